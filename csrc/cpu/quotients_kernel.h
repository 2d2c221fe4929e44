// Quotients and sums for one instruction set: PF_SIMD_LEVEL 0 (portable C++), 1 (AVX2) or 2 (AVX-512), in namespace
// PF_ISA. No include guard: see simd.h.
#include "cpu/typed_range.h"

namespace pecker_fast {
namespace PF_ISA {

void write_quotients(const QuotientRange& range, float* quotients) {
  const std::int64_t length = range.scores.length;
  const Vec damping = set(range.damping), smallest = set(kSmallestNormal);
  with_type(range.scores, [&](const auto* scores) {
    const auto* const others = static_cast<decltype(scores)>(range.others);
    constexpr std::int64_t kPage = 4096 / sizeof(*scores);
    std::int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
      if (i % kPage == 0) {
        // See for_blocks in select_kernel.h.
        prefetch_read(scores + i + kPage);
        prefetch_read(others + i + kPage);
      }
      // maximum returns its second argument if that is NaN.
      const Vec denominator = maximum(smallest, absolute(load_wide(others + i)) + damping);
      store(quotients + i, absolute(load_wide(scores + i)) / denominator);
    }
    for (; i < length; ++i) quotients[i] = quotient(widen(scores[i]), widen(others[i]), range.damping);
  });
}

// Sums of the lanes of many vectors, in double.
#if PF_SIMD_LEVEL == 1
struct LaneSums {
  __m256d low, high;
};
inline LaneSums no_sums() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
inline void add(Vec x, LaneSums* sums) {
  sums->low = _mm256_add_pd(sums->low, _mm256_cvtps_pd(_mm256_castps256_ps128(x.r)));
  sums->high = _mm256_add_pd(sums->high, _mm256_cvtps_pd(_mm256_extractf128_ps(x.r, 1)));
}
#elif PF_SIMD_LEVEL == 2
struct LaneSums {
  __m512d low, high;
};
inline LaneSums no_sums() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
inline void add(Vec x, LaneSums* sums) {
  sums->low = _mm512_add_pd(sums->low, _mm512_cvtps_pd(_mm512_castps512_ps256(x.r)));
  sums->high = _mm512_add_pd(sums->high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.r, 1)));
}
#else
struct LaneSums {
  double lanes[kLanes];
};
inline LaneSums no_sums() { return {}; }
inline void add(Vec x, LaneSums* sums) {
  for (int i = 0; i < kLanes; ++i) sums->lanes[i] += x.r[i];
}
#endif

inline double total(const LaneSums& sums) {
  double lanes[kLanes], result = 0.0;
  std::memcpy(lanes, &sums, sizeof(lanes));
  for (const double lane : lanes) result += lane;
  return result;
}

inline float largest_lane(Vec x) {
  float lanes[kLanes], result = 0.0f;
  store(lanes, x);
  for (const float lane : lanes) result = lane > result ? lane : result;
  return result;
}

// Entries that are summed up in double: within a window that is exact for so many of them, with 24 bits of the
// significands, 15 of the exponents and 10 of the count.
constexpr std::int64_t kSumBlock = 1024;

// Adds the magnitudes of a block, none of which is inf or NaN, and overwrites them.
inline void add_block(float* magnitudes, float largest, std::int64_t* sums) {
  // Few windows have entries. The largest remaining entry tells the next window.
  while (largest > 0.0f) {
    const std::uint32_t window = sum_window(float_bits(largest));
    const Vec bottom = set(float_from_bits(window << kSumShift));
    LaneSums even = no_sums(), odd = no_sums();
    Vec next = set(0.0f);
    const auto take = [&](float* from, LaneSums* lanes) {
      const Vec x = load(from), left = keep(less(x, bottom), x);
      next = maximum(next, left);
      store(from, left);
      add(x - left, lanes);
    };
    for (std::int64_t i = 0; i < kSumBlock; i += 2 * kLanes) {
      take(magnitudes + i, &even);
      take(magnitudes + i + kLanes, &odd);
    }
    // In the window's unit the sum is an integer.
    const double sum = std::ldexp(total(even) + total(odd), 150 - kSumExponents * static_cast<int>(window));
    add_to_window(static_cast<std::uint64_t>(sum), window, sums);
    largest = largest_lane(next);
  }
}

void add_magnitudes(const ScanRange& range, std::int64_t* sums) {
  with_type(range, [&](const auto* data) {
    float block[kSumBlock];
    const Vec infinity = set(HUGE_VALF);
    for (std::int64_t begin = 0; begin < range.length; begin += kSumBlock) {
      const std::int64_t count = range.length - begin < kSumBlock ? range.length - begin : kSumBlock;
      std::int64_t finite = 0, i = 0;
      Vec largest = set(0.0f);
      for (; i + kLanes <= count; i += kLanes) {
        const Vec x = absolute(load_wide(data + begin + i));
        const Mask is_finite = less(x, infinity);
        finite += count_bits(bits_of(is_finite));
        const Vec kept = keep(is_finite, x);
        largest = maximum(largest, kept);
        store(block + i, kept);
      }
      float top = largest_lane(largest);
      for (; i < count; ++i) {
        const float x = magnitude(widen(data[begin + i]));
        const bool is_finite = x < HUGE_VALF;
        finite += is_finite;
        block[i] = is_finite ? x : 0.0f;
        top = block[i] > top ? block[i] : top;
      }
      for (; i < kSumBlock; ++i) block[i] = 0.0f;
      sums[2 * kSumWindows] += finite;
      add_block(block, top, sums);
    }
  });
}

}  // namespace PF_ISA
}  // namespace pecker_fast
