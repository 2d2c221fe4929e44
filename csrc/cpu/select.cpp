#include "cpu/select.h"

#include "cpu/isa.h"

namespace pecker_fast {

#define PF_DECLARE(isa)                                                                                        \
  namespace isa {                                                                                              \
  ScanCounts scan_range(const ScanRange&, std::uint32_t, std::uint32_t, std::uint32_t*, Pending*);             \
  void list_pending(const ScanRange&, const Pending&, std::int64_t, std::uint32_t*, std::uint16_t*);           \
  std::uint32_t smallest_kept(const ScanRange&, const std::uint32_t*);                                         \
  std::int64_t count_bits(const std::uint32_t*, std::int64_t);                                                 \
  }
PF_DECLARE(scalar)
#if PF_X86
PF_DECLARE(avx2)
PF_DECLARE(avx512)
#define PF_CALL(function, ...)                                                     \
  switch (active_isa()) {                                                          \
    case Isa::avx512:                                                              \
      return avx512::function(__VA_ARGS__);                                        \
    case Isa::avx2:                                                                \
      return avx2::function(__VA_ARGS__);                                          \
    default:                                                                       \
      return scalar::function(__VA_ARGS__);                                        \
  }
#else
#define PF_CALL(function, ...) return scalar::function(__VA_ARGS__);
#endif
#undef PF_DECLARE

ScanCounts scan_range(const ScanRange& range, std::uint32_t high, std::uint32_t low, std::uint32_t* words,
                      Pending* pending) {
  PF_CALL(scan_range, range, high, low, words, pending)
}

void list_pending(const ScanRange& range, const Pending& pending, std::int64_t base, std::uint32_t* keys,
                  std::uint16_t* positions) {
  PF_CALL(list_pending, range, pending, base, keys, positions)
}

std::uint32_t smallest_kept(const ScanRange& range, const std::uint32_t* words) {
  PF_CALL(smallest_kept, range, words)
}

std::int64_t count_bits(const std::uint32_t* words, std::int64_t entries) { PF_CALL(count_bits, words, entries) }

#undef PF_CALL

namespace {

// Four tables in turn: equal neighbours would wait for each other's increment.
template <typename P>
void histogram(const P* data, std::int64_t length, std::uint32_t prefix, int level, std::int64_t* bins) {
  constexpr int kTables = 4;
  const std::uint32_t size = std::uint32_t{1} << kRadixBits[level], digit_mask = size - 1;
  const int shift = kRadixShift[level], prefix_shift = shift + kRadixBits[level];
  // One more bin takes the entries that do not count.
  std::uint32_t tables[kTables][(1 << kRadixBits[0]) + 1];
  for (auto& table : tables) {
    for (std::uint32_t b = 0; b <= size; ++b) table[b] = 0;
  }
  for (std::int64_t i = 0; i < length; ++i) {
    const std::uint32_t key = radix_key(data[i]);
    const bool counts = key - 1 < kInfKey && (level == 0 || key >> prefix_shift == prefix);
    ++tables[i % kTables][counts ? (key >> shift & digit_mask) : size];
  }
  for (std::uint32_t b = 0; b < size; ++b) {
    for (const auto& table : tables) bins[b] += table[b];
  }
}

}  // namespace

std::uint32_t key_at(const void* data, ParamType type, std::int64_t i) {
  switch (type) {
    case ParamType::bf16:
      return radix_key(static_cast<const bf16*>(data)[i]);
    case ParamType::fp16:
      return radix_key(static_cast<const fp16*>(data)[i]);
    default:
      return radix_key(static_cast<const float*>(data)[i]);
  }
}

void histogram_range(const ScanRange& range, std::uint32_t prefix, int level, std::int64_t* bins) {
  switch (range.type) {
    case ParamType::bf16:
      return histogram(static_cast<const bf16*>(range.data), range.length, prefix, level, bins);
    case ParamType::fp16:
      return histogram(static_cast<const fp16*>(range.data), range.length, prefix, level, bins);
    default:
      return histogram(static_cast<const float*>(range.data), range.length, prefix, level, bins);
  }
}

}  // namespace pecker_fast
