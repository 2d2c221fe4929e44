// accumulate_, apply_mask_, pack, unpack and count_nonfinite on the CPU: argument checks, dtype dispatch and one
// parallel region over pieces of all tensors.
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string_view>
#include <vector>

#include "cpu/adam.h"
#include "cpu/pointwise.h"

namespace pecker_fast {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensors = c10::List<std::optional<Tensor>>;

struct Piece {
  std::int64_t tensor, begin, length;
};

// Pieces of kAdamChunk entries, so that each starts on a mask word.
std::vector<Piece> make_pieces(const std::vector<std::int64_t>& numels) {
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < numels.size(); ++i) {
    for (std::int64_t begin = 0; begin < numels[i]; begin += kAdamChunk) {
      pieces.push_back({static_cast<std::int64_t>(i), begin, std::min(kAdamChunk, numels[i] - begin)});
    }
  }
  return pieces;
}

// Runs `body(piece, number of the piece)` on all pieces, split evenly by entries.
template <typename Body>
void for_each_piece(const std::vector<Piece>& pieces, const Body& body) {
  std::vector<std::int64_t> before(pieces.size() + 1, 0);
  for (std::size_t p = 0; p < pieces.size(); ++p) before[p + 1] = before[p] + 64 + pieces[p].length;
  at::parallel_for(0, before.back(), 2 * kAdamChunk, [&](std::int64_t begin, std::int64_t end) {
    std::size_t p = std::lower_bound(before.begin(), before.end(), begin) - before.begin();
    for (; p < pieces.size() && before[p] < end; ++p) body(pieces[p], p);
  });
}

ParamType float_type(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return ParamType::f32;
    case at::kBFloat16:
      return ParamType::bf16;
    case at::kHalf:
      return ParamType::fp16;
    case at::kDouble:
      return ParamType::f64;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name, " must be float32, bfloat16, float16 or float64, got ", t.scalar_type());
  }
}

void check_plain(const Tensor& t, const char* op, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), op, ": ", name, " must be on the cpu, got ", t.device());
  TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.is_contiguous(), op, ": ", name, " must be contiguous");
}

const std::uint32_t* check_words(const Tensor& words, std::int64_t first, std::int64_t numel, const char* op) {
  check_plain(words, op, "words");
  TORCH_CHECK_TYPE(words.scalar_type() == at::kInt, op, ": words must be int32, got ", words.scalar_type());
  const std::int64_t last = first + (numel + 31) / 32;
  TORCH_CHECK_VALUE(first >= 0 && last <= words.numel(), op, ": a tensor needs words ", first, " to ", last,
                    " of the mask, which has ", words.numel());
  return static_cast<const std::uint32_t*>(words.data_ptr()) + first;
}

char* entry(const Tensor& t, std::int64_t i) { return static_cast<char*>(t.data_ptr()) + i * t.element_size(); }

int element_size(const Tensor& t, const char* op) {
  const std::int64_t size = t.element_size();
  TORCH_CHECK_TYPE(size <= 8, op, ": entries of more than 8 bytes are not supported, got ", t.scalar_type());
  return static_cast<int>(size);
}

void accumulate_cpu(TensorList accumulators, TensorList grads, std::string_view reduce) {
  constexpr const char* kOp = "accumulate_";
  TORCH_CHECK_VALUE(grads.size() == accumulators.size(), kOp, ": grads must have ", accumulators.size(),
                    " entries like accumulators, got ", grads.size());
  TORCH_CHECK_VALUE(reduce == "sum" || reduce == "abs_sum" || reduce == "sq_sum", kOp,
                    ": reduce must be 'sum', 'abs_sum' or 'sq_sum', got '", reduce, "'");
  const Reduce kind = reduce == "sum" ? Reduce::sum : reduce == "abs_sum" ? Reduce::abs_sum : Reduce::sq_sum;
  std::vector<std::int64_t> numels;
  for (std::size_t i = 0; i < grads.size(); ++i) {
    check_plain(accumulators[i], kOp, "accumulators");
    check_plain(grads[i], kOp, "grads");
    float_type(grads[i], kOp, "grads");
    TORCH_CHECK_TYPE(accumulators[i].scalar_type() == at::kFloat, kOp, ": accumulators must be float32, got ",
                     accumulators[i].scalar_type());
    TORCH_CHECK_VALUE(grads[i].numel() == accumulators[i].numel(), kOp, ": grads[", i, "] must have ",
                      accumulators[i].numel(), " entries, got ", grads[i].numel());
    numels.push_back(grads[i].numel());
  }
  for_each_piece(make_pieces(numels), [&](const Piece& piece, std::size_t) {
    const Tensor& grad = grads[piece.tensor];
    float* const accumulator = static_cast<float*>(accumulators[piece.tensor].data_ptr()) + piece.begin;
    accumulate(float_type(grad, kOp, "grads"), kind, accumulator, entry(grad, piece.begin), piece.length);
  });
}

void apply_mask_cpu(TensorList tensors, const Tensor& words, at::IntArrayRef word_offsets) {
  constexpr const char* kOp = "apply_mask_";
  TORCH_CHECK_VALUE(word_offsets.size() >= tensors.size(), kOp, ": word_offsets must have an entry for each of ",
                    tensors.size(), " tensors, got ", word_offsets.size());
  std::vector<std::int64_t> numels;
  std::vector<const std::uint32_t*> masks;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    check_plain(tensors[i], kOp, "tensors");
    element_size(tensors[i], kOp);
    masks.push_back(check_words(words, word_offsets[i], tensors[i].numel(), kOp));
    numels.push_back(tensors[i].numel());
  }
  for_each_piece(make_pieces(numels), [&](const Piece& piece, std::size_t) {
    const Tensor& t = tensors[piece.tensor];
    apply_mask(element_size(t, kOp), entry(t, piece.begin), masks[piece.tensor] + piece.begin / 32, piece.length);
  });
}

// Salient entries before each piece, with their total at the end.
std::vector<std::int64_t> salient_before(const std::uint32_t* words, const std::vector<Piece>& pieces) {
  std::vector<std::int64_t> before(pieces.size() + 1, 0);
  for_each_piece(pieces, [&](const Piece& piece, std::size_t p) {
    count_salient(words + piece.begin / 32, piece.length, &before[p + 1]);
  });
  for (std::size_t p = 0; p < pieces.size(); ++p) before[p + 1] += before[p];
  return before;
}

Tensor pack_cpu(const Tensor& dense, const Tensor& words, std::int64_t count) {
  constexpr const char* kOp = "pack";
  check_plain(dense, kOp, "dense");
  const int size = element_size(dense, kOp);
  const std::uint32_t* mask = check_words(words, 0, dense.numel(), kOp);
  const std::vector<Piece> pieces = make_pieces({dense.numel()});
  const std::vector<std::int64_t> before = salient_before(mask, pieces);
  TORCH_CHECK_VALUE(before.back() == count, kOp, ": count is ", count, ", but the mask has ", before.back(),
                    " entries");
  Tensor packed = at::empty({count}, dense.options());
  for_each_piece(pieces, [&](const Piece& piece, std::size_t p) {
    pack(size, entry(dense, piece.begin), mask + piece.begin / 32, piece.length, entry(packed, before[p]));
  });
  return packed;
}

Tensor unpack_cpu(const Tensor& packed, const Tensor& words, std::int64_t numel) {
  constexpr const char* kOp = "unpack";
  check_plain(packed, kOp, "packed");
  TORCH_CHECK_VALUE(numel >= 0, kOp, ": numel must be at least 0, got ", numel);
  const int size = element_size(packed, kOp);
  const std::uint32_t* mask = check_words(words, 0, numel, kOp);
  const std::vector<Piece> pieces = make_pieces({numel});
  const std::vector<std::int64_t> before = salient_before(mask, pieces);
  TORCH_CHECK_VALUE(before.back() == packed.numel(), kOp, ": packed has ", packed.numel(),
                    " entries, but the mask has ", before.back());
  Tensor dense = at::empty({numel}, packed.options());
  for_each_piece(pieces, [&](const Piece& piece, std::size_t p) {
    unpack(size, entry(packed, before[p]), packed.numel() - before[p], mask + piece.begin / 32, piece.length,
           entry(dense, piece.begin));
  });
  return dense;
}

Tensor count_nonfinite_cpu(const OptionalTensors& grads, const OptionalTensors& masked_grads,
                           const std::optional<Tensor>& words, at::IntArrayRef word_offsets,
                           const std::optional<Tensor>& grad_scale) {
  constexpr const char* kOp = "count_nonfinite";
  const bool joint = !masked_grads.empty();
  TORCH_CHECK_VALUE(!joint || masked_grads.size() == grads.size(), kOp, ": masked_grads must have ", grads.size(),
                    " entries like grads or none, got ", masked_grads.size());
  TORCH_CHECK_VALUE(!words || word_offsets.size() >= grads.size(), kOp,
                    ": word_offsets must have an entry for each of ", grads.size(), " grads, got ",
                    word_offsets.size());
  float scale = 1.0f;
  if (grad_scale) {
    check_plain(*grad_scale, kOp, "grad_scale");
    TORCH_CHECK_TYPE(grad_scale->scalar_type() == at::kFloat, kOp, ": grad_scale must be float32, got ",
                     grad_scale->scalar_type());
    TORCH_CHECK_VALUE(grad_scale->numel() == 1, kOp, ": grad_scale must have one entry, got ", grad_scale->numel());
    scale = *static_cast<const float*>(grad_scale->data_ptr());
  }
  struct Source {
    std::optional<Tensor> grad, masked_grad;
    ParamType type;
    const std::uint32_t* words;
  };
  std::vector<Source> sources(grads.size());
  std::vector<std::int64_t> numels(grads.size(), 0);
  for (std::size_t i = 0; i < grads.size(); ++i) {
    Source& s = sources[i];
    s.grad = grads.get(i);
    if (joint) s.masked_grad = masked_grads.get(i);
    if (!s.grad && !s.masked_grad) continue;
    const Tensor& like = s.grad ? *s.grad : *s.masked_grad;
    check_plain(like, kOp, "grads");
    s.type = float_type(like, kOp, "grads");
    if (s.grad && s.masked_grad) {
      check_plain(*s.masked_grad, kOp, "masked_grads");
      TORCH_CHECK_TYPE(s.masked_grad->scalar_type() == like.scalar_type(), kOp, ": masked_grads[", i, "] must be ",
                       like.scalar_type(), ", got ", s.masked_grad->scalar_type());
      TORCH_CHECK_VALUE(s.masked_grad->numel() == like.numel(), kOp, ": masked_grads[", i, "] must have ", like.numel(),
                        " entries, got ", s.masked_grad->numel());
    }
    numels[i] = like.numel();
    s.words = words ? check_words(*words, word_offsets[i], numels[i], kOp) : nullptr;
  }
  std::atomic<std::int64_t> total{0};
  for_each_piece(make_pieces(numels), [&](const Piece& piece, std::size_t) {
    const Source& s = sources[piece.tensor];
    const double inv_scale = s.type == ParamType::f64 ? 1.0 / scale : static_cast<double>(1.0f / scale);
    total += count_nonfinite(s.type, s.grad ? entry(*s.grad, piece.begin) : nullptr,
                             s.masked_grad ? entry(*s.masked_grad, piece.begin) : nullptr,
                             s.words != nullptr ? s.words + piece.begin / 32 : nullptr,
                             words.has_value() && !joint, inv_scale, piece.length);
  });
  return at::scalar_tensor(total.load(), at::TensorOptions().dtype(at::kLong));
}

TORCH_LIBRARY_IMPL(pecker_fast, CPU, m) {
  m.impl("accumulate_", &accumulate_cpu);
  m.impl("apply_mask_", &apply_mask_cpu);
  m.impl("pack", &pack_cpu);
  m.impl("unpack", &unpack_cpu);
  m.impl("count_nonfinite", &count_nonfinite_cpu);
}

}  // namespace
}  // namespace pecker_fast
