#include "cpu/select.h"

#include "cpu/isa.h"

namespace pecker_fast {

#define PF_DECLARE(isa)                                                                                             \
  namespace isa {                                                                                                   \
  std::int64_t scan_range(const ScanRange&, const Quantization*, ScanRow*, int, OpenEntries*);                       \
  std::int64_t keep_range(const ScanRange&, KeepRow*, int);                                                         \
  void read_keys(const ScanRange&, std::uint32_t*);                                                                 \
  std::int64_t collect_keys(const std::uint32_t*, std::int64_t, std::uint32_t, std::uint32_t, std::uint32_t,        \
                            std::uint32_t*, std::uint32_t*);                                                        \
  std::int64_t count_above(const std::uint32_t*, std::int64_t, std::uint32_t);                                      \
  std::int64_t count_bits(const std::uint32_t*, std::int64_t);                                                      \
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

std::int64_t scan_range(const ScanRange& range, const Quantization* quantization, ScanRow* rows, int count,
                        OpenEntries* open) {
  PF_CALL(scan_range, range, quantization, rows, count, open)
}

std::int64_t keep_range(const ScanRange& range, KeepRow* rows, int count) { PF_CALL(keep_range, range, rows, count) }

void read_keys(const ScanRange& range, std::uint32_t* keys) { PF_CALL(read_keys, range, keys) }

std::int64_t collect_keys(const std::uint32_t* keys, std::int64_t size, std::uint32_t low, std::uint32_t high,
                          std::uint32_t base, std::uint32_t* inside, std::uint32_t* indices) {
  PF_CALL(collect_keys, keys, size, low, high, base, inside, indices)
}

std::int64_t count_above(const std::uint32_t* keys, std::int64_t size, std::uint32_t bound) {
  PF_CALL(count_above, keys, size, bound)
}

std::int64_t count_bits(const std::uint32_t* words, std::int64_t entries) { PF_CALL(count_bits, words, entries) }

#undef PF_CALL

namespace {

template <typename P>
void histogram(const P* data, std::int64_t length, std::uint32_t prefix, int level, std::int64_t* bins) {
  const std::uint32_t size = std::uint32_t{1} << kRadixBits[level], digit_mask = size - 1;
  const int shift = kRadixShift[level], prefix_shift = shift + kRadixBits[level];
  // One more bin takes the entries that do not count.
  const auto bin_of = [&](P x) {
    const std::uint32_t key = radix_key(x);
    const bool counts = key - 1 < kInfKey && (level == 0 || key >> prefix_shift == prefix);
    return counts ? (key >> shift & digit_mask) : size;
  };
  constexpr std::int64_t kShort = 2048;
  if (length < kShort) {
    for (std::int64_t i = 0; i < length; ++i) {
      const std::uint32_t bin = bin_of(data[i]);
      if (bin != size) ++bins[bin];
    }
    return;
  }
  // Four tables in turn: equal neighbours would wait for each other's increment.
  constexpr int kTables = 4;
  std::uint32_t tables[kTables][(1 << kRadixBits[0]) + 1];
  for (auto& table : tables) {
    for (std::uint32_t b = 0; b <= size; ++b) table[b] = 0;
  }
  for (std::int64_t i = 0; i < length; ++i) ++tables[i % kTables][bin_of(data[i])];
  for (std::uint32_t b = 0; b < size; ++b) {
    for (const auto& table : tables) bins[b] += table[b];
  }
}

}  // namespace

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
