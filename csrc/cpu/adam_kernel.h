// Adam on the chunks of float32, bfloat16 and float16 parameters, for one instruction set. No include guard: see simd.h.
//
// Three ways through a chunk, all with the same arithmetic for an entry:
//   sweep    every entry, full vectors; in a masked step with dense state, frozen lanes are blended back.
//   packed   tiles: the salient gradients are compressed into a buffer in L1, Adam runs on the buffer and on the
//            contiguous packed state, and the updates are expanded onto the parameters.
//   gather   the entries are listed, gathered one by one, updated in vectors, and scattered; for sparse masks, and for
//            the last entries of a tensor, which do not fill a mask word.
namespace pecker_fast {
namespace PF_ISA {

constexpr std::int64_t kTile = 1024;
// Below this share of salient entries gathering is faster than going over all of them.
constexpr double kGatherDensityPacked = 0.04;
constexpr double kGatherDensityDense = 0.04;

struct Constants {
  Vec grad_factor, clip_value, decay, coupled_decay, beta2, one_minus_beta1, one_minus_beta2, eps, max_update;
  Vec ema_weight, step_size, inv_sqrt_bc2;
  bool coupled, zero_nonfinite;
};

// Staging for one tile. `x`, `h`, the moments and the corrections are used only by the steps that need them.
struct Buffers {
  alignas(64) float g[kTile + kLanes];
  alignas(64) float h[kTile + kLanes];
  alignas(64) float x[kTile + kLanes];
  alignas(64) float m[kTile + kLanes];
  alignas(64) float v[kTile + kLanes];
  alignas(64) float vmax[kTile + kLanes];
  alignas(64) float step_size[kTile + kLanes];
  alignas(64) float inv_sqrt_bc2[kTile + kLanes];
  std::uint16_t index[kTile + kLanes];
};

inline Vec condition(const Constants& k, Vec g, Vec x) {
  if (k.zero_nonfinite) g = finite_or_zero(g);
  g = clamp_symmetric(g, k.clip_value);
  return k.coupled ? multiply_add(k.coupled_decay, x, g) : g;
}

// Advances the moments in place and returns the update.
template <bool kHasM, bool kRare>
inline Vec advance(const Constants& k, Vec g, Vec h, Vec* m, Vec* v, Vec* vmax, Vec step_size, Vec inv_sqrt_bc2) {
  if (kHasM) g = *m = multiply_add(k.one_minus_beta1, g - *m, *m);
  Vec second = *v = multiply_add(k.beta2, *v, k.one_minus_beta2 * h * h);
  if (kRare && vmax != nullptr) second = *vmax = blend(is_nan(*vmax), *vmax, maximum(*vmax, second));
  const Vec u = step_size * g / multiply_add(square_root(second), inv_sqrt_bc2, k.eps);
  return clamp_symmetric(u, k.max_update);
}

// kHasM: a first moment is stored. kRare: any of amsgrad, counts, stochastic rounding is used.
template <typename P, bool kHasM, bool kRare>
class AdamRunner {
 public:
  AdamRunner(const AdamStep<float>& step, Buffers& buffers) : step_(step), buffers_(buffers) {
    const AdamScalars<float>& s = step.scalars;
    k_.grad_factor = set(s.grad_factor);
    k_.clip_value = set(s.clip_value);
    k_.decay = set(s.decay);
    k_.coupled_decay = set(s.coupled_decay);
    k_.beta2 = set(s.beta2);
    k_.one_minus_beta1 = set(s.one_minus_beta1);
    k_.one_minus_beta2 = set(s.one_minus_beta2);
    k_.eps = set(s.eps);
    k_.max_update = set(s.max_update);
    k_.ema_weight = set(s.ema_weight);
    k_.coupled = s.coupled_decay != 0.0f;
    k_.zero_nonfinite = s.zero_nonfinite;
  }

  void run(const AdamTensor<float>& tensor, const AdamChunk& chunk) {
    t_ = &tensor;
    param_ = static_cast<P*>(tensor.param);
    grad_ = static_cast<const P*>(tensor.grad);
    forget_ = static_cast<const P*>(tensor.masked_grad);
    k_.step_size = set(tensor.correction.step_size);
    k_.inv_sqrt_bc2 = set(tensor.correction.inv_sqrt_bc2);
    const std::int64_t begin = chunk.begin, end = begin + chunk.length, body = end - chunk.length % 32;
    if (!step_.masked) {
      forget_ != nullptr ? sweep<true, false>(begin, body) : sweep<false, false>(begin, body);
      gather(body, end, body);
      return;
    }
    const double density = static_cast<double>(chunk.salient) / static_cast<double>(chunk.length);
    if (density < (step_.packed ? kGatherDensityPacked : kGatherDensityDense)) {
      if (chunk.salient > 0) gather(begin, end, chunk.state);
      if (tensor.ema != nullptr && step_.ema_frozen) average(begin, end);
      return;
    }
    std::int64_t state = chunk.state;
    if (step_.packed) {
      for (std::int64_t i = begin; i < body; i += kTile) {
        state += packed_tile(i, body - i < kTile ? body : i + kTile, state);
      }
    } else {
      sweep<false, true>(begin, body);
    }
    gather(body, end, state);
    if (tensor.ema != nullptr && step_.ema_frozen) average(body, end);
  }

 private:
  // Entries [begin, end), a multiple of 32. kPredicated: only salient ones are updated; state is dense.
  template <bool kForget, bool kPredicated>
  void sweep(std::int64_t begin, std::int64_t end) {
    if (!kRare || t_->counts == nullptr) return sweep_tile<kForget, kPredicated>(begin, end);
    for (std::int64_t i = begin; i < end; i += kTile) {
      const std::int64_t stop = end - i < kTile ? end : i + kTile;
      for (std::int64_t j = i; j < stop; ++j) {
        if (!kPredicated || is_salient(t_->words, j)) correct(j - i, j);
      }
      sweep_tile<kForget, kPredicated>(i, stop);
    }
  }

  template <bool kForget, bool kPredicated>
  void sweep_tile(std::int64_t begin, std::int64_t end) {
    // Local copies: the stores below could otherwise alias the members.
    const Constants k = k_;
    const AdamTensor<float> t = *t_;
    P* const param = param_;
    const P* const grad = grad_;
    const P* const forget = forget_;
    const bool selected = kPredicated || (kForget && t.words != nullptr);
    const bool retain = kForget && step_.retain_variance;
    for (std::int64_t i = begin; i < end; i += kLanes) {
      const Mask salient = mask_of(selected ? t.words[i >> 5] >> (i & 31) & kLaneMask : 0);
      const typename Io<P>::Raw raw = Io<P>::load(param + i);
      const Vec x = t.master != nullptr ? load(t.master + i) : Io<P>::widen(raw);
      Vec g = grad != nullptr ? load_wide(grad + i) * k.grad_factor : set(0.0f);
      Vec h = g;
      if (kForget) {
        const Vec more = load_wide(forget + i) * k.grad_factor;
        g = g + (selected ? keep(salient, more) : more);
      }
      g = condition(k, g, x);
      h = retain ? condition(k, h, x) : g;
      Vec m = kHasM ? load(t.exp_avg + i) : g;
      Vec v = load(t.exp_avg_sq + i);
      const Vec old_m = m, old_v = v;
      Vec step_size = k.step_size, inv_sqrt_bc2 = k.inv_sqrt_bc2;
      Vec vmax = v, u = v;
      if (kRare) {
        if (t.counts != nullptr) {
          step_size = load(buffers_.step_size + (i - begin));
          inv_sqrt_bc2 = load(buffers_.inv_sqrt_bc2 + (i - begin));
        }
        if (t.max_exp_avg_sq != nullptr) vmax = load(t.max_exp_avg_sq + i);
        const Vec old_vmax = vmax;
        u = advance<kHasM, true>(k, g, h, &m, &v, t.max_exp_avg_sq != nullptr ? &vmax : nullptr, step_size,
                                 inv_sqrt_bc2);
        if (t.max_exp_avg_sq != nullptr) {
          store(t.max_exp_avg_sq + i, kPredicated ? blend(salient, vmax, old_vmax) : vmax);
        }
      } else {
        u = advance<kHasM, false>(k, g, h, &m, &v, nullptr, step_size, inv_sqrt_bc2);
      }
      if (kHasM) store(t.exp_avg + i, kPredicated ? blend(salient, m, old_m) : m);
      store(t.exp_avg_sq + i, kPredicated ? blend(salient, v, old_v) : v);
      finish<kPredicated>(k, t, i, raw, x, x * k.decay - u, salient);
    }
  }

  // Stores the lanes' parameters, masters and averages; where kPredicated, frozen lanes keep theirs.
  template <bool kPredicated>
  void finish(const Constants& k, const AdamTensor<float>& t, std::int64_t i, typename Io<P>::Raw raw, Vec old_x,
              Vec x, Mask salient) {
    P* const param = static_cast<P*>(t.param);
    typename Io<P>::Raw stored = rounded(t, x, i);
    if (kPredicated) stored = Io<P>::blend(salient, stored, raw);
    Io<P>::store(param + i, stored);
    if (t.master != nullptr) {
      if (kPredicated) x = blend(salient, x, old_x);
      store(t.master + i, x);
    }
    if (t.ema != nullptr) {
      const Vec target = t.master != nullptr ? x : Io<P>::widen(stored);
      const Vec ema = load(t.ema + i);
      const Vec moved = ema + k.ema_weight * (target - ema);
      store(t.ema + i, kPredicated && !step_.ema_frozen ? blend(salient, moved, ema) : moved);
    }
  }

  typename Io<P>::Raw rounded(const AdamTensor<float>& t, Vec x, std::int64_t i) {
    if (kRare && sizeof(P) == 2 && step_.stochastic_rounding && t.master == nullptr) {
      float wide[kLanes];
      P lanes[kLanes];
      store(wide, x);
      for (int lane = 0; lane < kLanes; ++lane) {
        narrow_stochastic(wide[lane], random_bits(t.random_state, i + lane), lanes + lane);
      }
      return Io<P>::load(lanes);
    }
    return Io<P>::narrow(x);
  }

  // Salient entries of [begin, end), at most kTile and a multiple of 32, with state packed from `state` on. Returns
  // how many there were.
  std::int64_t packed_tile(std::int64_t begin, std::int64_t end, std::int64_t state) {
    const Constants k = k_;
    const AdamTensor<float> t = *t_;
    P* const param = param_;
    const P* const grad = grad_;
    float* const g = buffers_.g;
    std::int64_t n = 0;
    for (std::int64_t i = begin; i < end; i += 32) {
      std::uint32_t word = t.words[i >> 5];
      if (word == 0) continue;
      for (int j = 0; j < 32; j += kLanes, word >>= kLanes & 31) {
        const std::uint32_t bits = word & kLaneMask;
        store(g + n, compress(bits, load_wide(grad + i + j) * k.grad_factor));
        if (k.coupled) {
          const Vec x = t.master != nullptr ? load(t.master + i + j) : load_wide(param + i + j);
          store(buffers_.x + n, compress(bits, x));
        }
        n += count_bits(bits);
      }
    }
    if (kRare && t.counts != nullptr) {
      for (std::int64_t j = 0; j < n; ++j) correct(j, state + j);
    }
    advance_run(k, n, false, kHasM ? t.exp_avg + state : nullptr, t.exp_avg_sq + state,
                t.max_exp_avg_sq != nullptr ? t.max_exp_avg_sq + state : nullptr);
    const bool all = t.ema != nullptr && step_.ema_frozen;
    const float* u = g;
    for (std::int64_t i = begin; i < end; i += 32) {
      std::uint32_t word = t.words[i >> 5];
      if (word == 0 && !all) continue;
      for (int j = 0; j < 32; j += kLanes, word >>= kLanes & 31) {
        const std::uint32_t bits = word & kLaneMask;
        const typename Io<P>::Raw raw = Io<P>::load(param + i + j);
        const Vec x = t.master != nullptr ? load(t.master + i + j) : Io<P>::widen(raw);
        finish<true>(k, t, i + j, raw, x, x * k.decay - expand(bits, load(u)), mask_of(bits));
        u += count_bits(bits);
      }
    }
    return n;
  }

  // Adam on n staged entries and contiguous moments; the updates replace buffers_.g.
  void advance_run(const Constants& k, std::int64_t n, bool retain, float* exp_avg, float* exp_avg_sq,
                   float* max_exp_avg_sq) {
    std::int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      Vec m = kHasM ? load(exp_avg + j) : set(0.0f), v = load(exp_avg_sq + j), vmax = v;
      if (kRare && max_exp_avg_sq != nullptr) vmax = load(max_exp_avg_sq + j);
      advance_staged(k, j, retain, max_exp_avg_sq != nullptr, &m, &v, &vmax);
      if (kHasM) store(exp_avg + j, m);
      store(exp_avg_sq + j, v);
      if (kRare && max_exp_avg_sq != nullptr) store(max_exp_avg_sq + j, vmax);
    }
    if (j < n) {
      // What follows in packed state belongs to another chunk, perhaps to another thread.
      const std::int64_t rest = n - j;
      Vec m = kHasM ? load_first(exp_avg + j, rest) : set(0.0f), v = load_first(exp_avg_sq + j, rest), vmax = v;
      if (kRare && max_exp_avg_sq != nullptr) vmax = load_first(max_exp_avg_sq + j, rest);
      advance_staged(k, j, retain, max_exp_avg_sq != nullptr, &m, &v, &vmax);
      if (kHasM) store_first(exp_avg + j, m, rest);
      store_first(exp_avg_sq + j, v, rest);
      if (kRare && max_exp_avg_sq != nullptr) store_first(max_exp_avg_sq + j, vmax, rest);
    }
  }

  void advance_staged(const Constants& k, std::int64_t j, bool retain, bool amsgrad, Vec* m, Vec* v, Vec* vmax) {
    const Vec x = k.coupled ? load(buffers_.x + j) : set(0.0f);
    const Vec g = condition(k, load(buffers_.g + j), x);
    const Vec h = retain ? condition(k, load(buffers_.h + j), x) : g;
    Vec step_size = k.step_size, inv_sqrt_bc2 = k.inv_sqrt_bc2;
    if (kRare && t_->counts != nullptr) {
      step_size = load(buffers_.step_size + j);
      inv_sqrt_bc2 = load(buffers_.inv_sqrt_bc2 + j);
    }
    store(buffers_.g + j, advance<kHasM, kRare>(k, g, h, m, v, amsgrad ? vmax : nullptr, step_size, inv_sqrt_bc2));
  }

  // Entries [begin, end), begin a multiple of 32, at most kAdamChunk; in a masked step the salient ones.
  void gather(std::int64_t begin, std::int64_t end, std::int64_t state) {
    for (std::int64_t i = begin; i < end;) {
      const std::int64_t first = i;
      const std::int64_t n = list_entries(&i, end);
      gather_tile(first, n, state);
      state += n;
    }
  }

  // Lists entries from *begin on, relative to it, until the buffer or the range is full; *begin moves to the next one.
  std::int64_t list_entries(std::int64_t* begin, std::int64_t end) {
    std::uint16_t* const index = buffers_.index;
    const std::int64_t first = *begin;
    std::int64_t n = 0, i = first;
    for (; i < end && n <= kTile - 64; i += 64) {
      std::uint64_t word = ~std::uint64_t{0};
      if (step_.masked) {
        word = t_->words[i >> 5];
        if (i + 32 < end) word |= static_cast<std::uint64_t>(t_->words[(i >> 5) + 1]) << 32;
      }
      if (end - i < 64) word &= (std::uint64_t{1} << (end - i)) - 1;
      for (; word != 0; word &= word - 1) index[n++] = static_cast<std::uint16_t>(i - first + lowest_bit(word));
    }
    *begin = i;
    return n;
  }

  void gather_tile(std::int64_t first, std::int64_t n, std::int64_t state) {
    const Constants k = k_;
    const AdamTensor<float> t = *t_;
    const std::uint16_t* const index = buffers_.index;
    const bool packed = step_.packed, amsgrad = kRare && t.max_exp_avg_sq != nullptr;
    const bool retain = step_.retain_variance && forget_ != nullptr;
    const float factor = step_.scalars.grad_factor;
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t i = first + index[j];
      prefetch(param_ + i);
      float g = grad_ != nullptr ? widen(grad_[i]) * factor : 0.0f;
      if (retain) buffers_.h[j] = g;
      if (forget_ != nullptr && (t.words == nullptr || is_salient(t.words, i))) g += widen(forget_[i]) * factor;
      buffers_.g[j] = g;
      if (k.coupled) buffers_.x[j] = t.master != nullptr ? t.master[i] : widen(param_[i]);
      if (!packed) {
        if (kHasM) buffers_.m[j] = t.exp_avg[i];
        buffers_.v[j] = t.exp_avg_sq[i];
        if (amsgrad) buffers_.vmax[j] = t.max_exp_avg_sq[i];
      }
    }
    if (kRare && t.counts != nullptr) {
      for (std::int64_t j = 0; j < n; ++j) correct(j, packed ? state + j : first + index[j]);
    }
    if (packed) {
      advance_run(k, n, retain, kHasM ? t.exp_avg + state : nullptr, t.exp_avg_sq + state,
                  amsgrad ? t.max_exp_avg_sq + state : nullptr);
    } else {
      advance_run(k, n, retain, buffers_.m, buffers_.v, amsgrad ? buffers_.vmax : nullptr);
    }
    const bool stochastic = kRare && step_.stochastic_rounding && t.master == nullptr;
    const bool average = t.ema != nullptr && !(step_.masked && step_.ema_frozen);
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t i = first + index[j];
      float x = (t.master != nullptr ? t.master[i] : widen(param_[i])) * step_.scalars.decay - buffers_.g[j];
      if (stochastic) {
        narrow_stochastic(x, random_bits(t.random_state, i), param_ + i);
      } else {
        narrow(x, param_ + i);
      }
      if (t.master != nullptr) {
        t.master[i] = x;
      } else {
        x = widen(param_[i]);
      }
      if (average) t.ema[i] += step_.scalars.ema_weight * (x - t.ema[i]);
      if (!packed) {
        if (kHasM) t.exp_avg[i] = buffers_.m[j];
        t.exp_avg_sq[i] = buffers_.v[j];
        if (amsgrad) t.max_exp_avg_sq[i] = buffers_.vmax[j];
      }
    }
  }

  // The average of all entries of [begin, end).
  void average(std::int64_t begin, std::int64_t end) {
    const AdamTensor<float> t = *t_;
    const Vec weight = k_.ema_weight;
    std::int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec target = t.master != nullptr ? load(t.master + i) : load_wide(param_ + i);
      const Vec ema = load(t.ema + i);
      store(t.ema + i, ema + weight * (target - ema));
    }
    for (; i < end; ++i) {
      const float target = t.master != nullptr ? t.master[i] : widen(param_[i]);
      t.ema[i] += step_.scalars.ema_weight * (target - t.ema[i]);
    }
  }

  void correct(std::int64_t slot, std::int64_t index) {
    const AdamCorrection<float> c = count_update(step_, t_->counts, index);
    buffers_.step_size[slot] = c.step_size;
    buffers_.inv_sqrt_bc2[slot] = c.inv_sqrt_bc2;
  }

  const AdamStep<float>& step_;
  Buffers& buffers_;
  Constants k_;
  const AdamTensor<float>* t_ = nullptr;
  P* param_ = nullptr;
  const P* grad_ = nullptr;
  const P* forget_ = nullptr;
};

template <typename P, bool kHasM, bool kRare>
void run_chunks(const AdamStep<float>& step, const AdamTensor<float>* tensors, const AdamChunk* chunks,
                std::int64_t count) {
  Buffers buffers;
  AdamRunner<P, kHasM, kRare> runner(step, buffers);
  for (std::int64_t i = 0; i < count; ++i) runner.run(tensors[chunks[i].tensor], chunks[i]);
}

template <typename P>
void run_chunks(const AdamStep<float>& step, const AdamTensor<float>* tensors, const AdamChunk* chunks,
                std::int64_t count) {
  const bool rare = step.has_max_exp_avg_sq || step.has_counts || step.stochastic_rounding;
  if (step.has_exp_avg) {
    rare ? run_chunks<P, true, true>(step, tensors, chunks, count)
         : run_chunks<P, true, false>(step, tensors, chunks, count);
  } else {
    rare ? run_chunks<P, false, true>(step, tensors, chunks, count)
         : run_chunks<P, false, false>(step, tensors, chunks, count);
  }
}

void adam_chunks(ParamType type, const AdamStep<float>& step, const AdamTensor<float>* tensors,
                 const AdamChunk* chunks, std::int64_t count) {
  switch (type) {
    case ParamType::bf16:
      return run_chunks<bf16>(step, tensors, chunks, count);
    case ParamType::fp16:
      return run_chunks<fp16>(step, tensors, chunks, count);
    default:
      return run_chunks<float>(step, tensors, chunks, count);
  }
}

void count_salient(const std::uint32_t* words, std::int64_t numel, std::int64_t* counts) {
  for (std::int64_t begin = 0; begin < numel; begin += kAdamChunk) {
    const std::int64_t length = numel - begin < kAdamChunk ? numel - begin : kAdamChunk;
    const std::uint32_t* const block = words + begin / 32;
    std::int64_t count = 0, word = 0;
    for (; (word + 2) * 32 <= length; word += 2) {
      std::uint64_t pair;
      std::memcpy(&pair, block + word, sizeof(pair));
      count += count_bits(pair);
    }
    for (; word * 32 < length; ++word) {
      const std::int64_t rest = length - word * 32;
      count += count_bits(rest < 32 ? block[word] & ((1u << rest) - 1u) : block[word]);
    }
    *counts++ = count;
  }
}

}  // namespace PF_ISA
}  // namespace pecker_fast
