// State of a selection on the device, and the steps that select.cu puts together. A step is one kernel; every kernel
// is always enqueued and returns at once if the state has no work for it.
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

// Digits of the selections in the sample and among the candidates.
constexpr int kDigitBits = 13;
constexpr int kDigits = 1 << kDigitBits;
// Levels of the selection among the candidates, before the last few are sorted out by one block.
constexpr int kCandidateLevels = 3;
constexpr int kFew = kDigits;

// The sample is ordered by key, then by which of 256 equal parts of all positions an entry lies in.
constexpr int kGroupBits = 8;
constexpr int kSampleBits = 31 + kGroupBits;
constexpr int kSampleLevels = kSampleBits / kDigitBits;
static_assert(kSampleBits % kDigitBits == 0);
constexpr u32 kNoSample = 0xffffffffu;

constexpr int kRadixBins = 1 << kRadixBits[0];

// All bits zero at the start.
struct RowState {
  // Entries within `high` are kept, those not within `low` are not; the others are candidates.
  Bound high, low;
  u64 within_high, candidates;
  // A candidate is kept if its composite is at least this.
  u64 kept_from;
  // The value among the candidates is (composite >> dropped_bits) - base.
  u64 base;
  int dropped_bits;
  RadixState finish;
  // Candidates in `few`.
  u64 few;
  // The bracket missed, or there were too many candidates: histograms decide. `cut` then is the mask.
  bool fallback;
  bool count_ties;
  Bound cut;
  u64 tie_limit;
  RadixState radix;
  // Sums over the final mask. The smallest kept key is stored as kInfKey - key, so that zero bits mean none.
  u64 kept;
  u32 smallest;
  // Of the pass with a bracket, and of the one with a cut.
  u64 nans[2];
  // For the bracket: sums over the clusters, with c entries at or above the key of `edge` out of n.
  u32 edge;
  u64 at_least, in_bin;
  u64 sum_cc, sum_cn, sum_nn;
  RadixState bounds[2];
  u32 tickets[16];
};

struct SampleState {
  u64 valid, zeros;
  u32 ticket;
};

// Device pointers of a group of rows; of arrays by row this is the first row's.
struct Workspace {
  RowState* rows;
  SampleState* sample;
  // kDigits: the sample's first level. 2 * kDigits a row: one level of two selections.
  u32* sample_histogram;
  u32* level_histograms;
  // kRadixBins a row.
  u64* radix_histograms;
  // num_chunks a row: entries at the threshold.
  u32* chunk_ties;
  // Of sampled selections only. The sample is no longer needed when the first candidate comes: they share memory.
  u64* few;  // kFew a row
  u32* sample_keys;
  u64* candidates;  // capacity a row
  std::int64_t capacity;
  int position_bits;
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

// select_mask.cu: the passes that write mask words. `always`: for rows that are not in need of a fallback too.
void write_bracket_masks(const Scores& scores, const SelectPlan& plan, const std::int64_t* ks, bool ties_all,
                         const Workspace& workspace, const MaskGroup& out, cudaStream_t stream);
void write_cut_masks(const Scores& scores, int blocks, bool always, bool threshold_given, const Workspace& workspace,
                     const MaskGroup& out, cudaStream_t stream);

// select_finish.cu: the exact choice among the candidates, and their bits.
void finish_candidates(const Scores& scores, const SelectPlan& plan, const Workspace& workspace, const MaskGroup& out,
                       cudaStream_t stream);

// select_radix.cu: selection by histograms, and where the last kept tie is. Fills cut.
void radix_select(const Scores& scores, int blocks, const std::int64_t* ks, int rows, bool ties_all, bool always,
                  const Workspace& workspace, cudaStream_t stream);
void prepare_thresholds(const Scores& scores, const std::int32_t* keys, const std::int64_t* tie_limits, int rows,
                        const Workspace& workspace, cudaStream_t stream);
void locate_ties(const Scores& scores, int blocks, int rows, bool always, const Workspace& workspace,
                 cudaStream_t stream);

inline unsigned score_grid(const Scores& scores, int blocks) {
  const std::int64_t wanted = scores.num_chunks < blocks ? scores.num_chunks : blocks;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted);
}

// A grid over the scores for each row.
inline dim3 score_grid(const Scores& scores, int blocks, int rows) {
  return dim3(score_grid(scores, blocks), static_cast<unsigned>(rows));
}

// One level of a selection: counts the digits of value(i), 0 <= i < n, in `histogram` (zero before and after), and the
// last block takes the next digit into *state. Returns true in that block, once it has done so; all its threads may
// then read the new state from *result.
template <typename Value>
__device__ __forceinline__ bool radix_level(RadixState* state, u32* histogram, u32* ticket, std::int64_t n,
                                            Value&& value, RadixState* result) {
  __shared__ u32 bins[kDigits];
  const RadixState before = *state;
  const int shift = before.bits > kDigitBits ? before.bits - kDigitBits : 0;
  const int digits = 1 << (before.bits - shift);
  for (int bin = threadIdx.x; bin < digits; bin += kSelectThreads) bins[bin] = 0;
  __syncthreads();
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kSelectThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x; i < n; i += stride) {
    const u64 v = value(i);
    if ((before.bits < 64 ? v >> before.bits : 0) == before.prefix) {
      atomicAdd(&bins[static_cast<u32>(v >> shift) & (digits - 1)], 1u);
    }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < digits; bin += kSelectThreads) {
    if (bins[bin] != 0) atomicAdd(histogram + bin, bins[bin]);
  }
  if (!is_last_block(ticket, gridDim.x)) return false;
  const RankedBin found = find_rank(histogram, digits, before.rank);
  for (int bin = threadIdx.x; bin < digits; bin += kSelectThreads) histogram[bin] = 0;
  *result = before;
  result->prefix = (before.prefix << (before.bits - shift)) | static_cast<u64>(found.bin);
  result->rank = before.rank - found.above;
  result->count = found.count;
  result->bits = shift;
  result->done = shift == 0;
  if (threadIdx.x == 0) *state = *result;
  return true;
}

}  // namespace pecker_fast
