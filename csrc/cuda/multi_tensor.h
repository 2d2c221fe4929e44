// Multi-tensor tables: how one launch works on any number of tensors.
//
// A tensor's entries are taken in chunks of kChunk, one block each, and within a chunk in groups of kGroup, one lane
// each. Groups start where the tensor's leading pointer is aligned for a vector access: group j of a tensor holds the
// entries 4 j - shift to 4 j - shift + 3 that exist. Its first and last groups may be partial (the peeled head
// and tail: accessed entry by entry); all others are vectors.
#pragma once

#include "common/bit_words.h"
#include "vectors.h"

namespace pecker_fast {

// Packed offsets are looked up by chunk.
constexpr int kChunk = static_cast<int>(kPackBlock);
constexpr int kGroup = 4;

// Codes of element types in a table.
enum ElementType : std::int32_t { kF32 = 0, kBF16 = 1, kFP16 = 2, kF64 = 3 };

struct Chunk {
  std::int32_t tensor, index;
};

struct TensorInfo {
  std::int64_t numel;
  std::int64_t first_word;   // of its mask, in entries of `words`
  std::int64_t first_block;  // number of blocks of kPackBlock entries of the tensors before it
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

// The table of one call, a kernel argument; everything it points to is on the device.
struct MultiTensor {
  const TensorInfo* tensors;
  // pointers[slot * num_tensors + tensor]: slot by slot the operator's lists; null if a tensor has none. Those of the
  // slots from `static_slots` on are in `dynamic_pointers`.
  void* const* pointers;
  void* const* dynamic_pointers;
  // One per block of the grid.
  const Chunk* chunks;
  std::int32_t num_tensors, static_slots;
  std::int64_t num_chunks;
};

// A table is one array of 64-bit words: TensorInfo of each tensor, pointers, chunks. A second one may have the dynamic
// pointers.
constexpr std::int64_t kInfoWords = sizeof(TensorInfo) / sizeof(std::int64_t);

inline std::int64_t pointers_at(std::int64_t num_tensors) { return kInfoWords * num_tensors; }

inline std::int64_t chunks_at(std::int64_t num_tensors, std::int64_t slots) {
  return (kInfoWords + slots) * num_tensors;
}


// Copies host words to the device as kernel arguments: no pinned buffer has to outlive the copy, nothing waits, and a
// CUDA graph keeps the values. The first launch also sets `clear_words` words at `clear` to 0.
void upload_words(const std::int64_t* host, std::int64_t count, std::int64_t* device, cudaStream_t stream,
                  std::int64_t* clear = nullptr, std::int64_t clear_words = 0);

// Writes the chunks of a table whose TensorInfo is on the device already.
void expand_chunks(const MultiTensor& table, cudaStream_t stream);

#if defined(PF_EMULATE_CUDA) || defined(__CUDACC__)

template <typename T>
__device__ __forceinline__ T* table_pointer(const MultiTensor& table, int slot, int tensor) {
  void* const* const list = slot < table.static_slots
                                ? table.pointers + static_cast<std::int64_t>(slot) * table.num_tensors
                                : table.dynamic_pointers +
                                      static_cast<std::int64_t>(slot - table.static_slots) * table.num_tensors;
  return static_cast<T*>(list[tensor]);
}

// Whether groups of a tensor with this shift can be vector accesses at `base`.
template <typename T>
__device__ __forceinline__ bool vector_aligned(const T* base, int shift) {
  constexpr int kBytes = Vector<T, kGroup>::kBytes, kAlignment = kBytes < 16 ? kBytes : 16;
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

// A group as one vector (kFast: it is whole and aligned), or those of its entries whose bit is set.
template <bool kFast, typename P>
__device__ __forceinline__ void load_group(Vector<P, kGroup>& out, const P* base, std::int64_t first, unsigned bits) {
  if constexpr (kFast) {
    out.load(base + first);
  } else {
    out.load_some(base + first, bits);
  }
}

template <bool kFast, typename P>
__device__ __forceinline__ void store_group(const Vector<P, kGroup>& values, P* base, std::int64_t first,
                                            unsigned bits) {
  if constexpr (kFast) {
    values.store(base + first);
  } else {
    values.store_some(base + first, bits);
  }
}

constexpr int kChunkThreads = 256;
constexpr int kChunkWarps = kChunkThreads / 32;
// A warp's unit of work: 32 mask words, one a lane, read in one access.
constexpr int kTileEntries = 1024;
constexpr int kTileGroups = kTileEntries / kGroup;
constexpr int kTiles = kChunk / kTileEntries;
constexpr int kTilesPerWarp = kTiles / kChunkWarps;

// Where the k-th tile of this warp starts within a chunk.
__device__ __forceinline__ int tile_offset(int k) { return (warp_id() + kChunkWarps * k) * kTileEntries; }

// Its first entry; negative if the shift puts it before the tensor.
__device__ __forceinline__ std::int64_t tile_first(int chunk_index, int k, int shift) {
  return static_cast<std::int64_t>(chunk_index) * kChunk + tile_offset(k) - shift;
}

// Index of this lane's (shifted) mask word in that tile.
__device__ __forceinline__ std::int64_t tile_word(int chunk_index, int k) {
  return static_cast<std::int64_t>(chunk_index) * (kChunk / 32) + (warp_id() + kChunkWarps * k) * 32 + lane_id();
}

// Whether a tile that starts at entry `first` has all of its entries.
__device__ __forceinline__ bool whole_tile(std::int64_t first, std::int64_t numel) {
  return first >= 0 && first + kTileEntries <= numel;
}

// Calls visit(first entry, bits of the entries that exist, bits of the mask, fast) for all groups of a chunk, one a
// lane. words[k] is this lane's mask word of tile k. `aligned`: groups are vectors in all of the tensor's lists;
// `fast`: besides, the tile is whole. Blocks have kChunkThreads threads.
template <typename Visit>
__device__ __forceinline__ void for_each_group(int chunk_index, std::int64_t numel, int shift, bool aligned,
                                               const unsigned (&words)[kTilesPerWarp], const Visit& visit) {
#pragma unroll 1
  for (int k = 0; k < kTilesPerWarp; ++k) {
    const std::int64_t tile = tile_first(chunk_index, k, shift);
    const bool fast = aligned && whole_tile(tile, numel);
    const unsigned own = k == 0 ? words[0] : words[kTilesPerWarp - 1];
#pragma unroll 1
    for (int r = 0; r < kTileGroups && tile < numel; r += 32) {
      const unsigned word = __shfl_sync(kFullWarp, own, (r + lane_id()) / 8);
      const std::int64_t first = tile + (r + lane_id()) * kGroup;
      const unsigned exists = fast ? 15u : group_bits(first, numel);
      if (exists != 0) visit(first, exists, word >> (lane_id() % 8 * kGroup) & exists, fast);
    }
  }
}
static_assert(kTilesPerWarp == 2);

#endif

}  // namespace pecker_fast
