#include "adam_kernel.cuh"

namespace pecker_fast {

template void adam_step<bf16, float>(const AdamArguments<float>&, cudaStream_t);

}  // namespace pecker_fast
