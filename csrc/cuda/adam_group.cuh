// A group of an Adam step: where its tensor's lists are, loads, the update of its entries, stores. The kernel is in
// adam_kernel.cuh.
#pragma once

#include <type_traits>

#include "adam.h"
#include "arithmetic.cuh"
#include "vectors.h"

namespace pecker_fast {
namespace {

enum class Kind { every, masked, packed };

// Compile-time options of a kernel. With kAnyOption it checks its arguments instead; kRare adds the features of
// AdamArguments::rare, kPackedLists packed_grads and packed_values.
enum Option : int { kFirstMoment = 1, kWithEma = 2, kJoint = 4, kAnyOption = 8, kRare = 16, kPackedLists = 32 };

constexpr int kRoundEntries = 32 * kGroup;

template <typename T>
struct BlocksPerSM {
  // 64 registers a thread; double needs up to 128.
  static constexpr int value = sizeof(T) == 4 ? 4 : 2;
};

// Shared by all threads of a block: the chunk's tensor and the scalars of its step. In shared memory, because keeping
// them in registers would halve the number of blocks that run at once.
template <typename P, typename T, int kOptions>
struct AdamTensor {
  static constexpr bool kAny = (kOptions & kAnyOption) != 0, kRareToo = (kOptions & kRare) != 0;
  static constexpr bool kMayPack = (kOptions & kPackedLists) != 0;

  void* pointers[kAdamSlots];
  // First entry of the chunk; negative if the shift puts it before the tensor.
  std::int64_t first;
  std::int64_t numel;
  int shift;
  // Groups are vectors in all of the tensor's dense lists.
  bool aligned;
  bool packed_grads, packed_values;
  AdamTensorPrepared<T> prepared;
  AdamPrepared<T> step;

  // Whether the tensor has this list. A constant unless the kernel checks its arguments.
  template <AdamSlot kSlot>
  __device__ __forceinline__ bool has() const {
    if constexpr (kSlot == kExpAvg && !kAny) return (kOptions & kFirstMoment) != 0;
    if constexpr (kSlot == kEma && !kAny) return (kOptions & kWithEma) != 0;
    if constexpr (kSlot == kMaskedGrad && !kAny && !(kOptions & kJoint)) return false;
    if constexpr (kSlot == kGrad && !kAny && !(kOptions & kJoint)) return true;
    if constexpr ((kSlot == kMaster || kSlot == kMaxExpAvgSq || kSlot == kCounts) && !kRareToo) return false;
    // Only 16-bit parameters have masters.
    if constexpr (kSlot == kMaster && sizeof(P) != 2) return false;
    return pointers[kSlot] != nullptr;
  }
  template <AdamSlot kSlot>
  __device__ __forceinline__ auto* data() const {
    constexpr bool kLikeParam = kSlot == kParam || kSlot == kGrad || kSlot == kMaskedGrad;
    return static_cast<std::conditional_t<kLikeParam, P, T>*>(pointers[kSlot]);
  }

  // Whether a list is dense although the state is packed.
  template <AdamSlot kSlot>
  __device__ __forceinline__ bool is_dense() const {
    if constexpr (!kMayPack) return true;
    return kSlot == kGrad ? !packed_grads : !packed_values;
  }

  // By the first warp; for all after a barrier.
  __device__ __forceinline__ void read(const AdamArguments<T>& a, const Chunk& chunk, bool packed) {
    const MultiTensor& table = a.table;
    const int slot = lane_id(), tensor = chunk.tensor;
    bool fits = true;
    if (slot < kAdamSlots) {
      const int info_shift = table.tensors[tensor].shift;
      void* const pointer = table_pointer<void>(table, slot, tensor);
      const bool is_param = slot == kParam || slot == kGrad || slot == kMaskedGrad;
      // Packed state and counts are accessed entry by entry anyway.
      const bool is_value = slot == kMaster || slot == kEma;
      const bool packs = kMayPack && ((slot == kGrad && a.packed_grads) || (is_value && a.packed_values));
      const bool dense = !packs && (is_param || is_value || (!packed && slot < kMaster));
      pointers[slot] = pointer;
      if (dense && pointer != nullptr) {
        fits = is_param ? vector_aligned(static_cast<P*>(pointer), info_shift)
                        : vector_aligned(static_cast<T*>(pointer), info_shift);
      }
    } else if (slot == kAdamSlots) {
      numel = table.tensors[tensor].numel;
      shift = table.tensors[tensor].shift;
      first = static_cast<std::int64_t>(chunk.index) * kChunk - shift;
    } else if (slot == kAdamSlots + 1) {
      packed_grads = a.packed_grads;
      packed_values = a.packed_values;
      prepared = reinterpret_cast<const AdamTensorPrepared<T>*>(static_cast<const unsigned char*>(a.scratch) +
                                                                kAdamPreparedBytes)[tensor];
    } else if (slot == kAdamSlots + 2) {
      step = *static_cast<const AdamPrepared<T>*>(a.scratch);
    }
    const bool all_fit = __all_sync(kFullWarp, fits);
    if (slot == 0) aligned = all_fit;
  }
};

// Shared memory is read again after this instead of being kept in registers.
__device__ __forceinline__ void forget_registers() { asm volatile("" ::: "memory"); }

template <typename P, typename T>
struct AdamGroup {
  Vector<P, kGroup> param, grad, masked_grad;
  Vector<T, kGroup> master, ema;
  Vector<T, kGroup> exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// The place of a group, and which of its entries are updated, have their EMA updated, see the masked gradient. `fast`:
// all of them exist and are vectors.
struct GroupBits {
  std::int64_t first;
  unsigned update, ema, masked;
  bool fast;
};

template <bool kFast, Kind kKind, typename Tensor, typename P, typename T>
__device__ __forceinline__ void load_dense(const Tensor& t, const GroupBits& b, AdamGroup<P, T>& v) {
  const unsigned touched = b.update | b.ema;
  if (t.template has<kGrad>() && t.template is_dense<kGrad>()) {
    load_group<kFast>(v.grad, t.template data<kGrad>(), b.first, b.update);
  }
  if (t.template has<kMaskedGrad>() && b.masked != 0) {
    load_group<kFast>(v.masked_grad, t.template data<kMaskedGrad>(), b.first, b.masked);
  }
  // A master has the parameter's value. The parameter itself is read only if a vector is stored of which some entries
  // do not change.
  const bool some_stay = kFast && kKind != Kind::every && b.update != 0 && b.update != 15u;
  if (!t.template has<kMaster>() || some_stay) {
    load_group<kFast>(v.param, t.template data<kParam>(), b.first, touched);
  }
  if (t.template has<kMaster>() && t.template is_dense<kMaster>()) {
    load_group<kFast>(v.master, t.template data<kMaster>(), b.first, touched);
  }
  // With packed lists the average is read as late as possible, because registers are scarce.
  if (t.template has<kEma>() && !Tensor::kMayPack) {
    load_group<kFast>(v.ema, t.template data<kEma>(), b.first, b.ema);
  }
}

template <bool kFast, typename Tensor, typename P, typename T>
__device__ __forceinline__ void load_state(const Tensor& t, const GroupBits& b, AdamGroup<P, T>& v) {
  if (t.template has<kExpAvg>()) load_group<kFast>(v.exp_avg, t.template data<kExpAvg>(), b.first, b.update);
  load_group<kFast>(v.exp_avg_sq, t.template data<kExpAvgSq>(), b.first, b.update);
  if (t.template has<kMaxExpAvgSq>()) {
    load_group<kFast>(v.max_exp_avg_sq, t.template data<kMaxExpAvgSq>(), b.first, b.update);
  }
}

template <bool kFast, typename Tensor, typename P, typename T>
__device__ __forceinline__ void store_dense(const Tensor& t, const GroupBits& b, const AdamGroup<P, T>& v) {
  if (b.update != 0) {
    store_group<kFast>(v.param, t.template data<kParam>(), b.first, b.update);
    if (t.template has<kMaster>() && t.template is_dense<kMaster>()) {
      store_group<kFast>(v.master, t.template data<kMaster>(), b.first, b.update);
    }
  }
  if (t.template has<kEma>() && t.template is_dense<kEma>()) {
    store_group<kFast>(v.ema, t.template data<kEma>(), b.first, b.ema);
  }
}

template <bool kFast, typename Tensor, typename P, typename T>
__device__ __forceinline__ void store_state(const Tensor& t, const GroupBits& b, const AdamGroup<P, T>& v) {
  if (b.update == 0) return;
  if (t.template has<kExpAvg>()) store_group<kFast>(v.exp_avg, t.template data<kExpAvg>(), b.first, b.update);
  store_group<kFast>(v.exp_avg_sq, t.template data<kExpAvgSq>(), b.first, b.update);
  if (t.template has<kMaxExpAvgSq>()) {
    store_group<kFast>(v.max_exp_avg_sq, t.template data<kMaxExpAvgSq>(), b.first, b.update);
  }
}

// Lists of a round in shared memory, after the first and second moment.
template <typename T>
struct StageOf {
  static constexpr int kLargest = 2, kEma = 3, kMaster = 4;
  // Double has no masters, and no room for more than four lists: its gradients go before the largest second moments.
  static constexpr bool kSharesGrad = sizeof(T) == 8;
  static constexpr int kGrad = kSharesGrad ? kLargest : 5, kLists = kSharesGrad ? 4 : 6;
};

// The updated entries of a group, from those of a packed list at `staged`.
template <typename P>
__device__ __forceinline__ void take_staged(Vector<P, kGroup>& group, const P* staged, unsigned update) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (update >> i & 1) group.set_entry(i, *staged++);
  }
}
// Adds one to the step count of state entry `at` and returns its bias corrections.
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

// Moment k (first, second, largest second) of an updated entry: in the group or, if the state is packed, in shared
// memory at `staged`.
template <Kind kKind, typename T>
__device__ __forceinline__ T moment(const Vector<T, kGroup>& group, int i, const T* staged, int k, bool updated) {
  if constexpr (kKind != Kind::packed) return group.entry(i);
  return updated ? staged[k * kRoundEntries] : T(0);
}
template <Kind kKind, typename T>
__device__ __forceinline__ void set_moment(Vector<T, kGroup>& group, int i, T* staged, int k, bool updated, T value) {
  if constexpr (kKind != Kind::packed) {
    // Stores whole vectors: entries that are not updated are written back unchanged.
    if (kKind == Kind::every || updated) group.set_entry(i, value);
  } else {
    if (updated) staged[k * kRoundEntries] = value;
  }
}

// Updates entry i of a group. `state_first`: index of the group's first entry in dense state, of its first updated
// entry in packed state, which is at `staged`. Returns the parameter before it is rounded.
template <Kind kKind, bool kConditioned, typename Tensor, typename P, typename T>
__device__ __forceinline__ T update_entry(const AdamArguments<T>& a, const Tensor& t, const GroupBits& b,
                                          std::int64_t state_first, T* staged, int i, AdamGroup<P, T>& v) {
  const bool updated = b.update >> i & 1;
  const int before = kKind == Kind::packed ? __popc(b.update & ((1u << i) - 1)) : i;
  staged += before;
  const AdamScalars<T>& s = a.scalars;
  const T factor = t.step.grad_factor;
  const T x = t.template has<kMaster>() ? v.master.entry(i) : widen(v.param.entry(i));
  T g = t.template has<kGrad>() ? product(widen(v.grad.entry(i)), factor) : T(0), h = g;
  if (t.template has<kMaskedGrad>() && (b.masked >> i & 1)) {
    g = sum(g, product(widen(v.masked_grad.entry(i)), factor));
  }
  if constexpr (kConditioned) g = conditioned(s, g, x);
  h = Tensor::kRareToo && a.retain_variance ? conditioned(s, h, x) : g;
  AdamCorrection<T> correction = t.prepared.correction;
  if (t.template has<kCounts>() && updated) {
    correction = count_update(a, t.step.lr, t.pointers[kCounts], state_first + before);
  }
  if (t.template has<kExpAvg>()) {
    const T m = moment<kKind>(v.exp_avg, i, staged, 0, updated);
    g = fused(s.one_minus_beta1, sum(g, -m), m);
    set_moment<kKind>(v.exp_avg, i, staged, 0, updated, g);
  }
  const T before_v = moment<kKind>(v.exp_avg_sq, i, staged, 1, updated);
  T second = fused(product(s.one_minus_beta2, h), h, product(s.beta2, before_v));
  set_moment<kKind>(v.exp_avg_sq, i, staged, 1, updated, second);
  if (t.template has<kMaxExpAvgSq>()) {
    const T largest = moment<kKind>(v.max_exp_avg_sq, i, staged, 2, updated);
    if (!(second > largest || second != second)) second = largest;
    set_moment<kKind>(v.max_exp_avg_sq, i, staged, 2, updated, second);
  }
  T u = quotient(product(correction.step_size, g), fused(root(second), correction.inv_sqrt_bc2, s.eps));
  if constexpr (kConditioned) u = clamped(u, t.step.max_update);
  return sum(product(x, t.step.decay), -u);
}

// Rounds the updated entries' new parameters to their type, and advances masters and EMA.
template <Kind kKind, typename Tensor, typename P, typename T>
__device__ __forceinline__ void set_params(const AdamArguments<T>& a, const Tensor& t, const GroupBits& b,
                                           const T (&x)[kGroup], AdamGroup<P, T>& v) {
  Vector<P, kGroup> rounded;
  if constexpr (sizeof(P) == 2) {
    if (Tensor::kRareToo && a.stochastic_rounding) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        P entry;
        narrow_stochastic(x[i], random_bits(t.prepared.random_state, b.first + i), &entry);
        rounded.set_entry(i, entry);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; i += 2) narrow_pair(x[i], x[i + 1], rounded, i / 2);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) rounded.set_entry(i, x[i]);
  }
  const unsigned updated = kKind == Kind::every ? 15u : b.update;
  merge(v.param, rounded, updated);
  if (t.template has<kMaster>()) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (updated >> i & 1) v.master.set_entry(i, x[i]);
    }
  }
  if (t.template has<kEma>()) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const T y = t.template has<kMaster>() ? v.master.entry(i) : widen(v.param.entry(i));
      const T e = v.ema.entry(i);
      if (kKind == Kind::every || (b.ema >> i & 1)) v.ema.set_entry(i, fused(a.scalars.ema_weight, sum(y, -e), e));
    }
  }
}

// For steps with packed lists. `staged`: the group's first entry in the first list of the round.
template <typename Tensor, typename P, typename T>
__device__ __forceinline__ void read_average(const Tensor& t, const GroupBits& b, const T* staged, AdamGroup<P, T>& v) {
  if (t.packed_values) {
    take_staged(v.ema, staged + StageOf<T>::kEma * kRoundEntries, b.update);
  } else if (b.fast) {
    load_group<true>(v.ema, t.template data<kEma>(), b.first, b.ema);
  } else {
    load_group<false>(v.ema, t.template data<kEma>(), b.first, b.ema);
  }
}

template <Kind kKind, bool kConditioned, typename Tensor, typename P, typename T>
__device__ __forceinline__ void update_entries(const AdamArguments<T>& a, const Tensor& t, const GroupBits& b,
                                               std::int64_t state_first, T* staged, AdamGroup<P, T>& v) {
  T x[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    x[i] = update_entry<kKind, kConditioned>(a, t, b, state_first, staged, i, v);
    if constexpr (Tensor::kRareToo) forget_registers();
  }
  if constexpr (Tensor::kMayPack) {
    if (t.template has<kEma>()) read_average(t, b, staged, v);
  }
  set_params<kKind>(a, t, b, x, v);
}

template <Kind kKind, typename Tensor, typename P, typename T>
__device__ __forceinline__ void update_group(const AdamArguments<T>& a, const Tensor& t, const GroupBits& b,
                                             std::int64_t state_first, T* staged, AdamGroup<P, T>& v) {
  // Most steps neither clip nor decay: this saves them a quarter of the instructions.
  if (Tensor::kAny || a.conditioned) {
    update_entries<kKind, true>(a, t, b, state_first, staged, v);
  } else {
    update_entries<kKind, false>(a, t, b, state_first, staged, v);
  }
}

// A group whose state is dense: loads, update, stores.
template <Kind kKind, typename P, typename T, typename Tensor>
__device__ __forceinline__ void step_group(const AdamArguments<T>& a, const Tensor& t, const GroupBits& b) {
  AdamGroup<P, T> v;
  if (b.fast) {
    load_dense<true, kKind>(t, b, v);
    load_state<true>(t, b, v);
  } else {
    load_dense<false, kKind>(t, b, v);
    load_state<false>(t, b, v);
  }
  if constexpr (Tensor::kRareToo) forget_registers();
  update_group<kKind>(a, t, b, b.first, static_cast<T*>(nullptr), v);
  if constexpr (Tensor::kRareToo) forget_registers();
  if (b.fast) {
    store_state<true>(t, b, v);
    store_dense<true>(t, b, v);
  } else {
    store_state<false>(t, b, v);
    store_dense<false>(t, b, v);
  }
}

}  // namespace
}  // namespace pecker_fast
