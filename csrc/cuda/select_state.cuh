// State of a selection on the device, and the kernels that select.cu puts together. Every kernel is always enqueued; it
// returns at once if the state has no work for it.
#pragma once

#include "select_entries.cuh"

namespace pecker_fast {

// One radix selection in progress: the value of rank `rank` (1 is the largest) among the `count` whose bits above the
// lowest `bits` are `prefix`.
struct RadixState {
  u64 prefix, rank, count;
  int bits;
  bool done;
};

// Digits that histograms in shared memory count.
constexpr int kDigitBits = 13;
constexpr int kDigits = 1 << kDigitBits;
// So many candidates are sorted out by one block.
constexpr int kFew = kDigits;

// The sample is ordered by key, then by which of 256 equal parts of all positions an entry lies in.
constexpr int kGroupBits = 8;
constexpr int kKeyBits = 31;
// Bins for the variance of the sample, by the highest bits of a key.
constexpr int kPairBits = 11;
constexpr int kPairBins = 1 << kPairBits;

// The digit that select_radix.cu counts chunk by chunk: the lowest bits of a key that are not spare.
constexpr int kRestBits = 5;
constexpr int kRestBins = 1 << kRestBits;

// Places of the counters of finished blocks in RowState. Kernels that share one work on different rows.
// There are two bounds.
enum Ticket : int {
  kBoundTicket,
  kBracketTicket = 2,
  kCandidateTicket,
  kRadixTicket,
  kRestTicket,
  kCutTicket,
  kTickets,
};

// All bits zero at the start.
struct RowState {
  // Entries within `high` are kept, those not within `low` are not; the others are candidates.
  Bound high, low;
  u64 within_high, candidates;
  // The choice among the candidates, whose values are (composite >> dropped_bits) - base. `done`: those with at least
  // this prefix are kept.
  u64 base;
  int dropped_bits;
  RadixState finish;
  // Candidates in `few`.
  u64 few;
  // The kept candidates are in the mask, and the results are written.
  bool finished;
  // The bracket missed, or there were too many candidates: histograms decide. `cut` then is the mask.
  bool fallback;
  Bound cut;
  RadixState radix;
  // Sums over the kept entries: the candidates or, if histograms decide, all. The smallest kept key is stored as
  // kInfKey - key, so that zero bits mean none.
  u64 kept;
  u32 smallest;
  // Of the pass with a bracket, and of the one with a cut.
  u64 nans[2];
  // The two sides of the bracket in the sample, and how many sampled entries a side may be rounded by.
  RadixState bounds[2];
  u64 tolerance;
  u32 tickets[kTickets];
};

struct SampleState {
  // `squares`: the sum of the squares of the clusters' sizes.
  u64 valid, zeros, squares;
  u32 ticket;
};

// Device pointers of a group of rows; of arrays by row this is the first row's.
struct Workspace {
  RowState* rows;
  // kDigits u64 a row. Sample and candidates use it as two histograms of u32. All zero between two kernels that use it.
  u64* histograms;
  // row_stride a row: its candidates or, if histograms decide, kRestBins 16-bit counts a chunk. The counts begin with
  // zeros only if a threshold is given. The sample, which has the same memory, is no longer needed when they come.
  u64* row_memory;
  u32* sample_keys;
  std::int64_t row_stride;
  // Of sampled selections only.
  SampleState* sample;
  u32* sample_histogram;  // kDigits
  u32* pair_histogram;    // kPairBins
  u64* few;               // kFew a row
  std::int64_t capacity;  // candidates of a row
  CompositeForm form;

  __device__ __forceinline__ u64* histogram(int row) const {
    return histograms + static_cast<std::int64_t>(row) * kDigits;
  }
  // which: 0 or 1.
  __device__ __forceinline__ u32* half_histogram(int row, int which) const {
    return reinterpret_cast<u32*>(histogram(row)) + which * kDigits;
  }
  __device__ __forceinline__ u64* candidates(int row) const { return row_memory + row * row_stride; }
  __device__ __forceinline__ u32* chunk_counts(int row) const { return reinterpret_cast<u32*>(candidates(row)); }
};

// Results of a group of rows. nan_count is null for all groups but the first, words for a call without rows.
struct MaskGroup {
  std::int32_t* words;
  float* thresholds;
  std::int64_t* counts;
  std::int64_t* nan_count;
  int rows;
};

// In the kernels blockIdx.y is the row, unless noted otherwise.

// select_sample.cu: brackets around the ranks ks. Fills high and low.
void bracket_ranks(const Scores& scores, const SelectPlan& plan, const std::int64_t* ks, int rows, bool ties_all,
                   const Workspace& workspace, cudaStream_t stream);

// select_mask.cu: the passes that write mask words.
void write_bracket_masks(const Scores& scores, const SelectPlan& plan, const std::int64_t* ks, bool ties_all,
                         const Workspace& workspace, const MaskGroup& out, cudaStream_t stream);
// sampled: only for rows in need of a fallback; the candidates of the others are finished.
void write_cut_masks(const Scores& scores, int blocks, bool sampled, bool threshold_given, const Workspace& workspace,
                     const MaskGroup& out, cudaStream_t stream);

// select_radix.cu: selection by histograms, and where the last kept tie is. Fills cut. sampled: as above.
void radix_select(const Scores& scores, int blocks, const std::int64_t* ks, bool ties_all, bool sampled,
                  const Workspace& workspace, const MaskGroup& out, cudaStream_t stream);
void cut_at_thresholds(const Scores& scores, int blocks, const std::int32_t* keys, const std::int64_t* tie_limits,
                       const Workspace& workspace, const MaskGroup& out, cudaStream_t stream);

inline unsigned score_grid(const Scores& scores, int blocks) {
  const std::int64_t wanted = scores.num_chunks < blocks ? scores.num_chunks : blocks;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted);
}

// A grid over the scores for each row.
inline dim3 score_grid(const Scores& scores, int blocks, int rows) {
  return dim3(score_grid(scores, blocks), static_cast<unsigned>(rows));
}

__device__ __forceinline__ int next_shift(const RadixState& state) {
  return state.bits > kDigitBits ? state.bits - kDigitBits : 0;
}

// The state after the next digit is known.
__device__ __forceinline__ RadixState with_digit(const RadixState& before, const RankedBin& found) {
  const int shift = next_shift(before);
  RadixState state = before;
  state.prefix = (before.prefix << (before.bits - shift)) | static_cast<u64>(found.bin);
  state.rank = before.rank - found.above;
  state.count = found.count;
  state.bits = shift;
  state.done = shift == 0;
  return state;
}

// Whole block: counts the next digits of value(i), i = first, first + stride, ... < n, in shared memory. Returns the
// number of bins.
template <typename Value>
__device__ __forceinline__ int count_values(const RadixState& state, u32* bins, std::int64_t first, std::int64_t stride,
                                            std::int64_t n, const Value& value) {
  const int shift = next_shift(state), digits = 1 << (state.bits - shift);
  for (int bin = threadIdx.x; bin < digits; bin += kSelectThreads) bins[bin] = 0;
  __syncthreads();
  for (std::int64_t i = first; i < n; i += stride) {
    const u64 v = value(i);
    if ((state.bits < 64 ? v >> state.bits : 0) == state.prefix) {
      atomicAdd(&bins[static_cast<u32>(v >> shift) & (digits - 1)], 1u);
    }
  }
  __syncthreads();
  return digits;
}

// One level by the block alone, among value(i), 0 <= i < n. All threads get the new state.
template <typename Value>
__device__ __forceinline__ RadixState block_level(const RadixState& state, u32* bins, std::int64_t n,
                                                  const Value& value) {
  const int digits = count_values(state, bins, threadIdx.x, kSelectThreads, n, value);
  return with_digit(state, find_rank_of(digits, state.rank, [&](int bin) { return u64{bins[bin]}; }));
}

// One level by all blocks (gridDim.x): the digits are added up in `histogram` (zero before and after), and the last
// block takes the next one into *state. Returns true in that block, once it has done so; all its threads may then read
// the new state from *result. `bins`: kDigits in shared memory.
template <typename Value>
__device__ __forceinline__ bool radix_level(RadixState* state, u32* bins, u32* histogram, u32* ticket, std::int64_t n,
                                            const Value& value, RadixState* result) {
  const RadixState before = *state;
  const int digits = count_values(before, bins, static_cast<std::int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x,
                                  static_cast<std::int64_t>(gridDim.x) * kSelectThreads, n, value);
  for (int bin = threadIdx.x; bin < digits; bin += kSelectThreads) {
    if (bins[bin] != 0) atomicAdd(histogram + bin, bins[bin]);
  }
  if (!is_last_block(ticket, gridDim.x)) return false;
  *result = with_digit(before, find_rank(histogram, digits, before.rank));
  for (int bin = threadIdx.x; bin < digits; bin += kSelectThreads) histogram[bin] = 0;
  if (threadIdx.x == 0) *state = *result;
  return true;
}

}  // namespace pecker_fast
