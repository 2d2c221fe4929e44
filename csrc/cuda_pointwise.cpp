// accumulate_, apply_mask_, count_nonfinite, block_counts, pack and unpack on CUDA tensors: checks and launches.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string_view>

#include "cuda/packing.h"
#include "cuda/pointwise.h"
#include "cuda_checks.h"
#include "cuda_tables.h"

namespace pecker_fast {
namespace {

void accumulate_cuda(TensorList accumulators, TensorList grads, std::string_view reduce) {
  TORCH_CHECK_VALUE(reduce == "sum" || reduce == "abs_sum" || reduce == "sq_sum", "reduce is '", reduce,
                    "', expected one of sum, abs_sum, sq_sum");
  TORCH_CHECK_VALUE(accumulators.size() == grads.size(), accumulators.size(), " accumulators for ", grads.size(),
                    " grads");
  if (grads.empty()) return;
  const c10::Device device = accumulators[0].device();
  TableSpec spec(grads.size(), kAccumulateSlots, 1);
  for (std::size_t i = 0; i < grads.size(); ++i) {
    const Tensor &accumulator = accumulators[i], &grad = grads[i];
    check_tensor("accumulators", i, accumulator, {at::kFloat, at::kDouble}, device);
    check_tensor("grads", i, grad, kParamDtypes, device);
    TORCH_CHECK_TYPE((accumulator.scalar_type() == at::kDouble) == (grad.scalar_type() == at::kDouble),
                     "accumulators[", i, "] is ", accumulator.scalar_type(), " for grads[", i, "] of ",
                     grad.scalar_type());
    check_size("accumulators", i, accumulator, "grads", grad.numel());
    void* const data = accumulator.mutable_data_ptr();
    spec.set_tensor(i, grad.numel(), 0, element_type(grad.scalar_type()), data, accumulator.element_size());
    spec.set_pointer(0, i, data);
    spec.set_pointer(1, i, grad.const_data_ptr());
  }
  const c10::DeviceGuard guard(device);
  const Table table = device_table(spec, kAccumulateTable);
  accumulate(table.view,
             reduce == "sum"       ? Reduction::sum
             : reduce == "abs_sum" ? Reduction::abs_sum
                                   : Reduction::sq_sum,
             table.stream);
}

void apply_mask_cuda(TensorList tensors, const Tensor& words, at::IntArrayRef word_offsets) {
  const c10::Device device = words.device();
  check_words(words, word_offsets, tensors.size(), device);
  TableSpec spec(tensors.size(), kApplyMaskSlots, 1);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    check_tensor("tensors", i, tensors[i], kParamDtypes, device);
    const std::int64_t numel = tensors[i].numel();
    check_words_of(words, word_offsets, i, numel);
    void* const data = tensors[i].mutable_data_ptr();
    spec.set_tensor(i, numel, word_offsets[i], element_type(tensors[i].scalar_type()), data, tensors[i].element_size());
    spec.set_pointer(0, i, data);
  }
  if (spec.total_chunks == 0) return;
  const c10::DeviceGuard guard(device);
  const Table table = device_table(spec, kApplyMaskTable);
  apply_mask(table.view, word_data(words), table.stream);
}

Tensor count_nonfinite_cuda(const OptionalTensors& grads, const OptionalTensors& masked_grads,
                            const std::optional<Tensor>& words, at::IntArrayRef word_offsets,
                            const std::optional<Tensor>& grad_scale) {
  const bool joint = !masked_grads.empty();
  TORCH_CHECK_VALUE(!joint || masked_grads.size() == grads.size(), masked_grads.size(), " masked_grads for ",
                    grads.size(), " grads, expected as many or none");
  std::optional<Tensor> first;
  for (std::size_t i = 0; i < grads.size() && !first; ++i) first = grads.get(i);
  for (std::size_t i = 0; i < masked_grads.size() && !first; ++i) first = masked_grads.get(i);
  const std::optional<Tensor>& any = first ? first : words;
  TORCH_CHECK_VALUE(any.has_value(), "count_nonfinite on CUDA needs at least one tensor");
  const c10::Device device = any->device();
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  if (!first) return at::zeros({}, options);
  const at::ScalarType dtype = first->scalar_type();
  check_tensor("grads", -1, *first, kParamDtypes, device);
  if (words) check_words(*words, word_offsets, grads.size(), device);
  check_scalar("grad_scale", grad_scale, at::kFloat, device);
  TableSpec spec(grads.size(), kNonfiniteSlots, kNonfiniteSlots);
  for (std::size_t i = 0; i < grads.size(); ++i) {
    const std::optional<Tensor> grad = grads.get(i);
    const std::optional<Tensor> masked_grad = joint ? masked_grads.get(i) : std::nullopt;
    if (grad) check_tensor("grads", i, *grad, {dtype}, device);
    if (masked_grad) check_tensor("masked_grads", i, *masked_grad, {dtype}, device);
    if (grad && masked_grad) check_size("masked_grads", i, *masked_grad, "grads", grad->numel());
    const std::optional<Tensor>& like = grad ? grad : masked_grad;
    const std::int64_t numel = like ? like->numel() : 0;
    if (words) check_words_of(*words, word_offsets, i, numel);
    spec.set_tensor(i, numel, words ? word_offsets[i] : 0, element_type(dtype),
                    like ? like->const_data_ptr() : nullptr, c10::elementSize(dtype));
    if (grad) spec.set_pointer(0, i, grad->const_data_ptr());
    if (masked_grad) spec.set_pointer(1, i, masked_grad->const_data_ptr());
  }
  const c10::DeviceGuard guard(device);
  Tensor total = at::zeros({}, options);
  const Table table = device_table(spec, kNonfiniteTable);
  count_nonfinite(table.view, element_type(dtype), word_data(words), joint, optional_data<float>(grad_scale),
                  reinterpret_cast<unsigned long long*>(total.mutable_data_ptr<std::int64_t>()), table.stream);
  return total;
}

Tensor block_counts_cuda(const Tensor& words, at::IntArrayRef word_offsets, at::IntArrayRef numels) {
  const c10::Device device = words.device();
  check_words(words, word_offsets, numels.size(), device);
  TableSpec spec(numels.size(), 0, 0);
  for (std::size_t i = 0; i < numels.size(); ++i) {
    TORCH_CHECK_VALUE(numels[i] >= 0, "numels[", i, "] is ", numels[i], ", expected at least 0");
    check_words_of(words, word_offsets, i, numels[i]);
    spec.set_tensor(i, numels[i], word_offsets[i], kF32, nullptr, 1);
  }
  const c10::DeviceGuard guard(device);
  Tensor counts = at::empty({spec.total_blocks}, words.options().dtype(at::kLong));
  if (spec.total_blocks == 0) return counts;
  const Table table = device_table(spec, kBlockCountsTable);
  block_counts(table.view, word_data(words), counts.mutable_data_ptr<std::int64_t>(), table.stream);
  return counts;
}

// Set bits before each block of a single tensor.
Tensor offsets_of(const Tensor& words, std::int64_t numel, cudaStream_t stream) {
  Tensor offsets = at::empty({block_count(numel) + 1}, words.options().dtype(at::kLong));
  block_offsets(word_data(words), numel, offsets.mutable_data_ptr<std::int64_t>(), stream);
  return offsets;
}

Tensor pack_cuda(const Tensor& dense, const Tensor& words, std::int64_t count) {
  const c10::Device device = dense.device();
  check_tensor("dense", -1, dense, kPackDtypes, device);
  check_words(words, {0}, 1, device);
  check_words_of(words, {0}, 0, dense.numel());
  TORCH_CHECK_VALUE(count >= 0 && count <= dense.numel(), "count is ", count, ", expected 0 to ", dense.numel());
  const c10::DeviceGuard guard(device);
  Tensor packed = at::empty({count}, dense.options());
  if (count == 0) return packed;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Tensor offsets = offsets_of(words, dense.numel(), stream);
  pack(dense.const_data_ptr(), static_cast<int>(dense.element_size()), word_data(words), dense.numel(),
       offsets.const_data_ptr<std::int64_t>(), packed.mutable_data_ptr(), count, stream);
  return packed;
}

Tensor unpack_cuda(const Tensor& packed, const Tensor& words, std::int64_t numel) {
  const c10::Device device = packed.device();
  check_tensor("packed", -1, packed, kPackDtypes, device);
  TORCH_CHECK_VALUE(numel >= 0, "numel is ", numel, ", expected at least 0");
  check_words(words, {0}, 1, device);
  check_words_of(words, {0}, 0, numel);
  TORCH_CHECK_VALUE(packed.numel() <= numel, "packed has ", packed.numel(), " entries, more than numel = ", numel);
  const c10::DeviceGuard guard(device);
  Tensor dense = at::empty({numel}, packed.options());
  if (numel == 0) return dense;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Tensor offsets = offsets_of(words, numel, stream);
  unpack(packed.const_data_ptr(), static_cast<int>(packed.element_size()), packed.numel(), word_data(words), numel,
         offsets.const_data_ptr<std::int64_t>(), dense.mutable_data_ptr(), stream);
  return dense;
}

TORCH_LIBRARY_IMPL(pecker_fast, CUDA, m) {
  m.impl("accumulate_", &accumulate_cuda);
  m.impl("apply_mask_", &apply_mask_cuda);
  m.impl("count_nonfinite", &count_nonfinite_cuda);
  m.impl("block_counts", &block_counts_cuda);
  m.impl("pack", &pack_cuda);
  m.impl("unpack", &unpack_cuda);
}

}  // namespace
}  // namespace pecker_fast
