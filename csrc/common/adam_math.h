// The Adam step of one entry, and the roundings around it, shared by host and device. masked_adam_ in
// pecker_fast/ops/reference.py is the definition; names here follow it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace pecker_fast {

// Storage of 16-bit floating types; arithmetic is in float.
struct bf16 {
  std::uint16_t bits;
};
struct fp16 {
  std::uint16_t bits;
};

PF_HD inline std::uint32_t float_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

PF_HD inline float float_from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Exact widening to the compute type.
PF_HD inline double widen(double x) { return x; }
PF_HD inline float widen(float x) { return x; }
PF_HD inline float widen(bf16 x) { return float_from_bits(static_cast<std::uint32_t>(x.bits) << 16); }
PF_HD inline float widen(fp16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) return float_from_bits(float_bits(static_cast<float>(mantissa) * 0x1p-24f) | sign);
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | mantissa << 13 | (mantissa ? 0x400000u : 0u));
  return float_from_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
#endif
}

// Rounding to the nearest, ties to even; NaN stays NaN.
PF_HD inline void narrow(double x, double* out) { *out = x; }
PF_HD inline void narrow(float x, float* out) { *out = x; }
PF_HD inline void narrow(float x, bf16* out) {
  const std::uint32_t raw = float_bits(x);
  const bool nan = (raw & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<std::uint16_t>(nan ? 0x7fc0u : (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16);
}
PF_HD inline void narrow(float x, fp16* out) {
  const std::uint32_t raw = float_bits(x), sign = (raw >> 16) & 0x8000u, magnitude = raw & 0x7fffffffu;
  std::uint32_t bits;
  if (magnitude > 0x7f800000u) {
    bits = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    // From 65520 on the nearest is inf.
    bits = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Subnormal results are multiples of 2^-24, which is the spacing of floats in [0.5, 1).
    bits = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    bits = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | bits);
}

// random_bits and round_stochastic of reference.py.
PF_HD inline std::uint32_t mix_bits(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// The part of the hash that all entries of a tensor share in one step.
PF_HD inline std::uint32_t random_state(std::int64_t seed, std::int64_t step, std::int64_t tensor) {
  const std::uint64_t whole = static_cast<std::uint64_t>(seed);
  std::uint32_t state = mix_bits(static_cast<std::uint32_t>(whole >> 32) + 0x9e3779b9u);
  state = mix_bits(static_cast<std::uint32_t>(whole) ^ state);
  state = mix_bits(state ^ static_cast<std::uint32_t>(step));
  return mix_bits(state ^ static_cast<std::uint32_t>(tensor));
}

PF_HD inline std::uint32_t random_bits(std::uint32_t state, std::int64_t entry) {
  const std::uint64_t index = static_cast<std::uint64_t>(entry);
  return mix_bits(mix_bits(state ^ static_cast<std::uint32_t>(index >> 32)) ^ static_cast<std::uint32_t>(index));
}

PF_HD inline void narrow_stochastic(double x, std::uint32_t, double* out) { *out = x; }
PF_HD inline void narrow_stochastic(float x, std::uint32_t, float* out) { *out = x; }
PF_HD inline void narrow_stochastic(float x, std::uint32_t random, bf16* out) {
  const std::uint32_t raw = float_bits(x);
  const bool finite = (raw & 0x7fffffffu) < 0x7f800000u;
  narrow(finite ? float_from_bits((raw + (random & 0xffffu)) & 0xffff0000u) : x, out);
}
PF_HD inline void narrow_stochastic(float x, std::uint32_t random, fp16* out) {
  const std::uint32_t raw = float_bits(x), magnitude = raw & 0x7fffffffu;
  random &= 0x1fffu;
  if (magnitude < 0x38800000u) {
    // Below 2^-14 float16 values are 2^-24 apart: the random bits are a fraction of that spacing.
    const float scaled = float_from_bits(magnitude) * 0x1p24f + static_cast<float>(random) * 0x1p-13f;
    out->bits = static_cast<std::uint16_t>((raw >> 16 & 0x8000u) | static_cast<std::uint32_t>(scaled));
  } else {
    narrow(magnitude < 0x7f800000u ? float_from_bits((raw + random) & 0xffffe000u) : x, out);
  }
}

// Values that all entries of a step share; T is the compute type.
template <typename T>
struct AdamScalars {
  T grad_factor;  // +- 1 / grad_scale, negative if the step maximizes: clamping is symmetric
  T clip_value;   // inf: none
  T decay;        // 1 - lr weight_decay if decoupled, else 1
  T coupled_decay;
  T beta2, one_minus_beta1, one_minus_beta2;
  T eps;
  T max_update;  // times lr; inf: none
  T ema_weight;  // 1 - ema_decay
  bool zero_nonfinite;
};

// Corrections of an entry or a tensor.
template <typename T>
struct AdamCorrection {
  T step_size;  // lr / bc1
  T inv_sqrt_bc2;
};

template <typename T>
PF_HD inline bool is_finite(T x) {
  return x - x == T(0);
}

// NaN stays NaN.
template <typename T>
PF_HD inline T clamp_symmetric(T x, T limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

template <typename T>
PF_HD inline T condition_grad(const AdamScalars<T>& s, T g, T x) {
  if (s.zero_nonfinite && !is_finite(g)) g = 0;
  g = clamp_symmetric(g, s.clip_value);
  return s.coupled_decay != T(0) ? g + s.coupled_decay * x : g;
}

PF_HD inline float square_root(float x) { return sqrtf(x); }
PF_HD inline double square_root(double x) { return sqrt(x); }

// Advances the moments of an entry and returns its update u. `g` is the combined gradient and `h` the one that the
// second moment sees, both after condition_grad. m and vmax may be null.
template <typename T>
PF_HD inline T adam_update(const AdamScalars<T>& s, AdamCorrection<T> c, T g, T h, T* m, T* v, T* vmax) {
  if (m != nullptr) g = *m = *m + s.one_minus_beta1 * (g - *m);
  T second = *v = s.beta2 * *v + s.one_minus_beta2 * h * h;
  if (vmax != nullptr) {
    if (second > *vmax || second != second) *vmax = second;
    second = *vmax;
  }
  return clamp_symmetric(c.step_size * g / (square_root(second) * c.inv_sqrt_bc2 + s.eps), s.max_update);
}

}  // namespace pecker_fast
