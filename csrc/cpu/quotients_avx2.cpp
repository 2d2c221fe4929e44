#include "cpu/isa.h"

#if PF_X86
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/bit_words.h"
#include "cpu/quotients.h"
#include "cpu/simd_tables.h"

PF_TARGET_AVX2_BEGIN
#define PF_ISA avx2
#define PF_SIMD_LEVEL 1
#include "cpu/simd.h"
#include "cpu/quotients_kernel.h"
PF_TARGET_END
#endif
