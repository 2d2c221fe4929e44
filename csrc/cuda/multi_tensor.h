// Multi-tensor tables: how one launch works on any number of tensors.
//
// A tensor's entries are taken in chunks of kChunk, one block each, and within a chunk in groups of kGroup, one lane
// each. Groups start where the tensor's leading pointer is aligned for a vector access: group j of a tensor holds the
// entries 4 j - shift to 4 j - shift + 3, those that exist. Its first and last groups may be partial (the peeled head
// and tail: accessed entry by entry); all others are vectors.
#pragma once

#include "launch.h"

namespace pecker_fast {

// PACK_BLOCK of pecker_fast/ops/layout.py.
constexpr int kChunk = 16384;
constexpr int kGroup = 4;

// Codes of element types in a table.
enum ElementType : std::int32_t { kF32 = 0, kBF16 = 1, kFP16 = 2, kF64 = 3 };

struct Chunk {
  std::int32_t tensor, index;
};

struct TensorInfo {
  std::int64_t numel;
  std::int64_t first_word;   // of its mask, in entries of `words`
  std::int64_t first_block;  // number of PACK_BLOCK blocks of the tensors before it
  std::int64_t first_chunk;
  std::int32_t shift;
  std::int32_t type;
};

// Entries by which groups are shifted for a tensor at this address.
inline std::int32_t group_shift(const void* address, int element_size) {
  const int alignment = element_size * kGroup < 16 ? element_size * kGroup : 16;
  return static_cast<std::int32_t>(reinterpret_cast<std::uintptr_t>(address) % alignment / element_size);
}

inline std::int64_t num_chunks(std::int64_t numel, std::int32_t shift) {
  return numel == 0 ? 0 : (numel + shift + kChunk - 1) / kChunk;
}

inline std::int64_t num_words(std::int64_t numel) { return (numel + 31) / 32; }
inline std::int64_t num_blocks(std::int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// The table of one call, a kernel argument; everything it points to is on the device.
struct MultiTensor {
  const TensorInfo* tensors;
  // pointers[slot * num_tensors + tensor]: slot by slot the operator's lists; null where a tensor has none.
  void* const* pointers;
  // One per block of the grid.
  const Chunk* chunks;
  std::int32_t num_tensors;
  std::int64_t num_chunks;
};

// A table is one array of 64-bit words: TensorInfo of each tensor, pointers, chunks.
constexpr std::int64_t kInfoWords = sizeof(TensorInfo) / sizeof(std::int64_t);

inline std::int64_t pointers_at(std::int64_t num_tensors) { return kInfoWords * num_tensors; }

inline std::int64_t chunks_at(std::int64_t num_tensors, std::int64_t slots) {
  return (kInfoWords + slots) * num_tensors;
}

inline MultiTensor view_table(std::int64_t* table, std::int64_t num_tensors, std::int64_t slots,
                              std::int64_t chunks) {
  return {reinterpret_cast<const TensorInfo*>(table), reinterpret_cast<void* const*>(table + pointers_at(num_tensors)),
          reinterpret_cast<const Chunk*>(table + chunks_at(num_tensors, slots)),
          static_cast<std::int32_t>(num_tensors), chunks};
}

// Copies host words to the device as kernel arguments: no pinned buffer that must outlive the copy, nothing to wait
// for, and a CUDA graph keeps the values.
void upload_words(const std::int64_t* host, std::int64_t count, std::int64_t* device, cudaStream_t stream);

// Writes the chunks of a table whose TensorInfo is on the device already.
void expand_chunks(const MultiTensor& table, cudaStream_t stream);

#if defined(PF_EMULATE_CUDA) || defined(__CUDACC__)

template <typename T>
__device__ __forceinline__ T* table_pointer(const MultiTensor& table, int slot, int tensor) {
  return static_cast<T*>(table.pointers[static_cast<std::int64_t>(slot) * table.num_tensors + tensor]);
}

// Whether groups of a tensor with this shift can be vector accesses at `base`.
template <typename T>
__device__ __forceinline__ bool vector_aligned(const T* base, int shift) {
  constexpr int kAlignment = alignof(Pack<T, kGroup>);
  return (reinterpret_cast<std::uintptr_t>(base) - shift * sizeof(T)) % kAlignment == 0;
}

// Bits i of the group that starts at `first` (which may be negative) for which first + i is an entry of the tensor.
__device__ __forceinline__ unsigned group_bits(std::int64_t first, std::int64_t numel) {
  unsigned bits = first + kGroup <= numel ? 15u : first < numel ? (1u << static_cast<int>(numel - first)) - 1 : 0u;
  if (first < 0) bits &= 15u << static_cast<int>(-first);
  return bits & 15u;
}

// 32 mask bits, of the entries `first` = 32 w - shift and on. Bits of entries that do not exist are 0.
__device__ __forceinline__ unsigned shifted_word(const std::uint32_t* words, std::int64_t w, int shift,
                                                 std::int64_t numel) {
  const std::int64_t count = (numel + 31) >> 5;
  unsigned bits = w < count ? words[w] : 0u;
  if (w == count - 1 && (numel & 31) != 0) bits &= (1u << static_cast<int>(numel & 31)) - 1;
  if (shift != 0) {
    unsigned before = w > 0 && w <= count ? words[w - 1] : 0u;
    if (w == count && (numel & 31) != 0) before &= (1u << static_cast<int>(numel & 31)) - 1;
    bits = __funnelshift_l(before, bits, shift);
  }
  return bits;
}

// The same for a mask of all entries.
__device__ __forceinline__ unsigned existing_word(std::int64_t w, int shift, std::int64_t numel) {
  const std::int64_t first = 32 * w - shift;
  unsigned bits = first + 32 <= numel ? ~0u : first < numel ? (1u << static_cast<int>(numel - first)) - 1 : 0u;
  if (first < 0) bits &= ~0u << static_cast<int>(-first);
  return bits;
}

// The entries of a group whose bit is set; `vector`: the group is whole and `base` aligned for it, then all of them.
template <typename T>
__device__ __forceinline__ void load_group(const T* base, std::int64_t first, unsigned bits, bool vector,
                                           Pack<T, kGroup>& out) {
  if (vector) {
    out = load_vector<Pack<T, kGroup>>(base + first);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (bits >> i & 1) out[i] = base[first + i];
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_group(T* base, std::int64_t first, unsigned bits, bool vector,
                                            const Pack<T, kGroup>& values) {
  if (vector) {
    store_vector(base + first, values);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (bits >> i & 1) base[first + i] = values[i];
    }
  }
}

constexpr int kChunkThreads = 256;
constexpr int kChunkWarps = kChunkThreads / 32;
// What a warp takes at a time: 32 mask words, one a lane, read in one access.
constexpr int kTileEntries = 1024;
constexpr int kTileGroups = kTileEntries / kGroup;
constexpr int kTiles = kChunk / kTileEntries;
constexpr int kTilesPerWarp = kTiles / kChunkWarps;

// First entry (negative where the shift comes before it) of the k-th tile of this warp.
__device__ __forceinline__ std::int64_t tile_first(int chunk_index, int k, int shift) {
  return static_cast<std::int64_t>(chunk_index) * kChunk + (warp_id() + kChunkWarps * k) * kTileEntries - shift;
}

// Index of this lane's (shifted) mask word in that tile.
__device__ __forceinline__ std::int64_t tile_word(int chunk_index, int k) {
  return static_cast<std::int64_t>(chunk_index) * (kChunk / 32) + (warp_id() + kChunkWarps * k) * 32 + lane_id();
}

// Calls visit(first entry, bits of the entries that exist, bits of the mask) for all groups of a chunk, one a lane.
// words[k] is this lane's mask word of tile k. Blocks have kChunkThreads threads.
template <typename Visit>
__device__ __forceinline__ void for_each_group(int chunk_index, std::int64_t numel, int shift,
                                               const unsigned (&words)[kTilesPerWarp], const Visit& visit) {
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    const std::int64_t tile = tile_first(chunk_index, k, shift);
    const unsigned own = words[k];
#pragma unroll 1
    for (int r = 0; r < kTileGroups && tile < numel; r += 32) {
      const unsigned word = __shfl_sync(kFullWarp, own, (r + lane_id()) / 8);
      const std::int64_t first = tile + (r + lane_id()) * kGroup;
      const unsigned exists = group_bits(first, numel);
      if (exists != 0) visit(first, exists, word >> (lane_id() % 8 * kGroup) & exists);
    }
  }
}

// Products and sums that the compiler may not contract into a fused multiply-add.
__device__ __forceinline__ float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply_rounded(double a, double b) { return __dmul_rn(a, b); }

#endif

}  // namespace pecker_fast
