// The passes over all scores that write mask words: one read of the scores, one write of the words of each row.
//
// An entry is compared with one threshold: in a batch before the position of a bound, entries with exactly its key are
// within the bound; in a batch behind it they are not. Only the batch that contains the position compares each entry.
// Registers hold 32 entries of a lane, whose bits the warp transposes into words.
#include "select_candidates.cuh"

namespace pecker_fast {
namespace {

// Candidates of a row that a warp collects before it takes room for them in the row's buffer.
template <int kRows>
constexpr int kStaged = kRows == 1 ? 256 : 48;

// The values of a row's candidates (see RowState): how many bits they have, and below which bit the first digit ends.
struct CandidateRange {
  u64 base;
  int dropped, bits, shift;
};

__device__ __forceinline__ CandidateRange range_between(const Bound& low, const Bound& high, bool ties_all,
                                                        const CompositeForm& form) {
  CandidateRange range;
  range.dropped = ties_all ? form.position_bits : 0;
  range.base = composite(low, form) >> range.dropped;
  const u64 largest = ((composite(high, form) - 1) >> range.dropped) - range.base;
  range.bits = largest == 0 ? 1 : 64 - __clzll(static_cast<long long>(largest));
  range.shift = range.bits > kDigitBits ? range.bits - kDigitBits : 0;
  return range;
}

// Where a row's candidates go.
struct CandidateBuffer {
  u64* total;
  u64* entries;
  u64 capacity;
  u32* histogram;  // of their first digits
};

__device__ __forceinline__ CandidateBuffer candidate_buffer(const Workspace& workspace, int row) {
  return {&workspace.rows[row].candidates, workspace.candidates(row), static_cast<u64>(workspace.capacity),
          workspace.half_histogram(row, 0)};
}

// Whole warp: moves `count` candidates from shared memory to the row's buffer. Equal digits of a warp are added up
// first: if scores have many ties, all candidates may have few digits.
__device__ __forceinline__ void flush(const u64* staged, int count, const CandidateBuffer& buffer,
                                      const CandidateRange& range) {
  const int lane = lane_id();
  u64 start = 0;
  if (lane == 0) start = atomicAdd(buffer.total, static_cast<u64>(count));
  start = __shfl_sync(kFullWarp, start, 0);
  __syncwarp();
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const int i = first + lane;
    const u32 active = __ballot_sync(kFullWarp, i < count);
    if (i < count) {
      const u64 candidate = staged[i];
      if (start + i < buffer.capacity) buffer.entries[start + i] = candidate;
      const u32 digit = static_cast<u32>(((candidate >> range.dropped) - range.base) >> range.shift);
      const u32 peers = __match_any_sync(active, digit);
      if ((peers & ((1u << lane) - 1)) == 0) atomicAdd(buffer.histogram + digit, static_cast<u32>(__popc(peers)));
    }
    __syncwarp();
  }
}

// Whole warp: stages the entries whose bits are set and returns the number of staged entries. They are read again, most
// likely from the cache: picking them out of registers would take longer than the rest of the pass.
template <bool kRelative, int kRoom, typename Order>
__device__ __forceinline__ int stage(const Batch& batch, Order, u32 bits, u64* staged, int count,
                                     const Workspace& workspace, int row, const CandidateRange& range) {
  const int lane = lane_id();
  u32 active = __ballot_sync(kFullWarp, bits != 0);
  while (active != 0) {
    if (count + 32 > kRoom) {
      flush(staged, count, candidate_buffer(workspace, row), range);
      count = 0;
    }
    if (bits != 0) {
      const int offset = Order::offset(__ffs(static_cast<int>(bits)) - 1, lane);
      bits &= bits - 1;
      const u32 key = float_key(load_ranked<kRelative>(batch.entries, batch.first + offset));
      staged[count + __popc(active & ((1u << lane) - 1))] = composite(key, batch.position + offset, workspace.form);
    }
    count += __popc(active);
    active = __ballot_sync(kFullWarp, bits != 0);
  }
  return count;
}

template <typename Order>
__device__ __forceinline__ void store_word(std::int32_t* words, const Batch& batch, Order, u32 bits) {
  const u32 word = Order::to_word(bits, lane_id());
  const int w = Order::word_of(lane_id());
  if (32 * w < batch.valid) words[static_cast<std::int64_t>(batch.position >> 5) + w] = static_cast<std::int32_t>(word);
}

// After the pass with a bracket: what remains to be done for a row, by one thread.
__device__ void decide(RowState* state, std::int64_t k, u64 capacity, const CandidateRange& range) {
  const u64 within_high = __ldcg(&state->within_high), candidates = __ldcg(&state->candidates);
  const u64 wanted = static_cast<u64>(k);
  const bool all_eligible = state->low.key == 1 && state->low.position == kEndPosition;
  state->base = range.base;
  state->dropped_bits = range.dropped;
  if (k < 1 || candidates > capacity || within_high >= wanted) {
    state->fallback = true;
  } else if (within_high + candidates < wanted) {
    // Without candidates the smallest kept entry is unknown.
    state->fallback = !all_eligible || (candidates == 0 && within_high > 0);
    // Values of any number of bits have at least this prefix.
    state->finish = {0, 0, 0, 63, true};
  } else {
    state->finish = {0, wanted - within_high, candidates, range.bits, false};
  }
}

// For all rows together: writes the entries within their `high` and collects the candidates. kRows: at most so many
// rows. The shared memory of several leaves room for three blocks a multiprocessor, and so do the registers that
// division takes.
template <int kRows, bool kRelative>
__global__ void __launch_bounds__(kSelectThreads, kRows == 1 && !kRelative ? 4 : 3)
    bracket_kernel(Scores scores, const std::int64_t* ks, bool ties_all, Workspace workspace, MaskGroup out) {
  constexpr int kRoom = kStaged<kRows>;
  __shared__ u64 staged[kSelectWarps][kRows][kRoom];
  __shared__ int staged_counts[kSelectWarps][kRows];
  __shared__ u32 kept_counts[kSelectWarps][kRows];
  __shared__ Bound uppers[kRows], lowers[kRows];
  __shared__ CandidateRange ranges[kRows];
  const int rows = kRows == 1 ? 1 : out.rows, warp = warp_id(), lane = lane_id();
  if (threadIdx.x < static_cast<unsigned>(rows)) {
    uppers[threadIdx.x] = workspace.rows[threadIdx.x].high;
    lowers[threadIdx.x] = workspace.rows[threadIdx.x].low;
    ranges[threadIdx.x] = range_between(lowers[threadIdx.x], uppers[threadIdx.x], ties_all, workspace.form);
  }
  if (lane < kRows) {
    staged_counts[warp][lane] = 0;
    kept_counts[warp][lane] = 0;
  }
  __syncthreads();
  u32 nans = 0;
  // Bits of the lane's entries in a batch: those within `high`, and the candidates. In shared memory for several rows,
  // because there are registers for one row only.
  __shared__ u32 shared_bits[kRows == 1 ? 1 : kSelectWarps][kRows][2][32];
  u32 own_bits[2];
  const auto bits_of = [&](int row, int which) -> u32& {
    if constexpr (kRows == 1) return own_bits[which];
    return shared_bits[warp][row][which][lane];
  };
  const auto part = [&](const Batch& batch, int half, const float* x, auto order) {
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const u32 inner = entries_within(x, order, uppers[row], batch, half);
      const u32 candidates = entries_within(x, order, lowers[row], batch, half) & ~inner;
      bits_of(row, 0) = half == 0 ? inner : bits_of(row, 0) | inner;
      bits_of(row, 1) = half == 0 ? candidates : bits_of(row, 1) | candidates;
    }
    nans += count_nan(x);
  };
  const auto finish = [&](const Batch& batch, auto order) {
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const u32 within = bits_of(row, 0), outside = bits_of(row, 1);
      store_word(out.words + row * scores.num_words, batch, order, within);
      const u32 kept = __reduce_add_sync(kFullWarp, static_cast<u32>(__popc(within)));
      const int count = stage<kRelative, kRoom>(batch, order, outside, staged[warp][row], staged_counts[warp][row],
                                                workspace, row, ranges[row]);
      __syncwarp();
      if (lane == 0) {
        staged_counts[warp][row] = count;
        kept_counts[warp][row] += kept;
      }
      __syncwarp();
    }
  };
  for_each_batch<kRelative, kRows == 1>(scores, part, finish);
  __syncwarp();
  for (int row = 0; row < rows; ++row) {
    const int count = staged_counts[warp][row];
    if (count > 0) flush(staged[warp][row], count, candidate_buffer(workspace, row), ranges[row]);
    block_add(lane == 0 ? kept_counts[warp][row] : 0u, &workspace.rows[row].within_high);
  }
  block_add(nans, &workspace.rows[0].nans[0]);
  if (!is_last_block(&workspace.rows[0].tickets[kBracketTicket], gridDim.x)) return;
  if (threadIdx.x < static_cast<unsigned>(rows)) {
    decide(workspace.rows + threadIdx.x, ks[threadIdx.x], static_cast<u64>(workspace.capacity), ranges[threadIdx.x]);
  }
  __syncthreads();
  for (int row = 0; row < rows; ++row) {
    RowState* const state = workspace.rows + row;
    u32* const histogram = workspace.half_histogram(row, 0);
    const RadixState before = state->finish;
    if (!state->fallback && !before.done) {
      const RankedBin found = find_rank(histogram, 1 << (before.bits - ranges[row].shift), before.rank);
      if (threadIdx.x == 0) state->finish = with_digit(before, found);
    }
    for (int bin = threadIdx.x; bin < kDigits; bin += kSelectThreads) histogram[bin] = 0;
  }
}

// Writes the words and results of the entries within the row's cut. kSmallest: looks for the smallest kept magnitude.
template <bool kSmallest, bool kRelative>
__global__ void __launch_bounds__(kSelectThreads, 4)
    cut_kernel(Scores scores, bool sampled, Workspace workspace, MaskGroup out) {
  const int row = blockIdx.y;
  RowState* const state = workspace.rows + row;
  if constexpr (!kSmallest) {
    // Thresholds that are given have no candidates.
    __shared__ u32 bins[kDigits];
    if (sampled && !state->fallback) return candidate_step(workspace, scores.num_words, out, bins);
  }
  const Bound cut = state->cut;
  std::int32_t* const words = out.words == nullptr ? nullptr : out.words + row * scores.num_words;
  u32 kept = 0, nans = 0, bits = 0;
  float smallest = __uint_as_float(kInfKey);
  const auto part = [&](const Batch& batch, int half, const float* x, auto order) {
    const u32 within = entries_within(x, order, cut, batch, half);
    bits = half == 0 ? within : bits | within;
    if (kSmallest) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        if (within >> (half * kPart + i) & 1) smallest = fminf(smallest, fabsf(x[i]));
      }
    }
    nans += count_nan(x);
  };
  const auto finish = [&](const Batch& batch, auto order) {
    kept += __popc(bits);
    // Whole warp: the words are made by exchange.
    if (words != nullptr) store_word(words, batch, order, bits);
  };
  for_each_batch<kRelative>(scores, part, finish);
  block_add(kept, &state->kept);
  // After a pass with a bracket this counts again.
  if (out.nan_count != nullptr && row == 0) block_add(nans, &state->nans[1]);
  if (kSmallest) {
    const u32 below_inf = __reduce_max_sync(kFullWarp, kInfKey - __float_as_uint(smallest));
    if (lane_id() == 0) atomicMax(&state->smallest, below_inf);
  }
  if (!is_last_block(&state->tickets[kCutTicket], gridDim.x) || threadIdx.x != 0) return;
  const u64 count = __ldcg(&state->kept);
  const u32 key = kSmallest ? kInfKey - __ldcg(&state->smallest) : state->cut.key;
  if (out.counts != nullptr) {
    out.counts[row] = static_cast<std::int64_t>(count);
    out.thresholds[row] = __uint_as_float(count > 0 ? key : kInfKey);
  }
  if (out.nan_count != nullptr && row == 0) *out.nan_count = static_cast<std::int64_t>(__ldcg(&state->nans[1]));
}

}  // namespace

void write_bracket_masks(const Scores& scores, const SelectPlan& plan, const std::int64_t* ks, bool ties_all,
                         const Workspace& workspace, const MaskGroup& out, cudaStream_t stream) {
  const unsigned grid = score_grid(scores, plan.tuning.blocks);
  for_ranking(scores, [&](auto relative) {
    constexpr bool kRelative = decltype(relative)::value;
    if (out.rows == 1) {
      PF_LAUNCH((bracket_kernel<1, kRelative>), grid, kSelectThreads, 0, stream, scores, ks, ties_all, workspace, out);
    } else {
      PF_LAUNCH((bracket_kernel<kMaxRows, kRelative>), grid, kSelectThreads, 0, stream, scores, ks, ties_all, workspace,
                out);
    }
  });
}

void write_cut_masks(const Scores& scores, int blocks, bool sampled, bool threshold_given, const Workspace& workspace,
                     const MaskGroup& out, cudaStream_t stream) {
  const dim3 grid = score_grid(scores, blocks, out.rows);
  for_ranking(scores, [&](auto relative) {
    constexpr bool kRelative = decltype(relative)::value;
    if (threshold_given) {
      PF_LAUNCH((cut_kernel<true, kRelative>), grid, kSelectThreads, 0, stream, scores, sampled, workspace, out);
    } else {
      PF_LAUNCH((cut_kernel<false, kRelative>), grid, kSelectThreads, 0, stream, scores, sampled, workspace, out);
    }
  });
}

}  // namespace pecker_fast
