// Multi-tensor tables on the device, cached between calls.
//
// Between two steps of a training loop at most the gradients' pointers change. A table is looked up by everything else
// (its static part); only the pointers in its last slots (the dynamic part) are sent, as arguments of one small kernel.
// After the first call nothing is allocated and nothing waits for the device.
//
// CUDA graphs. A captured call takes the static part from the cache, where the steps before the capture have put it, and
// only the gradients' pointers into the graph's own memory, by a kernel that the graph records: replays write them again,
// and later calls cannot change what they read. From then on that static part stays in the cache for good: nothing says
// when the graph is gone. Its contents are there before the first replay if the parameters that the same earlier step
// wrote are. Without an earlier step all of the table is made in the graph's memory, and written again at every replay.
// The tensors of the call must stay where they are, as for every captured kernel.
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
  // `scratch_bytes` of memory, 16-byte aligned, with arbitrary contents.
  void* scratch;
  cudaStream_t stream;

  at::Tensor storage, graph_storage;
  std::unique_lock<std::mutex> lock;
};

// Call after set_tensor for all tensors in order, with their device as the current one.
// `purpose` keeps the scratch memory of different operators apart.
Table device_table(const TableSpec& spec, int purpose, std::int64_t scratch_bytes = 0);

}  // namespace pecker_fast
