#include <cmath>

#include "adam.h"

namespace pecker_fast {
namespace {

constexpr int kThreads = 128;

// Powers and divisions that a tensor needs once. Computing them here keeps the step's own kernel small.
template <typename T>
__global__ void prepare_kernel(AdamDeviceScalars s, MultiTensor table, void* scratch) {
  const T lr = static_cast<T>(*s.lr);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i == 0) {
    AdamPrepared<T>& step = *static_cast<AdamPrepared<T>*>(scratch);
    const T inv_scale = s.grad_scale != nullptr ? T(1) / static_cast<T>(*s.grad_scale) : T(1);
    step.lr = lr;
    step.grad_factor = s.maximize ? -inv_scale : inv_scale;
    step.decay = s.decoupled_weight_decay ? T(1) - lr * static_cast<T>(s.weight_decay) : T(1);
    // An infinite limit stays infinite if lr is 0: inf * 0 would be NaN.
    const T limit = static_cast<T>(s.max_update);
    step.max_update = is_finite(limit) ? limit * lr : limit;
    step.skip = s.found_inf != nullptr && *s.found_inf != 0.0f;
  }
  if (i >= table.num_tensors) return;
  const double count = s.steps[i];
  AdamTensorPrepared<T> tensor;
  tensor.correction.step_size = lr * static_cast<T>(1 / (1 - pow(s.beta1, count)));
  tensor.correction.inv_sqrt_bc2 = static_cast<T>(1 / sqrt(1 - pow(s.beta2, count)));
  const std::int64_t number = reinterpret_cast<std::intptr_t>(table_pointer<void>(table, kTensorNumber, i));
  tensor.random_state = random_state(s.seed, static_cast<std::int64_t>(count), number);
  auto* const tensors =
      reinterpret_cast<AdamTensorPrepared<T>*>(static_cast<unsigned char*>(scratch) + kAdamPreparedBytes);
  tensors[i] = tensor;
}

}  // namespace

template <typename T>
void prepare_adam(const AdamDeviceScalars& scalars, const MultiTensor& table, void* scratch, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((table.num_tensors + kThreads - 1) / kThreads);
  PF_LAUNCH(prepare_kernel<T>, blocks, kThreads, 0, stream, scalars, table, scratch);
}

template void prepare_adam<float>(const AdamDeviceScalars&, const MultiTensor&, void*, cudaStream_t);
template void prepare_adam<double>(const AdamDeviceScalars&, const MultiTensor&, void*, cudaStream_t);

}  // namespace pecker_fast
