// masked_adam_ on CUDA tensors: checks, the table of the step, and its two launches.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/adam.h"
#include "cuda_checks.h"
#include "cuda_tables.h"

namespace pecker_fast {
namespace {

struct Options {
  double beta1, beta2, eps, weight_decay;
  bool decoupled_weight_decay, maximize;
  std::optional<double> clip_value, max_update;
  bool retain_variance, zero_nonfinite;
  std::optional<double> ema_decay;
  bool ema_everywhere, stochastic_rounding;
  std::int64_t seed;
};

void check_range(bool ok, const char* name, double value, const char* allowed) {
  TORCH_CHECK_VALUE(ok, name, " is ", value, ", expected ", allowed);
}

void check_options(const Options& o) {
  check_range(o.beta1 >= 0 && o.beta1 < 1, "beta1", o.beta1, "0 <= beta1 < 1");
  check_range(o.beta2 >= 0 && o.beta2 < 1, "beta2", o.beta2, "0 <= beta2 < 1");
  check_range(o.eps >= 0, "eps", o.eps, "at least 0");
  check_range(!o.clip_value || *o.clip_value >= 0, "clip_value", o.clip_value.value_or(0), "at least 0");
  check_range(!o.max_update || *o.max_update >= 0, "max_update", o.max_update.value_or(0), "at least 0");
}

void check_count(const char* name, std::size_t given, std::size_t params, bool may_be_empty) {
  TORCH_CHECK_VALUE(given == params || (may_be_empty && given == 0), given, " ", name, " for ", params, " params",
                    may_be_empty ? ", expected as many or none" : "");
}

std::int64_t entries(const std::optional<Tensor>& t) { return t ? t->numel() : -1; }

// Whether lists hold the salient entries only: their tensors have as many entries as the packed moments, but not as
// many as the parameters. With a mask of all entries there is no difference.
class Packing {
 public:
  Packing(TensorList params, TensorList moments, bool packed) : params_(params), moments_(moments), packed_(packed) {}

  // size(i): entries of tensor i, -1 if there is none.
  template <typename Size>
  bool of(std::size_t tensors, const Size& size) const {
    bool differs = false;
    for (std::size_t i = 0; packed_ && i < std::min(tensors, params_.size()); ++i) {
      const std::int64_t own = size(i);
      if (own >= 0 && own != moments_[i].numel()) return false;
      differs |= own >= 0 && own != params_[i].numel();
    }
    return differs;
  }

 private:
  TensorList params_, moments_;
  bool packed_;
};

template <typename T>
void launch(const TableSpec& spec, at::ScalarType dtype, AdamArguments<T> arguments, AdamDeviceScalars scalars,
            const Options& o) {
  const Table table = device_table(spec, kAdamTable, adam_scratch_bytes(spec.num_tensors));
  constexpr double kNone = std::numeric_limits<double>::infinity();
  arguments.table = table.view;
  arguments.scratch = table.scratch;
  set_adam_scalars<T>(arguments, o.beta1, o.beta2, o.eps, o.decoupled_weight_decay ? 0.0 : o.weight_decay,
                      o.clip_value.value_or(kNone), o.max_update.value_or(kNone), o.ema_decay.value_or(0.0),
                      o.zero_nonfinite);
  prepare_adam<T>(scalars, table.view, table.scratch, table.stream);
  if constexpr (std::is_same_v<T, double>) {
    adam_step<double, double>(arguments, table.stream);
  } else if (dtype == at::kBFloat16) {
    adam_step<bf16, float>(arguments, table.stream);
  } else if (dtype == at::kHalf) {
    adam_step<fp16, float>(arguments, table.stream);
  } else {
    adam_step<float, float>(arguments, table.stream);
  }
}

void masked_adam_cuda(TensorList params, const OptionalTensors& grads, const OptionalTensors& masked_grads,
                      TensorList exp_avgs, TensorList exp_avg_sqs, TensorList max_exp_avg_sqs, TensorList masters,
                      TensorList emas, TensorList counts, const Tensor& steps, const Tensor& lr,
                      const std::optional<Tensor>& bias_table, const std::optional<Tensor>& words,
                      at::IntArrayRef word_offsets, const std::optional<Tensor>& packed_offsets,
                      const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double beta1,
                      double beta2, double eps, double weight_decay, bool decoupled_weight_decay, bool maximize,
                      std::optional<double> clip_value, std::optional<double> max_update, bool retain_variance,
                      bool zero_nonfinite, std::optional<double> ema_decay, bool ema_everywhere,
                      bool stochastic_rounding, std::int64_t seed, at::IntArrayRef tensor_numbers) {
  const std::size_t n = params.size();
  if (n == 0) return;
  const Options o{beta1,        beta2,      eps,           weight_decay,        decoupled_weight_decay,
                  maximize,     clip_value, max_update,    retain_variance,     zero_nonfinite,
                  ema_decay,    ema_everywhere, stochastic_rounding, seed};
  check_options(o);
  const at::ScalarType dtype = params[0].scalar_type();
  const c10::Device device = params[0].device();
  check_tensor("params", 0, params[0], kParamDtypes, device);
  const at::ScalarType compute = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const bool joint = !masked_grads.empty(), packed = packed_offsets.has_value();
  check_count("exp_avg_sqs", exp_avg_sqs.size(), n, false);
  const Packing packing(params, exp_avg_sqs, packed);
  const bool packed_grads = packing.of(grads.size(), [&](std::size_t i) { return entries(grads.get(i)); });
  const bool packed_masters = packing.of(masters.size(), [&](std::size_t i) { return masters[i].numel(); });
  const bool packed_emas = packing.of(emas.size(), [&](std::size_t i) { return emas[i].numel(); });
  const bool packed_values = packed_masters || packed_emas;
  TORCH_CHECK_VALUE(masters.empty() || emas.empty() || packed_masters == packed_emas,
                    "either both masters and emas are packed or none");
  TORCH_CHECK_VALUE(!packed_values || !ema_everywhere, "ema_everywhere is for emas of all entries, these are packed");
  check_count("grads", grads.size(), n, false);
  TORCH_CHECK_VALUE(!joint || masked_grads.size() == n, masked_grads.size(), " masked_grads for ", n,
                    " grads, expected as many or none");
  TORCH_CHECK_VALUE(!packed || (words && !joint), "packed_offsets are only for masked steps");
  TORCH_CHECK_VALUE(exp_avgs.empty() == (beta1 == 0),
                    "exp_avgs must be given exactly when beta1 is not 0, beta1 is ", beta1);
  TORCH_CHECK_VALUE(emas.empty() != ema_decay.has_value(),
                    ema_decay ? "ema_decay is given without emas" : "emas are given without ema_decay");
  TORCH_CHECK_TYPE(masters.empty() || compute != dtype,
                   "masters are for bfloat16 and float16 parameters, params are ", dtype);
  check_count("exp_avgs", exp_avgs.size(), n, true);
  check_count("max_exp_avg_sqs", max_exp_avg_sqs.size(), n, true);
  check_count("masters", masters.size(), n, true);
  check_count("emas", emas.size(), n, true);
  check_count("counts", counts.size(), n, true);
  check_count("tensor_numbers", tensor_numbers.size(), n, true);
  check_tensor("steps", -1, steps, {at::kFloat}, device);
  TORCH_CHECK_VALUE(steps.numel() == static_cast<std::int64_t>(n), "steps has ", steps.numel(), " entries for ", n,
                    " params");
  check_scalar("lr", lr, at::kDouble, device);
  check_scalar("grad_scale", grad_scale, at::kFloat, device);
  check_scalar("found_inf", found_inf, at::kFloat, device);
  if (!counts.empty()) {
    TORCH_CHECK_VALUE(bias_table, "counts are given without bias_table");
    check_tensor("bias_table", -1, *bias_table, {compute}, device);
    TORCH_CHECK_VALUE(bias_table->dim() == 2 && bias_table->size(0) >= 2 && bias_table->size(1) == 2,
                      "bias_table has shape ", bias_table->sizes(), ", expected [rows, 2] with at least 2 rows");
    check_tensor("counts", 0, counts[0], {at::kShort, at::kInt}, device);
  }
  if (words) check_words(*words, word_offsets, n, device);

  TableSpec spec(n, kAdamSlots, kAdamDynamicSlots);
  for (std::size_t i = 0; i < n; ++i) {
    const Tensor& param = params[i];
    check_tensor("params", i, param, {dtype}, device);
    const std::int64_t numel = param.numel();
    if (words) check_words_of(*words, word_offsets, i, numel);
    spec.set_tensor(i, numel, words ? word_offsets[i] : 0, element_type(dtype), param.const_data_ptr(),
                    static_cast<int>(param.element_size()));
    spec.set_pointer(kParam, i, param.mutable_data_ptr());
    const auto set_state = [&](AdamSlot slot, const char* name, TensorList list, at::ScalarType type, bool dense) {
      if (list.empty()) return;
      check_tensor(name, i, list[i], {type}, device);
      if (dense) {
        check_size(name, i, list[i], "params", numel);
      } else {
        check_size(name, i, list[i], "exp_avg_sqs", exp_avg_sqs[i].numel());
      }
      spec.set_pointer(slot, i, list[i].mutable_data_ptr());
    };
    set_state(kExpAvg, "exp_avgs", exp_avgs, compute, !packed);
    set_state(kExpAvgSq, "exp_avg_sqs", exp_avg_sqs, compute, !packed);
    set_state(kMaxExpAvgSq, "max_exp_avg_sqs", max_exp_avg_sqs, compute, !packed);
    set_state(kMaster, "masters", masters, compute, !packed_values);
    set_state(kEma, "emas", emas, compute, !packed_values);
    if (!counts.empty()) set_state(kCounts, "counts", counts, counts[0].scalar_type(), !packed);
    spec.set_number(kPackedSize, i, exp_avg_sqs[i].numel());
    spec.set_number(kTensorNumber, i, tensor_numbers.empty() ? static_cast<std::int64_t>(i) : tensor_numbers[i]);
    const auto set_gradient = [&](AdamSlot slot, const char* name, const OptionalTensors& list) {
      const std::optional<Tensor> gradient = list.get(i);
      if (!gradient) return;
      check_tensor(name, i, *gradient, {dtype}, device);
      if (slot == kGrad && packed_grads) {
        check_size(name, i, *gradient, "exp_avg_sqs", exp_avg_sqs[i].numel());
      } else {
        check_size(name, i, *gradient, "params", numel);
      }
      spec.set_pointer(slot, i, gradient->const_data_ptr());
    };
    set_gradient(kGrad, "grads", grads);
    if (joint) set_gradient(kMaskedGrad, "masked_grads", masked_grads);
  }
  if (packed) {
    check_tensor("packed_offsets", -1, *packed_offsets, {at::kLong}, device);
    TORCH_CHECK_VALUE(packed_offsets->numel() == spec.total_blocks, "packed_offsets has ", packed_offsets->numel(),
                      " entries, expected ", spec.total_blocks);
  }

  const c10::DeviceGuard guard(device);
  const AdamDeviceScalars scalars{steps.const_data_ptr<float>(),
                                  lr.const_data_ptr<double>(),
                                  optional_data<float>(grad_scale),
                                  optional_data<float>(found_inf),
                                  beta1,
                                  beta2,
                                  weight_decay,
                                  max_update.value_or(std::numeric_limits<double>::infinity()),
                                  decoupled_weight_decay,
                                  maximize,
                                  seed};
  const auto run = [&](auto compute_value) {
    using T = decltype(compute_value);
    AdamArguments<T> a{};
    a.words = word_data(words);
    a.packed_offsets = optional_data<std::int64_t>(packed_offsets);
    if (!counts.empty()) {
      a.bias_table = bias_table->const_data_ptr<T>();
      a.last_bias_row = static_cast<std::int32_t>(bias_table->size(0) - 1);
      a.counts_are_16_bit = counts[0].scalar_type() == at::kShort;
    }
    a.packed_grads = packed_grads;
    a.packed_values = packed_values;
    a.has_first_moment = !exp_avgs.empty();
    a.has_ema = !emas.empty();
    a.joint = joint;
    a.retain_variance = retain_variance && joint;
    a.ema_everywhere = ema_everywhere && words && !joint && !emas.empty();
    a.stochastic_rounding = stochastic_rounding && masters.empty() && (dtype == at::kBFloat16 || dtype == at::kHalf);
    a.rare = !max_exp_avg_sqs.empty() || !masters.empty() || !counts.empty() || a.retain_variance || a.ema_everywhere ||
             a.stochastic_rounding;
    launch<T>(spec, dtype, a, scalars, o);
  };
  if (compute == at::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
  }
}

TORCH_LIBRARY_IMPL(pecker_fast, CUDA, m) { m.impl("masked_adam_", &masked_adam_cuda); }

}  // namespace
}  // namespace pecker_fast
