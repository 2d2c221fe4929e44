// Exact top-k selection on the device: arguments of the launchers. Free of torch headers; select.cu has the method.
//
// Everything is enqueued on one stream. Nothing synchronises with the host, and neither the launches nor the memory
// depend on the data, so that a call can be captured in a CUDA graph. tests/test_cuda_launches.py counts the launches.
#pragma once

#include <cstdint>

#include "common/bit_words.h"
#include "common/host_device.h"
#include "launch.h"

namespace pecker_fast {

// The host and device types of all counters: what CUDA's 64-bit atomics take.
using u64 = unsigned long long;
using u32 = unsigned int;

enum ScoreType : std::int32_t { kScoreFloat = 0, kScoreBFloat16 = 1, kScoreHalf = 2 };

// Entries that a block handles at a time; no chunk spans two tensors.
constexpr int kSelectChunk = 8192;

struct ScoreTensor {
  const void* data;
  std::int64_t numel;
  // Words and chunks of the tensors before this one.
  std::int64_t first_word;
  std::int64_t first_chunk;
  std::int32_t type;
  // Number of the tensor, empty ones included.
  std::int32_t index;
};

// All scores. The table is on the device, in order and without empty tensors.
struct Scores {
  const ScoreTensor* tensors;
  int num_tensors;
  std::int64_t num_chunks;
  std::int64_t num_words;
  std::int64_t numel;
  std::int64_t bytes;
  // Whether one of the tensors is of this type.
  bool has_float, has_half;
  // Device pointers, by the number of the tensor: the denominators of relative scores, of the same type and size, and
  // the damping that is added to their magnitudes. Null if the scores themselves are ranked; otherwise quotients are
  // (see common/radix_key.h).
  const void* const* others;
  const float* damping;
};

// Fills one row of the table on the host; call for the tensors in order, starting with scores = {}. An empty tensor
// takes no row (returns false).
inline bool append_score(Scores& scores, std::int32_t index, const void* data, std::int64_t numel, ScoreType type,
                         ScoreTensor* row) {
  if (numel == 0) return false;
  *row = {data, numel, scores.num_words, scores.num_chunks, type, index};
  scores.num_tensors += 1;
  scores.num_chunks += (numel + kSelectChunk - 1) / kSelectChunk;
  scores.num_words += word_count(numel);
  scores.numel += numel;
  scores.bytes += numel * (type == kScoreFloat ? 4 : 2);
  scores.has_float |= type == kScoreFloat;
  scores.has_half |= type == kScoreHalf;
  return true;
}

// The lowest bits of all keys that are 0: 16-bit entries have fewer keys. Quotients have all.
PF_HD inline int spare_key_bits(const Scores& scores) {
  return scores.damping != nullptr || scores.has_float ? 0 : scores.has_half ? 13 : 16;
}

// Numbers that do not change the result. The tests make them small to reach every path.
struct SelectTuning {
  // Blocks of the kernels that read all scores, and of those that read the sample or the candidates.
  int blocks;
  // Fewer bytes of scores than this are selected by histograms alone: they stay in a GPU's second-level cache.
  std::int64_t min_sampled_bytes;
  // The sample has at most 2 ** max_log_clusters clusters of 8 adjacent entries.
  int max_log_clusters;
  // Half the width of the bracket: sigmas * standard deviation + slack, in ranks of the sample.
  float sigmas;
  float slack;
  // Room for candidates of each row; 0: as much as the memory that a selection may take.
  std::int64_t capacity;
};

inline SelectTuning default_tuning(int multiprocessors) { return {4 * multiprocessors, 1 << 24, 17, 5.0f, 16.0f, 0}; }

// Rows that one pass over the scores works on at most.
constexpr int kMaxRows = 8;

// How a selection runs; derived from Scores and SelectTuning.
struct SelectPlan {
  SelectTuning tuning;
  bool sampled;
  int log_clusters;
  // Number of rows selected together, and the candidates that each may have.
  int group;
  std::int64_t capacity;
};

// For a call with `rows` rows.
SelectPlan plan_select(const Scores& scores, const SelectTuning& tuning, std::int64_t rows);

// Bytes of workspace (aligned to 256 bytes) of launch_select and launch_threshold_mask.
std::int64_t select_workspace_bytes(const Scores& scores, const SelectPlan& plan);

// How many of them must be 0 when launch_select or, if `threshold_given`, launch_threshold_mask is called. The others
// may have any contents.
std::int64_t select_cleared_bytes(const Scores& scores, const SelectPlan& plan, bool threshold_given);

// Words of the table on the device, with `num_others` denominators.
std::int64_t score_table_words(const Scores& scores, std::int64_t num_others);

// Sends the table to `memory` and points scores.tensors and scores.others to it. Clears `clear_bytes` (a multiple of 8)
// at `clear`. One launch for up to 800 tensors, or 666 with denominators.
void upload_scores(Scores& scores, const ScoreTensor* rows, const void* const* others, std::int64_t num_others,
                   std::int64_t* memory, void* clear, std::int64_t clear_bytes, cudaStream_t stream);

// Device pointers to what select and threshold_mask return: words [rows, num_words], thresholds [rows], counts [rows],
// nan_count [1].
struct MaskRows {
  std::int32_t* words;
  float* thresholds;
  std::int64_t* counts;
  std::int64_t* nan_count;
};

void launch_select(const Scores& scores, const std::int64_t* ks, std::int64_t rows, bool ties_all,
                   const MaskRows& out, const SelectPlan& plan, void* workspace, cudaStream_t stream);

void launch_threshold_mask(const Scores& scores, const std::int32_t* keys, const std::int64_t* tie_limits,
                           std::int64_t rows, const MaskRows& out, const SelectPlan& plan, void* workspace,
                           cudaStream_t stream);

// sums: int64 [tensors, kSumColumns], to which the scores' own magnitudes are added (common/radix_key.h).
void launch_magnitude_sums(const Scores& scores, std::int64_t* sums, int blocks, cudaStream_t stream);

// counts: int64 [rows, bins], to which the entries are added; bins = 2048 at level 0 and 1024 at levels 1 and 2.
void launch_radix_histogram(const Scores& scores, const std::int32_t* prefixes, std::int64_t rows, int level,
                            std::int64_t* counts, int blocks, cudaStream_t stream);

}  // namespace pecker_fast
