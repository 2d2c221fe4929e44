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
    std::int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
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

// Adds kSumBlock magnitudes, none of which is inf or NaN. Within a window double is exact for so many of them: 24 bits
// of the significands, 15 of the exponents, 10 of the count.
constexpr std::int64_t kSumBlock = 1024;
inline void add_block(const float* magnitudes, std::int64_t* sums) {
  Vec largest = set(0.0f);
  for (std::int64_t i = 0; i < kSumBlock; i += kLanes) largest = maximum(largest, load(magnitudes + i));
  float top = largest_lane(largest);
  while (top > 0.0f) {
    const std::uint32_t window = sum_window(float_bits(top));
    const Vec bottom = set(float_from_bits(window << kSumShift));
    const float above = window + 1 == kSumWindows ? HUGE_VALF : float_from_bits((window + 1) << kSumShift);
    const Vec end = set(above);
    LaneSums lanes = no_sums();
    Vec next = set(0.0f);
    for (std::int64_t i = 0; i < kSumBlock; i += kLanes) {
      const Vec x = load(magnitudes + i), below_end = keep(less(x, end), x);
      const Vec below = keep(less(below_end, bottom), below_end);
      next = maximum(next, below);
      add(below_end - below, &lanes);
    }
    // In the window's unit the sum is an integer.
    const double sum = std::ldexp(total(lanes), 150 - kSumExponents * static_cast<int>(window));
    add_to_window(static_cast<std::uint64_t>(sum), window, sums);
    top = largest_lane(next);
  }
}

void add_magnitudes(const ScanRange& range, std::int64_t* sums) {
  with_type(range, [&](const auto* data) {
    float block[kSumBlock];
    for (std::int64_t begin = 0; begin < range.length; begin += kSumBlock) {
      const std::int64_t count = range.length - begin < kSumBlock ? range.length - begin : kSumBlock;
      std::int64_t finite = 0, i = 0;
      const Vec infinity = set(HUGE_VALF);
      for (; i + kLanes <= count; i += kLanes) {
        const Vec x = absolute(load_wide(data + begin + i));
        const Mask is_finite = less(x, infinity);
        finite += count_bits(bits_of(is_finite));
        store(block + i, keep(is_finite, x));
      }
      for (; i < count; ++i) {
        const float x = magnitude(widen(data[begin + i]));
        const bool is_finite = x < HUGE_VALF;
        finite += is_finite;
        block[i] = is_finite ? x : 0.0f;
      }
      for (; i < kSumBlock; ++i) block[i] = 0.0f;
      sums[2 * kSumWindows] += finite;
      add_block(block, sums);
    }
  });
}

}  // namespace PF_ISA
}  // namespace pecker_fast
