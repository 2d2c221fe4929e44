// The Adam step over chunks of tensors; masked_adam_ in pecker_fast/ops/reference.py is the definition.
#pragma once

#include <cstdint>

#include "common/adam_math.h"
#include "common/bit_words.h"
#include "cpu/isa.h"
#include "cpu/param_type.h"

namespace pecker_fast {

// Entries of one chunk of work, and between two recorded offsets into packed state.
constexpr std::int64_t kAdamChunk = kPackBlock;

// One tensor of the step; T is the compute type. A pointer is null if the step has no such part.
template <typename T>
struct AdamTensor {
  void* param;
  const void* grad;
  const void* masked_grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;
  T* master;
  T* ema;
  void* counts;
  const std::uint32_t* words;
  std::int64_t numel;
  AdamCorrection<T> correction;
  std::uint32_t random_state;
};

template <typename T>
struct AdamStep {
  AdamScalars<T> scalars;
  T lr;
  const T* bias_table;  // rows of (1 / bc1, 1 / sqrt(bc2)); null without counts
  std::int64_t last_bias_row;
  // Which lists are present; the pointers of an empty tensor are null in any step.
  bool has_exp_avg, has_max_exp_avg_sq, has_counts, has_master;
  bool counts_are_16_bit;
  bool masked;  // only salient entries are updated
  bool packed;  // moments and counts hold the salient entries only
  bool packed_grads, packed_masters, packed_emas;  // these are packed too
  bool retain_variance;
  bool ema_everywhere;
  bool stochastic_rounding;
};

struct AdamChunk {
  std::int64_t tensor;
  std::int64_t begin;    // first entry, a multiple of kAdamChunk
  std::int64_t length;   // at most kAdamChunk
  std::int64_t salient;  // entries to update
  std::int64_t state;    // of the first updated entry: its index into packed lists; `begin` if state is dense
};

// Set bits among the first `numel` of `words`: one count for each kAdamChunk entries.
void count_salient(const std::uint32_t* words, std::int64_t numel, std::int64_t* counts);

// Runs `count` chunks. Params are of type `type`, not f64.
void adam_chunks(ParamType type, const AdamStep<float>& step, const AdamTensor<float>* tensors,
                 const AdamChunk* chunks, std::int64_t count);

// The same for f64.
void adam_chunks(const AdamStep<double>& step, const AdamTensor<double>* tensors, const AdamChunk* chunks,
                 std::int64_t count);

namespace scalar {
void adam_chunks(ParamType type, const AdamStep<float>& step, const AdamTensor<float>* tensors,
                 const AdamChunk* chunks, std::int64_t count);
void count_salient(const std::uint32_t* words, std::int64_t numel, std::int64_t* counts);
}  // namespace scalar
#if PF_X86
namespace avx2 {
void adam_chunks(ParamType type, const AdamStep<float>& step, const AdamTensor<float>* tensors,
                 const AdamChunk* chunks, std::int64_t count);
void count_salient(const std::uint32_t* words, std::int64_t numel, std::int64_t* counts);
}  // namespace avx2
namespace avx512 {
void adam_chunks(ParamType type, const AdamStep<float>& step, const AdamTensor<float>* tensors,
                 const AdamChunk* chunks, std::int64_t count);
void count_salient(const std::uint32_t* words, std::int64_t numel, std::int64_t* counts);
}  // namespace avx512
#endif

// The next count of an entry, which is stored, and the corrections that go with it.
template <typename T>
inline AdamCorrection<T> count_update(const AdamStep<T>& step, void* counts, std::int64_t index) {
  std::int64_t count;
  if (step.counts_are_16_bit) {
    std::int16_t* slot = static_cast<std::int16_t*>(counts) + index;
    count = *slot = static_cast<std::int16_t>(*slot + (*slot != 0x7fff));
  } else {
    std::int32_t* slot = static_cast<std::int32_t*>(counts) + index;
    count = *slot = *slot + (*slot != 0x7fffffff);
  }
  const T* row = step.bias_table + 2 * (count < step.last_bias_row ? count : step.last_bias_row);
  return {step.lr * row[0], row[1]};
}

inline bool is_salient(const std::uint32_t* words, std::int64_t entry) {
  return words[entry >> 5] >> (entry & 31) & 1u;
}

}  // namespace pecker_fast
