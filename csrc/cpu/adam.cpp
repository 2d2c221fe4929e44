#include "cpu/adam.h"

namespace pecker_fast {
namespace {

// One entry at a time: float64 serves checks and small models, which are not bound by memory.
void adam_chunk(const AdamStep<double>& step, const AdamTensor<double>& t, const AdamChunk& chunk) {
  const AdamScalars<double>& s = step.scalars;
  double* param = static_cast<double*>(t.param);
  const double* grad = static_cast<const double*>(t.grad);
  const double* masked_grad = static_cast<const double*>(t.masked_grad);
  if (grad == nullptr && masked_grad == nullptr) return;
  std::int64_t state = chunk.state;
  for (std::int64_t i = chunk.begin; i < chunk.begin + chunk.length; ++i) {
    const bool salient = t.words == nullptr || is_salient(t.words, i);
    if (step.masked && !salient) {
      if (t.ema != nullptr && step.ema_everywhere) {
        const double target = t.master != nullptr ? t.master[i] : param[i];
        t.ema[i] += s.ema_weight * (target - t.ema[i]);
      }
      continue;
    }
    const std::int64_t k = step.packed ? state++ : i;
    double* x = t.master != nullptr ? t.master + (step.packed_masters ? k : i) : param + i;
    double g = grad != nullptr ? grad[step.packed_grads ? k : i] * s.grad_factor : 0.0;
    double h = g;
    if (masked_grad != nullptr && salient) g += masked_grad[i] * s.grad_factor;
    g = condition_grad(s, g, *x);
    h = step.retain_variance && masked_grad != nullptr ? condition_grad(s, h, *x) : g;
    const AdamCorrection<double> correction =
        t.counts != nullptr ? count_update(step, t.counts, k) : t.correction;
    const double u = adam_update(s, correction, g, h, t.exp_avg != nullptr ? t.exp_avg + k : nullptr,
                                 t.exp_avg_sq + k, t.max_exp_avg_sq != nullptr ? t.max_exp_avg_sq + k : nullptr);
    *x = *x * s.decay - u;
    param[i] = *x;
    if (t.ema != nullptr) {
      double* ema = t.ema + (step.packed_emas ? k : i);
      *ema += s.ema_weight * (*x - *ema);
    }
  }
}

}  // namespace

void count_salient(const std::uint32_t* words, std::int64_t numel, std::int64_t* counts) {
#if PF_X86
  if (active_isa() == Isa::avx512) return avx512::count_salient(words, numel, counts);
  if (active_isa() == Isa::avx2) return avx2::count_salient(words, numel, counts);
#endif
  return scalar::count_salient(words, numel, counts);
}

void adam_chunks(const AdamStep<double>& step, const AdamTensor<double>* tensors, const AdamChunk* chunks,
                 std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) adam_chunk(step, tensors[chunks[i].tensor], chunks[i]);
}

void adam_chunks(ParamType type, const AdamStep<float>& step, const AdamTensor<float>* tensors,
                 const AdamChunk* chunks, std::int64_t count) {
#if PF_X86
  if (active_isa() == Isa::avx512) return avx512::adam_chunks(type, step, tensors, chunks, count);
  if (active_isa() == Isa::avx2) return avx2::adam_chunks(type, step, tensors, chunks, count);
#endif
  return scalar::adam_chunks(type, step, tensors, chunks, count);
}

}  // namespace pecker_fast
