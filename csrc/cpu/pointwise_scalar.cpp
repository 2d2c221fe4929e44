#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/pointwise.h"

#define PF_ISA scalar
#define PF_SIMD_LEVEL 0
#include "cpu/simd.h"
#include "cpu/pointwise_kernel.h"
