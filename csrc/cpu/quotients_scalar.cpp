#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/quotients.h"

#define PF_ISA scalar
#define PF_SIMD_LEVEL 0
#include "cpu/simd.h"
#include "cpu/quotients_kernel.h"
