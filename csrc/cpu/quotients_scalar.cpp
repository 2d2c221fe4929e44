#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/bit_words.h"
#include "cpu/quotients.h"

#define PF_ISA scalar
#define PF_SIMD_LEVEL 0
#include "cpu/simd.h"
#include "cpu/quotients_kernel.h"
