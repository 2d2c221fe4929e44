// accumulate_, apply_mask_ and count_nonfinite on raw device pointers.
#pragma once

#include "common/adam_math.h"
#include "multi_tensor.h"

namespace pecker_fast {

enum class Reduction : std::int32_t { sum, abs_sum, sq_sum };

// Slots: accumulators (float, or double for double gradients), gradients of TensorInfo::type.
constexpr int kAccumulateSlots = 2;
void accumulate(const MultiTensor& table, Reduction reduction, cudaStream_t stream);

// Slot: tensors of TensorInfo::type. Entries outside the mask become +0.
constexpr int kApplyMaskSlots = 1;
void apply_mask(const MultiTensor& table, const std::uint32_t* words, cudaStream_t stream);

// Slots: gradients and masked gradients, all of one type. Adds to *total the entries that are inf or NaN, in a masked
// step (words, not joint) those of the mask. grad_scale may be null.
constexpr int kNonfiniteSlots = 2;
void count_nonfinite(const MultiTensor& table, ElementType type, const std::uint32_t* words, bool joint,
                     const float* grad_scale, unsigned long long* total, cudaStream_t stream);

}  // namespace pecker_fast
