// Exact sums of magnitudes: windows of exponents, each with an integer. See common/radix_key.h.
#include "select_state.cuh"

namespace pecker_fast {
namespace {

// A half of a batch has few windows. The warp adds them up one after the other, from the largest down, and keeps the
// sums in shared memory until it comes to the next tensor, or to so many entries that more might not fit 64 bits.
constexpr int kMostBatches = 1 << 14;

// Prevents the compiler from keeping values computed from x in registers: there is no room for them.
__device__ __forceinline__ float opaque(float x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(x));
#endif
  return x;
}

__global__ void __launch_bounds__(kSelectThreads, 4) sums_kernel(Scores scores, std::int64_t* sums) {
  // The windows' sums, and the number of finite entries.
  __shared__ u64 all[kSelectWarps][kSumWindows + 1];
  const int lane = lane_id();
  u64* const own = all[warp_id()];
  const auto clear = [&] {
    if (lane <= kSumWindows) own[lane] = 0;
    __syncwarp();
  };
  std::int64_t tensor = -1;
  const auto flush = [&] {
    __syncwarp();
    if (tensor < 0) return;
    u64* const row = reinterpret_cast<u64*>(sums) + tensor * kSumColumns;
    const u64 sum = lane <= kSumWindows ? own[lane] : 0;
    if (sum != 0 && lane < kSumWindows) {
      atomicAdd(row + lane, sum & 0xffffffffu);
      atomicAdd(row + kSumWindows + lane, sum >> kSumLowBits);
    } else if (sum != 0) {
      atomicAdd(row + 2 * kSumWindows, sum);
    }
    __syncwarp();
  };
  clear();
  u32 infinite = 0;
  int batches = 0;
  const auto part = [&](const Batch& batch, int half, const float* x, auto) {
    if (half == 0 && (batch.index != tensor || ++batches == kMostBatches)) {
      flush();
      clear();
      tensor = batch.index;
      batches = 0;
    }
    if (half == 0) infinite = 0;
    // One more than the window, 0 for entries that add nothing.
    const auto place = [](u32 key) { return key - 1 < kInfKey - 1 ? sum_window(key) + 1 : 0; };
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const u32 key = float_key(x[i]);
      infinite += key >= kInfKey;
      largest = max(largest, place(key));
    }
    for (u32 window = __reduce_max_sync(kFullWarp, largest); window > 0;) {
      u64 sum = 0;
      u32 next = 0;
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        const u32 key = float_key(opaque(x[i])), at = place(key);
        sum += at == window ? sum_value(key) : 0;
        next = max(next, at < window ? at : 0);
      }
      sum = warp_sum(sum);
      if (lane == 0) own[window - 1] += sum;
      window = __reduce_max_sync(kFullWarp, next);
    }
  };
  const auto finish = [&](const Batch& batch, auto) {
    const u32 left_out = __reduce_add_sync(kFullWarp, infinite);
    if (lane == 0) own[kSumWindows] += static_cast<u64>(batch.valid) - left_out;
  };
  for_each_batch<false>(scores, part, finish);
  flush();
}

}  // namespace

void launch_magnitude_sums(const Scores& scores, std::int64_t* sums, int blocks, cudaStream_t stream) {
  if (scores.num_tensors == 0) return;
  PF_LAUNCH(sums_kernel, score_grid(scores, blocks), kSelectThreads, 0, stream, scores, sums);
}

}  // namespace pecker_fast
