// The selection kernels for one instruction set: PF_SIMD_LEVEL 0 (portable C++), 1 (AVX2) or 2 (AVX-512), in namespace
// PF_ISA. No include guard: see simd.h.
#include "cpu/simd_bits.h"
#include "cpu/select_blocks.h"
#include "cpu/typed_range.h"

namespace pecker_fast {
namespace PF_ISA {

inline std::uint32_t magnitude(float x) { return float_bits(x) & 0x7fffffffu; }
inline std::uint32_t magnitude(bf16 x) { return x.bits & 0x7fffu; }
inline std::uint32_t magnitude(fp16 x) { return x.bits & 0x7fffu; }

inline std::uint32_t key_of_magnitude(std::uint32_t m, float) { return m; }
inline std::uint32_t key_of_magnitude(std::uint32_t m, bf16) { return m << 16; }
inline std::uint32_t key_of_magnitude(std::uint32_t m, fp16) { return radix_key(fp16{static_cast<std::uint16_t>(m)}); }

template <typename Lane>
Lane largest_lane(const Lanes& lanes) {
  Lane values[sizeof(Lanes) / sizeof(Lane)], result = 0;
  std::memcpy(values, &lanes, sizeof(values));
  for (const Lane value : values) result = value > result ? value : result;
  return result;
}

template <typename Lane>
Lane smallest_lane(const Lanes& lanes) {
  Lane values[sizeof(Lanes) / sizeof(Lane)], result = static_cast<Lane>(-1);
  std::memcpy(values, &lanes, sizeof(values));
  for (const Lane value : values) result = value < result ? value : result;
  return result;
}

// How entries become keys in registers, and how a row's keys become numbers to compare them with. Exact keys in the
// entries' own width.
template <typename P>
struct ExactKeys {
  using Entry = P;
  using Lane = Lane16;
  using Row = Row16;
  using Open = Open16;
  Keys16 load(const P* p, Lanes* largest) const {
    const Keys16 keys = load_halves(p);
    track_largest(keys, largest);
    return keys;
  }
  std::int32_t number(std::uint32_t key) const { return static_cast<std::int32_t>(narrow_key<P>(key)); }
};

template <>
struct ExactKeys<float> {
  using Entry = float;
  using Lane = Lane32;
  using Row = Row32;
  using Open = Open32;
  Keys32 load(const float* p, Lanes* largest) const {
    const Keys32 keys = PF_ISA::load(p);
    track_largest(keys, largest);
    return keys;
  }
  std::int32_t number(std::uint32_t key) const { return static_cast<std::int32_t>(key); }
};

struct QuantizedKeys {
  using Entry = float;
  using Lane = Lane32;
  using Row = Row8;
  using Open = Open8;
  Quantization quantization;
  Keys16 load(const float* p, Lanes* largest) const {
    return load_quantized(p, quantization, largest);
  }
  std::int32_t number(std::uint32_t key) const {
    return (static_cast<std::int32_t>(key) - static_cast<std::int32_t>(quantization.origin)) >> quantization.shift;
  }
};

// Writes a block's bits; `streamed`: past the cache, which avoids reading lines that are written as a whole. A single
// row gains nothing from it.
inline void store_words(std::uint64_t bits, bool two_words, bool streamed, std::uint32_t* words) {
  if (!two_words) {
    words[0] = static_cast<std::uint32_t>(bits);
    return;
  }
#if PF_SIMD_LEVEL > 0
  if (streamed) {
    _mm_stream_si64(reinterpret_cast<long long*>(words), static_cast<long long>(bits));
  } else {
    std::memcpy(words, &bits, sizeof(bits));
  }
#else
  words[0] = static_cast<std::uint32_t>(bits);
  words[1] = static_cast<std::uint32_t>(bits >> 32);
#endif
}

// Makes streamed words visible to other threads before any later store.
inline void finish_stores() {
#if PF_SIMD_LEVEL > 0
  _mm_sfence();
#endif
}

// Calls take(number of the block, its entries, whether a second word belongs to it) for all blocks; the last one is
// filled up with zeros, which no row takes.
//
// Hardware prefetchers stop at the end of a page. One access to the next page well ahead lets them go on; more than one
// slows them down.
template <typename P, typename Take>
inline void for_blocks(const P* data, std::int64_t length, const Take& take) {
  const std::int64_t whole = length / kScanBlock, rest = length % kScanBlock;
  constexpr std::int64_t kPage = 4096 / sizeof(P), kBlocks = kPage / kScanBlock;
  for (std::int64_t b = 0; b < whole; ++b) {
    if (b % kBlocks == 0) prefetch_read(data + b * kScanBlock + kPage);
    take(b, data + b * kScanBlock, true);
  }
  if (rest != 0) {
    P last[kScanBlock] = {};
    std::memcpy(last, data + whole * kScanBlock, static_cast<std::size_t>(rest) * sizeof(P));
    take(whole, last, rest > kWordBits);
  }
}

inline int highest_bit(std::uint64_t x) {
#if PF_SIMD_LEVEL > 0
  return 63 - static_cast<int>(_lzcnt_u64(x));
#else
  int bit = 0;
  for (int half = 32; half > 0; half /= 2) {
    if (x >> half != 0) {
      x >>= half;
      bit += half;
    }
  }
  return bit;
#endif
}

// Whether there was no NaN; a NaN compares as the largest. kRows: the number of rows, 0 if it is `count`.
template <int kRows, typename Keys>
PF_NOINLINE bool scan_blocks(const Keys& reader, const typename Keys::Entry* data, std::int64_t length, ScanRow* rows,
                             int count, OpenEntries* entries) {
  using P = typename Keys::Entry;
  constexpr int kMost = kRows ? kRows : kScanRows;
  if (kRows) count = kRows;
  typename Keys::Row bounds[kMost];
  std::int64_t kept[kMost] = {}, listed = 0;
  for (int r = 0; r < count; ++r) {
    set_row(reader.number(rows[r].pivot), reader.number(rows[r].low), reader.number(rows[r].high), &bounds[r]);
  }
  std::uint32_t* const keys = entries->keys;
  std::uint16_t* const positions = entries->positions;
  const std::int64_t base = entries->base;
  Lanes largest = all_lanes(0);
  for_blocks(data, length, [&](std::int64_t block, const P* p, bool two_words) {
    const auto block_keys = reader.load(p, &largest);
    typename Keys::Open open;
    open_none(&open);
    for (int r = 0; r < count; ++r) {
      const std::uint64_t bits = at_least_and_open(block_keys, bounds[r], &open);
      store_words(bits, two_words, kRows != 1, rows[r].words + 2 * block);
      kept[r] += count_bits(bits);
    }
    // Most blocks have at most two open entries: the first and the last are written without a branch to mispredict, and
    // overwritten by the next block if there are fewer.
    std::uint64_t bits = open_bits(open);
    const std::int64_t first = base + kScanBlock * block;
    const auto list = [&](std::int64_t j, int i) {
      keys[j] = magnitude(p[i]);
      positions[j] = static_cast<std::uint16_t>(first + i);
    };
    const std::int64_t more = count_bits(bits);
    list(listed, lowest_bit(bits) & 63);
    list(listed + 1, highest_bit(bits) & 63);
    if (more > 2) {
      for (std::int64_t j = listed; bits != 0; bits &= bits - 1) list(j++, lowest_bit(bits));
    }
    listed += more;
  });
  if (kRows != 1) finish_stores();
  for (int r = 0; r < count; ++r) rows[r].kept = kept[r];
  if (!std::is_same_v<P, float>) {
    for (std::int64_t j = 0; j < listed; ++j) keys[j] = key_of_magnitude(keys[j], P{});
  }
  entries->count = listed;
  return largest_lane<typename Keys::Lane>(largest) <= narrow_key<P>(kInfKey);
}

template <int kRows, typename P>
PF_NOINLINE bool keep_blocks(const P* data, std::int64_t length, KeepRow* rows, int count) {
  constexpr int kMost = kRows ? kRows : kScanRows;
  if (kRows) count = kRows;
  const ExactKeys<P> reader;
  typename ExactKeys<P>::Row bounds[kMost];
  Lanes nearest[kMost];
  std::int64_t kept[kMost] = {};
  for (int r = 0; r < count; ++r) {
    const std::int32_t key = reader.number(rows[r].key);
    set_row(key, key, key, &bounds[r]);
    nearest[r] = all_lanes(-1);
  }
  Lanes largest = all_lanes(0);
  for_blocks(data, length, [&](std::int64_t block, const P* p, bool two_words) {
    const auto keys = reader.load(p, &largest);
    for (int r = 0; r < count; ++r) {
      const std::uint64_t bits = at_least(keys, bounds[r]);
      track_nearest(keys, bounds[r], &nearest[r]);
      store_words(bits, two_words, kRows != 1, rows[r].words + 2 * block);
      kept[r] += count_bits(bits);
    }
  });
  if (kRows != 1) finish_stores();
  for (int r = 0; r < count; ++r) {
    rows[r].kept = kept[r];
    rows[r].smallest = kInfKey;
    if (kept[r] != 0) {
      const std::uint32_t distance = smallest_lane<typename ExactKeys<P>::Lane>(nearest[r]);
      rows[r].smallest = key_of_magnitude(narrow_key<P>(rows[r].key) + distance, P{});
    }
  }
  return largest_lane<typename ExactKeys<P>::Lane>(largest) <= narrow_key<P>(kInfKey);
}

// Runs `blocks` on a range; if that meets a NaN, again on a copy with zeros in their place. Returns the number of NaN.
template <typename P, typename Blocks>
std::int64_t run_without_nan(const P* data, std::int64_t length, const Blocks& blocks) {
  if (blocks(data)) return 0;
  P clean[kScanPiece];
  std::int64_t nan = 0;
  const std::uint32_t infinity = narrow_key<P>(kInfKey);
  for (std::int64_t i = 0; i < length; ++i) {
    const bool is_nan = magnitude(data[i]) > infinity;
    clean[i] = is_nan ? P{} : data[i];
    nan += is_nan;
  }
  blocks(clean);
  return nan;
}

template <typename P, typename Keys>
std::int64_t scan(const P* data, std::int64_t length, const Keys& reader, ScanRow* rows, int count,
                  OpenEntries* open) {
  return run_without_nan(data, length, [&](const P* from) {
    return count == 1 ? scan_blocks<1>(reader, from, length, rows, 1, open)
                      : scan_blocks<0>(reader, from, length, rows, count, open);
  });
}

std::int64_t scan_range(const ScanRange& range, const Quantization* quantization, ScanRow* rows, int count,
                        OpenEntries* open) {
  if (range.type == ParamType::f32 && quantization != nullptr) {
    const QuantizedKeys reader{*quantization};
    return scan(static_cast<const float*>(range.data), range.length, reader, rows, count, open);
  }
  return with_type(range, [&](const auto* data) {
    using P = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    return scan(data, range.length, ExactKeys<P>(), rows, count, open);
  });
}

std::int64_t keep_range(const ScanRange& range, KeepRow* rows, int count) {
  return with_type(range, [&](const auto* data) {
    return run_without_nan(data, range.length, [&](const auto* from) {
      return count == 1 ? keep_blocks<1>(from, range.length, rows, 1)
                        : keep_blocks<0>(from, range.length, rows, count);
    });
  });
}

void read_keys(const ScanRange& range, std::uint32_t* keys) {
  std::int64_t i = 0;
#if PF_SIMD_LEVEL > 0
  if (range.type == ParamType::fp16) {
    const fp16* const data = static_cast<const fp16*>(range.data);
    for (; i + 8 <= range.length; i += 8) {
      const __m256i bits =
          _mm256_castps_si256(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i))));
      const __m256i key = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
      const __m256i nan = _mm256_cmpgt_epi32(key, _mm256_set1_epi32(static_cast<int>(kInfKey)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(keys + i), _mm256_andnot_si256(nan, key));
    }
  }
#endif
  with_type(range, [&](const auto* data) {
    for (; i < range.length; ++i) {
      const std::uint32_t key = radix_key(data[i]);
      keys[i] = key > kInfKey ? 0 : key;
    }
  });
}

template <bool kIndices>
std::int64_t collect(const std::uint32_t* keys, std::int64_t size, std::uint32_t low, std::uint32_t high,
                     std::uint32_t base, std::uint32_t* inside, std::uint32_t* indices) {
  std::int64_t i = 0, collected = 0;
#if PF_SIMD_LEVEL == 1
  const __m256i low_lanes = _mm256_set1_epi32(static_cast<int>(low));
  const __m256i high_lanes = _mm256_set1_epi32(static_cast<int>(high));
  for (; i + 8 <= size; i += 8) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    const __m256i out = _mm256_or_si256(_mm256_cmpgt_epi32(key, high_lanes), _mm256_cmpgt_epi32(low_lanes, key));
    const std::uint32_t bits = ~static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(out))) & 255u;
    const __m256i lanes = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompressTable.rows[bits])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(inside + collected), _mm256_permutevar8x32_epi32(key, lanes));
    if (kIndices) {
      const __m256i index = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(base + i)), lanes);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices + collected), index);
    }
    collected += _mm_popcnt_u32(bits);
  }
#elif PF_SIMD_LEVEL == 2
  const __m512i low_lanes = _mm512_set1_epi32(static_cast<int>(low));
  const __m512i high_lanes = _mm512_set1_epi32(static_cast<int>(high));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= size; i += 16) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 in = _mm512_mask_cmpge_epu32_mask(_mm512_cmple_epu32_mask(key, high_lanes), key, low_lanes);
    _mm512_storeu_si512(inside + collected, _mm512_maskz_compress_epi32(in, key));
    if (kIndices) {
      const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(base + i)), lanes);
      _mm512_storeu_si512(indices + collected, _mm512_maskz_compress_epi32(in, index));
    }
    collected += _mm_popcnt_u32(in);
  }
#endif
  for (; i < size; ++i) {
    inside[collected] = keys[i];
    if (kIndices) indices[collected] = static_cast<std::uint32_t>(base + i);
    collected += keys[i] >= low && keys[i] <= high;
  }
  return collected;
}

std::int64_t collect_keys(const std::uint32_t* keys, std::int64_t size, std::uint32_t low, std::uint32_t high,
                          std::uint32_t base, std::uint32_t* inside, std::uint32_t* indices) {
  return indices ? collect<true>(keys, size, low, high, base, inside, indices)
                 : collect<false>(keys, size, low, high, base, inside, nullptr);
}

std::int64_t count_above(const std::uint32_t* keys, std::int64_t size, std::uint32_t bound) {
  // Short loops, so that compilers can vectorise with 32-bit sums.
  constexpr std::int64_t kPart = 4096;
  std::int64_t above = 0;
  for (std::int64_t begin = 0; begin < size; begin += kPart) {
    const std::int64_t end = begin + kPart < size ? begin + kPart : size;
    std::uint32_t part = 0;
    for (std::int64_t i = begin; i < end; ++i) part += keys[i] > bound;
    above += part;
  }
  return above;
}

std::int64_t count_bits(const std::uint32_t* words, std::int64_t entries) {
  std::int64_t count = 0, w = 0;
  for (; (w + 1) * kWordBits <= entries; ++w) count += count_bits(words[w]);
  const std::int64_t rest = entries % kWordBits;
  if (rest != 0) count += count_bits(words[w] & ((std::uint32_t{1} << rest) - 1));
  return count;
}

}  // namespace PF_ISA
}  // namespace pecker_fast
