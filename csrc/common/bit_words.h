// Mask words: bit i of word w of a tensor is its entry 32 w + i.
#pragma once

#include <cstdint>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace pecker_fast {

// This file and radix_key.h own the sizes that all C++ kernels share; pecker_fast/ops/layout.py owns Python's, and a
// test compares the two.
constexpr int kWordBits = 32;

// Entries between two recorded offsets into packed state (PACK_BLOCK).
constexpr std::int64_t kPackBlock = 16384;

inline std::int64_t word_count(std::int64_t entries) { return (entries + kWordBits - 1) / kWordBits; }
inline std::int64_t block_count(std::int64_t entries) { return (entries + kPackBlock - 1) / kPackBlock; }

// Index of the lowest set bit; x is not 0.
inline int lowest_set_bit(std::uint32_t x) {
#if defined(_MSC_VER) && !defined(__clang__)
  unsigned long index;
  _BitScanForward(&index, x);
  return static_cast<int>(index);
#else
  return __builtin_ctz(x);
#endif
}

// Prefetches the cache line of an address that will be read soon.
inline void prefetch_read(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#else
  static_cast<void>(address);
#endif
}

}  // namespace pecker_fast
