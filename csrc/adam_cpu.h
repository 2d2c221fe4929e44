// masked_adam_ on the CPU in two parts: a plan of the work and its memory, made and checked once, and a step with it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace pecker_fast {

// The keyword arguments of masked_adam_.
struct AdamOptions {
  double beta1, beta2, eps, weight_decay;
  bool decoupled_weight_decay, maximize;
  std::optional<double> clip_value, max_update;
  bool retain_variance, zero_nonfinite;
  std::optional<double> ema_decay;
  bool ema_everywhere, stochastic_rounding;
  std::int64_t seed;
};

// Its lists of tensors except the gradients, and the mask.
struct AdamLists {
  at::TensorList params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas, counts;
  std::optional<at::Tensor> bias_table, words;
  at::IntArrayRef word_offsets;
  std::optional<at::Tensor> packed_offsets;
  // The numbers of the tensors in their random bits; empty: 0, 1, 2 ...
  at::IntArrayRef tensor_numbers;
};

// The arguments that change from step to step. A tensor without either gradient is left out of the step.
struct AdamGradients {
  const std::vector<const void*>& grads;
  const std::vector<const void*>& masked_grads;  // empty: this is no joint step
};

// The memory of a present gradient. An empty gradient has no memory, but is not missing.
inline const void* gradient_data(const at::Tensor& grad) {
  static const char nothing = 0;
  return grad.numel() > 0 ? grad.const_data_ptr() : &nothing;
}

class AdamTable {
 public:
  virtual ~AdamTable() = default;

  // Raises if tensors or options do not fit. The tensors must keep their memory. packed_grads: gradients hold the
  // salient entries only; whether masters and emas do follows from their sizes.
  static std::unique_ptr<AdamTable> make(const AdamLists& lists, const AdamOptions& options, bool joint,
                                         bool packed_grads);

  virtual void step(const AdamGradients& gradients, const at::Tensor& steps, const at::Tensor& lr,
                    const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) = 0;
};

}  // namespace pecker_fast
