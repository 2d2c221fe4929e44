// masked_adam_ on raw device pointers; pecker_fast/ops/reference.py defines it.
#pragma once

#include "common/adam_math.h"
#include "multi_tensor.h"

namespace pecker_fast {

// Pointer lists of the operator's table. The gradients come last: only they change from step to step.
enum AdamSlot : int {
  kParam,
  kExpAvg,
  kExpAvgSq,
  kMaxExpAvgSq,
  kMaster,
  kEma,
  kCounts,
  kPackedSize,    // not a pointer: the number of entries in each tensor's packed state
  kTensorNumber,  // not a pointer: the number of the tensor in its random bits
  kGrad,
  kMaskedGrad,
  kAdamSlots,
};
constexpr int kAdamDynamicSlots = 2;

// Values that prepare_adam computes on the device for the step: for the whole step ...
template <typename T>
struct AdamPrepared {
  T lr, grad_factor, decay, max_update;
  std::int32_t skip;
};

// ... and for each tensor.
template <typename T>
struct AdamTensorPrepared {
  AdamCorrection<T> correction;
  std::uint32_t random_state;
};

// Scratch memory of a step: AdamPrepared, then AdamTensorPrepared of each tensor.
constexpr std::int64_t kAdamPreparedBytes = 64;

inline std::int64_t adam_scratch_bytes(std::int64_t num_tensors) {
  return kAdamPreparedBytes + num_tensors * static_cast<std::int64_t>(sizeof(AdamTensorPrepared<double>));
}

template <typename T>
struct AdamArguments {
  MultiTensor table;
  void* scratch;
  const std::uint32_t* words;          // null: no mask
  const std::int64_t* packed_offsets;  // null: state is not packed
  const T* bias_table;                 // null: shared step counts
  std::int32_t last_bias_row;
  AdamScalars<T> scalars;
  // With packed state: gradients, and masters and averages, hold the salient entries only, too.
  bool packed_grads, packed_values;
  bool has_first_moment, has_ema, joint, retain_variance, ema_everywhere, stochastic_rounding, counts_are_16_bit;
  // Whether a feature is used that only the larger version of the kernel has: max_exp_avg_sqs, masters, counts,
  // retain_variance, stochastic_rounding, ema_everywhere.
  bool rare;
  // Whether gradients are clipped, decayed or made finite, or updates are limited; set by set_adam_scalars.
  bool conditioned;
};

// Fills in the scalars that the host knows; prepare_adam does the rest. clip_value, max_update: inf for none.
template <typename T>
void set_adam_scalars(AdamArguments<T>& arguments, double beta1, double beta2, double eps, double coupled_decay,
                      double clip_value, double max_update, double ema_decay, bool zero_nonfinite) {
  AdamScalars<T>& s = arguments.scalars;
  s.clip_value = static_cast<T>(clip_value);
  s.coupled_decay = static_cast<T>(coupled_decay);
  s.beta2 = static_cast<T>(beta2);
  s.one_minus_beta1 = static_cast<T>(1.0 - beta1);
  s.one_minus_beta2 = static_cast<T>(1.0 - beta2);
  s.eps = static_cast<T>(eps);
  s.ema_weight = static_cast<T>(1.0 - ema_decay);
  s.zero_nonfinite = zero_nonfinite;
  arguments.conditioned = zero_nonfinite || is_finite(clip_value) || is_finite(max_update) || coupled_decay != 0;
}

// Device scalars of a step, and the options to combine them with.
struct AdamDeviceScalars {
  const float* steps;
  const double* lr;
  const float* grad_scale;  // or null
  const float* found_inf;   // or null
  double beta1, beta2, weight_decay, max_update;  // max_update: inf for none
  bool decoupled_weight_decay, maximize;
  std::int64_t seed;
};

template <typename T>
void prepare_adam(const AdamDeviceScalars& scalars, const MultiTensor& table, void* scratch, cudaStream_t stream);

// One step, after prepare_adam. P is the type of parameters and gradients, T the compute type.
template <typename P, typename T>
void adam_step(const AdamArguments<T>& arguments, cudaStream_t stream);

}  // namespace pecker_fast
