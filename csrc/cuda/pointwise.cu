#include "pointwise.h"

#include <type_traits>

#include "arithmetic.cuh"

namespace pecker_fast {
namespace {

// Calls body with a null pointer of the tensor's element type; a block has one tensor, so its threads agree.
template <typename Body>
__device__ __forceinline__ void for_type(std::int32_t type, const Body& body) {
  switch (type) {
    case kF32:
      return body(static_cast<float*>(nullptr));
    case kBF16:
      return body(static_cast<bf16*>(nullptr));
    case kFP16:
      return body(static_cast<fp16*>(nullptr));
    default:
      return body(static_cast<double*>(nullptr));
  }
}

template <typename P>
using Compute = std::conditional_t<std::is_same_v<P, double>, double, float>;

__device__ __forceinline__ void read_words(const std::uint32_t* words, int chunk_index, const TensorInfo& info,
                                           unsigned (&out)[kTilesPerWarp]) {
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    out[k] = words == nullptr
                 ? ~0u
                 : shifted_word(words + info.first_word, tile_word(chunk_index, k), info.shift, info.numel);
  }
}

template <bool kFast, typename T, typename P>
__device__ __forceinline__ void load_both(Vector<T, kGroup>& a, const T* a_base, Vector<P, kGroup>& b, const P* b_base,
                                          std::int64_t first, unsigned exists) {
  load_group<kFast>(a, a_base, first, exists);
  load_group<kFast>(b, b_base, first, exists);
}

template <typename P>
__device__ __forceinline__ void accumulate_chunk(const MultiTensor& table, const Chunk& chunk, Reduction reduction) {
  using T = Compute<P>;
  const TensorInfo info = table.tensors[chunk.tensor];
  T* const accumulator = table_pointer<T>(table, 0, chunk.tensor);
  const P* const grad = table_pointer<const P>(table, 1, chunk.tensor);
  // Not double, whose vectors would take the registers of all other types' blocks.
  const bool aligned =
      sizeof(P) < 8 && vector_aligned(accumulator, info.shift) && vector_aligned(grad, info.shift);
  const auto visit = [&](std::int64_t first, unsigned exists, unsigned, bool fast) {
    Vector<T, kGroup> sums;
    Vector<P, kGroup> grads;
    if (fast) {
      load_both<true>(sums, accumulator, grads, grad, first, exists);
    } else {
      load_both<false>(sums, accumulator, grads, grad, first, exists);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      T x = widen(grads.entry(i));
      if (reduction == Reduction::abs_sum) x = x < 0 ? -x : x;
      if (reduction == Reduction::sq_sum) x = product(x, x);
      sums.set_entry(i, sum(sums.entry(i), x));
    }
    if (fast) {
      store_group<true>(sums, accumulator, first, exists);
    } else {
      store_group<false>(sums, accumulator, first, exists);
    }
  };
  const unsigned no_words[kTilesPerWarp] = {};
  for_each_group(chunk.index, info.numel, info.shift, aligned, no_words, visit);
}

__global__ void __launch_bounds__(kChunkThreads, 5) accumulate_kernel(const __grid_constant__ MultiTensor table,
                                                                 Reduction reduction) {
  const Chunk chunk = table.chunks[blockIdx.x];
  if (table_pointer<void>(table, 1, chunk.tensor) == nullptr) return;
  for_type(table.tensors[chunk.tensor].type, [&](auto* type) {
    accumulate_chunk<std::remove_pointer_t<decltype(type)>>(table, chunk, reduction);
  });
}

// P is only moved: an unsigned integer of the element's size.
template <typename P>
__device__ __forceinline__ void apply_mask_chunk(const MultiTensor& table, const Chunk& chunk,
                                                 const std::uint32_t* words) {
  const TensorInfo info = table.tensors[chunk.tensor];
  P* const tensor = table_pointer<P>(table, 0, chunk.tensor);
  unsigned salient[kTilesPerWarp];
  read_words(words, chunk.index, info, salient);
  const auto visit = [&](std::int64_t first, unsigned exists, unsigned mask, bool fast) {
    if (mask == exists) return;
    Vector<P, kGroup> values{};
    if (fast) {
      if (mask != 0) {
        values.load(tensor + first);
        merge(values, Vector<P, kGroup>{}, ~mask);
      }
      values.store(tensor + first);
    } else {
      values.store_some(tensor + first, exists & ~mask);
    }
  };
  for_each_group(chunk.index, info.numel, info.shift, vector_aligned(tensor, info.shift), salient, visit);
}

__global__ void __launch_bounds__(kChunkThreads, 6) apply_mask_kernel(const __grid_constant__ MultiTensor table,
                                                                 const std::uint32_t* words) {
  const Chunk chunk = table.chunks[blockIdx.x];
  const std::int32_t type = table.tensors[chunk.tensor].type;
  if (type == kF32) {
    apply_mask_chunk<std::uint32_t>(table, chunk, words);
  } else if (type == kF64) {
    apply_mask_chunk<std::uint64_t>(table, chunk, words);
  } else {
    apply_mask_chunk<std::uint16_t>(table, chunk, words);
  }
}

// Double precision needs two registers a value.
template <typename P>
__global__ void __launch_bounds__(kChunkThreads, sizeof(P) == 8 ? 4 : 6)
    count_nonfinite_kernel(const __grid_constant__ MultiTensor table, const std::uint32_t* words, bool joint,
                           const float* grad_scale, unsigned long long* total) {
  using T = Compute<P>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const P* const grad = table_pointer<const P>(table, 0, chunk.tensor);
  const P* const masked_grad = table_pointer<const P>(table, 1, chunk.tensor);
  if (grad == nullptr && masked_grad == nullptr) return;
  const TensorInfo info = table.tensors[chunk.tensor];
  const bool aligned = (grad == nullptr || vector_aligned(grad, info.shift)) &&
                       (masked_grad == nullptr || vector_aligned(masked_grad, info.shift));
  const T factor = grad_scale != nullptr ? T(1) / static_cast<T>(*grad_scale) : T(1);
  unsigned salient[kTilesPerWarp];
  read_words(words, chunk.index, info, salient);
  int count = 0;
  const auto visit = [&](std::int64_t first, unsigned exists, unsigned mask, bool fast) {
    const unsigned counted = joint ? exists : mask;
    const unsigned masked = masked_grad != nullptr ? mask : 0u;
    Vector<P, kGroup> grads{}, masked_grads{};
    if (fast) {
      if (grad != nullptr && counted != 0) grads.load(grad + first);
      if (masked != 0) masked_grads.load(masked_grad + first);
    } else {
      if (grad != nullptr) grads.load_some(grad + first, counted);
      if (masked != 0) masked_grads.load_some(masked_grad + first, masked);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      T g = grad != nullptr ? product(widen(grads.entry(i)), factor) : T(0);
      if (masked >> i & 1) g = sum(g, product(widen(masked_grads.entry(i)), factor));
      count += (counted >> i & 1) != 0 && !is_finite(g);
    }
  };
  for_each_group(chunk.index, info.numel, info.shift, aligned, salient, visit);
  count = warp_sum(count);
  // Almost always 0, so there is no contention.
  if (lane_id() == 0 && count != 0) atomicAdd(total, static_cast<unsigned long long>(count));
}

}  // namespace

void accumulate(const MultiTensor& table, Reduction reduction, cudaStream_t stream) {
  if (table.num_chunks == 0) return;
  PF_LAUNCH(accumulate_kernel, static_cast<unsigned>(table.num_chunks), kChunkThreads, 0, stream, table, reduction);
}

void apply_mask(const MultiTensor& table, const std::uint32_t* words, cudaStream_t stream) {
  if (table.num_chunks == 0) return;
  PF_LAUNCH(apply_mask_kernel, static_cast<unsigned>(table.num_chunks), kChunkThreads, 0, stream, table, words);
}

void count_nonfinite(const MultiTensor& table, ElementType type, const std::uint32_t* words, bool joint,
                     const float* grad_scale, unsigned long long* total, cudaStream_t stream) {
  if (table.num_chunks == 0) return;
  const auto kernel = type == kF32    ? count_nonfinite_kernel<float>
                      : type == kBF16 ? count_nonfinite_kernel<bf16>
                      : type == kFP16 ? count_nonfinite_kernel<fp16>
                                      : count_nonfinite_kernel<double>;
  PF_LAUNCH(kernel, static_cast<unsigned>(table.num_chunks), kChunkThreads, 0, stream, table, words, joint, grad_scale,
            total);
}

}  // namespace pecker_fast
