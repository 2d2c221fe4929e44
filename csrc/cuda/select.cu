// Exact global top-k masks: the steps of a call, and its memory.
//
// 1. A sample of all scores gives a bracket around the wanted rank (select_sample.cu).
// 2. One pass over all scores writes the mask of the entries above the bracket and collects those inside
//    (select_mask.cu).
// 3. The right number of these is chosen exactly, and their bits are added (select_finish.cu).
// 4. Where the bracket missed or held more entries than there is room for, histograms of all scores decide instead
//    (select_radix.cu); otherwise their kernels end at once.
// Entries are compared as (key, position), which are all different: no input has more ties for it than another.
//
// Rows of one call share the sample; each makes its own passes.
#include <algorithm>

#include "select_state.cuh"

namespace pecker_fast {
namespace {

template <typename T>
T* take(char*& next, std::int64_t count) {
  T* const p = reinterpret_cast<T*>(next);
  next += (count * static_cast<std::int64_t>(sizeof(T)) + 255) / 256 * 256;
  return p;
}

// Cuts the workspace into parts. The first *zero_bytes have to be zero at the start.
std::int64_t lay_out(const Scores& scores, const SelectPlan& plan, std::int64_t rows, void* memory,
                     Workspace* workspace, std::int64_t* zero_bytes) {
  char* const start = static_cast<char*>(memory);
  char* next = start;
  workspace->rows = take<RowState>(next, std::max<std::int64_t>(rows, 1));
  workspace->sample = take<SampleState>(next, 1);
  workspace->sample_histogram = take<u32>(next, kDigits);
  workspace->level_histogram = take<u32>(next, 2 * kDigits);
  workspace->radix_histogram = take<u64>(next, kRadixBins);
  workspace->chunk_ties = take<u32>(next, scores.num_chunks);
  *zero_bytes = next - start;
  workspace->sample_keys = nullptr;
  workspace->candidates = nullptr;
  workspace->capacity = plan.sampled ? plan.capacity : 0;
  if (plan.sampled) {
    workspace->sample_keys = take<u32>(next, std::int64_t{8} << plan.log_clusters);
    workspace->candidates = take<u64>(next, plan.capacity);
  }
  return next - start;
}

Workspace prepare(const Scores& scores, const SelectPlan& plan, std::int64_t rows, void* memory, cudaStream_t stream) {
  Workspace workspace;
  std::int64_t zero_bytes;
  lay_out(scores, plan, rows, memory, &workspace, &zero_bytes);
  check_cuda(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(zero_bytes), stream), "select");
  return workspace;
}

MaskRow row_of(const MaskRows& out, const Scores& scores, std::int64_t row) {
  return {out.words + row * scores.num_words, out.thresholds + row, out.counts + row,
          row == 0 ? out.nan_count : nullptr};
}

// A call without rows still counts NaN.
void count_nan_only(const Scores& scores, const SelectPlan& plan, const MaskRows& out, const Workspace& workspace,
                    cudaStream_t stream) {
  prepare_thresholds(scores, nullptr, nullptr, 0, workspace.rows, stream);
  write_cut_mask(scores, plan.tuning.blocks, true, false, workspace.rows, {nullptr, nullptr, nullptr, out.nan_count},
                 stream);
}

}  // namespace

SelectPlan plan_select(const Scores& scores, const SelectTuning& tuning) {
  SelectPlan plan = {tuning, false, 0, 0};
  // At least 16 clusters' worth of entries for each that is read.
  const std::int64_t octets = scores.num_words * 4;
  while (plan.log_clusters < tuning.max_log_clusters && (octets >> (plan.log_clusters + 5)) > 0) ++plan.log_clusters;
  // Composites have room for this many positions.
  const bool positions_fit = scores.num_words <= static_cast<std::int64_t>(kEndPosition / 32);
  plan.sampled = positions_fit && scores.num_words > 0 && scores.numel >= tuning.min_sampled;
  // A bracket of +-5 sigma with all entries of a cluster alike is 1.4 % of the ranks for 2 ** 20 sampled entries, and
  // the rounding to 1/256 of the positions adds 0.8 % at most.
  plan.capacity = tuning.capacity > 0 ? tuning.capacity : scores.numel / (scores.numel < (1 << 25) ? 16 : 32) + 1024;
  return plan;
}

std::int64_t select_workspace_bytes(const Scores& scores, const SelectPlan& plan, std::int64_t rows) {
  Workspace workspace;
  std::int64_t zero_bytes;
  return lay_out(scores, plan, rows, nullptr, &workspace, &zero_bytes);
}

void launch_select(const Scores& scores, const std::int64_t* ks, std::int64_t rows, bool ties_all, const MaskRows& out,
                   const SelectPlan& plan, void* memory, cudaStream_t stream) {
  const Workspace workspace = prepare(scores, plan, rows, memory, stream);
  if (rows == 0) return count_nan_only(scores, plan, out, workspace, stream);
  const int blocks = plan.tuning.blocks;
  if (plan.sampled) take_sample(scores, plan, ks, rows, workspace, stream);
  for (std::int64_t row = 0; row < rows; ++row) {
    RowState* const state = workspace.rows + row;
    const MaskRow result = row_of(out, scores, row);
    if (plan.sampled) {
      bracket_rank(scores, plan, ks + row, ties_all, state, workspace, stream);
      write_bracket_mask(scores, plan, ks + row, ties_all, state, workspace, result, stream);
      finish_candidates(plan, state, workspace, result, stream);
    }
    radix_select(scores, blocks, ks + row, ties_all, !plan.sampled, state, workspace, stream);
    locate_ties(scores, blocks, !plan.sampled, state, workspace, stream);
    write_cut_mask(scores, blocks, !plan.sampled, false, state, result, stream);
  }
}

void launch_threshold_mask(const Scores& scores, const std::int32_t* keys, const std::int64_t* tie_limits,
                           std::int64_t rows, const MaskRows& out, const SelectPlan& plan, void* memory,
                           cudaStream_t stream) {
  const Workspace workspace = prepare(scores, plan, rows, memory, stream);
  if (rows == 0) return count_nan_only(scores, plan, out, workspace, stream);
  prepare_thresholds(scores, keys, tie_limits, rows, workspace.rows, stream);
  for (std::int64_t row = 0; row < rows; ++row) {
    RowState* const state = workspace.rows + row;
    locate_ties(scores, plan.tuning.blocks, true, state, workspace, stream);
    write_cut_mask(scores, plan.tuning.blocks, true, true, state, row_of(out, scores, row), stream);
  }
}

}  // namespace pecker_fast
