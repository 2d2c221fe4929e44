#include "cpu/isa.h"

#if PF_X86
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/bit_words.h"
#include "cpu/quotients.h"
#include "cpu/simd_tables.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 intrinsics start from a deliberately undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

PF_TARGET_AVX512_BEGIN
#define PF_ISA avx512
#define PF_SIMD_LEVEL 2
#include "cpu/simd.h"
#include "cpu/quotients_kernel.h"
PF_TARGET_END
#endif
