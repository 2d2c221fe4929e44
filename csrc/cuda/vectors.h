// Groups of adjacent entries in registers, as they lie in memory: 16-bit entries in pairs. Nothing is converted before
// all of a thread's loads are under way.
#pragma once

#include "common/adam_math.h"
#include "launch.h"

#if defined(PF_EMULATE_CUDA) || defined(__CUDACC__)

namespace pecker_fast {

// Bits of one entry.
template <int kBytes>
struct EntryBits;
template <>
struct EntryBits<2> {
  using type = std::uint16_t;
};
template <>
struct EntryBits<4> {
  using type = std::uint32_t;
};
template <>
struct EntryBits<8> {
  using type = std::uint64_t;
};

template <typename P, int N>
struct Vector {
  using Bits = typename EntryBits<sizeof(P)>::type;
  static constexpr int kBytes = N * static_cast<int>(sizeof(P));
  static_assert(kBytes % 4 == 0);

  std::uint32_t words[kBytes / 4];

  __device__ __forceinline__ Bits bits(int i) const {
    if constexpr (sizeof(P) == 8) {
      return static_cast<std::uint64_t>(words[2 * i + 1]) << 32 | words[2 * i];
    } else if constexpr (sizeof(P) == 4) {
      return words[i];
    } else {
      return static_cast<Bits>(words[i / 2] >> (i % 2 * 16));
    }
  }

  __device__ __forceinline__ void set_bits(int i, Bits bits) {
    if constexpr (sizeof(P) == 8) {
      words[2 * i] = static_cast<std::uint32_t>(bits);
      words[2 * i + 1] = static_cast<std::uint32_t>(bits >> 32);
    } else if constexpr (sizeof(P) == 4) {
      words[i] = bits;
    } else {
      const int shift = i % 2 * 16;
      words[i / 2] = (words[i / 2] & ~(0xffffu << shift)) | std::uint32_t{bits} << shift;
    }
  }

  __device__ __forceinline__ P entry(int i) const {
    const Bits own = bits(i);
    P value;
    std::memcpy(&value, &own, sizeof(value));
    return value;
  }

  __device__ __forceinline__ void set_entry(int i, P value) {
    Bits own;
    std::memcpy(&own, &value, sizeof(own));
    set_bits(i, own);
  }

  __device__ __forceinline__ void load(const P* address) { load_bytes<kBytes>(address, words); }
  __device__ __forceinline__ void store(P* address) const { store_bytes<kBytes>(address, words); }

  // Only the entries whose bit of `chosen` is set; the others are 0 after a load.
  __device__ __forceinline__ void load_some(const P* address, unsigned chosen) {
    const auto* const from = reinterpret_cast<const Bits*>(address);
#pragma unroll
    for (std::uint32_t& word : words) word = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
#if defined(PF_EMULATE_CUDA)
      if (chosen >> i & 1) ::cuda_emulator::check_read(from + i);
#endif
      if (chosen >> i & 1) set_bits(i, from[i]);
    }
  }
  __device__ __forceinline__ void store_some(P* address, unsigned chosen) const {
    auto* const to = reinterpret_cast<Bits*>(address);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (chosen >> i & 1) to[i] = bits(i);
    }
  }
};

// Entries 2 i and 2 i + 1 of a vector become values rounded to nearest.
template <typename P, int N>
__device__ __forceinline__ void narrow_pair(float low, float high, Vector<P, N>& out, int i) {
  static_assert(sizeof(P) == 2);
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<P, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out.words[i]) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out.words[i]) : "f"(high), "f"(low));
  }
#else
  P entry;
  narrow(low, &entry);
  out.set_entry(2 * i, entry);
  narrow(high, &entry);
  out.set_entry(2 * i + 1, entry);
#endif
}

// Takes the entries of `other` whose bit of `chosen` is set.
template <typename P, int N>
__device__ __forceinline__ void merge(Vector<P, N>& vector, const Vector<P, N>& other, unsigned chosen) {
  if constexpr (sizeof(P) == 2) {
#pragma unroll
    for (int w = 0; w < N / 2; ++w) {
      const unsigned pair = chosen >> 2 * w;
      const std::uint32_t mask = ((pair & 1) != 0 ? 0xffffu : 0u) | ((pair & 2) != 0 ? 0xffff0000u : 0u);
      vector.words[w] = (other.words[w] & mask) | (vector.words[w] & ~mask);
    }
  } else {
    constexpr int kEach = static_cast<int>(sizeof(P)) / 4;
#pragma unroll
    for (int w = 0; w < N * kEach; ++w) {
      if (chosen >> w / kEach & 1) vector.words[w] = other.words[w];
    }
  }
}

}  // namespace pecker_fast

#endif
