// The Adam step. A block takes a chunk of a tensor, a warp tiles of 1,024 entries: 32 mask words, one a lane, read in
// one access. Lanes then work on groups of four entries.
//
// Every entry (plain and joint steps): eight rounds of 32 neighbouring groups.
// Masked: the groups that have a salient entry are listed first and handed out 32 at a time, so that no lane idles at
// low densities and all lanes have loads under way. Salient groups are in order, so accesses stay coalesced.
// Packed: as masked, and the state of a round's entries, which is one contiguous range, is moved through shared memory
// in full-width accesses.
#pragma once

#include <type_traits>

#include "adam.h"

namespace pecker_fast {
namespace {

enum class Kind { every, masked, packed };

constexpr int kRoundEntries = 32 * kGroup;

template <typename T>
struct BlocksPerSM {
  // 64 registers a thread; double needs up to 128.
  static constexpr int value = sizeof(T) == 4 ? 4 : 2;
};

// What all threads of a block share: the chunk's tensor and the scalars of its step. In shared memory, because as many
// registers would halve the number of blocks that run at once.
template <typename P, typename T>
struct AdamTensor {
  void* pointers[kAdamSlots];
  bool vector[kAdamSlots];
  std::int64_t numel;
  int shift;
  AdamTensorPrepared<T> prepared;
  AdamPrepared<T> step;

  __device__ __forceinline__ bool has(AdamSlot slot) const { return pointers[slot] != nullptr; }
  __device__ __forceinline__ T* state(AdamSlot slot) const { return static_cast<T*>(pointers[slot]); }
  __device__ __forceinline__ P* like_param(AdamSlot slot) const { return static_cast<P*>(pointers[slot]); }

  // By the first warp; for all after a barrier.
  __device__ __forceinline__ void read(const MultiTensor& table, int tensor, const void* scratch) {
    const int slot = lane_id();
    if (slot < kAdamSlots) {
      const int info_shift = table.tensors[tensor].shift;
      void* const pointer = table_pointer<void>(table, slot, tensor);
      const bool is_param = slot == kParam || slot == kGrad || slot == kMaskedGrad;
      pointers[slot] = pointer;
      vector[slot] = is_param ? vector_aligned(static_cast<P*>(pointer), info_shift)
                              : vector_aligned(static_cast<T*>(pointer), info_shift);
    } else if (slot == kAdamSlots) {
      numel = table.tensors[tensor].numel;
      shift = table.tensors[tensor].shift;
    } else if (slot == kAdamSlots + 1) {
      prepared = reinterpret_cast<const AdamTensorPrepared<T>*>(static_cast<const unsigned char*>(scratch) +
                                                                kAdamPreparedBytes)[tensor];
    } else if (slot == kAdamSlots + 2) {
      step = *static_cast<const AdamPrepared<T>*>(scratch);
    }
  }
};

// What is in shared memory is read again after this, instead of being kept in registers.
__device__ __forceinline__ void forget_registers() { asm volatile("" ::: "memory"); }

template <typename P, typename T>
struct AdamGroup {
  Pack<P, kGroup> param, grad, masked_grad;
  Pack<T, kGroup> exp_avg, exp_avg_sq, max_exp_avg_sq, master, ema;
};

// Where a group is and which of its entries exist, are updated, have their EMA updated, see the masked gradient.
struct GroupBits {
  std::int64_t first;
  unsigned update, ema, forget;
  bool whole;
};

template <typename P, typename T, bool kRare>
__device__ __forceinline__ void load_dense(const AdamTensor<P, T>& t, const GroupBits& b, AdamGroup<P, T>& v) {
  const unsigned touched = b.update | b.ema;
  load_group(t.like_param(kParam), b.first, touched, b.whole && t.vector[kParam], v.param);
  if (t.has(kGrad)) load_group(t.like_param(kGrad), b.first, b.update, b.whole && t.vector[kGrad], v.grad);
  if (b.forget != 0) {
    load_group(t.like_param(kMaskedGrad), b.first, b.forget, b.whole && t.vector[kMaskedGrad], v.masked_grad);
  }
  if (t.has(kEma)) load_group(t.state(kEma), b.first, b.ema, b.whole && t.vector[kEma], v.ema);
  if (kRare && t.has(kMaster)) {
    load_group(t.state(kMaster), b.first, touched, b.whole && t.vector[kMaster], v.master);
  }
}

template <typename P, typename T, bool kRare>
__device__ __forceinline__ void load_state(const AdamTensor<P, T>& t, const GroupBits& b, AdamGroup<P, T>& v) {
  if (t.has(kExpAvg)) load_group(t.state(kExpAvg), b.first, b.update, b.whole && t.vector[kExpAvg], v.exp_avg);
  load_group(t.state(kExpAvgSq), b.first, b.update, b.whole && t.vector[kExpAvgSq], v.exp_avg_sq);
  if (kRare && t.has(kMaxExpAvgSq)) {
    load_group(t.state(kMaxExpAvgSq), b.first, b.update, b.whole && t.vector[kMaxExpAvgSq], v.max_exp_avg_sq);
  }
}

template <typename P, typename T, bool kRare>
__device__ __forceinline__ void store_dense(const AdamTensor<P, T>& t, const GroupBits& b, const AdamGroup<P, T>& v) {
  if (b.update != 0) {
    store_group(t.like_param(kParam), b.first, b.update, b.whole && t.vector[kParam], v.param);
    if (kRare && t.has(kMaster)) {
      store_group(t.state(kMaster), b.first, b.update, b.whole && t.vector[kMaster], v.master);
    }
  }
  if (t.has(kEma)) store_group(t.state(kEma), b.first, b.ema, b.whole && t.vector[kEma], v.ema);
}

template <typename P, typename T, bool kRare>
__device__ __forceinline__ void store_state(const AdamTensor<P, T>& t, const GroupBits& b, const AdamGroup<P, T>& v) {
  if (b.update == 0) return;
  if (t.has(kExpAvg)) store_group(t.state(kExpAvg), b.first, b.update, b.whole && t.vector[kExpAvg], v.exp_avg);
  store_group(t.state(kExpAvgSq), b.first, b.update, b.whole && t.vector[kExpAvgSq], v.exp_avg_sq);
  if (kRare && t.has(kMaxExpAvgSq)) {
    store_group(t.state(kMaxExpAvgSq), b.first, b.update, b.whole && t.vector[kMaxExpAvgSq], v.max_exp_avg_sq);
  }
}

// Counts an update of state entry `at` and returns its corrections.
template <typename T>
__device__ __forceinline__ AdamCorrection<T> count_update(const AdamArguments<T>& a, T lr, void* counts,
                                                          std::int64_t at) {
  std::int32_t count;
  if (a.counts_are_16_bit) {
    std::int16_t& stored = static_cast<std::int16_t*>(counts)[at];
    count = stored < INT16_MAX ? stored + 1 : INT16_MAX;
    stored = static_cast<std::int16_t>(count);
  } else {
    std::int32_t& stored = static_cast<std::int32_t*>(counts)[at];
    count = stored < INT32_MAX ? stored + 1 : INT32_MAX;
    stored = count;
  }
  const T* row = a.bias_table + 2 * static_cast<std::int64_t>(count < a.last_bias_row ? count : a.last_bias_row);
  return {lr * row[0], row[1]};
}

// Updates a group in registers; packed state is in shared memory, at `staged`, where the group's first updated entry is
// entry `at` of the round. `state_first`: index into dense state of the group's first entry, into packed state of its
// first updated entry.
template <typename P, typename T, Kind kKind, bool kRare>
__device__ __forceinline__ void update_group(const AdamArguments<T>& a, const AdamTensor<P, T>& t, const GroupBits& b,
                                             std::int64_t state_first, T* staged, int at, AdamGroup<P, T>& v) {
  AdamScalars<T> s = a.scalars;
  s.grad_factor = t.step.grad_factor;
  s.decay = t.step.decay;
  s.max_update = t.step.max_update;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (b.update >> i & 1) {
      T x = kRare && t.has(kMaster) ? v.master[i] : widen(v.param[i]);
      T g = t.has(kGrad) ? multiply_rounded(widen(v.grad[i]), s.grad_factor) : T(0);
      T h = g;
      if (kKind == Kind::every && (b.forget >> i & 1)) {
        g += multiply_rounded(widen(v.masked_grad[i]), s.grad_factor);
      }
      g = condition_grad(s, g, x);
      h = kRare && a.retain_variance ? condition_grad(s, h, x) : g;
      x *= s.decay;
      const int before = kKind == Kind::packed ? __popc(b.update & ((1u << i) - 1)) : i;
      AdamCorrection<T> correction = t.prepared.correction;
      if (kRare && t.has(kCounts)) {
        correction = count_update(a, t.step.lr, t.pointers[kCounts], state_first + before);
      }
      if (t.has(kExpAvg)) {
        T& m = kKind == Kind::packed ? staged[at + before] : v.exp_avg[i];
        g = m += s.one_minus_beta1 * (g - m);
      }
      // No pointers chosen at run time into the group: they would move it from registers to local memory.
      T* const none = nullptr;
      T& second = kKind == Kind::packed ? staged[kRoundEntries + at + before] : v.exp_avg_sq[i];
      if (kRare && t.has(kMaxExpAvgSq)) {
        T& largest = kKind == Kind::packed ? staged[2 * kRoundEntries + at + before] : v.max_exp_avg_sq[i];
        x -= adam_update(s, correction, g, h, none, &second, &largest);
      } else {
        x -= adam_update(s, correction, g, h, none, &second, none);
      }
      if (kRare && t.has(kMaster)) v.master[i] = x;
      if (kRare && a.stochastic_rounding) {
        narrow_stochastic(x, random_bits(t.prepared.random_state, b.first + i), &v.param[i]);
      } else {
        narrow(x, &v.param[i]);
      }
    }
    if (t.has(kEma) && (b.ema >> i & 1)) {
      const T y = kRare && t.has(kMaster) ? v.master[i] : widen(v.param[i]);
      v.ema[i] += s.ema_weight * (y - v.ema[i]);
    }
  }
}

// The packed state of a round's groups, `count` entries from `base` on, staged through shared memory.
template <typename T>
__device__ __forceinline__ void stage_in(const T* state, std::int64_t base, int count, T* staged) {
  T values[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    const int at = lane_id() + 32 * k;
    if (at < count) values[k] = state[base + at];
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    const int at = lane_id() + 32 * k;
    if (at < count) staged[at] = values[k];
  }
}

template <typename T>
__device__ __forceinline__ void stage_out(T* state, std::int64_t base, int count, const T* staged) {
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    const int at = lane_id() + 32 * k;
    if (at < count) state[base + at] = staged[at];
  }
}

// An entry of a tile's list: group (8 bits), its salient entries (4), salient entries of the tile before it.
__device__ __forceinline__ std::uint32_t list_item(int group, unsigned bits, int rank) {
  return static_cast<std::uint32_t>(group) | bits << 8 | static_cast<std::uint32_t>(rank) << 12;
}

// Lists the groups of a tile that have work; returns how many.
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

template <typename P, typename T, Kind kKind, bool kRare>
__global__ void __launch_bounds__(kChunkThreads, BlocksPerSM<T>::value)
    adam_kernel(const __grid_constant__ AdamArguments<T> a) {
  __shared__ AdamTensor<P, T> t;
  const Chunk chunk = a.table.chunks[blockIdx.x];
  if (warp_id() == 0) t.read(a.table, chunk.tensor, a.scratch);
  __syncthreads();
  if (t.step.skip || (!t.has(kGrad) && !t.has(kMaskedGrad))) return;
  const TensorInfo& info = a.table.tensors[chunk.tensor];
  const std::uint32_t* const words = a.words == nullptr ? nullptr : a.words + info.first_word;

  // A mask word of each tile of this warp, all loads under way at once.
  unsigned salient[kTilesPerWarp];
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    if (words != nullptr) {
      salient[k] = shifted_word(words, tile_word(chunk.index, k), t.shift, t.numel);
    } else {
      salient[k] = t.has(kMaskedGrad) ? ~0u : 0u;
    }
  }

  if constexpr (kKind == Kind::every) {
    for_each_group(chunk.index, t.numel, t.shift, salient, [&](std::int64_t first, unsigned exists, unsigned mask) {
      const GroupBits b{first, exists, exists, t.has(kMaskedGrad) ? mask : 0u, exists == 15u};
      AdamGroup<P, T> v;
      load_dense<P, T, kRare>(t, b, v);
      load_state<P, T, kRare>(t, b, v);
      forget_registers();
      update_group<P, T, kKind, kRare>(a, t, b, first, nullptr, 0, v);
      forget_registers();
      store_state<P, T, kRare>(t, b, v);
      store_dense<P, T, kRare>(t, b, v);
    });
  } else {
    __shared__ std::uint32_t lists[kChunkWarps][kTileGroups];
    std::uint32_t* const list = lists[warp_id()];
    __shared__ std::int64_t state_bases[kTiles];
    T* staged = nullptr;
    if constexpr (kKind == Kind::packed) {
      __shared__ int tile_counts[kTiles];
      __shared__ int head_count;
      __shared__ T stages[kChunkWarps][kRare ? 3 : 2][kRoundEntries];
      staged = stages[warp_id()][0];
#pragma unroll
      for (int k = 0; k < kTilesPerWarp; ++k) {
        const int count = warp_sum(__popc(salient[k]));
        if (lane_id() == 0) tile_counts[warp_id() + kChunkWarps * k] = count;
      }
      const bool past_blocks = chunk.index >= (t.numel + kChunk - 1) / kChunk;
      // Entries of the first word that packed_offsets has counted into the block before, because of the shift.
      if (threadIdx.x == 0) head_count = __popc(past_blocks ? salient[0] : salient[0] & ((1u << t.shift) - 1));
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
      const std::int64_t tile = tile_first(chunk.index, k, t.shift);
      const unsigned bits = k == 0 ? salient[0] : salient[kTilesPerWarp - 1];
      unsigned touched = bits;
      if (kRare && a.ema_frozen && t.has(kEma)) {
        touched = existing_word(tile_word(chunk.index, k), t.shift, t.numel);
      }
      const int total = list_groups(bits, touched, list);
      __syncwarp();
#pragma unroll 1
      for (int r = 0; r < total; r += 32) {
        const bool active = r + lane_id() < total;
        const std::uint32_t item = active ? list[r + lane_id()] : 0u;
        const int rank = static_cast<int>(item >> 12);
        GroupBits b;
        b.first = tile + static_cast<int>(item & 255u) * kGroup;
        const unsigned exists = group_bits(b.first, t.numel);
        b.update = item >> 8 & 15u;
        b.ema = !active ? 0u : kRare && a.ema_frozen ? exists : b.update;
        b.forget = 0;
        b.whole = exists == 15u;
        AdamGroup<P, T> v;
        if constexpr (kKind == Kind::masked) {
          if (!active) continue;
          load_dense<P, T, kRare>(t, b, v);
          if (b.update != 0) load_state<P, T, kRare>(t, b, v);
          forget_registers();
          update_group<P, T, kKind, kRare>(a, t, b, b.first, nullptr, 0, v);
          forget_registers();
          store_state<P, T, kRare>(t, b, v);
          store_dense<P, T, kRare>(t, b, v);
        } else {
          const int first_rank = __shfl_sync(kFullWarp, rank, 0);
          const int last = total - r < 32 ? total - r - 1 : 31;
          const int count = __shfl_sync(kFullWarp, rank + __popc(b.update), last) - first_rank;
          const std::int64_t base = state_bases[warp_id() + kChunkWarps * k] + first_rank;
          const int at = rank - first_rank;
          if (active) load_dense<P, T, kRare>(t, b, v);
          if (t.has(kExpAvg)) stage_in(t.state(kExpAvg), base, count, staged);
          stage_in(t.state(kExpAvgSq), base, count, staged + kRoundEntries);
          if (kRare && t.has(kMaxExpAvgSq)) stage_in(t.state(kMaxExpAvgSq), base, count, staged + 2 * kRoundEntries);
          __syncwarp();
          forget_registers();
          update_group<P, T, kKind, kRare>(a, t, b, base + at, staged, at, v);
          forget_registers();
          __syncwarp();
          if (t.has(kExpAvg)) stage_out(t.state(kExpAvg), base, count, staged);
          stage_out(t.state(kExpAvgSq), base, count, staged + kRoundEntries);
          if (kRare && t.has(kMaxExpAvgSq)) stage_out(t.state(kMaxExpAvgSq), base, count, staged + 2 * kRoundEntries);
          if (active) store_dense<P, T, kRare>(t, b, v);
          __syncwarp();
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
  const auto start = [&](auto rare) {
    constexpr bool kRare = decltype(rare)::value;
    if (a.packed_offsets != nullptr) {
      PF_LAUNCH((adam_kernel<P, T, Kind::packed, kRare>), grid, kChunkThreads, 0, stream, a);
    } else if (a.words != nullptr && !a.joint) {
      PF_LAUNCH((adam_kernel<P, T, Kind::masked, kRare>), grid, kChunkThreads, 0, stream, a);
    } else {
      PF_LAUNCH((adam_kernel<P, T, Kind::every, kRare>), grid, kChunkThreads, 0, stream, a);
    }
  };
  // Double precision is for checking other results: one version of each kernel is enough.
  if (a.rare || sizeof(T) == 8) {
    start(std::true_type{});
  } else if constexpr (sizeof(T) == 4) {
    start(std::false_type{});
  }
}

}  // namespace pecker_fast
