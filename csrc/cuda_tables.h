// Multi-tensor tables on the device, kept between calls.
//
// Between two steps of a training loop only gradient pointers change, and often not even they: a table is found again
// by everything else (the static part) and only the pointers in its last slots (the dynamic part) are sent, as
// arguments of one small kernel. After the first call nothing is allocated and nothing waits for the device.
//
// CUDA graphs. During a capture a table is made anew in the graph's memory, by kernels that the graph records, and is
// not kept: replays write it again, so they need nothing from this cache, and later calls cannot change what they read.
// The tensors of the call must stay where they are, as for every captured kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>

#include "cuda/table_spec.h"

namespace pecker_fast {

// A table on the current device and stream. While it lives, other threads wait for theirs: launch, then let go.
struct Table {
  MultiTensor view;
  // `scratch_bytes` of memory that later calls with the same table find again (contents are whatever the last left;
  // zeros at first), 16-byte aligned.
  void* scratch;
  cudaStream_t stream;

  at::Tensor storage;
  std::unique_lock<std::mutex> lock;
};

// Tensors must be given in order by set_tensor before. Call with the device of the tensors as the current one.
// `purpose` keeps the scratch memory of different operators apart.
Table device_table(const TableSpec& spec, int purpose, std::int64_t scratch_bytes = 0);

}  // namespace pecker_fast
