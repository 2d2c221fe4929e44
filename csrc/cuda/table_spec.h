// The host's side of a multi-tensor table: the tensors of a call.
#pragma once

#include <cstring>
#include <vector>

#include "multi_tensor.h"

namespace pecker_fast {

struct TableSpec {
  // `slots` lists of pointers; the last `dynamic_slots` are those that change between calls.
  TableSpec(std::size_t tensors, int slots, int dynamic_slots)
      : num_tensors(static_cast<std::int64_t>(tensors)),
        slots(slots),
        dynamic_slots(dynamic_slots),
        words(chunks_at(num_tensors, slots), 0) {}

  // For i = 0, 1, ...: entries, first word of the mask, type, and the pointer to which vector accesses are aligned
  // (null: groups start at entry 0).
  void set_tensor(std::size_t i, std::int64_t numel, std::int64_t first_word, ElementType type, const void* leading,
                  int element_size) {
    const std::int32_t shift = numel == 0 ? 0 : group_shift(leading, element_size);
    const TensorInfo info{numel, first_word, total_blocks, total_chunks, shift, type};
    std::memcpy(&words[kInfoWords * i], &info, sizeof(info));
    total_blocks += block_count(numel);
    total_chunks += num_chunks(numel, shift);
  }

  void set_pointer(int slot, std::size_t i, const void* pointer) {
    words[pointers_at(num_tensors) + slot * num_tensors + i] = reinterpret_cast<std::intptr_t>(pointer);
  }

  void set_number(int slot, std::size_t i, std::int64_t number) {
    words[pointers_at(num_tensors) + slot * num_tensors + i] = number;
  }

  // Words of the table on the device, the chunks and alignment to 16 bytes included.
  std::int64_t table_words() const { return (static_cast<std::int64_t>(words.size()) + total_chunks + 1) / 2 * 2; }

  // Words before those of the dynamic pointers, and words of these.
  std::int64_t static_words() const { return chunks_at(num_tensors, slots - dynamic_slots); }
  std::int64_t dynamic_words() const { return num_tensors * dynamic_slots; }

  // The table in `memory`; dynamic: other memory of its dynamic pointers, or null.
  MultiTensor view(std::int64_t* memory, std::int64_t* dynamic = nullptr) const {
    return {reinterpret_cast<const TensorInfo*>(memory),
            reinterpret_cast<void* const*>(memory + pointers_at(num_tensors)),
            reinterpret_cast<void* const*>(dynamic != nullptr ? dynamic : memory + static_words()),
            reinterpret_cast<const Chunk*>(memory + chunks_at(num_tensors, slots)),
            static_cast<std::int32_t>(num_tensors),
            static_cast<std::int32_t>(slots - dynamic_slots),
            total_chunks};
  }

  std::int64_t num_tensors, slots, dynamic_slots;
  std::int64_t total_chunks = 0, total_blocks = 0;
  // TensorInfo of each tensor, then the pointers, slot by slot.
  std::vector<std::int64_t> words;
};

}  // namespace pecker_fast
