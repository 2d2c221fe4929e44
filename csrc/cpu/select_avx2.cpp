#include "cpu/isa.h"

#if PF_X86
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/bit_words.h"
#include "cpu/select.h"
#include "cpu/simd_tables.h"

PF_TARGET_AVX2_BEGIN
#define PF_ISA avx2
#define PF_SIMD_LEVEL 1
#include "cpu/select_kernel.h"
PF_TARGET_END
#endif
