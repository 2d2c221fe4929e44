// The exact choice among the candidates that the pass with a bracket collected, and their bits in the mask.
#include "select_state.cuh"

namespace pecker_fast {
namespace {

// The chosen value is known, or all of its bin is kept: the bin's lower end is a threshold as good as its smallest value.
__device__ __forceinline__ void keep_from(RowState* state, u64 prefix, int bits) {
  state->finish.done = true;
  state->kept_from = (state->base + (prefix << bits)) << state->dropped_bits;
}

__global__ void __launch_bounds__(kSelectThreads) candidate_level_kernel(Workspace workspace) {
  RowState* const state = workspace.rows + blockIdx.y;
  if (state->fallback || state->finish.done || state->finish.count <= kFew) return;
  const u64* const candidates = workspace.candidates + blockIdx.y * workspace.capacity;
  const u64 base = state->base;
  const int dropped = state->dropped_bits;
  const auto value = [&](std::int64_t i) { return (candidates[i] >> dropped) - base; };
  RadixState finish;
  if (!radix_level(&state->finish, workspace.level_histograms + blockIdx.y * 2 * kDigits, &state->tickets[5],
                   static_cast<std::int64_t>(state->candidates), value, &finish) ||
      threadIdx.x != 0) {
    return;
  }
  if (finish.rank == finish.count || finish.done) keep_from(state, finish.prefix, finish.bits);
}

// Few candidates have the prefix of the wanted one: they are gathered, and the last block goes through the remaining
// digits alone.
__global__ void __launch_bounds__(kSelectThreads) few_kernel(Workspace workspace) {
  RowState* const state = workspace.rows + blockIdx.y;
  if (state->fallback || state->finish.done) return;
  const RadixState before = state->finish;
  if (before.count > kFew) {
    // So many whose first digits are all alike: the histograms of all scores know what to do.
    if (is_last_block(&state->tickets[11], gridDim.x) && threadIdx.x == 0) state->fallback = true;
    return;
  }
  const u64* const candidates = workspace.candidates + blockIdx.y * workspace.capacity;
  u64* const few = workspace.few + blockIdx.y * kFew;
  const u64 base = state->base;
  const int dropped = state->dropped_bits;
  const std::int64_t n = static_cast<std::int64_t>(state->candidates);
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kSelectThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x; i < n; i += stride) {
    const u64 value = (candidates[i] >> dropped) - base;
    if ((before.bits < 64 ? value >> before.bits : 0) == before.prefix) few[atomicAdd(&state->few, u64{1})] = value;
  }
  if (!is_last_block(&state->tickets[11], gridDim.x)) return;
  __shared__ u32 bins[kDigits];
  RadixState now = before;
  const int count = static_cast<int>(before.count);
  while (now.bits > 0 && now.rank != now.count) {
    const int shift = now.bits > kDigitBits ? now.bits - kDigitBits : 0;
    const int digits = 1 << (now.bits - shift);
    for (int bin = threadIdx.x; bin < digits; bin += kSelectThreads) bins[bin] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kSelectThreads) {
      const u64 value = __ldcg(few + i);
      if ((now.bits < 64 ? value >> now.bits : 0) == now.prefix) {
        atomicAdd(&bins[static_cast<u32>(value >> shift) & (digits - 1)], 1u);
      }
    }
    __syncthreads();
    const RankedBin found = find_rank_of(digits, now.rank, [&](int bin) { return u64{bins[bin]}; });
    now.prefix = (now.prefix << (now.bits - shift)) | static_cast<u64>(found.bin);
    now.rank -= found.above;
    now.count = found.count;
    now.bits = shift;
  }
  if (threadIdx.x == 0) keep_from(state, now.prefix, now.bits);
}

__global__ void __launch_bounds__(kSelectThreads) patch_kernel(Workspace workspace, std::int64_t num_words, MaskGroup out) {
  const int row = blockIdx.y;
  RowState* const state = workspace.rows + row;
  if (state->fallback) return;
  const u64* const candidates = workspace.candidates + row * workspace.capacity;
  u32* const words = reinterpret_cast<u32*>(out.words) + row * num_words;
  const u64 kept_from = state->kept_from;
  const std::int64_t n = static_cast<std::int64_t>(state->candidates);
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kSelectThreads;
  u64 kept = 0;
  u32 below_inf = 0;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x; i < n; i += stride) {
    const u64 candidate = candidates[i];
    if (candidate < kept_from) continue;
    const u64 last = (u64{1} << workspace.position_bits) - 1, position = last - (candidate & last);
    atomicOr(words + (position >> 5), 1u << (position & 31));
    kept += 1;
    const u32 below = kInfKey - static_cast<u32>(candidate >> workspace.position_bits);
    below_inf = below > below_inf ? below : below_inf;
  }
  block_add(kept, &state->kept);
  below_inf = __reduce_max_sync(kFullWarp, below_inf);
  if (lane_id() == 0 && below_inf != 0) atomicMax(&state->smallest, below_inf);
  if (!is_last_block(&state->tickets[6], gridDim.x) || threadIdx.x != 0) return;
  out.counts[row] = static_cast<std::int64_t>(state->within_high + __ldcg(&state->kept));
  out.thresholds[row] = __uint_as_float(kInfKey - __ldcg(&state->smallest));
  if (out.nan_count != nullptr && row == 0) *out.nan_count = static_cast<std::int64_t>(state->nans[0]);
  // The fallback starts from zero.
  state->kept = 0;
  state->smallest = 0;
}

}  // namespace

void finish_candidates(const Scores& scores, const SelectPlan& plan, const Workspace& workspace, const MaskGroup& out,
                       cudaStream_t stream) {
  const std::int64_t wanted = (workspace.capacity + 4 * kSelectThreads - 1) / (4 * kSelectThreads);
  const dim3 grid(static_cast<unsigned>(wanted < plan.tuning.blocks ? wanted : plan.tuning.blocks),
                  static_cast<unsigned>(out.rows));
  for (int level = 0; level < kCandidateLevels; ++level) {
    PF_LAUNCH(candidate_level_kernel, grid, kSelectThreads, 0, stream, workspace);
  }
  PF_LAUNCH(few_kernel, grid, kSelectThreads, 0, stream, workspace);
  PF_LAUNCH(patch_kernel, grid, kSelectThreads, 0, stream, workspace, scores.num_words, out);
}

}  // namespace pecker_fast
