// cub::DeviceTopK behind a C function, for benchmarks/selections.py. The toolkits that have it are newer than CUDA 13.0.
#include <cub/device/device_topk.cuh>
#include <cuda/__execution/determinism.h>
#include <cuda/__execution/output_ordering.h>
#include <cuda/__execution/require.h>
#include <cuda/std/execution>
#include <cuda/stream_ref>
#include <thrust/iterator/counting_iterator.h>

#include <cstdint>

// The k largest of `numel` keys and their positions, in any order. Called with memory = null it sets *bytes.
extern "C" int top_k(void* memory, std::size_t* bytes, const float* keys, float* out_keys, std::int64_t* out_positions,
                     std::int64_t numel, std::int64_t k, cudaStream_t stream) {
  const auto requirements = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                                     cuda::execution::output_ordering::unsorted);
  const auto environment = cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
  const thrust::counting_iterator<std::int64_t> positions(0);
  return cub::DeviceTopK::MaxPairs(memory, *bytes, keys, out_keys, positions, out_positions, numel, k, environment);
}
