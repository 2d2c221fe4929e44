// masked_adam_ on the CPU: argument checks, the chunk table, and one parallel region over all tensors.
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/adam.h"

namespace pecker_fast {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensors = c10::List<std::optional<Tensor>>;

// Arguments of masked_adam_ that are not per tensor.
struct Options {
  double beta1, beta2, eps, weight_decay;
  bool decoupled_weight_decay, maximize;
  std::optional<double> clip_value, max_update;
  bool retain_variance, zero_nonfinite;
  std::optional<double> ema_decay;
  bool ema_frozen, stochastic_rounding;
  std::int64_t seed;
};

ParamType param_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ParamType::f32;
    case at::kBFloat16:
      return ParamType::bf16;
    case at::kHalf:
      return ParamType::fp16;
    case at::kDouble:
      return ParamType::f64;
    default:
      TORCH_CHECK_TYPE(false, "masked_adam_: params must be float32, bfloat16, float16 or float64, got ", type);
  }
}

void check_tensor(const Tensor& t, const char* name, std::int64_t i, at::ScalarType type, std::int64_t numel) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), "masked_adam_: ", name, "[", i, "] is on ", t.device(), ", params are on cpu");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.is_contiguous(), "masked_adam_: ", name, "[", i,
                    "] must be contiguous");
  TORCH_CHECK_TYPE(t.scalar_type() == type, "masked_adam_: ", name, "[", i, "] must be ", type, ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.numel() == numel, "masked_adam_: ", name, "[", i, "] must have ", numel, " entries, got ",
                    t.numel());
}

void check_single(const Tensor& t, const char* name, at::ScalarType type) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), "masked_adam_: ", name, " is on ", t.device(), ", params are on cpu");
  TORCH_CHECK_TYPE(t.scalar_type() == type, "masked_adam_: ", name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.numel() == 1, "masked_adam_: ", name, " must have one entry, got ", t.numel());
}

void check_length(std::size_t length, std::size_t expected, bool may_be_empty, const char* name) {
  TORCH_CHECK_VALUE(length == expected || (may_be_empty && length == 0), "masked_adam_: ", name, " must have ",
                    expected, " entries like params", may_be_empty ? " or none" : "", ", got ", length);
}

void check_range(bool ok, const char* name, double value, const char* allowed) {
  TORCH_CHECK_VALUE(ok, "masked_adam_: ", name, " must be ", allowed, ", got ", value);
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

std::int64_t count_blocks(std::int64_t numel) { return (numel + kAdamChunk - 1) / kAdamChunk; }

template <typename T>
AdamScalars<T> make_scalars(const Options& options, T lr, const std::optional<Tensor>& grad_scale) {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  const T inv_scale = grad_scale ? T(1) / static_cast<T>(*data<float>(*grad_scale)) : T(1);
  AdamScalars<T> s;
  s.grad_factor = options.maximize ? -inv_scale : inv_scale;
  s.clip_value = options.clip_value ? static_cast<T>(*options.clip_value) : kInf;
  s.decay = options.decoupled_weight_decay ? T(1) - lr * static_cast<T>(options.weight_decay) : T(1);
  s.coupled_decay = options.decoupled_weight_decay ? T(0) : static_cast<T>(options.weight_decay);
  s.beta2 = static_cast<T>(options.beta2);
  s.one_minus_beta1 = static_cast<T>(1.0 - options.beta1);
  s.one_minus_beta2 = static_cast<T>(1.0 - options.beta2);
  s.eps = static_cast<T>(options.eps);
  s.max_update = options.max_update ? static_cast<T>(*options.max_update) * lr : kInf;
  s.ema_weight = static_cast<T>(1.0 - options.ema_decay.value_or(0.0));
  s.zero_nonfinite = options.zero_nonfinite;
  return s;
}

// Chunks of every tensor that has work to do. In a masked step they carry the numbers of their salient entries, which
// packed_offsets and the sizes of packed state are checked against.
template <typename T>
std::vector<AdamChunk> make_chunks(const std::vector<AdamTensor<T>>& tensors, const AdamStep<T>& step,
                                   const std::vector<std::int64_t>& first_blocks,
                                   const std::optional<Tensor>& packed_offsets, TensorList exp_avg_sqs) {
  std::vector<AdamChunk> chunks;
  std::vector<std::int64_t> first_chunks;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    first_chunks.push_back(static_cast<std::int64_t>(chunks.size()));
    if (tensors[i].param == nullptr) continue;
    for (std::int64_t begin = 0; begin < tensors[i].numel; begin += kAdamChunk) {
      const std::int64_t length = std::min(kAdamChunk, tensors[i].numel - begin);
      chunks.push_back({static_cast<std::int64_t>(i), begin, length, length, begin});
    }
  }
  if (!step.masked) return chunks;
  std::vector<std::int64_t> counts(chunks.size());
  at::parallel_for(0, static_cast<std::int64_t>(chunks.size()), 256, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t c = first; c < last; ++c) {
      const AdamChunk& chunk = chunks[c];
      count_salient(tensors[chunk.tensor].words + chunk.begin / 32, chunk.length, &counts[c]);
    }
  });
  std::int64_t seen = 0;
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    AdamChunk& chunk = chunks[c];
    const std::int64_t i = chunk.tensor;
    if (chunk.begin == 0) seen = 0;
    chunk.salient = counts[c];
    if (!step.packed) continue;
    const std::int64_t block = chunk.begin / kAdamChunk;
    chunk.state = data<std::int64_t>(*packed_offsets)[first_blocks[i] + block];
    TORCH_CHECK_VALUE(chunk.state == seen, "masked_adam_: packed_offsets[", first_blocks[i] + block, "] must be ", seen,
                      ", the salient entries of tensor ", i, " before block ", block, ", got ", chunk.state);
    seen += chunk.salient;
    if (chunk.begin + chunk.length == tensors[i].numel) {
      TORCH_CHECK_VALUE(exp_avg_sqs[i].numel() == seen, "masked_adam_: exp_avg_sqs[", i, "] must have ", seen,
                        " entries, as many as are salient, got ", exp_avg_sqs[i].numel());
    }
  }
  return chunks;
}

void run(ParamType type, const AdamStep<float>& step, const AdamTensor<float>* tensors, const AdamChunk* chunks,
         std::int64_t count) {
  adam_chunks(type, step, tensors, chunks, count);
}

void run(ParamType, const AdamStep<double>& step, const AdamTensor<double>* tensors, const AdamChunk* chunks,
         std::int64_t count) {
  adam_chunks(step, tensors, chunks, count);
}

// Splits the chunks evenly by work, not by number: small tensors and chunks with few salient entries are cheap.
template <typename T>
void run_parallel(ParamType type, const AdamStep<T>& step, const std::vector<AdamTensor<T>>& tensors,
                  const std::vector<AdamChunk>& chunks) {
  std::vector<std::int64_t> cost_before(chunks.size() + 1, 0);
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    const AdamChunk& chunk = chunks[c];
    const std::int64_t entries = step.masked ? std::min(chunk.length, chunk.length / 16 + 8 * chunk.salient)
                                             : chunk.length;
    cost_before[c + 1] = cost_before[c] + 64 + entries;
  }
  const auto chunk_at = [&](std::int64_t cost) {
    return std::lower_bound(cost_before.begin(), cost_before.end(), cost) - cost_before.begin();
  };
  at::parallel_for(0, cost_before.back(), 2 * kAdamChunk, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = chunk_at(begin), last = chunk_at(end);
    run(type, step, tensors.data(), chunks.data() + first, last - first);
  });
}

template <typename T>
void masked_adam(TensorList params, const OptionalTensors& grads, const OptionalTensors& masked_grads,
                 TensorList exp_avgs, TensorList exp_avg_sqs, TensorList max_exp_avg_sqs, TensorList masters,
                 TensorList emas, TensorList counts, const Tensor& steps, const Tensor& lr,
                 const std::optional<Tensor>& bias_table, const std::optional<Tensor>& words,
                 at::IntArrayRef word_offsets, const std::optional<Tensor>& packed_offsets,
                 const std::optional<Tensor>& grad_scale, const Options& options) {
  constexpr at::ScalarType kCompute = std::is_same_v<T, double> ? at::kDouble : at::kFloat;
  const at::ScalarType dtype = params[0].scalar_type();
  const bool joint = !masked_grads.empty();
  AdamStep<T> step{};
  step.lr = static_cast<T>(*data<double>(lr));
  step.scalars = make_scalars<T>(options, step.lr, grad_scale);
  step.masked = words.has_value() && !joint;
  step.packed = packed_offsets.has_value();
  step.retain_variance = options.retain_variance;
  step.ema_frozen = options.ema_frozen;
  step.stochastic_rounding =
      options.stochastic_rounding && masters.empty() && (dtype == at::kBFloat16 || dtype == at::kHalf);
  step.has_exp_avg = !exp_avgs.empty();
  step.has_max_exp_avg_sq = !max_exp_avg_sqs.empty();
  step.has_counts = !counts.empty();
  step.has_master = !masters.empty();
  if (step.has_counts) {
    step.bias_table = data<const T>(*bias_table);
    step.last_bias_row = bias_table->size(0) - 1;
    step.counts_are_16_bit = counts[0].scalar_type() == at::kShort;
  }

  std::vector<AdamTensor<T>> tensors(params.size());
  std::vector<std::int64_t> first_blocks;
  std::int64_t blocks = 0;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const std::int64_t numel = param.numel();
    check_tensor(param, "params", i, dtype, numel);
    first_blocks.push_back(blocks);
    blocks += count_blocks(numel);
    const std::optional<Tensor> grad = grads.get(i);
    const std::optional<Tensor> forget = joint ? masked_grads.get(i) : std::nullopt;
    if (grad) check_tensor(*grad, "grads", i, dtype, numel);
    if (forget) check_tensor(*forget, "masked_grads", i, dtype, numel);
    if (numel == 0 || (!grad && !forget)) continue;
    const std::int64_t state_numel = step.packed ? exp_avg_sqs[i].numel() : numel;
    AdamTensor<T>& t = tensors[i];
    const auto state = [&](TensorList list, const char* name, std::int64_t size) -> T* {
      if (list.empty()) return nullptr;
      check_tensor(list[i], name, i, kCompute, size);
      return data<T>(list[i]);
    };
    t.exp_avg_sq = state(exp_avg_sqs, "exp_avg_sqs", state_numel);
    t.exp_avg = state(exp_avgs, "exp_avgs", state_numel);
    t.max_exp_avg_sq = state(max_exp_avg_sqs, "max_exp_avg_sqs", state_numel);
    t.master = state(masters, "masters", numel);
    t.ema = state(emas, "emas", numel);
    if (!counts.empty()) {
      check_tensor(counts[i], "counts", i, counts[0].scalar_type(), state_numel);
      t.counts = counts[i].data_ptr();
    }
    if (words) {
      const std::int64_t last = word_offsets[i] + (numel + 31) / 32;
      TORCH_CHECK_VALUE(word_offsets[i] >= 0 && last <= words->numel(), "masked_adam_: tensor ", i, " needs words ",
                        word_offsets[i], " to ", last, " of the mask, which has ", words->numel());
      t.words = reinterpret_cast<const std::uint32_t*>(data<std::int32_t>(*words)) + word_offsets[i];
    }
    t.grad = grad ? grad->data_ptr() : nullptr;
    t.masked_grad = forget ? forget->data_ptr() : nullptr;
    t.param = param.data_ptr();
    t.numel = numel;
    const double count = data<float>(steps)[i];
    t.correction = {step.lr * static_cast<T>(1 / (1 - std::pow(options.beta1, count))),
                    static_cast<T>(1 / std::sqrt(1 - std::pow(options.beta2, count)))};
    t.random_state = random_state(options.seed, static_cast<std::int64_t>(count), i);
  }
  if (step.packed) {
    TORCH_CHECK_VALUE(packed_offsets->numel() == blocks, "masked_adam_: packed_offsets must have ", blocks,
                      " entries, one per block of every tensor, got ", packed_offsets->numel());
  }
  const std::vector<AdamChunk> chunks = make_chunks(tensors, step, first_blocks, packed_offsets, exp_avg_sqs);
  if (!chunks.empty()) run_parallel(param_type(dtype), step, tensors, chunks);
}

void masked_adam_cpu(TensorList params, const OptionalTensors& grads, const OptionalTensors& masked_grads,
                     TensorList exp_avgs, TensorList exp_avg_sqs, TensorList max_exp_avg_sqs, TensorList masters,
                     TensorList emas, TensorList counts, const Tensor& steps, const Tensor& lr,
                     const std::optional<Tensor>& bias_table, const std::optional<Tensor>& words,
                     at::IntArrayRef word_offsets, const std::optional<Tensor>& packed_offsets,
                     const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double beta1,
                     double beta2, double eps, double weight_decay, bool decoupled_weight_decay, bool maximize,
                     std::optional<double> clip_value, std::optional<double> max_update, bool retain_variance,
                     bool zero_nonfinite, std::optional<double> ema_decay, bool ema_frozen, bool stochastic_rounding,
                     std::int64_t seed) {
  const std::size_t n = params.size();
  check_length(grads.size(), n, false, "grads");
  check_length(masked_grads.size(), n, true, "masked_grads");
  check_length(exp_avgs.size(), n, true, "exp_avgs");
  check_length(exp_avg_sqs.size(), n, false, "exp_avg_sqs");
  check_length(max_exp_avg_sqs.size(), n, true, "max_exp_avg_sqs");
  check_length(masters.size(), n, true, "masters");
  check_length(emas.size(), n, true, "emas");
  check_length(counts.size(), n, true, "counts");
  check_range(beta1 >= 0 && beta1 < 1, "beta1", beta1, "in [0, 1)");
  check_range(beta2 >= 0 && beta2 < 1, "beta2", beta2, "in [0, 1)");
  check_range(eps >= 0, "eps", eps, "at least 0");
  check_range(!clip_value || *clip_value >= 0, "clip_value", clip_value.value_or(0), "at least 0");
  check_range(!max_update || *max_update >= 0, "max_update", max_update.value_or(0), "at least 0");
  check_single(lr, "lr", at::kDouble);
  if (grad_scale) check_single(*grad_scale, "grad_scale", at::kFloat);
  if (found_inf) check_single(*found_inf, "found_inf", at::kFloat);
  if (n == 0) return;
  check_tensor(steps, "steps", 0, at::kFloat, static_cast<std::int64_t>(n));
  TORCH_CHECK_VALUE(exp_avgs.empty() == (beta1 == 0),
                    "masked_adam_: exp_avgs must be given exactly when beta1 is not 0, beta1 is ", beta1);
  TORCH_CHECK_VALUE(emas.empty() == !ema_decay, "masked_adam_: emas and ema_decay must be given together");
  if (words) {
    check_tensor(*words, "words", 0, at::kInt, words->numel());
    TORCH_CHECK_VALUE(word_offsets.size() >= n, "masked_adam_: word_offsets must have an entry for each of ", n,
                      " params, got ", word_offsets.size());
  }
  if (packed_offsets) {
    TORCH_CHECK_VALUE(words && masked_grads.empty(),
                      "masked_adam_: packed_offsets need words and no masked_grads: packed state is for masked steps");
    check_tensor(*packed_offsets, "packed_offsets", 0, at::kLong, packed_offsets->numel());
  }
  const bool wide = params[0].scalar_type() == at::kDouble;
  param_type(params[0].scalar_type());
  const bool low_precision = params[0].scalar_type() == at::kBFloat16 || params[0].scalar_type() == at::kHalf;
  TORCH_CHECK_TYPE(masters.empty() || low_precision,
                   "masked_adam_: masters are for bfloat16 and float16 parameters, params are ",
                   params[0].scalar_type());
  if (!counts.empty()) {
    const at::ScalarType type = counts[0].scalar_type();
    TORCH_CHECK_TYPE(type == at::kShort || type == at::kInt, "masked_adam_: counts must be int16 or int32, got ",
                     type);
    TORCH_CHECK_VALUE(bias_table, "masked_adam_: bias_table is required with counts");
    check_tensor(*bias_table, "bias_table", 0, wide ? at::kDouble : at::kFloat, bias_table->numel());
    TORCH_CHECK_VALUE(bias_table->dim() == 2 && bias_table->size(0) >= 2 && bias_table->size(1) == 2,
                      "masked_adam_: bias_table must be [M + 1, 2] with M >= 1, got ", bias_table->sizes());
  }
  if (found_inf && *data<float>(*found_inf) != 0) return;
  const Options options{beta1,        beta2,           eps,           weight_decay,        decoupled_weight_decay,
                        maximize,     clip_value,      max_update,    retain_variance,     zero_nonfinite,
                        ema_decay,    ema_frozen,      stochastic_rounding, seed};
  const auto step = wide ? masked_adam<double> : masked_adam<float>;
  step(params, grads, masked_grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas, counts, steps, lr,
       bias_table, words, word_offsets, packed_offsets, grad_scale, options);
}

TORCH_LIBRARY_IMPL(pecker_fast, CPU, m) { m.impl("masked_adam_", &masked_adam_cpu); }

}  // namespace
}  // namespace pecker_fast
