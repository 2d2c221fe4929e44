// The Adam step. A block takes a chunk of a tensor, a warp tiles of 1,024 entries: 32 mask words, one a lane, read in
// one access. Lanes then work on groups of four entries, whose loads are all under way before the first is used.
//
// Every entry (plain and joint steps): rounds of 32 neighbouring groups.
// Masked: the groups that have a salient entry are listed first and handed out 32 at a time, so that no lane idles at
// low densities and all lanes have loads under way. Salient groups are in order, so accesses stay coalesced.
// Packed: as masked, and the state of a round's entries, which is one contiguous range, is moved through shared memory
// in full-width accesses; so are gradients, masters and averages if they are packed too.
//
// If a tile is whole and all its tensors are aligned, a group is one vector access in each; otherwise (at the ends of
// tensors) its entries are accessed one by one.
#pragma once

#include "adam_group.cuh"

namespace pecker_fast {
namespace {

// The packed state of a round's groups, `count` entries from `base` on, on its way to shared memory.
template <typename T>
struct Stage {
  T values[kGroup];

  __device__ __forceinline__ void load(const T* state, std::int64_t base, int count) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int at = lane_id() + 32 * k;
      // Not left as it is: the value of the round before would stay in its register.
      values[k] = at < count ? state[base + at] : T{};
    }
  }
  __device__ __forceinline__ void commit(int count, T* staged) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int at = lane_id() + 32 * k;
      if (at < count) staged[at] = values[k];
    }
  }
};

template <typename T>
__device__ __forceinline__ void stage_out(T* state, std::int64_t base, int count, const T* staged) {
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    const int at = lane_id() + 32 * k;
    if (at < count) state[base + at] = staged[at];
  }
}

// One packed list of a round, from memory to shared memory. Whole warp.
template <typename P>
__device__ __forceinline__ void stage_in(const P* list, std::int64_t base, int count, P* staged) {
  Stage<P> values;
  values.load(list, base, count);
  values.commit(count, staged);
}

// The inverse of take_staged.
template <typename P>
__device__ __forceinline__ void put_staged(const Vector<P, kGroup>& group, P* staged, unsigned update) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (update >> i & 1) *staged++ = group.entry(i);
  }
}

// Gradients, masters and averages of a round, as far as they are packed: to shared memory ...
template <typename P, typename T, typename Tensor>
__device__ __forceinline__ void stage_packed_lists(const Tensor& t, std::int64_t base, int count, T* staged) {
  using Of = StageOf<T>;
  if (t.packed_grads) {
    stage_in(t.template data<kGrad>(), base, count, reinterpret_cast<P*>(staged + Of::kGrad * kRoundEntries));
  }
  if (t.packed_values && t.template has<kEma>()) {
    stage_in(t.template data<kEma>(), base, count, staged + Of::kEma * kRoundEntries);
  }
  if (t.packed_values && t.template has<kMaster>()) {
    stage_in(t.template data<kMaster>(), base, count, staged + Of::kMaster * kRoundEntries);
  }
}

// ... and back to memory.
template <typename P, typename T, typename Tensor>
__device__ __forceinline__ void store_packed_lists(const Tensor& t, unsigned update, std::int64_t base, int count,
                                                   int at, T* staged, const AdamGroup<P, T>& v) {
  T* const emas = staged + StageOf<T>::kEma * kRoundEntries;
  T* const masters = staged + StageOf<T>::kMaster * kRoundEntries;
  if (t.packed_values && t.template has<kEma>()) put_staged(v.ema, emas + at, update);
  if (t.packed_values && t.template has<kMaster>()) put_staged(v.master, masters + at, update);
  __syncwarp();
  if (t.packed_values && t.template has<kEma>()) stage_out(t.template data<kEma>(), base, count, emas);
  if (t.packed_values && t.template has<kMaster>()) stage_out(t.template data<kMaster>(), base, count, masters);
}

// The entries of a round's groups in packed lists: `count` from `base` on.
struct Round {
  std::int64_t base;
  int count;
};

// A round of groups whose state is packed. The entries of the lane's group begin at `at`. `staged`: room of the warp
// for the round's lists. Whole warp; lanes that are not active have no group.
template <typename P, typename T, typename Tensor>
__device__ __forceinline__ void step_packed_round(const AdamArguments<T>& a, const Tensor& t, const GroupBits& b,
                                                  bool active, const Round& round, int at, T* staged) {
  AdamGroup<P, T> v;
  Stage<T> first, second;
  if (active) {
    if (b.fast) {
      load_dense<true, Kind::packed>(t, b, v);
    } else {
      load_dense<false, Kind::packed>(t, b, v);
    }
  }
  // A lane without a group has no updated entries.
  const unsigned update = active ? b.update : 0u;
  const auto take_grad = [&] {
    const P* const grads = reinterpret_cast<const P*>(staged + StageOf<T>::kGrad * kRoundEntries);
    if (t.packed_grads) take_staged(v.grad, grads + at, update);
  };
  if constexpr (Tensor::kMayPack) {
    stage_packed_lists<P>(t, round.base, round.count, staged);
    if constexpr (StageOf<T>::kSharesGrad) {
      __syncwarp();
      take_grad();
      __syncwarp();
    }
  }
  if (t.template has<kExpAvg>()) first.load(t.template data<kExpAvg>(), round.base, round.count);
  second.load(t.template data<kExpAvgSq>(), round.base, round.count);
  if (t.template has<kExpAvg>()) first.commit(round.count, staged);
  second.commit(round.count, staged + kRoundEntries);
  if (t.template has<kMaxExpAvgSq>()) {
    // Not together with the others, because there are no registers left for it.
    T* const largest = staged + StageOf<T>::kLargest * kRoundEntries;
    stage_in(t.template data<kMaxExpAvgSq>(), round.base, round.count, largest);
  }
  __syncwarp();
  if constexpr (Tensor::kMayPack) {
    // As late as possible, because registers are scarce.
    if constexpr (!StageOf<T>::kSharesGrad) take_grad();
    if (t.packed_values && t.template has<kMaster>()) {
      take_staged(v.master, staged + StageOf<T>::kMaster * kRoundEntries + at, update);
    }
  }
  if (active) {
    update_group<Kind::packed>(a, t, b, round.base + at, staged + at, v);
  }
  __syncwarp();
  if (t.template has<kExpAvg>()) stage_out(t.template data<kExpAvg>(), round.base, round.count, staged);
  stage_out(t.template data<kExpAvgSq>(), round.base, round.count, staged + kRoundEntries);
  if (t.template has<kMaxExpAvgSq>()) {
    T* const largest = staged + StageOf<T>::kLargest * kRoundEntries;
    stage_out(t.template data<kMaxExpAvgSq>(), round.base, round.count, largest);
  }
  if constexpr (Tensor::kMayPack) store_packed_lists(t, update, round.base, round.count, at, staged, v);
  if (active) {
    if (b.fast) {
      store_dense<true>(t, b, v);
    } else {
      store_dense<false>(t, b, v);
    }
  }
  __syncwarp();
}

// An entry of a tile's list: group (8 bits), its salient entries (4), salient entries of the tile before it.
__device__ __forceinline__ std::uint32_t list_item(int group, unsigned bits, int rank) {
  return static_cast<std::uint32_t>(group) | bits << 8 | static_cast<std::uint32_t>(rank) << 12;
}

// Lists the groups of a tile that have work; returns their number.
__device__ __forceinline__ int list_groups(unsigned salient, unsigned touched, std::uint32_t* list) {
  unsigned starts = touched | touched >> 1;
  starts = (starts | starts >> 2) & 0x11111111u;
  int total;
  const int before = warp_exclusive_sum(__popc(starts) | __popc(salient) << 16, &total);
  int at = before & 0xffff, rank = before >> 16;
  while (starts != 0) {
    const int start = __ffs(static_cast<int>(starts)) - 1;
    const unsigned bits = salient >> start & 15u;
    list[at++] = list_item(lane_id() * 8 + start / kGroup, bits, rank);
    rank += __popc(bits);
    starts &= starts - 1;
  }
  return total & 0xffff;
}

template <typename P, typename T, Kind kKind, int kOptions>
__global__ void __launch_bounds__(kChunkThreads, BlocksPerSM<T>::value)
    adam_kernel(const __grid_constant__ AdamArguments<T> a) {
  using Tensor = AdamTensor<P, T, kOptions>;
  __shared__ Tensor t;
  const Chunk chunk = a.table.chunks[blockIdx.x];
  if (warp_id() == 0) t.read(a, chunk, kKind == Kind::packed);
  __syncthreads();
  if (t.step.skip || (t.pointers[kGrad] == nullptr && t.pointers[kMaskedGrad] == nullptr)) return;
  const TensorInfo& info = a.table.tensors[chunk.tensor];
  const std::uint32_t* const words = a.words == nullptr ? nullptr : a.words + info.first_word;

  // Each lane loads one mask word of each tile of this warp, with all loads in flight at once.
  constexpr bool kWords = kKind != Kind::every || Tensor::kAny || (kOptions & kJoint) != 0;
  __shared__ unsigned all_words[kWords ? kChunkWarps : 1][kTilesPerWarp][32];
  unsigned(*const tile_words)[32] = all_words[kWords ? warp_id() : 0];
  if constexpr (kWords) {
#pragma unroll
    for (int k = 0; k < kTilesPerWarp; ++k) {
      const bool none = kKind == Kind::every && !t.template has<kMaskedGrad>();
      tile_words[k][lane_id()] = none               ? 0u
                                 : words == nullptr ? ~0u
                                                    : shifted_word(words, tile_word(chunk.index, k), t.shift, t.numel);
    }
    __syncwarp();
  }

  if constexpr (kKind == Kind::every) {
#pragma unroll 1
    for (int k = 0; k < kTilesPerWarp; ++k) {
      std::int64_t tile = t.first + tile_offset(k);
      bool fast = t.aligned && whole_tile(tile, t.numel);
#pragma unroll 1
      for (int r = 0; r < kTileGroups; r += 32) {
        if constexpr (Tensor::kRareToo) {
          // Recomputed: there are not enough registers to keep them.
          forget_registers();
          tile = t.first + tile_offset(k);
          fast = t.aligned && whole_tile(tile, t.numel);
        }
        if (tile >= t.numel) break;
        GroupBits b;
        b.first = tile + (r + lane_id()) * kGroup;
        b.update = b.ema = fast ? 15u : group_bits(b.first, t.numel);
        b.masked = kWords ? tile_words[k][(r + lane_id()) / 8] >> (lane_id() % 8 * kGroup) & b.update : 0u;
        b.fast = fast;
        if (fast || b.update != 0) step_group<kKind, P>(a, t, b);
      }
    }
  } else {
    __shared__ std::uint32_t lists[kChunkWarps][kTileGroups];
    std::uint32_t* const list = lists[warp_id()];
    __shared__ std::int64_t state_bases[kTiles];
    T* staged = nullptr;
    if constexpr (kKind == Kind::packed) {
      __shared__ int tile_counts[kTiles];
      __shared__ int head_count;
      constexpr int kLists = Tensor::kMayPack ? StageOf<T>::kLists : Tensor::kRareToo ? 3 : 2;
      __shared__ T stages[kChunkWarps][kLists][kRoundEntries];
      staged = stages[warp_id()][0];
#pragma unroll
      for (int k = 0; k < kTilesPerWarp; ++k) {
        const int count = warp_sum(__popc(tile_words[k][lane_id()]));
        if (lane_id() == 0) tile_counts[warp_id() + kChunkWarps * k] = count;
      }
      const bool past_blocks = chunk.index >= (t.numel + kChunk - 1) / kChunk;
      // Entries of the first word that packed_offsets has counted into the block before, because of the shift.
      if (threadIdx.x == 0) {
        head_count = __popc(past_blocks ? tile_words[0][0] : tile_words[0][0] & ((1u << t.shift) - 1));
      }
      __syncthreads();
      const std::int64_t base =
          (past_blocks ? reinterpret_cast<std::intptr_t>(table_pointer<void>(a.table, kPackedSize, chunk.tensor))
                       : a.packed_offsets[info.first_block + chunk.index]) -
          head_count;
#pragma unroll
      for (int k = 0; k < kTilesPerWarp; ++k) {
        const int tile = warp_id() + kChunkWarps * k;
        const int before = warp_sum(lane_id() < tile ? tile_counts[lane_id() % kTiles] : 0);
        if (lane_id() == 0) state_bases[tile] = base + before;
      }
    }
#pragma unroll 1
    for (int k = 0; k < kTilesPerWarp; ++k) {
      std::int64_t tile = t.first + tile_offset(k);
      bool fast = t.aligned && whole_tile(tile, t.numel);
      const unsigned bits = tile_words[k][lane_id()];
      unsigned touched = bits;
      if (Tensor::kRareToo && a.ema_everywhere && t.template has<kEma>()) {
        touched = existing_word(tile_word(chunk.index, k), t.shift, t.numel);
      }
      const int total = list_groups(bits, touched, list);
      __syncwarp();
#pragma unroll 1
      for (int r = 0; r < total; r += 32) {
        if constexpr (Tensor::kMayPack) {
          // Recomputed: there are not enough registers to keep them.
          forget_registers();
          tile = t.first + tile_offset(k);
          fast = t.aligned && whole_tile(tile, t.numel);
        }
        const bool active = r + lane_id() < total;
        const std::uint32_t item = active ? list[r + lane_id()] : 0u;
        GroupBits b;
        b.first = tile + static_cast<int>(item & 255u) * kGroup;
        b.update = item >> 8 & 15u;
        b.ema = b.update;
        if (Tensor::kRareToo && a.ema_everywhere) b.ema = active ? group_bits(b.first, t.numel) : 0u;
        b.masked = 0;
        b.fast = fast;
        if constexpr (kKind == Kind::masked) {
          if (active) step_group<kKind, P>(a, t, b);
        } else {
          const int rank = static_cast<int>(item >> 12);
          const int first_rank = __shfl_sync(kFullWarp, rank, 0);
          const int last = total - r < 32 ? total - r - 1 : 31;
          const int count = __shfl_sync(kFullWarp, rank + __popc(b.update), last) - first_rank;
          const Round round = {state_bases[warp_id() + kChunkWarps * k] + first_rank, count};
          if constexpr (Tensor::kMayPack) {
            // Read again when it is needed: there are not enough registers to keep it.
            __shared__ Round rounds[kChunkWarps];
            if (lane_id() == 0) rounds[warp_id()] = round;
            __syncwarp();
            step_packed_round<P>(a, t, b, active, rounds[warp_id()], rank - first_rank, staged);
          } else {
            step_packed_round<P>(a, t, b, active, round, rank - first_rank, staged);
          }
        }
      }
      // The next tile writes the list again.
      __syncwarp();
    }
  }
}

}  // namespace

template <typename P, typename T>
void adam_step(const AdamArguments<T>& a, cudaStream_t stream) {
  if (a.table.num_chunks == 0) return;
  const unsigned grid = static_cast<unsigned>(a.table.num_chunks);
  const auto start = [&](auto kind, auto options) {
    constexpr Kind kKind = decltype(kind)::value;
    constexpr int kOptions = decltype(options)::value;
    PF_LAUNCH((adam_kernel<P, T, kKind, kOptions>), grid, kChunkThreads, 0, stream, a);
  };
  const bool masked = a.words != nullptr && !a.joint;
  const Kind kind = a.packed_offsets != nullptr ? Kind::packed : masked ? Kind::masked : Kind::every;
  for_constant<Kind, Kind::every, Kind::masked, Kind::packed>(kind, [&](auto kind) {
    // Double precision serves to check other results: one version of each kernel is enough.
    constexpr bool kPacked = decltype(kind)::value == Kind::packed;
    if (kPacked && (a.packed_grads || a.packed_values)) {
      if constexpr (kPacked) start(kind, std::integral_constant<int, kAnyOption | kRare | kPackedLists>{});
    } else if constexpr (sizeof(T) == 8) {
      start(kind, std::integral_constant<int, kAnyOption | kRare>{});
    } else if (a.rare) {
      start(kind, std::integral_constant<int, kAnyOption | kRare>{});
    } else if constexpr (decltype(kind)::value == Kind::every) {
      const int options = (a.has_first_moment ? kFirstMoment : 0) | (a.has_ema ? kWithEma : 0) | (a.joint ? kJoint : 0);
      for_constant<int, 0, 1, 2, 3, 4, 5, 6, 7>(options, [&](auto chosen) { start(kind, chosen); });
    } else {
      start(kind, std::integral_constant<int, kAnyOption>{});
    }
  });
}

}  // namespace pecker_fast
