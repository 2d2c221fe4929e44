// block_counts, pack and unpack on raw device pointers.
#pragma once

#include "multi_tensor.h"

namespace pecker_fast {

// Set bits in each block of kChunk entries. The table has no slots and no shifts, so its chunks are the blocks.
void block_counts(const MultiTensor& table, const std::uint32_t* words, std::int64_t* counts, cudaStream_t stream);

// Set bits before each block of one tensor, with their total at the end: block_count(numel) + 1 entries.
void block_offsets(const std::uint32_t* words, std::int64_t numel, std::int64_t* offsets, cudaStream_t stream);

// `element_size`: 2, 4 or 8 bytes. Entries of `packed` past `count` are neither written nor read; where the mask has
// fewer than `count` entries, the rest of `packed` becomes 0.
void pack(const void* dense, int element_size, const std::uint32_t* words, std::int64_t numel,
          const std::int64_t* offsets, void* packed, std::int64_t count, cudaStream_t stream);
void unpack(const void* packed, int element_size, std::int64_t count, const std::uint32_t* words, std::int64_t numel,
            const std::int64_t* offsets, void* dense, cudaStream_t stream);

}  // namespace pecker_fast
