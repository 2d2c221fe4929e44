// Multi-tensor tables on the device, cached between calls.
//
// Between two steps of a training loop at most the gradients' pointers change. A table is looked up by everything else
// (its static part); only the pointers in its last slots (the dynamic part) are sent, as arguments of one small kernel.
// After the first call nothing is allocated and nothing waits for the device.
//
// CUDA graphs. During a capture a table is made anew in the graph's memory, by kernels that the graph records, and is
// not cached: replays write it again, so they need nothing from the cache, and later calls cannot change what they
// read. The tensors of the call must stay where they are, as for every captured kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>

#include "cuda/table_spec.h"

namespace pecker_fast {

// A table on the current device and stream. While it lives, other threads wait for theirs: launch, then release it.
struct Table {
  MultiTensor view;
  // `scratch_bytes` of memory, 16-byte aligned: zeros at first, then whatever the last call with the table left.
  void* scratch;
  cudaStream_t stream;

  at::Tensor storage;
  std::unique_lock<std::mutex> lock;
};

// Call after set_tensor for all tensors in order, with their device as the current one.
// `purpose` keeps the scratch memory of different operators apart.
Table device_table(const TableSpec& spec, int purpose, std::int64_t scratch_bytes = 0);

}  // namespace pecker_fast
