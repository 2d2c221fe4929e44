// Exact global top-k masks: the steps of a call, and its memory.
//
// 1. A sample of all scores gives a bracket around the wanted rank (select_sample.cu).
// 2. One pass over all scores writes the mask of the entries above the bracket and collects those inside
//    (select_mask.cu).
// 3. The right number of these is chosen exactly, and their bits are added (select_candidates.cuh). If the bracket
//    missed or held more entries than fit, histograms of all scores decide instead (select_radix.cu). Rows of both
//    kinds share the launches: four, or three for 16-bit scores, of which nearly always the first alone has work.
// Entries are compared as (key, position), which are all different, so no input has ties.
//
// Up to kMaxRows rows of a call share the sample and every pass over the scores.
#include <algorithm>
#include <cmath>
#include <vector>

#include "multi_tensor.h"
#include "select_state.cuh"

namespace pecker_fast {
namespace {

constexpr std::int64_t kClusterBytes = 32;

std::int64_t padded(std::int64_t bytes) { return (bytes + 255) / 256 * 256; }

template <typename T>
T* take(char*& next, std::int64_t count) {
  T* const p = reinterpret_cast<T*>(next);
  next += padded(count * static_cast<std::int64_t>(sizeof(T)));
  return p;
}

// Of each row: room for its candidates or, if histograms decide, for the counts of the chunks.
std::int64_t row_stride(const Scores& scores, const SelectPlan& plan) {
  constexpr std::int64_t kChunkBytes = kRestBins * sizeof(std::uint16_t);
  return std::max<std::int64_t>(plan.sampled ? plan.capacity : 0, scores.num_chunks * kChunkBytes / sizeof(u64));
}

// The part of the workspace for that. The sample shares it.
std::int64_t shared_bytes(const Scores& scores, const SelectPlan& plan) {
  const std::int64_t bytes = plan.group * row_stride(scores, plan) * static_cast<std::int64_t>(sizeof(u64));
  return padded(plan.sampled ? std::max(bytes, kClusterBytes << plan.log_clusters) : bytes);
}

// Cuts the workspace into parts. The first *clear_bytes must be zero at the start of a group of rows.
std::int64_t lay_out(const Scores& scores, const SelectPlan& plan, bool threshold_given, void* memory,
                     Workspace* workspace, std::int64_t* clear_bytes) {
  char* const start = static_cast<char*>(memory);
  char* next = start;
  const std::int64_t rows = plan.group;
  *workspace = {};
  workspace->rows = take<RowState>(next, rows);
  workspace->histograms = take<u64>(next, kDigits * rows);
  if (plan.sampled) {
    workspace->sample = take<SampleState>(next, 1);
    workspace->sample_histogram = take<u32>(next, kDigits);
    workspace->pair_histogram = take<u32>(next, kPairBins);
  }
  *clear_bytes = next - start;
  workspace->form = {1, spare_key_bits(scores)};
  while (scores.num_words * kWordBits > std::int64_t{1} << workspace->form.position_bits) {
    ++workspace->form.position_bits;
  }
  if (plan.sampled) {
    workspace->capacity = plan.capacity;
    workspace->few = take<u64>(next, kFew * rows);
  }
  workspace->row_stride = row_stride(scores, plan);
  workspace->row_memory = reinterpret_cast<u64*>(next);
  workspace->sample_keys = reinterpret_cast<u32*>(next);
  next += shared_bytes(scores, plan);
  // The chunk counts too.
  if (threshold_given) *clear_bytes = next - start;
  return next - start;
}

// The workspace of the group of rows that begins with `row`. The caller has cleared it for the first one.
Workspace prepare(const Scores& scores, const SelectPlan& plan, bool threshold_given, std::int64_t row, void* memory,
                  cudaStream_t stream) {
  Workspace workspace;
  std::int64_t clear_bytes;
  lay_out(scores, plan, threshold_given, memory, &workspace, &clear_bytes);
  if (row > 0) check_cuda(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(clear_bytes), stream), "select");
  return workspace;
}

// Calls body(first row, results) for the groups of rows of a call.
template <typename Body>
void for_each_group(const Scores& scores, const SelectPlan& plan, std::int64_t rows, const MaskRows& out,
                    const Body& body) {
  for (std::int64_t row = 0; row < rows; row += plan.group) {
    body(row, MaskGroup{out.words + row * scores.num_words, out.thresholds + row, out.counts + row,
                        row == 0 ? out.nan_count : nullptr,
                        static_cast<int>(std::min<std::int64_t>(plan.group, rows - row))});
  }
}

// A call without rows still counts NaN.
void count_nan_only(const Scores& scores, const SelectPlan& plan, const MaskRows& out, void* memory,
                    cudaStream_t stream) {
  const Workspace workspace = prepare(scores, plan, true, 0, memory, stream);
  write_cut_masks(scores, plan.tuning.blocks, false, true, workspace, {nullptr, nullptr, nullptr, out.nan_count, 1},
                  stream);
}

}  // namespace

SelectPlan plan_select(const Scores& scores, const SelectTuning& tuning, std::int64_t rows) {
  SelectPlan plan = {tuning, false, 0, static_cast<int>(std::clamp<std::int64_t>(rows, 1, kMaxRows)), 0};
  // Composites have room for this many positions.
  const bool positions_fit = scores.num_words <= static_cast<std::int64_t>(kEndPosition / 32);
  if (!positions_fit || scores.num_words == 0 || scores.bytes < tuning.min_sampled_bytes) return plan;
  const std::int64_t octets = scores.num_words * 4;
  const auto plan_group = [&](int group) {
    plan.group = group;
    plan.capacity = tuning.capacity;
    // At most one cluster in eight is read.
    plan.log_clusters = 0;
    while (plan.log_clusters < tuning.max_log_clusters && (octets >> (plan.log_clusters + 4)) > 0) ++plan.log_clusters;
    if (tuning.capacity > 0) return true;
    // One row takes 5.5 % of the scores' bytes, each further one less than its mask: a ninth of a byte an entry.
    plan.sampled = true;
    plan.capacity = 0;
    const std::int64_t budget = scores.bytes * 55 / 1000 + (group - 1) * scores.numel / 9;
    Workspace workspace;
    std::int64_t clear_bytes;
    const std::int64_t log_clusters = plan.log_clusters;
    plan.log_clusters = 0;
    const std::int64_t rest = budget + shared_bytes(scores, plan) -
                              lay_out(scores, plan, false, nullptr, &workspace, &clear_bytes);
    plan.log_clusters = static_cast<int>(log_clusters);
    while (plan.log_clusters > 0 && kClusterBytes << plan.log_clusters > rest) --plan.log_clusters;
    plan.capacity = std::max<std::int64_t>(rest, 0) / (group * static_cast<std::int64_t>(sizeof(u64)));
    // Share of the entries in a bracket around the median, if the entries of a cluster are independent; if all of them
    // are equal, it is 2.8 times as wide. Several rows share a pass only if there is room for the rounding to parts of
    // the positions too, which is this large if all entries have one key.
    const double n = std::ldexp(8.0, plan.log_clusters);
    const double rounding = group > 1 ? 2.0 / (1 << kGroupBits) : 0.0;
    const double share = 2.1 * (tuning.sigmas * std::sqrt(n) / 2 + tuning.slack) / n + rounding;
    return plan.capacity > 0 && static_cast<double>(plan.capacity) >= share * static_cast<double>(scores.numel);
  };
  const SelectPlan by_histograms = plan;
  for (int group = plan.group;; group = (group + 1) / 2) {
    if (plan_group(group)) break;
    if (group == 1) return by_histograms;
  }
  plan.sampled = true;
  return plan;
}

std::int64_t select_workspace_bytes(const Scores& scores, const SelectPlan& plan) {
  Workspace workspace;
  std::int64_t clear_bytes;
  return lay_out(scores, plan, false, nullptr, &workspace, &clear_bytes);
}

std::int64_t select_cleared_bytes(const Scores& scores, const SelectPlan& plan, bool threshold_given) {
  Workspace workspace;
  std::int64_t clear_bytes;
  lay_out(scores, plan, threshold_given, nullptr, &workspace, &clear_bytes);
  return clear_bytes;
}

std::int64_t score_table_words(const Scores& scores, std::int64_t num_others) {
  static_assert(sizeof(ScoreTensor) % sizeof(std::int64_t) == 0);
  return scores.num_tensors * static_cast<std::int64_t>(sizeof(ScoreTensor) / sizeof(std::int64_t)) + num_others;
}

void upload_scores(Scores& scores, const ScoreTensor* rows, const void* const* others, std::int64_t num_others,
                   std::int64_t* memory, void* clear, std::int64_t clear_bytes, cudaStream_t stream) {
  const std::int64_t row_words = score_table_words(scores, 0);
  std::vector<std::int64_t> words(score_table_words(scores, num_others));
  std::copy_n(reinterpret_cast<const std::int64_t*>(rows), row_words, words.begin());
  std::copy_n(reinterpret_cast<const std::int64_t*>(others), num_others, words.begin() + row_words);
  scores.tensors = reinterpret_cast<const ScoreTensor*>(memory);
  scores.others = num_others > 0 ? reinterpret_cast<const void* const*>(memory + row_words) : nullptr;
  upload_words(words.data(), static_cast<std::int64_t>(words.size()), memory, stream, static_cast<std::int64_t*>(clear),
               clear_bytes / static_cast<std::int64_t>(sizeof(std::int64_t)));
}

void launch_select(const Scores& scores, const std::int64_t* ks, std::int64_t rows, bool ties_all, const MaskRows& out,
                   const SelectPlan& plan, void* memory, cudaStream_t stream) {
  if (rows == 0) return count_nan_only(scores, plan, out, memory, stream);
  const int blocks = plan.tuning.blocks;
  for_each_group(scores, plan, rows, out, [&](std::int64_t first, const MaskGroup& group) {
    const Workspace workspace = prepare(scores, plan, false, first, memory, stream);
    const std::int64_t* const group_ks = ks + first;
    if (plan.sampled) {
      bracket_ranks(scores, plan, group_ks, group.rows, ties_all, workspace, stream);
      write_bracket_masks(scores, plan, group_ks, ties_all, workspace, group, stream);
    }
    radix_select(scores, blocks, group_ks, ties_all, plan.sampled, workspace, group, stream);
    write_cut_masks(scores, blocks, plan.sampled, false, workspace, group, stream);
  });
}

void launch_threshold_mask(const Scores& scores, const std::int32_t* keys, const std::int64_t* tie_limits,
                           std::int64_t rows, const MaskRows& out, const SelectPlan& plan, void* memory,
                           cudaStream_t stream) {
  if (rows == 0) return count_nan_only(scores, plan, out, memory, stream);
  for_each_group(scores, plan, rows, out, [&](std::int64_t first, const MaskGroup& group) {
    const Workspace workspace = prepare(scores, plan, true, first, memory, stream);
    cut_at_thresholds(scores, plan.tuning.blocks, keys + first, tie_limits + first, workspace, group, stream);
    write_cut_masks(scores, plan.tuning.blocks, false, true, workspace, group, stream);
  });
}

}  // namespace pecker_fast
