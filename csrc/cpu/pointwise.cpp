#include "cpu/pointwise.h"

namespace pecker_fast {

#if PF_X86
#define PF_DISPATCH(call)                                   \
  if (active_isa() == Isa::avx512) return avx512::call;     \
  if (active_isa() == Isa::avx2) return avx2::call;         \
  return scalar::call;
#else
#define PF_DISPATCH(call) return scalar::call;
#endif

void accumulate(ParamType type, Reduce reduce, float* accumulator, const void* grad, std::int64_t numel) {
  PF_DISPATCH(accumulate(type, reduce, accumulator, grad, numel))
}

void apply_mask(int element_size, void* x, const std::uint32_t* words, std::int64_t numel) {
  PF_DISPATCH(apply_mask(element_size, x, words, numel))
}

std::int64_t pack(int element_size, const void* dense, const std::uint32_t* words, std::int64_t numel, void* packed) {
  PF_DISPATCH(pack(element_size, dense, words, numel, packed))
}

void unpack(int element_size, const void* packed, std::int64_t count, const std::uint32_t* words, std::int64_t numel,
            void* dense) {
  PF_DISPATCH(unpack(element_size, packed, count, words, numel, dense))
}

std::int64_t count_nonfinite(ParamType type, const void* grad, const void* masked_grad, const std::uint32_t* words,
                             bool salient_only, double inv_scale, std::int64_t numel) {
  PF_DISPATCH(count_nonfinite(type, grad, masked_grad, words, salient_only, inv_scale, numel))
}

#undef PF_DISPATCH

}  // namespace pecker_fast
