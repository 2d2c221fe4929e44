#include "pointwise.h"

#include <type_traits>

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

template <typename P>
__device__ __forceinline__ void accumulate_chunk(const MultiTensor& table, const Chunk& chunk, Reduction reduction) {
  using T = Compute<P>;
  const TensorInfo info = table.tensors[chunk.tensor];
  T* const accumulator = table_pointer<T>(table, 0, chunk.tensor);
  const P* const grad = table_pointer<const P>(table, 1, chunk.tensor);
  const bool accumulator_aligned = vector_aligned(accumulator, info.shift);
  const bool grad_aligned = vector_aligned(grad, info.shift);
  const unsigned words[kTilesPerWarp] = {};
  for_each_group(chunk.index, info.numel, info.shift, words, [&](std::int64_t first, unsigned exists, unsigned) {
    Pack<T, kGroup> sum;
    Pack<P, kGroup> value;
    load_group(accumulator, first, exists, accumulator_aligned && exists == 15u, sum);
    load_group(grad, first, exists, grad_aligned && exists == 15u, value);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (!(exists >> i & 1)) continue;
      T x = widen(value[i]);
      if (reduction == Reduction::abs_sum) x = x < 0 ? -x : x;
      if (reduction == Reduction::sq_sum) x = multiply_rounded(x, x);
      sum[i] += x;
    }
    store_group(accumulator, first, exists, accumulator_aligned && exists == 15u, sum);
  });
}

__global__ void __launch_bounds__(kChunkThreads, 5) accumulate_kernel(const __grid_constant__ MultiTensor table,
                                                                 Reduction reduction) {
  const Chunk chunk = table.chunks[blockIdx.x];
  if (table_pointer<void>(table, 1, chunk.tensor) == nullptr) return;
  for_type(table.tensors[chunk.tensor].type, [&](auto* type) {
    accumulate_chunk<std::remove_pointer_t<decltype(type)>>(table, chunk, reduction);
  });
}

// P only moves: an unsigned integer of the element's size.
template <typename P>
__device__ __forceinline__ void apply_mask_chunk(const MultiTensor& table, const Chunk& chunk,
                                                 const std::uint32_t* words) {
  const TensorInfo info = table.tensors[chunk.tensor];
  P* const tensor = table_pointer<P>(table, 0, chunk.tensor);
  const bool aligned = vector_aligned(tensor, info.shift);
  unsigned salient[kTilesPerWarp];
  read_words(words, chunk.index, info, salient);
  for_each_group(chunk.index, info.numel, info.shift, salient, [&](std::int64_t first, unsigned exists, unsigned mask) {
    if (mask == exists) return;
    const bool vector = aligned && exists == 15u;
    Pack<P, kGroup> values;
    if (mask != 0) load_group(tensor, first, mask, vector, values);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (!(mask >> i & 1)) values[i] = 0;
    }
    store_group(tensor, first, exists, vector, values);
  });
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

template <typename P>
__global__ void __launch_bounds__(kChunkThreads, 6)
    count_nonfinite_kernel(const __grid_constant__ MultiTensor table, const std::uint32_t* words, bool joint,
                           const float* grad_scale, unsigned long long* total) {
  using T = Compute<P>;
  const Chunk chunk = table.chunks[blockIdx.x];
  const P* const grad = table_pointer<const P>(table, 0, chunk.tensor);
  const P* const masked_grad = table_pointer<const P>(table, 1, chunk.tensor);
  if (grad == nullptr && masked_grad == nullptr) return;
  const TensorInfo info = table.tensors[chunk.tensor];
  const bool grad_aligned = vector_aligned(grad, info.shift);
  const bool masked_aligned = vector_aligned(masked_grad, info.shift);
  const T factor = grad_scale != nullptr ? T(1) / static_cast<T>(*grad_scale) : T(1);
  unsigned salient[kTilesPerWarp];
  read_words(words, chunk.index, info, salient);
  int count = 0;
  for_each_group(chunk.index, info.numel, info.shift, salient, [&](std::int64_t first, unsigned exists, unsigned mask) {
    const unsigned counted = joint ? exists : mask;
    const unsigned forget = masked_grad != nullptr ? mask : 0u;
    Pack<P, kGroup> values, forget_values;
    if (grad != nullptr && counted != 0) load_group(grad, first, counted, grad_aligned && exists == 15u, values);
    if (forget != 0) load_group(masked_grad, first, forget, masked_aligned && exists == 15u, forget_values);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (!(counted >> i & 1)) continue;
      T g = grad != nullptr ? multiply_rounded(widen(values[i]), factor) : T(0);
      if (forget >> i & 1) g += multiply_rounded(widen(forget_values[i]), factor);
      if (!is_finite(g)) ++count;
    }
  });
  count = warp_sum(count);
  // Almost always 0: then nothing is contended for.
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
