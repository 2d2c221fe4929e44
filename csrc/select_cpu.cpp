// select, threshold_mask, radix_histogram, magnitude_sums and block_counts on the CPU: argument checks and tensors around the selector.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/bit_words.h"
#include "cpu/huge_pages.h"
#include "cpu/selector.h"

namespace pecker_fast {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensorList = std::optional<TensorList>;
using MaskRows = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_rows(const Tensor& rows, const char* op, const char* name, at::ScalarType type) {
  TORCH_CHECK_TYPE(rows.scalar_type() == type, op, ": ", name, " is ", rows.scalar_type(), ", expected ", type);
  TORCH_CHECK_VALUE(rows.device().is_cpu(), op, ": ", name, " is on ", rows.device(), ", expected cpu");
  TORCH_CHECK_VALUE(rows.dim() == 1 && rows.is_contiguous(), op, ": ", name, " has shape ", rows.sizes(),
                    ", expected one contiguous dimension");
}

ScoreTensor checked(const Tensor& t, const char* op, const char* name, std::size_t i) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, op, ": ", name, "[", i, "] has layout ", t.layout(), ", expected strided");
  ParamType type = ParamType::f32;
  switch (t.scalar_type()) {
    case at::kFloat:
      break;
    case at::kBFloat16:
      type = ParamType::bf16;
      break;
    case at::kHalf:
      type = ParamType::fp16;
      break;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name, "[", i, "] is ", t.scalar_type(),
                       ", expected float32, bfloat16 or float16");
  }
  TORCH_CHECK_VALUE(t.device().is_cpu(), op, ": ", name, "[", i, "] is on ", t.device(), ", expected cpu");
  TORCH_CHECK_VALUE(t.is_contiguous(), op, ": ", name, "[", i, "] with strides ", t.strides(), " is not contiguous");
  return {t.const_data_ptr(), type, t.numel()};
}

std::vector<ScoreTensor> checked(TensorList list, const char* op, const char* name) {
  std::vector<ScoreTensor> tensors;
  tensors.reserve(list.size());
  for (std::size_t i = 0; i < list.size(); ++i) tensors.push_back(checked(list[i], op, name, i));
  return tensors;
}

void relate(const OptionalTensorList& relative_to, const std::optional<Tensor>& damping, const char* op,
            std::vector<ScoreTensor>* scores) {
  TORCH_CHECK_VALUE(relative_to.has_value() == damping.has_value(), op,
                    ": give both of relative_to and damping, or neither");
  if (!relative_to) return;
  const std::vector<ScoreTensor> others = checked(*relative_to, op, "relative_to");
  TORCH_CHECK_VALUE(others.size() == scores->size(), op, ": ", others.size(), " relative_to for ", scores->size(),
                    " scores");
  check_rows(*damping, op, "damping", at::kFloat);
  TORCH_CHECK_VALUE(damping->numel() == static_cast<std::int64_t>(others.size()), op, ": damping has shape ",
                    damping->sizes(), ", expected [", others.size(), "]");
  for (std::size_t i = 0; i < others.size(); ++i) {
    ScoreTensor& score = (*scores)[i];
    TORCH_CHECK_TYPE(others[i].type == score.type, op, ": relative_to[", i, "] is ", (*relative_to)[i].scalar_type(),
                     ", scores[", i, "] is of another dtype");
    TORCH_CHECK_VALUE(others[i].numel == score.numel, op, ": relative_to[", i, "] has ", others[i].numel, " entries, scores[", i,
                      "] has ", score.numel);
    score.others = others[i].data;
    score.damping = damping->const_data_ptr<float>()[i];
  }
}

void run_tasks(std::int64_t n, const std::function<void(std::int64_t)>& task) {
  at::parallel_for(0, n, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) task(i);
  });
}

Selector make_selector(TensorList scores, const OptionalTensorList& relative_to, const std::optional<Tensor>& damping,
                       const char* op) {
  std::vector<ScoreTensor> tensors = checked(scores, op, "scores");
  relate(relative_to, damping, op, &tensors);
  return Selector(tensors, at::get_num_threads(), run_tasks);
}

MaskRows run(const Selector& selector, std::int64_t rows,
             const std::function<void(std::uint32_t*, RowResult*)>& fill) {
  const auto integers = at::TensorOptions().dtype(at::kLong);
  Tensor words = at::empty({rows, selector.words()}, at::TensorOptions().dtype(at::kInt));
  Tensor thresholds = at::empty({rows}, at::TensorOptions().dtype(at::kFloat));
  Tensor counts = at::empty({rows}, integers), nan_count = at::empty({}, integers);
  advise_huge_pages(words.mutable_data_ptr(), words.nbytes());
  std::vector<RowResult> results(static_cast<std::size_t>(rows));
  fill(reinterpret_cast<std::uint32_t*>(words.mutable_data_ptr<std::int32_t>()), results.data());
  std::int64_t nan = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    std::memcpy(thresholds.mutable_data_ptr<float>() + r, &results[r].smallest_key, sizeof(float));
    counts.mutable_data_ptr<std::int64_t>()[r] = results[r].count;
    nan = results[r].nan;
  }
  *nan_count.mutable_data_ptr<std::int64_t>() = nan;
  return {words, thresholds, counts, nan_count};
}

MaskRows select(TensorList scores, const Tensor& ks, bool ties_all, OptionalTensorList relative_to,
                const std::optional<Tensor>& damping) {
  check_rows(ks, "select", "ks", at::kLong);
  Selector selector = make_selector(scores, relative_to, damping, "select");
  const std::int64_t* k = ks.const_data_ptr<std::int64_t>();
  for (std::int64_t r = 0; r < ks.numel(); ++r) {
    TORCH_CHECK_VALUE(k[r] >= 1, "select: ks[", r, "] is ", k[r], ", expected at least 1");
  }
  return run(selector, ks.numel(), [&](std::uint32_t* words, RowResult* results) {
    selector.select(k, ks.numel(), ties_all, words, results);
  });
}

MaskRows threshold_mask(TensorList scores, const Tensor& keys, const Tensor& tie_limits, OptionalTensorList relative_to,
                        const std::optional<Tensor>& damping) {
  check_rows(keys, "threshold_mask", "keys", at::kInt);
  check_rows(tie_limits, "threshold_mask", "tie_limits", at::kLong);
  TORCH_CHECK_VALUE(keys.numel() == tie_limits.numel(), "threshold_mask: keys has ", keys.numel(),
                    " rows and tie_limits ", tie_limits.numel());
  Selector selector = make_selector(scores, relative_to, damping, "threshold_mask");
  std::vector<std::uint32_t> limits;
  for (std::int64_t r = 0; r < keys.numel(); ++r) {
    const std::int32_t key = keys.const_data_ptr<std::int32_t>()[r];
    TORCH_CHECK_VALUE(key >= 1 && static_cast<std::uint32_t>(key) <= kInfKey, "threshold_mask: keys[", r, "] is ", key,
                      ", expected 1 to ", kInfKey);
    const std::int64_t limit = tie_limits.const_data_ptr<std::int64_t>()[r];
    TORCH_CHECK_VALUE(limit >= 0, "threshold_mask: tie_limits[", r, "] is ", limit, ", expected at least 0");
    limits.push_back(static_cast<std::uint32_t>(key));
  }
  return run(selector, keys.numel(), [&](std::uint32_t* words, RowResult* results) {
    selector.threshold(limits.data(), tie_limits.const_data_ptr<std::int64_t>(), keys.numel(), words, results);
  });
}

Tensor radix_histogram(TensorList scores, const Tensor& prefixes, std::int64_t level, OptionalTensorList relative_to,
                       const std::optional<Tensor>& damping) {
  check_rows(prefixes, "radix_histogram", "prefixes", at::kInt);
  TORCH_CHECK_VALUE(level >= 0 && level < 3, "radix_histogram: level is ", level, ", expected 0 to 2");
  Selector selector = make_selector(scores, relative_to, damping, "radix_histogram");
  const std::vector<std::uint32_t> wanted(prefixes.const_data_ptr<std::int32_t>(),
                                          prefixes.const_data_ptr<std::int32_t>() + prefixes.numel());
  Tensor bins = at::empty({prefixes.numel(), std::int64_t{1} << kRadixBits[level]}, at::TensorOptions().dtype(at::kLong));
  selector.histogram(wanted.data(), prefixes.numel(), static_cast<int>(level), bins.mutable_data_ptr<std::int64_t>());
  return bins;
}

Tensor magnitude_sums(TensorList tensors) {
  const std::int64_t n = static_cast<std::int64_t>(tensors.size());
  Tensor sums = at::empty({n, kSumColumns}, at::TensorOptions().dtype(at::kLong));
  sum_magnitudes(checked(tensors, "magnitude_sums", "tensors"), at::get_num_threads(), run_tasks,
                 sums.mutable_data_ptr<std::int64_t>());
  return sums;
}

Tensor block_counts(const Tensor& words, at::IntArrayRef word_offsets, at::IntArrayRef numels) {
  TORCH_CHECK_TYPE(words.scalar_type() == at::kInt, "block_counts: words is ", words.scalar_type(), ", expected int32");
  TORCH_CHECK_VALUE(words.device().is_cpu() && words.is_contiguous(), "block_counts: words must be contiguous, on the cpu");
  TORCH_CHECK_VALUE(word_offsets.size() >= numels.size(), "block_counts: word_offsets has ", word_offsets.size(),
                    " entries for ", numels.size(), " tensors");
  struct Block {
    std::int64_t word, entries;
  };
  std::vector<Block> blocks;
  for (std::size_t i = 0; i < numels.size(); ++i) {
    TORCH_CHECK_VALUE(numels[i] >= 0 && word_offsets[i] >= 0 && word_offsets[i] + word_count(numels[i]) <= words.numel(),
                      "block_counts: word_offsets[", i, "] = ", word_offsets[i], ": the words of ", numels[i],
                      " entries are not among the ", words.numel(), " given");
    for (std::int64_t begin = 0; begin < numels[i]; begin += kPackBlock) {
      blocks.push_back({word_offsets[i] + begin / kWordBits, std::min(kPackBlock, numels[i] - begin)});
    }
  }
  Tensor counts = at::empty({static_cast<std::int64_t>(blocks.size())}, at::TensorOptions().dtype(at::kLong));
  std::int64_t* const out = counts.mutable_data_ptr<std::int64_t>();
  const auto* data = reinterpret_cast<const std::uint32_t*>(words.const_data_ptr<std::int32_t>());
  at::parallel_for(0, static_cast<std::int64_t>(blocks.size()), 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) out[b] = count_bits(data + blocks[b].word, blocks[b].entries);
  });
  return counts;
}

}  // namespace

TORCH_LIBRARY_IMPL(pecker_fast, CPU, m) {
  m.impl("select", &select);
  m.impl("threshold_mask", &threshold_mask);
  m.impl("radix_histogram", &radix_histogram);
  m.impl("magnitude_sums", &magnitude_sums);
  m.impl("block_counts", &block_counts);
}

}  // namespace pecker_fast
