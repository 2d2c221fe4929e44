// Arithmetic of one entry of an Adam step. Every product and sum is written as the intended instruction, so that an
// entry's result does not depend on which kernel, or which path of it, handles the entry.
#pragma once

#include "common/adam_math.h"
#include "launch.h"

#if defined(PF_EMULATE_CUDA) || defined(__CUDACC__)

namespace pecker_fast {

__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float sum(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double sum(double a, double b) { return __dadd_rn(a, b); }

// a b + c in one rounding.
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// Within one unit in the last place. IEEE's square root and division are ten instructions and two branches more, and
// the error of a step is no larger for it.
__device__ __forceinline__ float root(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#elif defined(PF_EMULATE_CUDA)
  return ::cuda_emulator::approximate_root(x);
#else
  return sqrtf(x);
#endif
}
__device__ __forceinline__ double root(double x) { return sqrt(x); }

__device__ __forceinline__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#elif defined(PF_EMULATE_CUDA)
  return ::cuda_emulator::approximate_reciprocal(x);
#else
  return 1.0f / x;
#endif
}

// a / b by the hardware's reciprocal and one correction: the nearest float or its neighbour. Infinities and NaN are
// IEEE's: a correction that gives NaN is dropped. A divisor below 2^-126 counts as 0, one above 2^126 as infinite;
// sqrt(v) + eps is between them for every eps but one below 1.2e-38.
__device__ __forceinline__ float quotient(float a, float b) {
#if defined(PF_EMULATE_CUDA)
  if (!::cuda_emulator::approximate) return a / b;
#endif
  const float inverse = reciprocal(b), first = __fmul_rn(a, inverse);
  const float corrected = __fmaf_rn(__fmaf_rn(-first, b, a), inverse, first);
  return corrected == corrected ? corrected : first;
}
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

// clamp_symmetric: NaN stays NaN.
__device__ __forceinline__ float clamped(float x, float limit) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(limit));
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(result), "f"(-limit));
  return result;
#else
  return clamp_symmetric(x, limit);
#endif
}
__device__ __forceinline__ double clamped(double x, double limit) { return clamp_symmetric(x, limit); }

// condition_grad of adam_math.h.
template <typename T>
__device__ __forceinline__ T conditioned(const AdamScalars<T>& s, T g, T x) {
  if (s.zero_nonfinite && !is_finite(g)) g = 0;
  g = clamped(g, s.clip_value);
  return s.coupled_decay != T(0) ? fused(s.coupled_decay, x, g) : g;
}

}  // namespace pecker_fast

#endif
