// How kernels are started, and the accesses they share. Everything in csrc/cuda is free of torch headers: it compiles
// with nvcc alone, and with a C++ compiler and tests/emulation/cuda_emulator.h (PF_EMULATE_CUDA), which runs the
// kernels on the host so that they can be tested where there is no GPU.
//
// PF_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) starts a kernel and throws what the driver says
// against the launch. A kernel template with several arguments goes in parentheses: PF_LAUNCH((kernel<A, B>), ...).
// PF_DYNAMIC_SHARED(type, name) declares the block's dynamic shared memory; it is 16-byte aligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

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

}  // namespace pecker_fast

#if defined(PF_EMULATE_CUDA)
#define PF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulator::launch(grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); })
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

// `Bytes` (2, 4, 8, 16 or 32) in one or two accesses of at most 16 bytes; the address must be a multiple of
// min(Bytes, 16). The bits are moved, never interpreted.
template <int Bytes>
struct Bits;
template <>
struct Bits<2> {
  using type = unsigned short;
};
template <>
struct Bits<4> {
  using type = unsigned int;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};
struct alignas(16) TwoVectors {
  uint4 low, high;
};
template <>
struct Bits<32> {
  using type = TwoVectors;
};

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T data[N];
  __device__ __forceinline__ T& operator[](int i) { return data[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }
};

template <typename P>
__device__ __forceinline__ P load_vector(const void* address) {
  using B = typename Bits<sizeof(P)>::type;
#if defined(PF_EMULATE_CUDA)
  ::cuda_emulator::check_aligned(address, alignof(P));
#endif
  union {
    B bits;
    P pack;
  } value;
  value.bits = *static_cast<const B*>(address);
  return value.pack;
}

template <typename P>
__device__ __forceinline__ void store_vector(void* address, const P& pack) {
  using B = typename Bits<sizeof(P)>::type;
#if defined(PF_EMULATE_CUDA)
  ::cuda_emulator::check_aligned(address, alignof(P));
#endif
  union {
    P pack;
    B bits;
  } value;
  value.pack = pack;
  *static_cast<B*>(address) = value.bits;
}

}  // namespace pecker_fast

#endif
