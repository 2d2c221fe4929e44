// A vector of floats for one instruction set: PF_SIMD_LEVEL 0 (portable C++), 1 (AVX2) or 2 (AVX-512), in namespace
// PF_ISA. No include guard: each translation unit includes it once, between PF_TARGET_*_BEGIN and PF_TARGET_END.
//
// Vec      kLanes floats, with the arithmetic operators. minimum and maximum return the second argument if either
//          is NaN.
// Mask     a condition for each lane.
// mask_of  the lanes' bits of a mask word, from bit `shift` on.
// compress moves the lanes whose bit is set to the front; spread is its inverse, with the lanes that it filled.
// Io<P>    how P (float, bf16, fp16) is loaded, widened to Vec, narrowed (to nearest even) and stored. Raw is the
//          untouched storage: blending it keeps a NaN's payload.
#include "cpu/simd_bits.h"

namespace pecker_fast {
namespace PF_ISA {

#if PF_SIMD_LEVEL == 1

constexpr int kLanes = 8;
struct Vec {
  __m256 r;
};
struct Mask {
  __m256 r;
};

inline Vec set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.r); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.r, b.r)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.r, b.r)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.r, b.r)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.r, b.r)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
inline Vec negative_multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.r, b.r, c.r)}; }
inline Vec exact_square_root(Vec a) { return {_mm256_sqrt_ps(a.r)}; }
inline Vec approximate_rsqrt(Vec a) { return {_mm256_rsqrt_ps(a.r)}; }
inline Vec minimum(Vec a, Vec b) { return {_mm256_min_ps(a.r, b.r)}; }
inline Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.r, b.r)}; }
inline Vec absolute(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.r)}; }
inline Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ)}; }
inline Mask is_nan(Vec a) { return {_mm256_cmp_ps(a.r, a.r, _CMP_UNORD_Q)}; }
inline Vec keep(Mask m, Vec a) { return {_mm256_and_ps(m.r, a.r)}; }
inline Vec blend(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.r, yes.r, m.r)}; }
inline std::uint32_t bits_of(Mask m) { return static_cast<std::uint32_t>(_mm256_movemask_ps(m.r)); }
inline Mask mask_of(std::uint32_t word, int shift) {
  const __m256i lane_bits = _mm256_slli_epi32(_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), shift);
  const __m256i set_bits = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(word)), lane_bits);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(set_bits, lane_bits))};
}
inline Vec compress(std::uint32_t bits, Vec a) {
  const __m128i row = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompressTable.rows[bits & 255]));
  return {_mm256_permutevar8x32_ps(a.r, _mm256_cvtepu8_epi32(row))};
}
struct Spread {
  Vec value;
  Mask filled;  // for blend only
};
inline Spread spread(std::uint32_t bits, Vec a) {
  const __m128i row = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpreadTable.rows[bits & 255]));
  // Negative where the lane is filled, and blend looks at signs only.
  const __m256i lanes = _mm256_cvtepi8_epi32(row);
  return {{_mm256_permutevar8x32_ps(a.r, lanes)}, {_mm256_castsi256_ps(lanes)}};
}
inline __m256i first_lanes(std::int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load_first(const float* p, std::int64_t n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
inline void store_first(float* p, Vec x, std::int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x.r); }

struct Raw16 {
  __m128i r;
};
inline Raw16 load16(const void* p) { return {_mm_loadu_si128(static_cast<const __m128i*>(p))}; }
inline void store16(void* p, Raw16 x) { _mm_storeu_si128(static_cast<__m128i*>(p), x.r); }
inline Raw16 blend16(Mask m, Raw16 yes, Raw16 no) {
  const __m256i wide = _mm256_castps_si256(m.r);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return {_mm_blendv_epi8(no.r, yes.r, half)};
}
inline Vec widen_bf16(Raw16 x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x.r), 16))};
}
inline Raw16 narrow_bf16(Vec x) {
  const __m256i raw = _mm256_castps_si256(x.r);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(raw, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i checked = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan(x).r));
  const __m256i high = _mm256_srli_epi32(checked, 16);
  return {_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1))};
}
inline Vec widen_fp16(Raw16 x) { return {_mm256_cvtph_ps(x.r)}; }
inline Raw16 narrow_fp16(Vec x) { return {_mm256_cvtps_ph(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

#elif PF_SIMD_LEVEL == 2

constexpr int kLanes = 16;
struct Vec {
  __m512 r;
};
struct Mask {
  __mmask16 r;
};

inline Vec set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.r); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.r, b.r)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.r, b.r)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.r, b.r)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.r, b.r)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
inline Vec negative_multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.r, b.r, c.r)}; }
inline Vec exact_square_root(Vec a) { return {_mm512_sqrt_ps(a.r)}; }
inline Vec approximate_rsqrt(Vec a) { return {_mm512_rsqrt14_ps(a.r)}; }
inline Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.r, b.r)}; }
inline Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.r, b.r)}; }
inline Vec absolute(Vec a) { return {_mm512_abs_ps(a.r)}; }
inline Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ)}; }
inline Mask is_nan(Vec a) { return {_mm512_cmp_ps_mask(a.r, a.r, _CMP_UNORD_Q)}; }
inline Vec keep(Mask m, Vec a) { return {_mm512_maskz_mov_ps(m.r, a.r)}; }
inline Vec blend(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m.r, no.r, yes.r)}; }
inline std::uint32_t bits_of(Mask m) { return m.r; }
inline Mask mask_of(std::uint32_t word, int shift) { return {static_cast<__mmask16>(word >> shift)}; }
inline Vec compress(std::uint32_t bits, Vec a) { return {_mm512_maskz_compress_ps(static_cast<__mmask16>(bits), a.r)}; }
struct Spread {
  Vec value;
  Mask filled;
};
inline Spread spread(std::uint32_t bits, Vec a) {
  const __mmask16 lanes = static_cast<__mmask16>(bits);
  return {{_mm512_maskz_expand_ps(lanes, a.r)}, {lanes}};
}
inline __mmask16 first_lanes(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec load_first(const float* p, std::int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void store_first(float* p, Vec x, std::int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.r); }

struct Raw16 {
  __m256i r;
};
inline Raw16 load16(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline void store16(void* p, Raw16 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x.r); }
inline Raw16 blend16(Mask m, Raw16 yes, Raw16 no) { return {_mm256_mask_blend_epi16(m.r, no.r, yes.r)}; }
inline Vec widen_bf16(Raw16 x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x.r), 16))};
}
inline Raw16 narrow_bf16(Vec x) {
  const __m512i raw = _mm512_castps_si512(x.r);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(raw, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i checked = _mm512_mask_blend_epi32(is_nan(x).r, rounded, _mm512_set1_epi32(0x7fc00000));
  return {_mm512_cvtepi32_epi16(_mm512_srli_epi32(checked, 16))};
}
inline Vec widen_fp16(Raw16 x) { return {_mm512_cvtph_ps(x.r)}; }
inline Raw16 narrow_fp16(Vec x) { return {_mm512_cvtps_ph(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

#else

// Short loops that compilers vectorise for the target.
constexpr int kLanes = 4;
struct Vec {
  float r[kLanes];
};
struct Mask {
  std::uint32_t r[kLanes];  // all ones or 0
};

#define PF_LANES(expression)                                   \
  {                                                            \
    Vec out;                                                   \
    for (int i = 0; i < kLanes; ++i) out.r[i] = (expression);  \
    return out;                                                \
  }
#define PF_LANE_MASK(expression)                                               \
  {                                                                            \
    Mask out;                                                                  \
    for (int i = 0; i < kLanes; ++i) out.r[i] = (expression) ? 0xffffffffu : 0u; \
    return out;                                                                \
  }

inline Vec set(float x) PF_LANES(x)
inline Vec load(const float* p) PF_LANES(p[i])
inline void store(float* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = x.r[i];
}
inline Vec operator+(Vec a, Vec b) PF_LANES(a.r[i] + b.r[i])
inline Vec operator-(Vec a, Vec b) PF_LANES(a.r[i] - b.r[i])
inline Vec operator*(Vec a, Vec b) PF_LANES(a.r[i] * b.r[i])
inline Vec operator/(Vec a, Vec b) PF_LANES(a.r[i] / b.r[i])
inline Vec multiply_add(Vec a, Vec b, Vec c) PF_LANES(a.r[i] * b.r[i] + c.r[i])
inline Vec square_root(Vec a) PF_LANES(sqrtf(a.r[i]))
inline Vec minimum(Vec a, Vec b) PF_LANES(a.r[i] < b.r[i] ? a.r[i] : b.r[i])
inline Vec maximum(Vec a, Vec b) PF_LANES(a.r[i] > b.r[i] ? a.r[i] : b.r[i])
inline Vec absolute(Vec a) PF_LANES(float_from_bits(float_bits(a.r[i]) & 0x7fffffffu))
inline Mask less(Vec a, Vec b) PF_LANE_MASK(a.r[i] < b.r[i])
inline Mask is_nan(Vec a) PF_LANE_MASK(a.r[i] != a.r[i])
inline Vec keep(Mask m, Vec a) PF_LANES(float_from_bits(m.r[i] & float_bits(a.r[i])))
// On the bits, not as a conditional of floats: a NaN's payload has to survive on every target.
inline Vec blend(Mask m, Vec yes, Vec no)
    PF_LANES(float_from_bits((m.r[i] & float_bits(yes.r[i])) | (~m.r[i] & float_bits(no.r[i]))))
inline std::uint32_t bits_of(Mask m) {
  std::uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= m.r[i] & (1u << i);
  return bits;
}
inline Mask mask_of(std::uint32_t word, int shift) PF_LANE_MASK(word >> (shift + i) & 1u)
inline Vec compress(std::uint32_t bits, Vec a) {
  Vec out = {};
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    out.r[count] = a.r[i];
    count += bits >> i & 1u;
    if (count == kLanes) break;
  }
  return out;
}
struct Spread {
  Vec value;
  Mask filled;
};
inline Spread spread(std::uint32_t bits, Vec a) {
  Spread out = {{}, mask_of(bits, 0)};
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    out.value.r[i] = a.r[count];
    count += bits >> i & 1u;
  }
  return out;
}
inline Vec load_first(const float* p, std::int64_t n) {
  Vec out = {};
  for (std::int64_t i = 0; i < n; ++i) out.r[i] = p[i];
  return out;
}
inline void store_first(float* p, Vec x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) p[i] = x.r[i];
}

#undef PF_LANES
#undef PF_LANE_MASK

struct Raw16 {
  std::uint16_t r[kLanes];
};
inline Raw16 load16(const void* p) {
  Raw16 out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
inline void store16(void* p, Raw16 x) { std::memcpy(p, &x, sizeof(x)); }
inline Raw16 blend16(Mask m, Raw16 yes, Raw16 no) {
  for (int i = 0; i < kLanes; ++i) no.r[i] = m.r[i] ? yes.r[i] : no.r[i];
  return no;
}
template <typename P>
inline Vec widen_lanes(Raw16 x) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.r[i] = widen(P{x.r[i]});
  return out;
}
template <typename P>
inline Raw16 narrow_lanes(Vec x) {
  Raw16 out;
  for (int i = 0; i < kLanes; ++i) {
    P narrowed;
    narrow(x.r[i], &narrowed);
    out.r[i] = narrowed.bits;
  }
  return out;
}
inline Vec widen_bf16(Raw16 x) { return widen_lanes<bf16>(x); }
inline Raw16 narrow_bf16(Vec x) { return narrow_lanes<bf16>(x); }
inline Vec widen_fp16(Raw16 x) { return widen_lanes<fp16>(x); }
inline Raw16 narrow_fp16(Vec x) { return narrow_lanes<fp16>(x); }

inline void prefetch(const void*) {}

#endif

// The bits of a mask word that one Vec takes.
constexpr std::uint32_t kLaneMask = (1u << kLanes) - 1u;

template <typename P>
struct Io;

template <>
struct Io<float> {
  using Raw = Vec;
  static Raw load(const float* p) { return PF_ISA::load(p); }
  static void store(float* p, Raw x) { PF_ISA::store(p, x); }
  static Vec widen(Raw x) { return x; }
  static Raw narrow(Vec x) { return x; }
  static Raw blend(Mask m, Raw yes, Raw no) { return PF_ISA::blend(m, yes, no); }
};

template <>
struct Io<bf16> {
  using Raw = Raw16;
  static Raw load(const bf16* p) { return load16(p); }
  static void store(bf16* p, Raw x) { store16(p, x); }
  static Vec widen(Raw x) { return widen_bf16(x); }
  static Raw narrow(Vec x) { return narrow_bf16(x); }
  static Raw blend(Mask m, Raw yes, Raw no) { return blend16(m, yes, no); }
};

template <>
struct Io<fp16> {
  using Raw = Raw16;
  static Raw load(const fp16* p) { return load16(p); }
  static void store(fp16* p, Raw x) { store16(p, x); }
  static Vec widen(Raw x) { return widen_fp16(x); }
  static Raw narrow(Vec x) { return narrow_fp16(x); }
  static Raw blend(Mask m, Raw yes, Raw no) { return blend16(m, yes, no); }
};

template <typename P>
inline Vec load_wide(const P* p) {
  return Io<P>::widen(Io<P>::load(p));
}

// NaN stays NaN: minimum and maximum return their second argument for it.
inline Vec clamp_symmetric(Vec x, Vec limit) { return minimum(limit, maximum(set(0.0f) - limit, x)); }

#if PF_SIMD_LEVEL > 0
// Accurate to 1 ulp. A quotient follows in every use, and the divider cannot do both at memory speed, so this goes
// through the multipliers: an estimate e of the reciprocal with 11 bits or more, and sqrt(a) = a e / sqrt(1 - r) for
// r = 1 - a e^2 expanded to the second order.
inline Vec square_root(Vec a) {
  const Vec estimate = approximate_rsqrt(a), root = a * estimate;
  const Vec r = negative_multiply_add(root, estimate, set(1.0f));
  const Vec result = multiply_add(root, r * multiply_add(r, set(0.375f), set(0.5f)), root);
  // 0, inf and values that the estimate takes for 0 give NaN above. Lane by lane: a root must not depend on the other
  // lanes of the vector, which differ with packing and with the end of a tensor.
  const Mask failed = is_nan(result);
  return bits_of(failed) == 0 ? result : blend(failed, exact_square_root(a), result);
}
#endif

inline Vec finite_or_zero(Vec x) { return keep(less(absolute(x), set(HUGE_VALF)), x); }

}  // namespace PF_ISA
}  // namespace pecker_fast
