// masked_adam_ on the CPU: argument checks, the table of chunks, and one parallel region over all tensors.
#include "adam_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/adam.h"

namespace pecker_fast {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensors = c10::List<std::optional<Tensor>>;

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


// Whether lists of state hold the salient entries only: their tensors have as many entries as the packed moments, but
// not as many as the parameters. With a mask of all entries there is no difference.
class Packing {
 public:
  Packing(const AdamLists& lists, bool packed) : lists_(lists), packed_(packed) {}

  bool of(TensorList tensors) const {
    bool differs = false;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].numel() != lists_.exp_avg_sqs[i].numel()) return false;
      differs |= tensors[i].numel() != lists_.params[i].numel();
    }
    return packed_ && differs;
  }

 private:
  const AdamLists& lists_;
  bool packed_;
};

template <typename T>
AdamScalars<T> make_scalars(const AdamOptions& options, T lr, const std::optional<Tensor>& grad_scale) {
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

void run(ParamType type, const AdamStep<float>& step, const AdamTensor<float>* tensors, const AdamChunk* chunks,
         std::int64_t count) {
  adam_chunks(type, step, tensors, chunks, count);
}

void run(ParamType, const AdamStep<double>& step, const AdamTensor<double>* tensors, const AdamChunk* chunks,
         std::int64_t count) {
  adam_chunks(step, tensors, chunks, count);
}

// Gradients, step counts, lr and grad_scale belong to one step; all else is in the table.
template <typename T>
class TypedTable : public AdamTable {
 public:
  TypedTable(const AdamLists& lists, const AdamOptions& options, bool joint, bool packed_grads)
      : type_(param_type(lists.params[0].scalar_type())), options_(options), joint_(joint),
        words_(lists.words), bias_table_(lists.bias_table), tensor_numbers_(lists.tensor_numbers.vec()) {
    const at::ScalarType dtype = lists.params[0].scalar_type();
    step_.masked = lists.words.has_value() && !joint;
    step_.packed = lists.packed_offsets.has_value();
    step_.packed_grads = packed_grads;
    const Packing packing(lists, step_.packed);
    step_.packed_masters = packing.of(lists.masters);
    step_.packed_emas = packing.of(lists.emas);
    TORCH_CHECK_VALUE(!step_.packed_emas || !options.ema_everywhere,
                      "masked_adam_: ema_everywhere is for emas of all entries, these are packed");
    TORCH_CHECK_VALUE(lists.masters.empty() || lists.emas.empty() || step_.packed_masters == step_.packed_emas,
                      "masked_adam_: either both masters and emas are packed or none");
    step_.retain_variance = options.retain_variance;
    step_.ema_everywhere = options.ema_everywhere;
    step_.stochastic_rounding =
        options.stochastic_rounding && lists.masters.empty() && (dtype == at::kBFloat16 || dtype == at::kHalf);
    step_.has_exp_avg = !lists.exp_avgs.empty();
    step_.has_max_exp_avg_sq = !lists.max_exp_avg_sqs.empty();
    step_.has_counts = !lists.counts.empty();
    step_.has_master = !lists.masters.empty();
    if (step_.has_counts) {
      step_.bias_table = data<const T>(*bias_table_);
      step_.last_bias_row = bias_table_->size(0) - 1;
      step_.counts_are_16_bit = lists.counts[0].scalar_type() == at::kShort;
    }
    for (std::size_t i = 0; i < lists.params.size(); ++i) add_tensor(lists, i);
    if (step_.masked) count_chunks();
    if (step_.packed) check_packed(lists);
    add_costs();
  }

  void step(const AdamGradients& gradients, const Tensor& steps, const Tensor& lr,
            const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) override {
    check_single(lr, "lr", at::kDouble);
    if (grad_scale) check_single(*grad_scale, "grad_scale", at::kFloat);
    if (found_inf) check_single(*found_inf, "found_inf", at::kFloat);
    check_tensor(steps, "steps", 0, at::kFloat, static_cast<std::int64_t>(tensors_.size()));
    if (found_inf && *data<float>(*found_inf) != 0) return;
    step_.lr = static_cast<T>(*data<double>(lr));
    step_.scalars = make_scalars<T>(options_, step_.lr, grad_scale);
    const float* const counts = data<float>(steps);
    AdamCorrection<T> correction{};
    double corrected_count = -1;
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      AdamTensor<T>& t = tensors_[i];
      t.grad = gradients.grads[i];
      t.masked_grad = joint_ ? gradients.masked_grads[i] : nullptr;
      // Nearly always all tensors have the same count.
      if (counts[i] != corrected_count) {
        corrected_count = counts[i];
        correction = {step_.lr * static_cast<T>(1 / (1 - std::pow(options_.beta1, corrected_count))),
                      static_cast<T>(1 / std::sqrt(1 - std::pow(options_.beta2, corrected_count)))};
      }
      t.correction = correction;
      if (step_.stochastic_rounding) {
        const std::int64_t number = tensor_numbers_.empty() ? static_cast<std::int64_t>(i) : tensor_numbers_[i];
        t.random_state = random_state(options_.seed, static_cast<std::int64_t>(counts[i]), number);
      }
    }
    if (!chunks_.empty()) run_parallel();
  }

 private:
  static constexpr at::ScalarType kCompute = std::is_same_v<T, double> ? at::kDouble : at::kFloat;

  void add_tensor(const AdamLists& lists, std::size_t i) {
    const Tensor& param = lists.params[i];
    const std::int64_t numel = param.numel();
    check_tensor(param, "params", i, lists.params[0].scalar_type(), numel);
    const std::int64_t state_numel = step_.packed ? lists.exp_avg_sqs[i].numel() : numel;
    AdamTensor<T> t{};
    const auto state = [&](TensorList list, const char* name, std::int64_t size) -> T* {
      if (list.empty()) return nullptr;
      check_tensor(list[i], name, i, kCompute, size);
      return data<T>(list[i]);
    };
    t.exp_avg_sq = state(lists.exp_avg_sqs, "exp_avg_sqs", state_numel);
    t.exp_avg = state(lists.exp_avgs, "exp_avgs", state_numel);
    t.max_exp_avg_sq = state(lists.max_exp_avg_sqs, "max_exp_avg_sqs", state_numel);
    t.master = state(lists.masters, "masters", step_.packed_masters ? state_numel : numel);
    t.ema = state(lists.emas, "emas", step_.packed_emas ? state_numel : numel);
    if (!lists.counts.empty()) {
      check_tensor(lists.counts[i], "counts", i, lists.counts[0].scalar_type(), state_numel);
      t.counts = lists.counts[i].data_ptr();
    }
    if (words_) {
      const std::int64_t first = lists.word_offsets[i], last = first + (numel + 31) / 32;
      TORCH_CHECK_VALUE(first >= 0 && last <= words_->numel(), "masked_adam_: tensor ", i, " needs words ", first,
                        " to ", last, " of the mask, which has ", words_->numel());
      t.words = reinterpret_cast<const std::uint32_t*>(data<std::int32_t>(*words_)) + first;
    }
    t.param = param.data_ptr();
    t.numel = numel;
    for (std::int64_t begin = 0; begin < numel; begin += kAdamChunk) {
      const std::int64_t length = std::min(kAdamChunk, numel - begin);
      chunks_.push_back({static_cast<std::int64_t>(i), begin, length, length, begin});
    }
    tensors_.push_back(t);
  }

  void count_chunks() {
    at::parallel_for(0, static_cast<std::int64_t>(chunks_.size()), 256, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t c = first; c < last; ++c) {
        AdamChunk& chunk = chunks_[c];
        count_salient(tensors_[chunk.tensor].words + chunk.begin / 32, chunk.length, &chunk.salient);
      }
    });
  }

  // Where each chunk starts in packed state. packed_offsets and the sizes of the state are checked against it.
  void check_packed(const AdamLists& lists) {
    const Tensor& offsets = *lists.packed_offsets;
    TORCH_CHECK_VALUE(offsets.numel() == static_cast<std::int64_t>(chunks_.size()),
                      "masked_adam_: packed_offsets must have ", chunks_.size(),
                      " entries, one per block of every tensor, got ", offsets.numel());
    const std::int64_t* const given = data<std::int64_t>(offsets);
    std::int64_t salient = 0;
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      AdamChunk& chunk = chunks_[c];
      const std::int64_t i = chunk.tensor;
      if (chunk.begin == 0) salient = 0;
      TORCH_CHECK_VALUE(given[c] == salient, "masked_adam_: packed_offsets[", c, "] must be ", salient,
                        ", the salient entries of tensor ", i, " before block ", chunk.begin / kAdamChunk, ", got ",
                        given[c]);
      chunk.state = salient;
      salient += chunk.salient;
      if (chunk.begin + chunk.length == tensors_[i].numel) {
        TORCH_CHECK_VALUE(lists.exp_avg_sqs[i].numel() == salient, "masked_adam_: exp_avg_sqs[", i, "] must have ",
                          salient, " entries, as many as are salient, got ", lists.exp_avg_sqs[i].numel());
      }
    }
  }

  // Chunks are divided evenly by work, not by number: small tensors and chunks with few salient entries are cheap.
  void add_costs() {
    cost_before_.assign(chunks_.size() + 1, 0);
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      const AdamChunk& chunk = chunks_[c];
      const std::int64_t entries =
          step_.masked ? std::min(chunk.length, chunk.length / 16 + 8 * chunk.salient) : chunk.length;
      cost_before_[c + 1] = cost_before_[c] + 64 + entries;
    }
  }

  void run_parallel() const {
    const auto chunk_at = [&](std::int64_t cost) {
      return std::lower_bound(cost_before_.begin(), cost_before_.end(), cost) - cost_before_.begin();
    };
    at::parallel_for(0, cost_before_.back(), 2 * kAdamChunk, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t first = chunk_at(begin), last = chunk_at(end);
      run(type_, step_, tensors_.data(), chunks_.data() + first, last - first);
    });
  }

  ParamType type_;
  AdamOptions options_;
  bool joint_;
  std::optional<Tensor> words_, bias_table_;
  std::vector<std::int64_t> tensor_numbers_;
  AdamStep<T> step_{};
  std::vector<AdamTensor<T>> tensors_;
  std::vector<AdamChunk> chunks_;
  std::vector<std::int64_t> cost_before_;
};

}  // namespace

std::unique_ptr<AdamTable> AdamTable::make(const AdamLists& lists, const AdamOptions& options, bool joint,
                                           bool packed_grads) {
  const std::size_t n = lists.params.size();
  TORCH_CHECK_VALUE(n > 0, "masked_adam_: a table needs params");
  check_length(lists.exp_avgs.size(), n, true, "exp_avgs");
  check_length(lists.exp_avg_sqs.size(), n, false, "exp_avg_sqs");
  check_length(lists.max_exp_avg_sqs.size(), n, true, "max_exp_avg_sqs");
  check_length(lists.masters.size(), n, true, "masters");
  check_length(lists.emas.size(), n, true, "emas");
  check_length(lists.counts.size(), n, true, "counts");
  check_length(lists.tensor_numbers.size(), n, true, "tensor_numbers");
  check_range(options.beta1 >= 0 && options.beta1 < 1, "beta1", options.beta1, "in [0, 1)");
  check_range(options.beta2 >= 0 && options.beta2 < 1, "beta2", options.beta2, "in [0, 1)");
  check_range(options.eps >= 0, "eps", options.eps, "at least 0");
  check_range(!options.clip_value || *options.clip_value >= 0, "clip_value", options.clip_value.value_or(0),
              "at least 0");
  check_range(!options.max_update || *options.max_update >= 0, "max_update", options.max_update.value_or(0),
              "at least 0");
  TORCH_CHECK_VALUE(lists.exp_avgs.empty() == (options.beta1 == 0),
                    "masked_adam_: exp_avgs must be given exactly when beta1 is not 0, beta1 is ", options.beta1);
  TORCH_CHECK_VALUE(lists.emas.empty() == !options.ema_decay,
                    "masked_adam_: emas and ema_decay must be given together");
  if (lists.words) {
    check_tensor(*lists.words, "words", 0, at::kInt, lists.words->numel());
    TORCH_CHECK_VALUE(lists.word_offsets.size() >= n, "masked_adam_: word_offsets must have an entry for each of ", n,
                      " params, got ", lists.word_offsets.size());
  }
  if (lists.packed_offsets) {
    TORCH_CHECK_VALUE(lists.words && !joint,
                      "masked_adam_: packed_offsets need words and no masked_grads: packed state is for masked steps");
    check_tensor(*lists.packed_offsets, "packed_offsets", 0, at::kLong, lists.packed_offsets->numel());
  }
  const at::ScalarType dtype = lists.params[0].scalar_type();
  const bool wide = dtype == at::kDouble;
  param_type(dtype);
  TORCH_CHECK_TYPE(lists.masters.empty() || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "masked_adam_: masters are for bfloat16 and float16 parameters, params are ", dtype);
  if (!lists.counts.empty()) {
    const at::ScalarType type = lists.counts[0].scalar_type();
    TORCH_CHECK_TYPE(type == at::kShort || type == at::kInt, "masked_adam_: counts must be int16 or int32, got ",
                     type);
    TORCH_CHECK_VALUE(lists.bias_table, "masked_adam_: bias_table is required with counts");
    const Tensor& table = *lists.bias_table;
    check_tensor(table, "bias_table", 0, wide ? at::kDouble : at::kFloat, table.numel());
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) >= 2 && table.size(1) == 2,
                      "masked_adam_: bias_table must be [M + 1, 2] with M >= 1, got ", table.sizes());
  }
  TORCH_CHECK_VALUE(!packed_grads || lists.packed_offsets, "masked_adam_: packed grads need packed_offsets");
  if (wide) return std::make_unique<TypedTable<double>>(lists, options, joint, packed_grads);
  return std::make_unique<TypedTable<float>>(lists, options, joint, packed_grads);
}

namespace {

// The gradients' memory, null for a missing gradient. `sizes`: tensors with as many entries.
std::vector<const void*> pointers(const OptionalTensors& tensors, const char* name, TensorList params,
                                  TensorList sizes) {
  std::vector<const void*> result(tensors.size(), nullptr);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::optional<Tensor> tensor = tensors.get(i);
    if (!tensor) continue;
    check_tensor(*tensor, name, i, params[0].scalar_type(), sizes[i].numel());
    result[i] = gradient_data(*tensor);
  }
  return result;
}

void masked_adam_cpu(TensorList params, const OptionalTensors& grads, const OptionalTensors& masked_grads,
                     TensorList exp_avgs, TensorList exp_avg_sqs, TensorList max_exp_avg_sqs, TensorList masters,
                     TensorList emas, TensorList counts, const Tensor& steps, const Tensor& lr,
                     const std::optional<Tensor>& bias_table, const std::optional<Tensor>& words,
                     at::IntArrayRef word_offsets, const std::optional<Tensor>& packed_offsets,
                     const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double beta1,
                     double beta2, double eps, double weight_decay, bool decoupled_weight_decay, bool maximize,
                     std::optional<double> clip_value, std::optional<double> max_update, bool retain_variance,
                     bool zero_nonfinite, std::optional<double> ema_decay, bool ema_everywhere,
                     bool stochastic_rounding, std::int64_t seed, at::IntArrayRef tensor_numbers) {
  check_length(grads.size(), params.size(), false, "grads");
  check_length(masked_grads.size(), params.size(), true, "masked_grads");
  if (params.empty()) return;
  const AdamLists lists{params, exp_avgs,   exp_avg_sqs, max_exp_avg_sqs, masters,       emas,
                        counts, bias_table, words,       word_offsets,    packed_offsets, tensor_numbers};
  const AdamOptions options{beta1,      beta2,      eps,        weight_decay,    decoupled_weight_decay,
                            maximize,   clip_value, max_update, retain_variance, zero_nonfinite,
                            ema_decay,  ema_everywhere, stochastic_rounding, seed};
  check_length(exp_avg_sqs.size(), params.size(), false, "exp_avg_sqs");
  bool packed_grads = packed_offsets.has_value();
  for (std::size_t i = 0; packed_grads && i < params.size(); ++i) {
    const std::optional<Tensor> grad = grads.get(i);
    packed_grads = !grad || grad->numel() == exp_avg_sqs[i].numel();
  }
  const auto table = AdamTable::make(lists, options, !masked_grads.empty(), packed_grads);
  table->step({pointers(grads, "grads", params, packed_grads ? exp_avg_sqs : params),
               pointers(masked_grads, "masked_grads", params, params)},
              steps, lr, grad_scale, found_inf);
}

TORCH_LIBRARY_IMPL(pecker_fast, CPU, m) { m.impl("masked_adam_", &masked_adam_cpu); }

}  // namespace
}  // namespace pecker_fast
