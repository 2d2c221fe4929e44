#include "cuda_tables.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <utility>

#include "cuda/table_cache.h"

namespace pecker_fast {
namespace {

struct Cache {
  std::mutex mutex;
  TableCache<at::Tensor> tables;
};

Cache& cache() {
  // Never destroyed: the CUDA context is gone by the time static objects are.
  static Cache* const instance = new Cache;
  return *instance;
}

// Sets the maximum of bytes that a read from DRAM fetches on the current device (0: no change); returns the setting.
std::int64_t l2_fetch_granularity(std::int64_t bytes) {
  if (bytes > 0) C10_CUDA_CHECK(cudaDeviceSetLimit(cudaLimitMaxL2FetchGranularity, static_cast<std::size_t>(bytes)));
  std::size_t now = 0;
  C10_CUDA_CHECK(cudaDeviceGetLimit(&now, cudaLimitMaxL2FetchGranularity));
  return static_cast<std::int64_t>(now);
}

TORCH_LIBRARY_FRAGMENT(pecker_fast, m) { m.def("l2_fetch_granularity", &l2_fetch_granularity); }

}  // namespace

Table device_table(const TableSpec& spec, int purpose, std::int64_t scratch_bytes) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  TORCH_CHECK_VALUE(spec.total_chunks <= INT32_MAX, "a call works on at most ", INT32_MAX, " chunks of ", kChunk,
                    " entries, got ", spec.total_chunks);
  const auto options = at::TensorOptions().dtype(at::kLong).device(at::kCUDA, stream.device_index());
  const auto allocate = [&](std::int64_t words) { return at::empty({words}, options); };
  const auto words_of = [](const at::Tensor& memory) {
    return memory.defined() ? memory.mutable_data_ptr<std::int64_t>() : nullptr;
  };
  Cache& shared = cache();
  std::unique_lock<std::mutex> lock(shared.mutex);
  const TableUser user{stream.device_index(), static_cast<std::int64_t>(stream.id()), purpose};
  auto table = shared.tables.get(spec, user, scratch_bytes, capturing, stream.stream(), allocate, words_of);
  return {table.view, table.scratch, stream.stream(), std::move(table.memory), std::move(table.own), std::move(lock)};
}

}  // namespace pecker_fast
