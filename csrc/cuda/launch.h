// How kernels are started, and the accesses they share. Everything in csrc/cuda is free of torch headers: it compiles
// with nvcc alone, and with a C++ compiler and tests/emulation/cuda_emulator.h (PF_EMULATE_CUDA), which runs the
// kernels on the host, so that they can be tested without a GPU.
//
// PF_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) starts a kernel and throws if the driver refuses
// the launch. A kernel template with several arguments goes in parentheses: PF_LAUNCH((kernel<A, B>), ...).
// PF_DYNAMIC_SHARED(type, name) declares the block's dynamic shared memory; it is 16-byte aligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(PF_EMULATE_CUDA)
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace pecker_fast {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(error));
  }
}

// Calls body(integral_constant) for the one of `kValues` that equals `value`: turns a run-time choice into a template
// argument.
template <typename T, T... kValues, typename Body>
void for_constant(T value, const Body& body) {
  static_cast<void>(((value == kValues ? (body(std::integral_constant<T, kValues>{}), true) : false) || ...));
}

}  // namespace pecker_fast

#if defined(PF_EMULATE_CUDA)
#define PF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulator::launch(#kernel, grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); })
#define PF_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::cuda_emulator::dynamic_shared())
#elif defined(__CUDACC__)
#define PF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)      \
  do {                                                                 \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::pecker_fast::check_cuda(cudaGetLastError(), #kernel);            \
  } while (0)
#define PF_DYNAMIC_SHARED(type, name)                             \
  extern __shared__ __align__(16) unsigned char pf_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(pf_dynamic_shared)
#endif

#if defined(PF_EMULATE_CUDA) || defined(__CUDACC__)

namespace pecker_fast {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// Sum of the values of all lower lanes; *total becomes the sum of all.
template <typename T>
__device__ __forceinline__ T warp_exclusive_sum(T value, T* total) {
  T sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const T below = __shfl_up_sync(kFullWarp, sum, offset);
    if (lane_id() >= offset) sum += below;
  }
  *total = __shfl_sync(kFullWarp, sum, 31);
  return sum - value;
}

// Loads and stores of device memory of 4, 8 or 16 bytes in one access, 32 in two; the address is a multiple of
// min(bytes, 16). In PTX, because the compiler splits copies of structs into scalar accesses. Volatile keeps the
// accesses in their order, so that all loads of a group are under way before the first result is used. The memory is
// not declared clobbered: no kernel reads an address that it has stored to. Entries are read once in a pass, past the
// first-level cache.
template <int kBytes>
__device__ __forceinline__ void load_bytes(const void* address, std::uint32_t* words) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16 || kBytes == 32);
#if defined(__CUDA_ARCH__)
  const std::size_t at = __cvta_generic_to_global(address);
  if constexpr (kBytes == 4) {
    asm volatile("ld.global.L1::no_allocate.b32 %0, [%1];" : "=r"(words[0]) : "l"(at));
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(at));
  } else {
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(at));
    if constexpr (kBytes == 32) load_bytes<16>(static_cast<const unsigned char*>(address) + 16, words + 4);
  }
#else
#if defined(PF_EMULATE_CUDA)
  ::cuda_emulator::check_aligned(address, kBytes < 16 ? kBytes : 16);
  ::cuda_emulator::check_read(address);
#endif
  std::memcpy(words, address, kBytes);
#endif
}

template <int kBytes>
__device__ __forceinline__ void store_bytes(void* address, const std::uint32_t* words) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16 || kBytes == 32);
#if defined(__CUDA_ARCH__)
  const std::size_t at = __cvta_generic_to_global(address);
  if constexpr (kBytes == 4) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(at), "r"(words[0]));
  } else if constexpr (kBytes == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(words[0]), "r"(words[1]));
  } else {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3]));
    if constexpr (kBytes == 32) store_bytes<16>(static_cast<unsigned char*>(address) + 16, words + 4);
  }
#else
#if defined(PF_EMULATE_CUDA)
  ::cuda_emulator::check_aligned(address, kBytes < 16 ? kBytes : 16);
#endif
  std::memcpy(address, words, kBytes);
#endif
}

}  // namespace pecker_fast

#endif
