#include "packing.h"

namespace pecker_fast {
namespace {

// Set bits of a tensor's kChunk entries from `block` on; for the threads of the first warp.
__device__ __forceinline__ int count_block(const std::uint32_t* words, std::int64_t block, std::int64_t numel) {
  __shared__ int warp_counts[kChunkWarps];
  int count = 0;
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    count += __popc(shifted_word(words, tile_word(static_cast<int>(block), k), 0, numel));
  }
  count = warp_sum(count);
  if (lane_id() == 0) warp_counts[warp_id()] = count;
  __syncthreads();
  return warp_id() == 0 ? warp_sum(lane_id() < kChunkWarps ? warp_counts[lane_id() % kChunkWarps] : 0) : 0;
}

__global__ void __launch_bounds__(kChunkThreads)
    block_counts_kernel(const __grid_constant__ MultiTensor table, const std::uint32_t* words, std::int64_t* counts) {
  const Chunk chunk = table.chunks[blockIdx.x];
  const TensorInfo& info = table.tensors[chunk.tensor];
  const int count = count_block(words + info.first_word, chunk.index, info.numel);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

__global__ void __launch_bounds__(kChunkThreads)
    tensor_block_counts_kernel(const std::uint32_t* words, std::int64_t numel, std::int64_t* counts) {
  const int count = count_block(words, blockIdx.x, numel);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

constexpr int kScanThreads = 1024;

// One block: values[i] becomes the sum of all before it, values[n] that of all.
__global__ void __launch_bounds__(kScanThreads) exclusive_sum_kernel(std::int64_t* values, std::int64_t n) {
  __shared__ std::int64_t warp_sums[kScanThreads / 32];
  std::int64_t carry = 0;
  for (std::int64_t start = 0; start < n; start += kScanThreads) {
    const std::int64_t i = start + threadIdx.x;
    const std::int64_t value = i < n ? values[i] : 0;
    std::int64_t total;
    const std::int64_t before = warp_exclusive_sum(value, &total);
    if (lane_id() == 0) warp_sums[warp_id()] = total;
    __syncthreads();
    const std::int64_t warps_before = warp_exclusive_sum(warp_sums[lane_id()], &total);
    const std::int64_t result = carry + __shfl_sync(kFullWarp, warps_before, warp_id()) + before;
    if (i < n) values[i] = result;
    carry += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) values[n] = carry;
}

// Calls visit(first entry, bits that exist, bits of the mask, set bits of the tensor before this group, fast) for all
// groups of a block. `aligned` and `fast` are as in for_each_group.
template <typename Visit>
__device__ __forceinline__ void for_each_ranked_group(const std::uint32_t* words, std::int64_t numel,
                                                      const std::int64_t* offsets, bool aligned, const Visit& visit) {
  __shared__ int tile_counts[kTiles];
  const int block = static_cast<int>(blockIdx.x);
  unsigned salient[kTilesPerWarp];
  int before[kTilesPerWarp];
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    salient[k] = shifted_word(words, tile_word(block, k), 0, numel);
    int total;
    before[k] = warp_exclusive_sum(__popc(salient[k]), &total);
    if (lane_id() == 0) tile_counts[warp_id() + kChunkWarps * k] = total;
  }
  __syncthreads();
  const std::int64_t base = offsets[block];
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    const std::int64_t tile = tile_first(block, k, 0);
    if (tile >= numel) break;
    const bool fast = aligned && whole_tile(tile, numel);
    const int tiles_before = warp_sum(lane_id() < warp_id() + kChunkWarps * k ? tile_counts[lane_id() % kTiles] : 0);
#pragma unroll 1
    for (int r = 0; r < kTileGroups; r += 32) {
      const int owner = (r + lane_id()) / 8, low = lane_id() % 8 * kGroup;
      const unsigned word = __shfl_sync(kFullWarp, salient[k], owner);
      const int rank = __shfl_sync(kFullWarp, before[k], owner) + __popc(word & ((1u << low) - 1));
      const std::int64_t first = tile + (r + lane_id()) * kGroup;
      const unsigned exists = fast ? 15u : group_bits(first, numel);
      if (exists != 0) visit(first, exists, word >> low & exists, base + tiles_before + rank, fast);
    }
  }
}

template <typename P>
__global__ void __launch_bounds__(kChunkThreads)
    pack_kernel(const P* dense, const std::uint32_t* words, std::int64_t numel, const std::int64_t* offsets, P* packed,
                std::int64_t count) {
  const auto visit = [&](std::int64_t first, unsigned, unsigned mask, std::int64_t at, bool fast) {
    if (mask == 0) return;
    Vector<P, kGroup> values;
    if (fast) {
      load_group<true>(values, dense, first, mask);
    } else {
      load_group<false>(values, dense, first, mask);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (!(mask >> i & 1)) continue;
      if (at < count) packed[at] = values.entry(i);
      ++at;
    }
  };
  for_each_ranked_group(words, numel, offsets, vector_aligned(dense, 0), visit);
  if (blockIdx.x == gridDim.x - 1) {
    for (std::int64_t i = offsets[gridDim.x] + threadIdx.x; i < count; i += blockDim.x) packed[i] = 0;
  }
}

template <typename P>
__global__ void __launch_bounds__(kChunkThreads)
    unpack_kernel(const P* packed, std::int64_t count, const std::uint32_t* words, std::int64_t numel,
                  const std::int64_t* offsets, P* dense) {
  const auto visit = [&](std::int64_t first, unsigned exists, unsigned mask, std::int64_t at, bool fast) {
    Vector<P, kGroup> values{};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool salient = mask >> i & 1;
      if (salient && at < count) values.set_entry(i, packed[at]);
      at += salient;
    }
    if (fast) {
      store_group<true>(values, dense, first, exists);
    } else {
      store_group<false>(values, dense, first, exists);
    }
  };
  for_each_ranked_group(words, numel, offsets, vector_aligned(dense, 0), visit);
}

template <typename Body>
void for_size(int element_size, const Body& body) {
  if (element_size == 2) {
    body(std::uint16_t{});
  } else if (element_size == 4) {
    body(std::uint32_t{});
  } else {
    body(std::uint64_t{});
  }
}

}  // namespace

void block_counts(const MultiTensor& table, const std::uint32_t* words, std::int64_t* counts, cudaStream_t stream) {
  if (table.num_chunks == 0) return;
  PF_LAUNCH(block_counts_kernel, static_cast<unsigned>(table.num_chunks), kChunkThreads, 0, stream, table, words,
            counts);
}

void block_offsets(const std::uint32_t* words, std::int64_t numel, std::int64_t* offsets, cudaStream_t stream) {
  const std::int64_t blocks = block_count(numel);
  if (blocks > 0) {
    PF_LAUNCH(tensor_block_counts_kernel, static_cast<unsigned>(blocks), kChunkThreads, 0, stream, words, numel,
              offsets);
  }
  PF_LAUNCH(exclusive_sum_kernel, 1, kScanThreads, 0, stream, offsets, blocks);
}

void pack(const void* dense, int element_size, const std::uint32_t* words, std::int64_t numel,
          const std::int64_t* offsets, void* packed, std::int64_t count, cudaStream_t stream) {
  if (numel == 0) return;
  for_size(element_size, [&](auto zero) {
    using P = decltype(zero);
    PF_LAUNCH(pack_kernel<P>, static_cast<unsigned>(block_count(numel)), kChunkThreads, 0, stream,
              static_cast<const P*>(dense), words, numel, offsets, static_cast<P*>(packed), count);
  });
}

void unpack(const void* packed, int element_size, std::int64_t count, const std::uint32_t* words, std::int64_t numel,
            const std::int64_t* offsets, void* dense, cudaStream_t stream) {
  if (numel == 0) return;
  for_size(element_size, [&](auto zero) {
    using P = decltype(zero);
    PF_LAUNCH(unpack_kernel<P>, static_cast<unsigned>(block_count(numel)), kChunkThreads, 0, stream,
              static_cast<const P*>(packed), count, words, numel, offsets, static_cast<P*>(dense));
  });
}

}  // namespace pecker_fast
