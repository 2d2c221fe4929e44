// The exact choice among the candidates that the pass with a bracket has collected, and their bits in the mask.
//
// That pass has counted the candidates' first digits. Each kernel for rows that need a fallback takes one step for the
// others: a further digit if too many candidates share those known, and otherwise the last step. So the choice costs no
// launch of its own. Nearly always the first step is the last: with 13 of the bits between the bracket's sides known,
// few candidates are left. At the last kernel the first 52 of at most 64 bits are known, or 39 of 51 for 16-bit scores:
// of 4096 values, which are all different, no more than kFew are left.
#pragma once

#include "select_state.cuh"

namespace pecker_fast {

// Sets the candidate's bit, and notes its key.
__device__ __forceinline__ void keep(u64 candidate, const CompositeForm& form, u32* words, u64* kept, u32* below_inf) {
  const u64 position = composite_position(candidate, form);
  atomicOr(words + (position >> 5), 1u << (position & 31));
  *kept += 1;
  *below_inf = max(*below_inf, kInfKey - composite_key(candidate, form));
}

// Whole block: adds to the row's sums.
__device__ __forceinline__ void add_kept(RowState* state, u64 kept, u32 below_inf) {
  block_add(kept, &state->kept);
  below_inf = __reduce_max_sync(kFullWarp, below_inf);
  if (lane_id() == 0 && below_inf != 0) atomicMax(&state->smallest, below_inf);
}

// A step of row blockIdx.y, by all blocks of the row. `bins`: kDigits in shared memory.
__device__ __forceinline__ void candidate_step(const Workspace& workspace, std::int64_t num_words, const MaskGroup& out,
                                               u32* bins) {
  const int row = blockIdx.y;
  RowState* const state = workspace.rows + row;
  if (state->finished) return;
  const RadixState now = state->finish;
  const u64* const candidates = workspace.candidates(row);
  const std::int64_t n = static_cast<std::int64_t>(state->candidates);
  const u64 base = state->base;
  const int dropped = state->dropped_bits;
  u32* const ticket = &state->tickets[kCandidateTicket];
  const auto value_of = [&](u64 candidate) { return (candidate >> dropped) - base; };
  // A whole bin is kept if it is the last one, whatever its digits to come.
  const bool whole = now.done || now.rank == now.count;
  if (!whole && now.count > kFew) {
    RadixState result;
    radix_level(&state->finish, bins, workspace.half_histogram(row, 0), ticket, n,
                [&](std::int64_t i) { return value_of(candidates[i]); }, &result);
    return;
  }
  u32* const words = reinterpret_cast<u32*>(out.words) + row * num_words;
  u64* const few = workspace.few + row * kFew;
  u64 kept = 0;
  u32 below_inf = 0;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kSelectThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x; i < n; i += stride) {
    const u64 candidate = candidates[i], prefix = value_of(candidate) >> now.bits;
    if (prefix > now.prefix || (whole && prefix == now.prefix)) {
      keep(candidate, workspace.form, words, &kept, &below_inf);
    } else if (prefix == now.prefix) {
      few[atomicAdd(&state->few, u64{1})] = candidate;
    }
  }
  add_kept(state, kept, below_inf);
  if (!is_last_block(ticket, gridDim.x)) return;
  if (!whole) {
    RadixState last = now;
    const auto few_value = [&](std::int64_t i) { return value_of(__ldcg(few + i)); };
    while (!last.done && last.rank != last.count) {
      last = block_level(last, bins, static_cast<std::int64_t>(now.count), few_value);
    }
    kept = 0;
    below_inf = 0;
    for (int i = threadIdx.x; i < static_cast<int>(now.count); i += kSelectThreads) {
      const u64 candidate = __ldcg(few + i);
      if (value_of(candidate) >> last.bits >= last.prefix) keep(candidate, workspace.form, words, &kept, &below_inf);
    }
    add_kept(state, kept, below_inf);
    __threadfence();
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  out.counts[row] = static_cast<std::int64_t>(state->within_high + __ldcg(&state->kept));
  out.thresholds[row] = __uint_as_float(kInfKey - __ldcg(&state->smallest));
  if (out.nan_count != nullptr && row == 0) *out.nan_count = static_cast<std::int64_t>(state->nans[0]);
  state->finished = true;
}

}  // namespace pecker_fast
