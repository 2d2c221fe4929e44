// Multi-tensor tables on the device, kept between calls.
//
// Between two steps of a training loop only gradient pointers change, and often not even they: a table is found again by
// everything else (the static part) and only the pointers in its last slots (the dynamic part) are sent, as arguments of
// one small kernel. After the first call nothing is allocated and nothing waits for the device.
//
// CUDA graphs. During a capture a table is made anew in the graph's memory, by kernels that the graph records, and is not
// kept: replays write it again, so they need nothing from this cache, and later calls cannot change what they read. The
// tensors of the call must stay where they are, as for every captured kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/multi_tensor.h"

namespace pecker_fast {

// What a call works on. `slots` lists of pointers; the last `dynamic_slots` are those that change between calls.
struct TableSpec {
  TableSpec(std::size_t tensors, int slots, int dynamic_slots);

  // Tensor i: entries, first word of its mask, element type, and the pointer that vector accesses are aligned to.
  void set_tensor(std::size_t i, std::int64_t numel, std::int64_t first_word, ElementType type, const void* leading,
                  int element_size);
  void set_pointer(int slot, std::size_t i, const void* pointer) {
    words[pointers_at(num_tensors) + slot * num_tensors + i] = reinterpret_cast<std::intptr_t>(pointer);
  }

  std::int64_t num_tensors, slots, dynamic_slots;
  std::int64_t total_chunks = 0, total_blocks = 0;
  // TensorInfo of each tensor, then the pointers: what the device gets.
  std::vector<std::int64_t> words;
};

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
