#include "cpu/isa.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/bit_words.h"
#include "cpu/select.h"

#define PF_ISA scalar
#define PF_SIMD_LEVEL 0
#include "cpu/select_kernel.h"
