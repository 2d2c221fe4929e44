// Loops of the operators that read each entry once, each on one piece of a tensor. `words` are the mask words from the
// piece's first entry on; bits past its end are ignored.
#pragma once

#include <cstdint>

#include "common/adam_math.h"
#include "cpu/isa.h"
#include "cpu/param_type.h"

namespace pecker_fast {

enum class Reduce { sum, abs_sum, sq_sum };

#define PF_POINTWISE_FUNCTIONS                                                                                     \
  /* accumulator[i] += grad[i], its magnitude or its square, in float. */                                          \
  void accumulate(ParamType type, Reduce reduce, float* accumulator, const void* grad, std::int64_t numel);        \
  /* Sets the entries outside the mask to +0. */                                                                   \
  void apply_mask(int element_size, void* x, const std::uint32_t* words, std::int64_t numel);                      \
  /* Copies the salient entries to `packed`, in order; returns their number. */                                    \
  std::int64_t pack(int element_size, const void* dense, const std::uint32_t* words, std::int64_t numel,           \
                    void* packed);                                                                                 \
  /* The inverse, 0 outside the mask; `count` is the number of salient entries. */                                 \
  void unpack(int element_size, const void* packed, std::int64_t count, const std::uint32_t* words,                \
              std::int64_t numel, void* dense);                                                                    \
  /* Entries with inf or NaN in inv_scale grad + (inv_scale masked_grad where salient). Either gradient may be     \
     null, and `words` where all is salient. salient_only: count those only. */                                    \
  std::int64_t count_nonfinite(ParamType type, const void* grad, const void* masked_grad,                          \
                               const std::uint32_t* words, bool salient_only, double inv_scale, std::int64_t numel);

// With the best instruction set.
PF_POINTWISE_FUNCTIONS

namespace scalar {
PF_POINTWISE_FUNCTIONS
}
#if PF_X86
namespace avx2 {
PF_POINTWISE_FUNCTIONS
}
namespace avx512 {
PF_POINTWISE_FUNCTIONS
}
#endif

#undef PF_POINTWISE_FUNCTIONS

}  // namespace pecker_fast
