// The passes over all scores that write mask words: one read of the scores, one write of the words.
//
// An entry is compared with one threshold: within a batch that lies before the position of a bound, entries of its very
// key are within it, behind it they are not. Only the batch that contains the position compares entry by entry.
// Registers hold 32 entries of a lane, whose bits the warp transposes into words.
#include "select_state.cuh"

namespace pecker_fast {
namespace {

// Candidates that a warp collects before it takes room for them in the common buffer.
constexpr int kStaged = 256;

struct Staging {
  u64* staged;
  int count;
  u64* total;
  u64* buffer;
  u64 capacity;

  // Whole warp.
  __device__ __forceinline__ void flush() {
    const int lane = lane_id();
    u64 start = 0;
    if (lane == 0) start = atomicAdd(total, static_cast<u64>(count));
    start = __shfl_sync(kFullWarp, start, 0);
    __syncwarp();
    for (int i = lane; i < count; i += 32) {
      if (start + i < capacity) buffer[start + i] = staged[i];
    }
    __syncwarp();
    count = 0;
  }

  // Whole warp: takes in the entries whose bits are set. They are read again, from the cache most likely: to find them
  // among the registers would take more than the rest of the pass.
  template <typename Order>
  __device__ __forceinline__ void add(const Batch& batch, Order, u32 bits) {
    const int lane = lane_id();
    u32 active = __ballot_sync(kFullWarp, bits != 0);
    while (active != 0) {
      if (count + 32 > kStaged) flush();
      if (bits != 0) {
        const int offset = Order::offset(__ffs(static_cast<int>(bits)) - 1, lane);
        bits &= bits - 1;
        const u32 key = float_key(load_score(batch.data, batch.type, batch.first + offset));
        staged[count + __popc(active & ((1u << lane) - 1))] = composite(key, batch.position + offset);
      }
      count += __popc(active);
      active = __ballot_sync(kFullWarp, bits != 0);
    }
  }
};

// After the pass with a bracket: what is left to do.
__device__ void decide(RowState* state, std::int64_t k, bool ties_all, u64 capacity) {
  const u64 within_high = __ldcg(&state->within_high), candidates = __ldcg(&state->candidates);
  const u64 low = composite(state->low), high = composite(state->high), wanted = static_cast<u64>(k);
  const bool all_eligible = state->low.key == 1 && state->low.position == kEndPosition;
  state->dropped_bits = ties_all ? kPositionBits : 0;
  if (k < 1 || candidates > capacity || within_high >= wanted) {
    state->fallback = true;
  } else if (within_high + candidates < wanted) {
    // Without candidates nothing is known of the smallest kept entry.
    state->fallback = !all_eligible || (candidates == 0 && within_high > 0);
    state->kept_from = low;
    state->finish.done = true;
  } else {
    state->base = low >> state->dropped_bits;
    const u64 largest = ((high - 1) >> state->dropped_bits) - state->base;
    state->finish.rank = wanted - within_high;
    state->finish.bits = largest == 0 ? 1 : 64 - __clzll(static_cast<long long>(largest));
  }
}

// kBracket: writes the entries within state->high and collects the candidates. Otherwise: writes the entries within
// state->cut and the results; kSmallest: the smallest kept magnitude has to be looked for.
template <bool kBracket, bool kSmallest>
__global__ void __launch_bounds__(kSelectThreads, 4)
    mask_kernel(Scores scores, bool always, const std::int64_t* k, bool ties_all, RowState* state, u64* candidates,
                u64 capacity, MaskRow out) {
  if (!kBracket && !always && !state->fallback) return;
  __shared__ u64 staged[kBracket ? kSelectWarps : 1][kStaged];
  const Bound upper = kBracket ? state->high : state->cut, lower = state->low;
  Staging staging = {staged[kBracket ? warp_id() : 0], 0, &state->candidates, candidates, capacity};
  u32 kept = 0, nans = 0, bits = 0, outside = 0;
  float smallest = __uint_as_float(kInfKey);
  const auto part = [&](const Batch& batch, int half, const float* x, auto order) {
    const u32 within = entries_within(x, order, upper, batch, half);
    bits = half == 0 ? within : bits | within;
    if (kBracket) {
      const u32 candidate = entries_within(x, order, lower, batch, half) & ~within;
      outside = half == 0 ? candidate : outside | candidate;
    }
    if (kSmallest) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        if (within >> (half * kPart + i) & 1) smallest = fminf(smallest, fabsf(x[i]));
      }
    }
    nans += count_nan(x);
  };
  const auto finish = [&](const Batch& batch, auto order) {
    using Order = decltype(order);
    kept += __popc(bits);
    const u32 word = Order::to_word(bits, lane_id());
    const int w = Order::word_of(lane_id());
    if (out.words != nullptr && 32 * w < batch.valid) {
      out.words[static_cast<std::int64_t>(batch.position >> 5) + w] = static_cast<std::int32_t>(word);
    }
    if (kBracket) staging.add(batch, order, outside);
  };
  for_each_batch(scores, part, finish);
  if (kBracket && staging.count > 0) staging.flush();
  block_add(kept, kBracket ? &state->within_high : &state->kept);
  // A pass with a bracket may be followed by one with a cut, which counts again.
  if (out.nan_count != nullptr) block_add(nans, &state->nans[kBracket ? 0 : 1]);
  if (kSmallest) {
    const u32 below_inf = __reduce_max_sync(kFullWarp, kInfKey - __float_as_uint(smallest));
    if (lane_id() == 0) atomicMax(&state->smallest, below_inf);
  }
  if (!is_last_block(&state->tickets[kBracket ? 3 : 4], gridDim.x) || threadIdx.x != 0) return;
  if (kBracket) {
    decide(state, *k, ties_all, capacity);
  } else {
    const u64 count = __ldcg(&state->kept);
    const u32 key = kSmallest ? kInfKey - __ldcg(&state->smallest) : state->cut.key;
    if (out.count != nullptr) {
      *out.count = static_cast<std::int64_t>(count);
      *out.threshold = __uint_as_float(count > 0 ? key : kInfKey);
    }
    if (out.nan_count != nullptr) *out.nan_count = static_cast<std::int64_t>(__ldcg(&state->nans[1]));
  }
}

}  // namespace

void write_bracket_mask(const Scores& scores, const SelectPlan& plan, const std::int64_t* k, bool ties_all,
                        RowState* state, const Workspace& workspace, const MaskRow& out, cudaStream_t stream) {
  PF_LAUNCH((mask_kernel<true, false>), score_grid(scores, plan.tuning.blocks), kSelectThreads, 0, stream, scores, true,
            k, ties_all, state, workspace.candidates, static_cast<u64>(workspace.capacity), out);
}

void write_cut_mask(const Scores& scores, int blocks, bool always, bool threshold_given, RowState* state,
                    const MaskRow& out, cudaStream_t stream) {
  const dim3 grid(score_grid(scores, blocks));
  const std::int64_t* k = nullptr;
  u64* candidates = nullptr;
  if (threshold_given) {
    PF_LAUNCH((mask_kernel<false, true>), grid, kSelectThreads, 0, stream, scores, always, k, false, state, candidates,
              u64{0}, out);
  } else {
    PF_LAUNCH((mask_kernel<false, false>), grid, kSelectThreads, 0, stream, scores, always, k, false, state, candidates,
              u64{0}, out);
  }
}

}  // namespace pecker_fast
