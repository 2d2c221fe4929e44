// The exact choice among the candidates that the pass with a bracket collected, and their bits in the mask.
#include "select_state.cuh"

namespace pecker_fast {
namespace {

__global__ void __launch_bounds__(kSelectThreads) candidate_level_kernel(RowState* state, Workspace workspace) {
  if (state->fallback || state->finish.done) return;
  const u64 base = state->base;
  const int dropped = state->dropped_bits;
  const auto value = [&](std::int64_t i) { return (workspace.candidates[i] >> dropped) - base; };
  RadixState finish;
  if (!radix_level(&state->finish, workspace.level_histogram, &state->tickets[5],
                   static_cast<std::int64_t>(state->candidates), value, &finish) ||
      threadIdx.x != 0) {
    return;
  }
  // All of the bin is kept: its lower end is a threshold as good as its smallest value.
  if (finish.rank == finish.count || finish.done) {
    state->finish.done = true;
    state->kept_from = (base + (finish.prefix << finish.bits)) << dropped;
  }
}

__global__ void __launch_bounds__(kSelectThreads)
    patch_kernel(RowState* state, const u64* candidates, std::int32_t* words, MaskRow out) {
  if (state->fallback) return;
  const u64 kept_from = state->kept_from;
  const std::int64_t n = static_cast<std::int64_t>(state->candidates);
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kSelectThreads;
  u64 kept = 0;
  u32 below_inf = 0;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x; i < n; i += stride) {
    const u64 candidate = candidates[i];
    if (candidate < kept_from) continue;
    const u64 position = kEndPosition - 1 - (candidate & (kEndPosition - 1));
    atomicOr(reinterpret_cast<u32*>(words) + (position >> 5), 1u << (position & 31));
    kept += 1;
    const u32 below = kInfKey - static_cast<u32>(candidate >> kPositionBits);
    below_inf = below > below_inf ? below : below_inf;
  }
  block_add(kept, &state->kept);
  below_inf = __reduce_max_sync(kFullWarp, below_inf);
  if (lane_id() == 0 && below_inf != 0) atomicMax(&state->smallest, below_inf);
  if (!is_last_block(&state->tickets[6], gridDim.x) || threadIdx.x != 0) return;
  const u64 count = state->within_high + __ldcg(&state->kept);
  *out.count = static_cast<std::int64_t>(count);
  *out.threshold = __uint_as_float(kInfKey - __ldcg(&state->smallest));
  if (out.nan_count != nullptr) *out.nan_count = static_cast<std::int64_t>(state->nans[0]);
  // The fallback starts from zero.
  state->kept = 0;
  state->smallest = 0;
}

}  // namespace

void finish_candidates(const SelectPlan& plan, RowState* state, const Workspace& workspace, const MaskRow& out,
                       cudaStream_t stream) {
  const std::int64_t wanted = (workspace.capacity + 4 * kSelectThreads - 1) / (4 * kSelectThreads);
  const unsigned grid = static_cast<unsigned>(wanted < plan.tuning.blocks ? wanted : plan.tuning.blocks);
  for (int level = 0; level < kCandidateLevels; ++level) {
    PF_LAUNCH(candidate_level_kernel, grid, kSelectThreads, 0, stream, state, workspace);
  }
  const u64* candidates = workspace.candidates;
  PF_LAUNCH(patch_kernel, grid, kSelectThreads, 0, stream, state, candidates, out.words, out);
}

}  // namespace pecker_fast
