#include "adam_kernel.cuh"

namespace pecker_fast {

template void adam_step<double, double>(const AdamArguments<double>&, cudaStream_t);

}  // namespace pecker_fast
