// Keys of a selection: the magnitude of an entry as an integer that orders like it. Shared by host and device.
#pragma once

#include <cstdint>

#include "adam_math.h"
#include "host_device.h"

namespace pecker_fast {

// key(x) = bits of float32(|x|). 0 is never salient; keys above kInfKey (INF_KEY of pecker_fast/ops/layout.py) are NaN.
constexpr std::uint32_t kInfKey = 0x7f800000u;

// Bits that the levels of a radix histogram resolve (RADIX_BITS), highest first, and the bits below each level.
constexpr int kRadixBits[3] = {11, 10, 10};
constexpr int kRadixShift[3] = {20, 10, 0};

PF_HD inline std::uint32_t radix_key(float x) { return float_bits(x) & 0x7fffffffu; }
PF_HD inline std::uint32_t radix_key(bf16 x) { return static_cast<std::uint32_t>(x.bits & 0x7fffu) << 16; }
PF_HD inline std::uint32_t radix_key(fp16 x) { return float_bits(widen(x)) & 0x7fffffffu; }

PF_HD inline float magnitude(float x) { return float_from_bits(radix_key(x)); }

// |score| / (|other| + damping): the value ranked for relative scores. Denominators below the smallest normal number
// count as that number.
constexpr float kSmallestNormal = 1.17549435e-38f;
PF_HD inline float quotient(float score, float other, float damping) {
  const float sum = magnitude(other) + damping;
  return magnitude(score) / (sum < kSmallestNormal ? kSmallestNormal : sum);
}

// Exact sums of magnitudes (magnitude_sums of pecker_fast/ops/schemas.py): kSumWindows (SUM_WINDOWS) windows of
// kSumExponents exponents, low parts first, then the high ones, then the number of finite entries.
constexpr int kSumWindows = 16;
constexpr int kSumExponents = 16;
constexpr int kSumShift = 27;
constexpr int kSumColumns = 2 * kSumWindows + 1;

// The window of a finite entry, and the integer that it adds there: less than 2 ** 39.
PF_HD inline std::uint32_t sum_window(std::uint32_t key) { return key >> kSumShift; }
PF_HD inline std::uint64_t sum_value(std::uint32_t key) {
  const std::uint32_t exponent = key >> 23;
  const std::uint64_t significand = exponent == 0 ? key : (key & 0x007fffffu) | 0x00800000u;
  return significand << ((exponent == 0 ? 1u : exponent) % kSumExponents);
}

// Parts of a window's sum: 32 bits, and what is above.
constexpr int kSumLowBits = 32;
inline void add_to_window(std::uint64_t sum, std::uint32_t window, std::int64_t* sums) {
  sums[window] += static_cast<std::int64_t>(sum & 0xffffffffu);
  sums[kSumWindows + window] += static_cast<std::int64_t>(sum >> kSumLowBits);
}

// The magnitude bits of an entry in its own width order like its key. narrow_key<P>(t) is the smallest such value whose
// key is at least t, so that 16-bit entries are compared 16 bits wide.
template <typename P>
PF_HD inline std::uint32_t narrow_key(std::uint32_t key);
template <>
PF_HD inline std::uint32_t narrow_key<float>(std::uint32_t key) {
  return key;
}
template <>
PF_HD inline std::uint32_t narrow_key<bf16>(std::uint32_t key) {
  return (key + 0xffffu) >> 16;
}
template <>
PF_HD inline std::uint32_t narrow_key<fp16>(std::uint32_t key) {
  std::uint32_t low = 0, high = 0x7c01u;
  while (low < high) {
    const std::uint32_t middle = (low + high) / 2;
    const fp16 candidate{static_cast<std::uint16_t>(middle)};
    if (radix_key(candidate) >= key) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace pecker_fast
