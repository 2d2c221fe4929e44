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
