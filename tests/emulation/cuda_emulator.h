// Runs CUDA kernels on the host, for tests on machines without a GPU: compile a .cu file as C++ with -DPF_EMULATE_CUDA.
//
// Blocks run one after the other, the threads of a block as fibers that switch only at barriers and warp collectives.
// The order in which runnable threads (and blocks) go on is a setting: a missing barrier shows as a different result in
// another order. A barrier or collective that not all expected threads reach, and a misaligned vector access, are
// errors that `launch` throws. Not emulated: clusters, cooperative grids, waiting on another block, textures, fp16
// arithmetic.
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define PF_EMULATED_VECTOR(name, type, align2, align4)                                          \
  struct alignas(align2) name##2 { type x, y; };                                                \
  struct alignas(align4) name##4 { type x, y, z, w; };                                          \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                              \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
PF_EMULATED_VECTOR(uint, unsigned, 8, 16)
PF_EMULATED_VECTOR(int, int, 8, 16)
PF_EMULATED_VECTOR(float, float, 8, 16)
PF_EMULATED_VECTOR(double, double, 16, 16)
PF_EMULATED_VECTOR(longlong, long long, 16, 16)
PF_EMULATED_VECTOR(ulonglong, unsigned long long, 16, 16)
PF_EMULATED_VECTOR(ushort, unsigned short, 4, 8)
#undef PF_EMULATED_VECTOR

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- The part of the runtime that launchers use. Streams run at once.
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorNotReady = 600;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 227 * 1024, cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int, std::size_t) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t = nullptr);
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

namespace cuda_emulator {

enum class Order { forward, reverse, shuffled };
inline Order order = Order::forward;

// Threads of one warp that meet in a collective under one mask. Two buffers: a thread that is already at the next
// collective must not overwrite what a slower one has still to read.
struct Meeting {
  unsigned mask = 0, arrived = 0, generation = 0;
  std::uint64_t values[2][32] = {};
};

// setcontext makes a system call, so it only enters a fiber; _setjmp and _longjmp switch afterwards.
struct Thread {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool started = false, exited = false;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<std::vector<Meeting>> meetings;
  jmp_buf scheduler_place;
  const std::function<void()>* body = nullptr;
  unsigned size = 0, current = 0, live = 0, at_barrier = 0, barrier_generation = 0;
  bool progress = false;
  std::string error;
  std::vector<std::uint64_t> shared;
};

inline Block& block() {
  static thread_local Block instance;
  return instance;
}

inline void* dynamic_shared() { return block().shared.data(); }

inline void set_thread(unsigned t) {
  block().current = t;
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

inline void yield() {
  Block& b = block();
  if (_setjmp(b.threads[b.current].place) == 0) _longjmp(b.scheduler_place, 1);
}

inline void resume(Block& b, Thread& thread) {
  if (_setjmp(b.scheduler_place) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.context);
}

inline void fail(const std::string& what) {
  if (block().error.empty()) {
    block().error =
        what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(block().current) + ")";
  }
}

inline void check_aligned(const void* p, std::size_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignment != 0) {
    fail("address not a multiple of " + std::to_string(alignment));
    // There is no way to unwind the fiber of a kernel; it stays where it is and launch throws.
    for (;;) yield();
  }
}

// Memory that no kernel may read by the accesses of csrc/cuda/launch.h and vectors.h.
inline std::vector<std::pair<const char*, const char*>> unreadable;

inline void check_read(const void* p) {
  for (const auto& [begin, end] : unreadable) {
    if (p < begin || p >= end) continue;
    fail("read of memory that this step does not need");
    for (;;) yield();
  }
}

inline void finish_barrier(Block& b) {
  if (b.live > 0 && b.at_barrier == b.live) {
    b.at_barrier = 0;
    ++b.barrier_generation;
    b.progress = true;
  }
}

inline void barrier() {
  Block& b = block();
  const unsigned generation = b.barrier_generation;
  ++b.at_barrier;
  b.progress = true;
  finish_barrier(b);
  while (b.barrier_generation == generation) yield();
}

// Every thread of `mask` hands in a value; returns those of all lanes.
inline const std::uint64_t* exchange(unsigned mask, std::uint64_t value) {
  Block& b = block();
  const unsigned lane = b.current % 32;
  std::vector<Meeting>& warp = b.meetings[b.current / 32];
  const unsigned warp_first = b.current / 32 * 32;
  if (b.size - warp_first < 32) mask &= (1u << (b.size - warp_first)) - 1;
  if (!(mask >> lane & 1)) fail("a thread that is not in its collective's mask");
  std::size_t i = 0;
  while (i < warp.size() && warp[i].mask != mask) ++i;
  if (i == warp.size()) {
    warp.emplace_back();
    warp[i].mask = mask;
  }
  const unsigned generation = warp[i].generation;
  warp[i].values[generation & 1][lane] = value;
  warp[i].arrived |= 1u << lane;
  b.progress = true;
  if (warp[i].arrived == mask) {
    warp[i].arrived = 0;
    ++warp[i].generation;
  }
  while (warp[i].generation == generation) yield();
  return warp[i].values[generation & 1];
}

template <typename T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void fiber_main() {
  Block& b = block();
  (*b.body)();
  b.threads[b.current].exited = true;
  --b.live;
  b.progress = true;
  finish_barrier(b);
  _longjmp(b.scheduler_place, 1);
}

inline void run_block(Block& b, std::vector<unsigned>& sequence) {
  constexpr std::size_t kStack = 64 * 1024;
  if (b.threads.size() < b.size) b.threads.resize(b.size);
  b.meetings.assign((b.size + 31) / 32, {});
  for (auto& warp : b.meetings) warp.reserve(64);
  b.live = b.size;
  b.at_barrier = 0;
  b.error.clear();
  std::fill(b.shared.begin(), b.shared.end(), 0xa5a5a5a5a5a5a5a5ull);
  for (unsigned t = 0; t < b.size; ++t) {
    Thread& thread = b.threads[t];
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    thread.started = thread.exited = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fiber_main, 0);
  }
  while (b.live > 0) {
    b.progress = false;
    for (unsigned t : sequence) {
      if (b.threads[t].exited) continue;
      set_thread(t);
      resume(b, b.threads[t]);
    }
    if (!b.error.empty()) throw std::runtime_error("emulated kernel: " + b.error);
    if (!b.progress) {
      throw std::runtime_error("emulated kernel: threads wait for ever at a barrier or collective in block " +
                               std::to_string(blockIdx.x));
    }
  }
  if (!b.error.empty()) throw std::runtime_error("emulated kernel: " + b.error);
}

inline std::vector<unsigned> make_sequence(unsigned n) {
  std::vector<unsigned> sequence(n);
  for (unsigned i = 0; i < n; ++i) sequence[i] = order == Order::reverse ? n - 1 - i : i;
  std::uint64_t state = 88172645463325252ull;
  for (unsigned i = n; order == Order::shuffled && i > 1; --i) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    std::swap(sequence[i - 1], sequence[state % i]);
  }
  return sequence;
}

// Names of the kernels launched so far, template arguments left out, and "memset".
inline std::vector<std::string> launched;

// While set, work is appended here instead of run: the nodes of a CUDA graph that is captured.
inline std::vector<std::function<void()>>* capture = nullptr;

inline void enqueue(const char* kernel, const std::function<void()>& work) {
  const std::string name = kernel;
  const std::size_t begin = name.find_first_not_of('(');
  launched.push_back(name.substr(begin, name.find_first_of("<)", begin) - begin));
  if (capture != nullptr) {
    capture->push_back(work);
  } else {
    work();
  }
}

inline void run_grid(dim3 grid, dim3 threads, std::size_t shared_bytes, const std::function<void()>& body) {
  Block& b = block();
  b.body = &body;
  b.size = threads.x * threads.y * threads.z;
  if (b.size == 0 || b.size > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("emulated kernel: invalid launch configuration");
  }
  b.shared.assign((shared_bytes + 23) / 16 * 2, 0);
  gridDim = grid;
  blockDim = threads;
  std::vector<unsigned> sequence = make_sequence(b.size);
  for (unsigned index : make_sequence(grid.x * grid.y * grid.z)) {
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
    run_block(b, sequence);
  }
}

inline void launch(const char* kernel, dim3 grid, dim3 threads, std::size_t shared_bytes,
                   const std::function<void()>& body) {
  enqueue(kernel, [=] { run_grid(grid, threads, shared_bytes, body); });
}

// Whether the hardware's approximations are as inexact as they may be: roots and reciprocals off by a unit in the last
// place, up or down by their bits, and products and sums fused.
inline bool approximate = false;

inline float inexact(float x) {
  if (!approximate || !std::isfinite(x) || x == 0) return x;
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const std::uint32_t hash = (bits ^ bits >> 15) * 0x85ebca6bu >> 30;
  return hash == 0 ? x : std::nextafterf(x, hash == 1 ? 0.0f : x * 2);
}
inline float approximate_root(float x) { return inexact(std::sqrt(x)); }
// A divisor below 2^-126 counts as 0.
inline float approximate_reciprocal(float x) { return inexact(1.0f / (std::fabs(x) < 0x1p-126f ? x * 0.0f : x)); }

template <typename T, typename F>
T exchange_old(T* p, F&& update) {
  const T old = *p;
  *p = update(old);
  return old;
}

}  // namespace cuda_emulator

inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
  return cuda_emulator::enqueue("memset", [=] { std::memset(p, value, bytes); }), cudaSuccess;
}

// ---- Device functions.
inline void __syncthreads() { cuda_emulator::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_emulator::exchange(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned lanes = std::min(32u, cuda_emulator::block().size - cuda_emulator::block().current / 32 * 32);
  const std::uint64_t* values = cuda_emulator::exchange(mask, predicate != 0);
  unsigned result = 0;
  for (unsigned lane = 0; lane < lanes; ++lane) result |= (mask >> lane & 1) && values[lane] ? 1u << lane : 0u;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline int __syncthreads_count(int predicate) {
  static int count;
  __syncthreads();
  count = 0;
  __syncthreads();
  count += predicate != 0;
  __syncthreads();
  return count;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(cuda_emulator::block().current % 32);
  const std::uint64_t* values = cuda_emulator::exchange(mask, cuda_emulator::to_bits(value));
  return cuda_emulator::from_bits<T>(values[(lane & ~(width - 1)) | (source & (width - 1))]);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(cuda_emulator::block().current % 32);
  const int source = (lane & (width - 1)) < static_cast<int>(delta) ? lane : lane - static_cast<int>(delta);
  return __shfl_sync(mask, value, source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(cuda_emulator::block().current % 32);
  const bool outside = (lane & (width - 1)) + static_cast<int>(delta) >= width;
  return __shfl_sync(mask, value, outside ? lane : lane + static_cast<int>(delta));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int = 32) {
  return __shfl_sync(mask, value, static_cast<int>(cuda_emulator::block().current % 32) ^ lane_mask);
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  const std::uint64_t own = cuda_emulator::to_bits(value), *values = cuda_emulator::exchange(mask, own);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= (mask >> lane & 1) && values[lane] == own ? 1u << lane : 0u;
  return result;
}
template <typename F>
unsigned pf_reduce_sync(unsigned mask, unsigned value, F&& combine) {
  const std::uint64_t* values = cuda_emulator::exchange(mask, value);
  bool first = true;
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    result = first ? static_cast<unsigned>(values[lane]) : combine(result, static_cast<unsigned>(values[lane]));
    first = false;
  }
  return result;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return pf_reduce_sync(mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return pf_reduce_sync(mask, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return pf_reduce_sync(mask, value, [](unsigned a, unsigned b) { return std::min(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return pf_reduce_sync(mask, value, [](unsigned a, unsigned b) { return a | b; });
}

template <typename T>
using pf_same = std::common_type_t<T>;
template <typename T>
T atomicAdd(T* p, pf_same<T> value) {
  return cuda_emulator::exchange_old(p, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* p, pf_same<T> value) {
  return cuda_emulator::exchange_old(p, [&](T old) { return std::max<T>(old, value); });
}
template <typename T>
T atomicMin(T* p, pf_same<T> value) {
  return cuda_emulator::exchange_old(p, [&](T old) { return std::min<T>(old, value); });
}
template <typename T>
T atomicOr(T* p, pf_same<T> value) {
  return cuda_emulator::exchange_old(p, [&](T old) { return static_cast<T>(old | value); });
}
template <typename T>
T atomicAnd(T* p, pf_same<T> value) {
  return cuda_emulator::exchange_old(p, [&](T old) { return static_cast<T>(old & value); });
}
template <typename T>
T atomicExch(T* p, pf_same<T> value) {
  return cuda_emulator::exchange_old(p, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* p, pf_same<T> expected, pf_same<T> value) {
  return cuda_emulator::exchange_old(p, [&](T old) { return old == expected ? value : old; });
}
template <typename T>
T atomicSub(T* p, pf_same<T> value) {
  return cuda_emulator::exchange_old(p, [&](T old) { return static_cast<T>(old - value); });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1u) << (31 - i);
  return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __float_as_uint(float x) { return cuda_emulator::from_bits<unsigned>(cuda_emulator::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::from_bits<float>(x); }
inline int __float_as_int(float x) { return cuda_emulator::from_bits<int>(cuda_emulator::to_bits(x)); }
inline float __int_as_float(int x) { return cuda_emulator::from_bits<float>(cuda_emulator::to_bits(x)); }
// Test libraries are compiled with -ffp-contract=off. Fused operations round twice unless cuda_emulator::approximate is
// set, as the reference that results are compared with does: the last bits of a difference of nearly equal numbers
// would not agree otherwise.
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
template <typename T>
T pf_fused(T a, T b, T c) {
  return cuda_emulator::approximate ? std::fma(a, b, c) : a * b + c;
}
inline float __fmaf_rn(float a, float b, float c) { return pf_fused(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return pf_fused(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, pf_same<T> value) {
  *p = value;
}
template <typename T>
void __stcg(T* p, pf_same<T> value) {
  *p = value;
}
using std::max;
using std::min;
