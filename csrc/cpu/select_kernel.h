// The scan for one instruction set: PF_SIMD_LEVEL 0 (portable C++), 1 (AVX2) or 2 (AVX-512), in namespace PF_ISA. No
// include guard: see simd.h.
namespace pecker_fast {
namespace PF_ISA {

inline int count_word_bits(std::uint32_t x) {
#if PF_SIMD_LEVEL > 0
  return _mm_popcnt_u32(x);
#else
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  return static_cast<int>(((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
#endif
}

// Compares 32 entries with thresholds in their own width. `nan` says whether any is NaN; it is exact only in being
// non-zero or not.
struct WordCompare {
  std::uint32_t high, low, nan;
};

inline std::uint32_t magnitude(const float* p, std::int64_t i) { return float_bits(p[i]) & 0x7fffffffu; }
inline std::uint32_t magnitude(const bf16* p, std::int64_t i) { return p[i].bits & 0x7fffu; }
inline std::uint32_t magnitude(const fp16* p, std::int64_t i) { return p[i].bits & 0x7fffu; }

template <typename P>
class Comparer {
 public:
  Comparer(std::uint32_t high, std::uint32_t low)
      : high_(narrow_key<P>(high)), low_(narrow_key<P>(low)), infinity_(narrow_key<P>(kInfKey)) {
#if PF_SIMD_LEVEL == 1
    if (sizeof(P) == 4) {
      high_vec_ = _mm256_set1_epi32(static_cast<int>(high_ - 1));
      low_vec_ = _mm256_set1_epi32(static_cast<int>(low_ - 1));
      infinity_vec_ = _mm256_set1_epi32(static_cast<int>(infinity_));
    } else {
      high_vec_ = _mm256_set1_epi16(static_cast<short>(high_ - 1));
      low_vec_ = _mm256_set1_epi16(static_cast<short>(low_ - 1));
      infinity_vec_ = _mm256_set1_epi16(static_cast<short>(infinity_));
    }
#elif PF_SIMD_LEVEL == 2
    if (sizeof(P) == 4) {
      high_vec_ = _mm512_set1_epi32(static_cast<int>(high_));
      low_vec_ = _mm512_set1_epi32(static_cast<int>(low_));
      infinity_vec_ = _mm512_set1_epi32(static_cast<int>(infinity_));
    } else {
      high_vec_ = _mm512_set1_epi16(static_cast<short>(high_));
      low_vec_ = _mm512_set1_epi16(static_cast<short>(low_));
      infinity_vec_ = _mm512_set1_epi16(static_cast<short>(infinity_));
    }
#endif
  }

  // 32 entries from p on; NaN compare as larger than everything.
  WordCompare operator()(const P* p) const {
#if PF_SIMD_LEVEL == 1
    if constexpr (sizeof(P) == 4) {
      const __m256i mask = _mm256_set1_epi32(0x7fffffff);
      __m256i key[4];
      for (int j = 0; j < 4; ++j) {
        key[j] = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * j)), mask);
      }
      const __m256i larger = _mm256_max_epi32(_mm256_max_epi32(key[0], key[1]), _mm256_max_epi32(key[2], key[3]));
      const __m256i nan = _mm256_cmpgt_epi32(larger, infinity_vec_);
      return {above32(key, high_vec_), above32(key, low_vec_), static_cast<std::uint32_t>(_mm256_movemask_epi8(nan))};
    } else {
      const __m256i mask = _mm256_set1_epi16(0x7fff);
      const __m256i* const from = reinterpret_cast<const __m256i*>(p);
      const __m256i a = _mm256_and_si256(_mm256_loadu_si256(from), mask);
      const __m256i b = _mm256_and_si256(_mm256_loadu_si256(from + 1), mask);
      const __m256i nan = _mm256_cmpgt_epi16(_mm256_max_epi16(a, b), infinity_vec_);
      return {above16(a, b, high_vec_), above16(a, b, low_vec_),
              static_cast<std::uint32_t>(_mm256_movemask_epi8(nan))};
    }
#elif PF_SIMD_LEVEL == 2
    if constexpr (sizeof(P) == 4) {
      const __m512i mask = _mm512_set1_epi32(0x7fffffff);
      const __m512i a = _mm512_and_si512(_mm512_loadu_si512(p), mask);
      const __m512i b = _mm512_and_si512(_mm512_loadu_si512(p + 16), mask);
      return {join(_mm512_cmpge_epi32_mask(a, high_vec_), _mm512_cmpge_epi32_mask(b, high_vec_)),
              join(_mm512_cmpge_epi32_mask(a, low_vec_), _mm512_cmpge_epi32_mask(b, low_vec_)),
              static_cast<std::uint32_t>(_mm512_cmpgt_epi32_mask(_mm512_max_epi32(a, b), infinity_vec_))};
    } else {
      const __m512i key = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff));
      return {static_cast<std::uint32_t>(_mm512_cmpge_epi16_mask(key, high_vec_)),
              static_cast<std::uint32_t>(_mm512_cmpge_epi16_mask(key, low_vec_)),
              static_cast<std::uint32_t>(_mm512_cmpgt_epi16_mask(key, infinity_vec_))};
    }
#else
    return partial(p, 32);
#endif
  }

  // The first n entries from p on.
  WordCompare partial(const P* p, std::int64_t n) const {
    WordCompare found{0, 0, 0};
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint32_t key = magnitude(p, i);
      found.high |= static_cast<std::uint32_t>(key >= high_) << i;
      found.low |= static_cast<std::uint32_t>(key >= low_) << i;
      found.nan |= static_cast<std::uint32_t>(key > infinity_) << i;
    }
    return found;
  }

 private:
  std::uint32_t high_, low_, infinity_;
#if PF_SIMD_LEVEL == 1
  __m256i high_vec_, low_vec_, infinity_vec_;

  // Bit i where entry i of 32 is above the limit. The packs interleave 128-bit halves; one permutation mends all.
  static std::uint32_t above32(const __m256i* key, __m256i limit) {
    const __m256i first = _mm256_packs_epi32(_mm256_cmpgt_epi32(key[0], limit), _mm256_cmpgt_epi32(key[1], limit));
    const __m256i second = _mm256_packs_epi32(_mm256_cmpgt_epi32(key[2], limit), _mm256_cmpgt_epi32(key[3], limit));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i octets = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order);
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(octets));
  }
  static std::uint32_t above16(__m256i a, __m256i b, __m256i limit) {
    const __m256i packed = _mm256_packs_epi16(_mm256_cmpgt_epi16(a, limit), _mm256_cmpgt_epi16(b, limit));
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(packed, 0xd8)));
  }
#elif PF_SIMD_LEVEL == 2
  __m512i high_vec_, low_vec_, infinity_vec_;

  static std::uint32_t join(__mmask16 a, __mmask16 b) {
    return static_cast<std::uint32_t>(a) | static_cast<std::uint32_t>(b) << 16;
  }
#endif
};

template <typename P>
ScanCounts scan(const P* data, std::int64_t length, std::uint32_t high, std::uint32_t low, std::uint32_t* words,
                Pending* pending) {
  const Comparer<P> compare(high, low);
  ScanCounts counts;
  std::uint32_t any_nan = 0;
  std::int64_t listed = 0;
  const std::int64_t whole = length / 32, all = (length + 31) / 32;
  const auto take = [&](std::int64_t w, WordCompare found) {
    words[w] = found.high;
    counts.kept += count_word_bits(found.high);
    any_nan |= found.nan;
    // A word without pending entries is overwritten by the next one: no branch to mispredict.
    const std::uint32_t between = found.low & ~found.high;
    pending->word[listed] = static_cast<std::uint16_t>(w);
    pending->bits[listed] = between;
    listed += between != 0;
  };
  for (std::int64_t w = 0; w < whole; ++w) take(w, compare(data + 32 * w));
  if (whole < all) take(whole, compare.partial(data + 32 * whole, length - 32 * whole));
  if (any_nan != 0) {
    // Rare, so plain code: NaN compared as the largest, take them out again.
    const std::uint32_t infinity = narrow_key<P>(kInfKey);
    for (std::int64_t i = 0; i < length; ++i) {
      if (magnitude(data, i) <= infinity) continue;
      ++counts.nan;
      const std::uint32_t bit = std::uint32_t{1} << (i & 31);
      counts.kept -= (words[i >> 5] & bit) != 0;
      words[i >> 5] &= ~bit;
    }
  }
  pending->size = listed;
  for (std::int64_t j = 0; j < listed; ++j) counts.pending += count_word_bits(pending->bits[j]);
  return counts;
}

ScanCounts scan_range(const ScanRange& range, std::uint32_t high, std::uint32_t low, std::uint32_t* words,
                      Pending* pending) {
  switch (range.type) {
    case ParamType::bf16:
      return scan(static_cast<const bf16*>(range.data), range.length, high, low, words, pending);
    case ParamType::fp16:
      return scan(static_cast<const fp16*>(range.data), range.length, high, low, words, pending);
    default:
      return scan(static_cast<const float*>(range.data), range.length, high, low, words, pending);
  }
}

template <typename P>
void list_entries(const P* data, const Pending& pending, std::int64_t base, std::uint32_t* keys,
                  std::uint16_t* positions) {
  for (std::int64_t j = 0; j < pending.size; ++j) {
    const std::int64_t first = 32 * std::int64_t{pending.word[j]};
    for (std::uint32_t bits = pending.bits[j]; bits != 0; bits &= bits - 1) {
      const std::int64_t i = first + lowest_set_bit(bits);
      *keys++ = radix_key(data[i]);
      *positions++ = static_cast<std::uint16_t>(base + i);
    }
  }
}

void list_pending(const ScanRange& range, const Pending& pending, std::int64_t base, std::uint32_t* keys,
                  std::uint16_t* positions) {
  switch (range.type) {
    case ParamType::bf16:
      return list_entries(static_cast<const bf16*>(range.data), pending, base, keys, positions);
    case ParamType::fp16:
      return list_entries(static_cast<const fp16*>(range.data), pending, base, keys, positions);
    default:
      return list_entries(static_cast<const float*>(range.data), pending, base, keys, positions);
  }
}

// Smallest key of the entries whose bit is set, in the entries' own width. Eight lanes at a time, which compilers turn
// into vectors.
template <typename P>
std::uint32_t smallest(const P* data, std::int64_t length, const std::uint32_t* words) {
  constexpr int kWide = 16;
  std::uint32_t found[kWide];
  for (std::uint32_t& lane : found) lane = kInfKey;
  std::int64_t i = 0;
  for (; i + 32 <= length; i += 32) {
    const std::uint32_t word = words[i >> 5];
    if (word == 0) continue;
    for (int half = 0; half < 32; half += kWide) {
      for (int lane = 0; lane < kWide; ++lane) {
        const std::uint32_t unset = (word >> (half + lane) & 1u) - 1u;
        const std::uint32_t key = magnitude(data, i + half + lane) | (unset & 0x7fffffffu);
        found[lane] = key < found[lane] ? key : found[lane];
      }
    }
  }
  for (; i < length; ++i) {
    const std::uint32_t key = words[i >> 5] >> (i & 31) & 1u ? magnitude(data, i) : kInfKey;
    found[0] = key < found[0] ? key : found[0];
  }
  for (const std::uint32_t lane : found) found[0] = lane < found[0] ? lane : found[0];
  return found[0];
}

std::uint32_t smallest_kept(const ScanRange& range, const std::uint32_t* words) {
  switch (range.type) {
    case ParamType::bf16: {
      const std::uint32_t found = smallest(static_cast<const bf16*>(range.data), range.length, words);
      return found == kInfKey ? kInfKey : radix_key(bf16{static_cast<std::uint16_t>(found)});
    }
    case ParamType::fp16: {
      const std::uint32_t found = smallest(static_cast<const fp16*>(range.data), range.length, words);
      return found == kInfKey ? kInfKey : radix_key(fp16{static_cast<std::uint16_t>(found)});
    }
    default:
      return smallest(static_cast<const float*>(range.data), range.length, words);
  }
}

std::int64_t count_bits(const std::uint32_t* words, std::int64_t entries) {
  std::int64_t count = 0, w = 0;
  for (; (w + 1) * 32 <= entries; ++w) count += count_word_bits(words[w]);
  if (entries % 32 != 0) count += count_word_bits(words[w] & ((std::uint32_t{1} << (entries % 32)) - 1));
  return count;
}

}  // namespace PF_ISA
}  // namespace pecker_fast
