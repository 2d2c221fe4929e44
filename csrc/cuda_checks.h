// Argument checks of the CUDA operators, before anything is written. They mirror pecker_fast/ops/checks.py.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "cuda/multi_tensor.h"

namespace pecker_fast {

using at::Tensor;
using at::TensorList;
using OptionalTensors = c10::List<std::optional<Tensor>>;
using Dtypes = std::initializer_list<at::ScalarType>;

constexpr Dtypes kParamDtypes = {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};
constexpr Dtypes kPackDtypes = {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble, at::kInt, at::kShort};

inline ElementType element_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? kF64 : dtype == at::kBFloat16 ? kBF16 : dtype == at::kHalf ? kFP16 : kF32;
}

// "name[i]", or "name" where i is negative.
inline std::string argument_name(const char* name, std::int64_t i) {
  return i < 0 ? name : std::string(name) + "[" + std::to_string(i) + "]";
}

inline std::string dtype_names(Dtypes dtypes) {
  std::string names;
  for (at::ScalarType dtype : dtypes) names += (names.empty() ? "" : ", ") + std::string(c10::toString(dtype));
  return names;
}

inline void check_tensor(const char* name, std::int64_t i, const Tensor& t, Dtypes dtypes, c10::Device device) {
  bool allowed = t.layout() == at::kStrided;
  if (allowed) {
    allowed = false;
    for (at::ScalarType dtype : dtypes) allowed = allowed || t.scalar_type() == dtype;
  }
  TORCH_CHECK_TYPE(allowed, argument_name(name, i), " is a ", t.layout(), " tensor of ", t.scalar_type(),
                   ", expected a dense tensor of ", dtype_names(dtypes));
  TORCH_CHECK_VALUE(t.device() == device, argument_name(name, i), " is on ", t.device(), ", expected ", device);
  TORCH_CHECK_VALUE(t.is_contiguous(), argument_name(name, i), " with strides ", t.strides(), " is not contiguous");
}

inline void check_size(const char* name, std::int64_t i, const Tensor& t, const char* other, std::int64_t numel) {
  TORCH_CHECK_VALUE(t.numel() == numel, argument_name(name, i), " has ", t.numel(), " entries, ",
                    argument_name(other, i), " has ", numel);
}

inline void check_scalar(const char* name, const std::optional<Tensor>& t, at::ScalarType dtype, c10::Device device) {
  if (!t) return;
  check_tensor(name, -1, *t, {dtype}, device);
  TORCH_CHECK_VALUE(t->numel() == 1, name, " has shape ", t->sizes(), ", expected a scalar");
}

inline void check_words(const Tensor& words, at::IntArrayRef word_offsets, std::size_t tensors, c10::Device device) {
  check_tensor("words", -1, words, {at::kInt}, device);
  TORCH_CHECK_VALUE(word_offsets.size() >= tensors, "word_offsets has ", word_offsets.size(), " entries for ", tensors,
                    " tensors");
}

inline void check_words_of(const Tensor& words, at::IntArrayRef word_offsets, std::size_t i, std::int64_t numel) {
  const std::int64_t first = word_offsets[i], end = first + word_count(numel);
  TORCH_CHECK_VALUE(first >= 0 && end <= words.numel(), "word_offsets[", i, "] = ", first, ": words ", first, " to ",
                    end, " of tensor ", i, " are not within the ", words.numel(), " given");
}

inline const std::uint32_t* word_data(const std::optional<Tensor>& words) {
  return words ? reinterpret_cast<const std::uint32_t*>(words->const_data_ptr<std::int32_t>()) : nullptr;
}

template <typename T>
const T* optional_data(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// What keeps the scratch memory of one operator's tables from another's.
enum TablePurpose : int { kAdamTable, kAccumulateTable, kApplyMaskTable, kNonfiniteTable, kBlockCountsTable };

}  // namespace pecker_fast
