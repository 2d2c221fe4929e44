// select, threshold_mask, radix_histogram and magnitude_sums on CUDA tensors: checks, memory and launches.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/radix_key.h"
#include "cuda/select.h"
#include "cuda_checks.h"

namespace pecker_fast {
namespace {

using MaskTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

using OptionalTensorList = std::optional<TensorList>;

constexpr Dtypes kScoreDtypes = {at::kFloat, at::kBFloat16, at::kHalf};

void check_rows(const char* name, const Tensor& rows, at::ScalarType dtype, c10::Device device) {
  check_tensor(name, -1, rows, {dtype}, device);
  TORCH_CHECK_VALUE(rows.dim() == 1, name, " has shape ", rows.sizes(), ", expected one dimension");
}

// The scores of a call, checked; the table goes to the device with `upload`.
class ScoreTable {
 public:
  ScoreTable(TensorList scores, c10::Device device, const OptionalTensorList& relative_to = std::nullopt,
             const std::optional<Tensor>& damping = std::nullopt, const char* name = "scores")
      : rows_(scores.size()) {
    check_relative(scores, device, relative_to, damping);
    if (damping) view_.damping = damping->const_data_ptr<float>();
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const Tensor& score = scores[i];
      const auto index = static_cast<std::int32_t>(i);
      check_tensor(name, index, score, kScoreDtypes, device);
      if (relative_to) {
        const Tensor& other = (*relative_to)[i];
        check_tensor("relative_to", index, other, {score.scalar_type()}, device);
        check_size("relative_to", index, other, "scores", score.numel());
        others_.push_back(other.const_data_ptr());
      }
      const ScoreType type = score.scalar_type() == at::kFloat      ? kScoreFloat
                             : score.scalar_type() == at::kBFloat16 ? kScoreBFloat16
                                                                    : kScoreHalf;
      append_score(view_, index, score.const_data_ptr(), score.numel(), type, &rows_[view_.num_tensors]);
    }
  }

  const Scores& view() const { return view_; }

  // As kernel arguments: nothing waits, and a CUDA graph keeps them. Clears `clear_bytes` at `clear` on the way.
  void upload(const at::TensorOptions& options, cudaStream_t stream, void* clear, std::int64_t clear_bytes) {
    const auto others = static_cast<std::int64_t>(others_.size());
    storage_ = at::empty({score_table_words(view_, others)}, options.dtype(at::kLong));
    upload_scores(view_, rows_.data(), others_.data(), others, storage_.mutable_data_ptr<std::int64_t>(), clear,
                  clear_bytes, stream);
  }

 private:
  static void check_relative(TensorList scores, c10::Device device, const OptionalTensorList& relative_to,
                             const std::optional<Tensor>& damping) {
    TORCH_CHECK_VALUE(relative_to.has_value() == damping.has_value(),
                      "give both of relative_to and damping, or neither");
    if (!damping) return;
    TORCH_CHECK_VALUE(relative_to->size() == scores.size(), relative_to->size(), " relative_to for ", scores.size(),
                      " scores");
    check_rows("damping", *damping, at::kFloat, device);
    TORCH_CHECK_VALUE(damping->numel() == static_cast<std::int64_t>(scores.size()), "damping has shape ",
                      damping->sizes(), ", expected [", scores.size(), "]");
  }

  std::vector<ScoreTensor> rows_;
  std::vector<const void*> others_;
  Scores view_ = {};
  Tensor storage_;
};

int multiprocessors(c10::Device device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index()), "select");
  return count;
}

// Allocates results and workspace; launch(scores, rows, plan, workspace, stream) fills them.
template <typename Launch>
MaskTensors mask_rows(ScoreTable& scores, const Tensor& rows, bool may_sample, const Launch& launch) {
  const auto options = rows.options();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const std::int64_t m = rows.numel();
  Tensor words = at::empty({m, scores.view().num_words}, options.dtype(at::kInt));
  Tensor thresholds = at::empty({m}, options.dtype(at::kFloat));
  Tensor counts = at::empty({m}, options.dtype(at::kLong)), nan_count = at::empty({}, options.dtype(at::kLong));
  SelectTuning tuning = default_tuning(multiprocessors(rows.device()));
  if (!may_sample) tuning.min_sampled_bytes = std::numeric_limits<std::int64_t>::max();
  const SelectPlan plan = plan_select(scores.view(), tuning, m);
  // From the caching allocator, which gives the same memory to every call alike.
  Tensor workspace = at::empty({select_workspace_bytes(scores.view(), plan)}, options.dtype(at::kByte));
  scores.upload(options, stream, workspace.mutable_data_ptr(),
                select_cleared_bytes(scores.view(), plan, !may_sample));
  const MaskRows out = {words.mutable_data_ptr<std::int32_t>(), thresholds.mutable_data_ptr<float>(),
                        counts.mutable_data_ptr<std::int64_t>(), nan_count.mutable_data_ptr<std::int64_t>()};
  launch(scores.view(), m, out, plan, workspace.mutable_data_ptr(), stream);
  return {words, thresholds, counts, nan_count};
}

MaskTensors select_cuda(TensorList scores, const Tensor& ks, bool ties_all, OptionalTensorList relative_to,
                        const std::optional<Tensor>& damping) {
  check_rows("ks", ks, at::kLong, ks.device());
  ScoreTable table(scores, ks.device(), relative_to, damping);
  const c10::DeviceGuard guard(ks.device());
  return mask_rows(table, ks, true, [&](const Scores& view, std::int64_t m, const MaskRows& out,
                                        const SelectPlan& plan, void* workspace, cudaStream_t stream) {
    launch_select(view, ks.const_data_ptr<std::int64_t>(), m, ties_all, out, plan, workspace, stream);
  });
}

MaskTensors threshold_mask_cuda(TensorList scores, const Tensor& keys, const Tensor& tie_limits,
                                OptionalTensorList relative_to, const std::optional<Tensor>& damping) {
  check_rows("keys", keys, at::kInt, keys.device());
  check_rows("tie_limits", tie_limits, at::kLong, keys.device());
  TORCH_CHECK_VALUE(keys.numel() == tie_limits.numel(), "keys has ", keys.numel(), " rows and tie_limits ",
                    tie_limits.numel());
  ScoreTable table(scores, keys.device(), relative_to, damping);
  const c10::DeviceGuard guard(keys.device());
  return mask_rows(table, keys, false, [&](const Scores& view, std::int64_t m, const MaskRows& out,
                                           const SelectPlan& plan, void* workspace, cudaStream_t stream) {
    launch_threshold_mask(view, keys.const_data_ptr<std::int32_t>(), tie_limits.const_data_ptr<std::int64_t>(), m, out,
                          plan, workspace, stream);
  });
}

Tensor radix_histogram_cuda(TensorList scores, const Tensor& prefixes, std::int64_t level,
                            OptionalTensorList relative_to, const std::optional<Tensor>& damping) {
  check_rows("prefixes", prefixes, at::kInt, prefixes.device());
  TORCH_CHECK_VALUE(level >= 0 && level <= 2, "level is ", level, ", expected 0 to 2");
  ScoreTable table(scores, prefixes.device(), relative_to, damping);
  const c10::DeviceGuard guard(prefixes.device());
  const auto options = prefixes.options();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const std::int64_t bins = std::int64_t{1} << kRadixBits[level];
  Tensor counts = at::empty({prefixes.numel(), bins}, options.dtype(at::kLong));
  if (counts.numel() == 0) return counts;
  table.upload(options, stream, counts.mutable_data_ptr(), static_cast<std::int64_t>(counts.nbytes()));
  launch_radix_histogram(table.view(), prefixes.const_data_ptr<std::int32_t>(), prefixes.numel(),
                         static_cast<int>(level), counts.mutable_data_ptr<std::int64_t>(),
                         default_tuning(multiprocessors(prefixes.device())).blocks, stream);
  return counts;
}

Tensor magnitude_sums_cuda(TensorList tensors) {
  TORCH_CHECK_VALUE(!tensors.empty(), "tensors is empty, expected at least one");
  const c10::Device device = tensors[0].device();
  ScoreTable table(tensors, device, std::nullopt, std::nullopt, "tensors");
  const c10::DeviceGuard guard(device);
  const auto options = tensors[0].options();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const std::int64_t n = static_cast<std::int64_t>(tensors.size());
  Tensor sums = at::empty({n, kSumColumns}, options.dtype(at::kLong));
  table.upload(options, stream, sums.mutable_data_ptr(), static_cast<std::int64_t>(sums.nbytes()));
  launch_magnitude_sums(table.view(), sums.mutable_data_ptr<std::int64_t>(),
                        default_tuning(multiprocessors(device)).blocks, stream);
  return sums;
}

TORCH_LIBRARY_IMPL(pecker_fast, CUDA, m) {
  m.impl("select", &select_cuda);
  m.impl("threshold_mask", &threshold_mask_cuda);
  m.impl("radix_histogram", &radix_histogram_cuda);
  m.impl("magnitude_sums", &magnitude_sums_cuda);
}

}  // namespace
}  // namespace pecker_fast
