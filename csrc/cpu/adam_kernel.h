// Adam on the chunks of float32, bfloat16 and float16 parameters, for one instruction set. No include guard: see
// simd.h.
//
// Four ways through a chunk, all with the same arithmetic for an entry:
//   sweep    every entry, full vectors; in a masked step with dense state, frozen lanes are blended back.
//   packed   tiles: the salient gradients are compressed into a buffer in L1 (or packed already), Adam runs on the buffer
//            and on the contiguous packed state, and the updates are spread over the parameters. With packed masters or
//            averages the new values are computed in the buffer too, and spread instead.
//   gather   the entries are listed, gathered one by one, updated in vectors, and scattered; for sparse masks, and for
//            the last entries of a tensor, which do not fill a mask word.
//   scatter  for sparse masks with packed gradients: Adam runs on the contiguous gradients and state, and the updates
//            are applied to the entries listed. Every cache line is fetched, which pays if one entry in 64 is salient.
// Besides memory, the loops are limited by how many iterations fit into the processor's reorder buffer, hence the lean
// variants without the branches and clamps of rare features.
namespace pecker_fast {
namespace PF_ISA {

// Tiles of all tensors lie at the same offsets within pages, hence in the same few sets of L1: small ones fit.
constexpr std::int64_t kTile = 256;
// How far ahead the steps of a tile prefetch.
constexpr std::int64_t kTileAhead = 512;
// Entries that can be staged at a time.
constexpr std::int64_t kListed = 1024;
// Below this share of salient entries gathering is faster than going over all of them.
constexpr double kGatherDensity = 0.035;
// The same for scattering, if gradients are packed and no other packed list determines the new values.
constexpr double kScatterDensity = 0.0625;
static_assert(kGatherDensity <= kScatterDensity && kScatterDensity * kAdamChunk <= kListed,
              "a gathered chunk must fit the buffers");

// Salient entries of a block of scatter_chunk: as many cache lines as can be in flight at a time.
constexpr std::int64_t kBlockEntries = 24;

// How far ahead a sweep prefetches, in entries: the hardware's streams stop at every page.
constexpr std::int64_t kAhead = 640;

// Prefetches the 32 entries at `p`, which may lie past the end of the tensor.
template <typename T>
inline void prefetch_word(const T* p) {
  for (std::size_t line = 0; line < 32 * sizeof(T); line += 64) prefetch(reinterpret_cast<const char*>(p) + line);
}

struct Constants {
  Vec grad_factor, clip_value, decay, coupled_decay, beta2, one_minus_beta1, one_minus_beta2, eps, max_update;
  Vec ema_weight, step_size, inv_sqrt_bc2;
  bool scaled, clipped, decayed, coupled, zero_nonfinite;
};

// Staging for one tile. All but `g` and `index` are used only by the steps that need them.
struct Buffers {
  alignas(64) float g[kListed + kLanes];
  alignas(64) float h[kListed + kLanes];
  alignas(64) float x[kListed + kLanes];
  alignas(64) float m[kListed + kLanes];
  alignas(64) float v[kListed + kLanes];
  alignas(64) float vmax[kListed + kLanes];
  alignas(64) float step_size[kListed + kLanes];
  alignas(64) float inv_sqrt_bc2[kListed + kLanes];
  std::uint16_t index[kListed + 64];
  std::uint16_t next_index[kListed + 64];
};

// The multipliers limit what runs from the caches, hence the branches around no-ops here.
inline Vec scaled(const Constants& k, Vec g) { return k.scaled ? g * k.grad_factor : g; }
inline Vec decayed(const Constants& k, Vec x) { return k.decayed ? x * k.decay : x; }

// kLean: no zero_nonfinite, max_update, retain_variance, amsgrad, counts, stochastic rounding and masters.
template <bool kLean>
inline Vec condition(const Constants& k, Vec g, Vec x) {
  if (!kLean && k.zero_nonfinite) g = finite_or_zero(g);
  if (k.clipped) g = clamp_symmetric(g, k.clip_value);
  return k.coupled ? multiply_add(k.coupled_decay, x, g) : g;
}

// Advances the moments in place and returns the update. vmax may be null.
template <bool kHasM, bool kLean>
inline Vec advance(const Constants& k, Vec g, Vec h, Vec* m, Vec* v, Vec* vmax, Vec step_size, Vec inv_sqrt_bc2) {
  if (kHasM) g = *m = multiply_add(k.one_minus_beta1, g - *m, *m);
  Vec second = *v = multiply_add(k.beta2, *v, k.one_minus_beta2 * h * h);
  if (!kLean && vmax != nullptr) second = *vmax = blend(is_nan(*vmax), *vmax, maximum(*vmax, second));
  const Vec u = step_size * g / multiply_add(square_root(second), inv_sqrt_bc2, k.eps);
  return kLean ? u : clamp_symmetric(u, k.max_update);
}

template <typename P, bool kHasM, bool kLean>
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
    k_.scaled = s.grad_factor != 1.0f;
    k_.clipped = s.clip_value < HUGE_VALF;
    k_.decayed = s.decay != 1.0f;
    k_.coupled = s.coupled_decay != 0.0f;
    k_.zero_nonfinite = s.zero_nonfinite;
    makes_values_ = step.packed_masters || step.packed_emas;
    stages_values_ = k_.coupled || makes_values_;
  }

  void run(const AdamTensor<float>& tensor, const AdamChunk& chunk) {
    t_ = &tensor;
    param_ = static_cast<P*>(tensor.param);
    grad_ = static_cast<const P*>(tensor.grad);
    masked_grad_ = static_cast<const P*>(tensor.masked_grad);
    if (grad_ == nullptr && masked_grad_ == nullptr) return;
    k_.step_size = set(tensor.correction.step_size);
    k_.inv_sqrt_bc2 = set(tensor.correction.inv_sqrt_bc2);
    const std::int64_t begin = chunk.begin, end = begin + chunk.length, body = end - chunk.length % 32;
    if (!step_.masked) {
      masked_grad_ != nullptr ? sweep<true, false>(begin, body) : sweep<false, false>(begin, body);
      if (body < end) gather(body, end, body);
      return;
    }
    const bool few = 64 * chunk.salient < chunk.length;
    const double density = static_cast<double>(chunk.salient) / static_cast<double>(chunk.length);
    if (density < kGatherDensity || (density < kScatterDensity && step_.packed_grads && !stages_values_)) {
      if (!few && step_.packed_grads && !stages_values_) {
        scatter_chunk(chunk);
      } else if (chunk.salient > 0) {
        gather(begin, end, chunk.state, few);
      }
      if (tensor.ema != nullptr && step_.ema_everywhere) average(begin, end);
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
    if (body == end) return;
    gather(body, end, state);
    if (tensor.ema != nullptr && step_.ema_everywhere) average(body, end);
  }

 private:
  using Raw = typename Io<P>::Raw;

  // Entries [begin, end), a multiple of 32. kPredicated: only salient ones are updated; state is dense.
  template <bool kJoint, bool kPredicated>
  void sweep(std::int64_t begin, std::int64_t end) {
    if (kLean || t_->counts == nullptr) return sweep_tile<kJoint, kPredicated>(begin, end);
    for (std::int64_t i = begin; i < end; i += kTile) {
      const std::int64_t stop = end - i < kTile ? end : i + kTile;
      for (std::int64_t j = i; j < stop; ++j) {
        if (!kPredicated || is_salient(t_->words, j)) correct(j - i, j);
      }
      sweep_tile<kJoint, kPredicated>(i, stop);
    }
  }

  template <bool kJoint, bool kPredicated>
  PF_NOINLINE void sweep_tile(std::int64_t begin, std::int64_t end) {
    // Local copies: the stores below could otherwise alias the members.
    const Constants k = k_;
    const AdamTensor<float> t = *t_;
    P* const param = param_;
    const P* const grad = grad_;
    const P* const masked_grad = masked_grad_;
    const std::uint32_t* const words = kJoint || kPredicated ? t.words : nullptr;
    for (std::int64_t i = begin; i < end; i += 32) {
      const std::uint32_t word = words != nullptr ? words[i >> 5] : ~std::uint32_t{0};
      prefetch_word(param + i + kAhead);
      if (grad != nullptr) prefetch_word(grad + i + kAhead);
      if (kJoint) prefetch_word(masked_grad + i + kAhead);
      if (kHasM) prefetch_word(t.exp_avg + i + kAhead);
      prefetch_word(t.exp_avg_sq + i + kAhead);
      if (t.ema != nullptr) prefetch_word(t.ema + i + kAhead);
      PF_UNROLL
      for (int j = 0; j < 32; j += kLanes) {
        const std::int64_t at = i + j;
        const Mask salient = mask_of(word, j);
        const Raw raw = Io<P>::load(param + at);
        const Vec x = !kLean && t.master != nullptr ? load(t.master + at) : Io<P>::widen(raw);
        Vec g = grad != nullptr ? scaled(k, load_wide(grad + at)) : set(0.0f);
        Vec h = g;
        if (kJoint) g = g + keep(salient, scaled(k, load_wide(masked_grad + at)));
        g = condition<kLean>(k, g, x);
        h = !kLean && kJoint && step_.retain_variance ? condition<kLean>(k, h, x) : g;
        const Vec old_m = kHasM ? load(t.exp_avg + at) : g, old_v = load(t.exp_avg_sq + at);
        Vec m = old_m, v = old_v, step_size = k.step_size, inv_sqrt_bc2 = k.inv_sqrt_bc2, u = g;
        if (kLean) {
          u = advance<kHasM, true>(k, g, h, &m, &v, nullptr, step_size, inv_sqrt_bc2);
        } else {
          if (t.counts != nullptr) {
            step_size = load(buffers_.step_size + (at - begin));
            inv_sqrt_bc2 = load(buffers_.inv_sqrt_bc2 + (at - begin));
          }
          const bool amsgrad = t.max_exp_avg_sq != nullptr;
          const Vec old_vmax = amsgrad ? load(t.max_exp_avg_sq + at) : g;
          Vec vmax = old_vmax;
          u = advance<kHasM, false>(k, g, h, &m, &v, amsgrad ? &vmax : nullptr, step_size, inv_sqrt_bc2);
          if (amsgrad) store(t.max_exp_avg_sq + at, kPredicated ? blend(salient, vmax, old_vmax) : vmax);
        }
        if (kHasM) store(t.exp_avg + at, kPredicated ? blend(salient, m, old_m) : m);
        store(t.exp_avg_sq + at, kPredicated ? blend(salient, v, old_v) : v);
        finish<kPredicated>(k, t, at, raw, x, decayed(k, x) - u, salient);
      }
    }
  }

  // Stores the lanes' parameters, masters and averages; where kPredicated, frozen lanes keep theirs.
  template <bool kPredicated>
  void finish(const Constants& k, const AdamTensor<float>& t, std::int64_t i, Raw raw, Vec old_x, Vec x,
              Mask salient) {
    P* const param = static_cast<P*>(t.param);
    Raw stored = rounded(t, x, i);
    if (kPredicated) stored = Io<P>::blend(salient, stored, raw);
    Io<P>::store(param + i, stored);
    const bool has_master = !kLean && t.master != nullptr;
    if (has_master) {
      if (kPredicated) x = blend(salient, x, old_x);
      store(t.master + i, x);
    }
    if (t.ema != nullptr) {
      const Vec target = has_master ? x : Io<P>::widen(stored);
      const Vec ema = load(t.ema + i);
      const Vec moved = ema + k.ema_weight * (target - ema);
      store(t.ema + i, kPredicated && !step_.ema_everywhere ? blend(salient, moved, ema) : moved);
    }
  }

  Raw rounded(const AdamTensor<float>& t, Vec x, std::int64_t i) {
    if (!kLean && sizeof(P) == 2 && step_.stochastic_rounding) {
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
  // their number.
  std::int64_t packed_tile(std::int64_t begin, std::int64_t end, std::int64_t state) {
    const bool takes_values = stages_values_ && !step_.packed_masters;
    std::int64_t n;
    if (step_.packed_grads) {
      n = takes_values ? compress_tile<false>(begin, end, true) : count_tile(begin, end);
      widen_run(grad_ + state, n, buffers_.g);
    } else {
      n = compress_tile<true>(begin, end, takes_values);
    }
    if (stages_values_ && step_.packed_masters) copy_run(t_->master + state, n, buffers_.x);
    if (!kLean && t_->counts != nullptr) {
      for (std::int64_t j = 0; j < n; ++j) correct(j, state + j);
    }
    advance_run(n, k_.scaled, false, t_->exp_avg + state, t_->exp_avg_sq + state,
                t_->max_exp_avg_sq != nullptr ? t_->max_exp_avg_sq + state : nullptr);
    if (makes_values_) {
      if (!kLean && step_.stochastic_rounding) list_entries(begin, end, false, buffers_.index);
      make_values(begin, n, state);
      spread_values(begin, end);
    } else {
      t_->ema != nullptr ? spread_tile<true>(begin, end) : spread_tile<false>(begin, end);
    }
    return n;
  }

  std::int64_t count_tile(std::int64_t begin, std::int64_t end) const {
    std::int64_t n = 0;
    for (std::int64_t i = begin; i < end; i += 32) n += count_bits(t_->words[i >> 5]);
    return n;
  }

  // Memory behind a packed run belongs to another chunk or to nobody, so the last entries are read one by one.
  static void widen_run(const P* packed, std::int64_t n, float* staged) {
    std::int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(staged + j, load_wide(packed + j));
    for (; j < n; ++j) staged[j] = widen(packed[j]);
  }

  static void copy_run(const float* packed, std::int64_t n, float* staged) {
    std::memcpy(staged, packed, static_cast<std::size_t>(n) * sizeof(float));
  }

  // The salient gradients (kGrads), and parameters or masters (`takes_values`), into the buffers.
  template <bool kGrads>
  PF_NOINLINE std::int64_t compress_tile(std::int64_t begin, std::int64_t end, bool takes_values) {
    const P* const param = param_;
    const P* const grad = grad_;
    const float* const master = kLean ? nullptr : t_->master;
    const std::uint32_t* const words = t_->words;
    float* const g = buffers_.g;
    float* const x = buffers_.x;
    std::int64_t n = 0;
    for (std::int64_t i = begin; i < end; i += 32) {
      const std::uint32_t word = words[i >> 5];
      // Prefetches the reads of this step in a later tile. The other steps do the same, so that memory is busy in all.
      if (kGrads) prefetch_word(grad + i + kTileAhead);
      if (word == 0) continue;
      PF_UNROLL
      for (int j = 0; j < 32; j += kLanes) {
        const std::uint32_t bits = word >> j & kLaneMask;
        if (kGrads) store(g + n, compress(bits, load_wide(grad + i + j)));
        if (takes_values) {
          store(x + n, compress(bits, master != nullptr ? load(master + i + j) : load_wide(param + i + j)));
        }
        n += count_bits(bits);
      }
    }
    return n;
  }

  // Applies the updates in buffers_.g to the salient parameters.
  template <bool kEma>
  PF_NOINLINE void spread_tile(std::int64_t begin, std::int64_t end) {
    const Constants k = k_;
    AdamTensor<float> t = *t_;
    if (!kEma) t.ema = nullptr;
    P* const param = param_;
    const bool all = t.ema != nullptr && step_.ema_everywhere;
    const float* u = buffers_.g;
    for (std::int64_t i = begin; i < end; i += 32) {
      const std::uint32_t word = t.words[i >> 5];
      prefetch_word(param + i + kTileAhead);
      if (word == 0 && !all) continue;
      PF_UNROLL
      for (int j = 0; j < 32; j += kLanes) {
        const std::uint32_t bits = word >> j & kLaneMask;
        const Raw raw = Io<P>::load(param + i + j);
        const Vec x = !kLean && t.master != nullptr ? load(t.master + i + j) : Io<P>::widen(raw);
        const Spread update = spread(bits, load(u));
        finish<true>(k, t, i + j, raw, x, x * k.decay - update.value, update.filled);
        u += count_bits(bits);
      }
    }
  }

  // Replaces the updates of n staged entries in buffers_.g by the new values, and advances packed masters and averages.
  // Stochastic rounding needs the entries listed, relative to `begin`.
  PF_NOINLINE void make_values(std::int64_t begin, std::int64_t n, std::int64_t state) {
    const Constants k = k_;
    Buffers& b = buffers_;
    float* const master = step_.packed_masters ? t_->master + state : nullptr;
    float* const ema = step_.packed_emas ? t_->ema + state : nullptr;
    const bool stochastic = !kLean && sizeof(P) == 2 && step_.stochastic_rounding;
    for (std::int64_t j = 0; j < n; j += kLanes) {
      const std::int64_t rest = n - j < kLanes ? n - j : kLanes;
      Vec x = decayed(k, load(b.x + j)) - load(b.g + j);
      if (master != nullptr) {
        store_first(master + j, x, rest);
      } else if (stochastic) {
        store(b.g + j, x);
        for (std::int64_t lane = j; lane < j + rest; ++lane) {
          P rounded;
          narrow_stochastic(b.g[lane], random_bits(t_->random_state, begin + b.index[lane]), &rounded);
          b.g[lane] = widen(rounded);
        }
        x = load(b.g + j);
      } else {
        x = Io<P>::widen(Io<P>::narrow(x));
      }
      store(b.g + j, x);
      if (ema != nullptr) {
        const Vec average = load_first(ema + j, rest);
        store_first(ema + j, average + k.ema_weight * (x - average), rest);
      }
    }
  }

  // Puts the values in buffers_.g into the salient parameters.
  PF_NOINLINE void spread_values(std::int64_t begin, std::int64_t end) {
    P* const param = param_;
    const std::uint32_t* const words = t_->words;
    const float* value = buffers_.g;
    for (std::int64_t i = begin; i < end; i += 32) {
      const std::uint32_t word = words[i >> 5];
      prefetch_word(param + i + kTileAhead);
      if (word == 0) continue;
      PF_UNROLL
      for (int j = 0; j < 32; j += kLanes) {
        const std::uint32_t bits = word >> j & kLaneMask;
        const Spread values = spread(bits, load(value));
        const Raw raw = Io<P>::load(param + i + j);
        Io<P>::store(param + i + j, Io<P>::blend(values.filled, Io<P>::narrow(values.value), raw));
        value += count_bits(bits);
      }
    }
  }

  // Adam on n staged entries and contiguous moments; the updates replace buffers_.g. `unscaled`: the
  // gradients still have to be multiplied by the gradient factor.
  PF_NOINLINE void advance_run(std::int64_t n, bool unscaled, bool retain, float* exp_avg, float* exp_avg_sq,
                               float* max_exp_avg_sq) {
    Constants k = k_;
    k.scaled = unscaled;
    const bool corrected = !kLean && t_->counts != nullptr, amsgrad = !kLean && max_exp_avg_sq != nullptr;
    Buffers& b = buffers_;
    const auto step = [&](std::int64_t j, Vec* m, Vec* v, Vec* vmax) {
      const Vec x = k.coupled ? load(b.x + j) : set(0.0f);
      const Vec g = condition<kLean>(k, scaled(k, load(b.g + j)), x);
      const Vec h = !kLean && retain ? condition<kLean>(k, scaled(k, load(b.h + j)), x) : g;
      const Vec step_size = corrected ? load(b.step_size + j) : k.step_size;
      const Vec inv_sqrt_bc2 = corrected ? load(b.inv_sqrt_bc2 + j) : k.inv_sqrt_bc2;
      store(b.g + j, advance<kHasM, kLean>(k, g, h, m, v, amsgrad ? vmax : nullptr, step_size, inv_sqrt_bc2));
    };
    std::int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      prefetch(exp_avg_sq + j + kAhead);
      if (kHasM) prefetch(exp_avg + j + kAhead);
      Vec m = kHasM ? load(exp_avg + j) : set(0.0f), v = load(exp_avg_sq + j);
      Vec vmax = amsgrad ? load(max_exp_avg_sq + j) : v;
      step(j, &m, &v, &vmax);
      if (kHasM) store(exp_avg + j, m);
      store(exp_avg_sq + j, v);
      if (amsgrad) store(max_exp_avg_sq + j, vmax);
    }
    if (j < n) {
      // Packed state behind the run belongs to another chunk, perhaps to another thread.
      const std::int64_t rest = n - j;
      Vec m = kHasM ? load_first(exp_avg + j, rest) : set(0.0f), v = load_first(exp_avg_sq + j, rest);
      Vec vmax = amsgrad ? load_first(max_exp_avg_sq + j, rest) : v;
      step(j, &m, &v, &vmax);
      if (kHasM) store_first(exp_avg + j, m, rest);
      store_first(exp_avg_sq + j, v, rest);
      if (amsgrad) store_first(max_exp_avg_sq + j, vmax, rest);
    }
  }

  // Entries of [begin, end), begin a multiple of 32; in a masked step the salient ones, at most kListed; `few`: at most
  // one in 64.
  void gather(std::int64_t begin, std::int64_t end, std::int64_t state, bool few = false) {
    const std::int64_t n = list_entries(begin, end, few, buffers_.index);
    const std::uint16_t* const index = buffers_.index;
    gather_entries(begin, n, state);
    if (!kLean && t_->counts != nullptr) {
      for (std::int64_t j = 0; j < n; ++j) correct(j, step_.packed ? state + j : begin + index[j]);
    }
    const bool retain = step_.retain_variance && masked_grad_ != nullptr;
    if (step_.packed) {
      advance_run(n, false, retain, t_->exp_avg + state, t_->exp_avg_sq + state,
                  t_->max_exp_avg_sq != nullptr ? t_->max_exp_avg_sq + state : nullptr);
    } else {
      const bool amsgrad = !kLean && t_->max_exp_avg_sq != nullptr;
      copy_from(t_->exp_avg_sq + begin, n, buffers_.v);
      if (kHasM) copy_from(t_->exp_avg + begin, n, buffers_.m);
      if (amsgrad) copy_from(t_->max_exp_avg_sq + begin, n, buffers_.vmax);
      advance_run(n, false, retain, buffers_.m, buffers_.v, amsgrad ? buffers_.vmax : nullptr);
      copy_to(buffers_.v, n, t_->exp_avg_sq + begin);
      if (kHasM) copy_to(buffers_.m, n, t_->exp_avg + begin);
      if (amsgrad) copy_to(buffers_.vmax, n, t_->max_exp_avg_sq + begin);
    }
    if (makes_values_) {
      make_values(begin, n, state);
      P* const param = param_ + begin;
      for (std::int64_t j = 0; j < n; ++j) narrow(buffers_.g[j], param + index[j]);
    } else {
      scatter_updates(begin, n, index, buffers_.g, true);
    }
  }

  // A chunk with packed gradients and few salient entries. Only parameters are not contiguous: while the updates of a
  // block are applied, the parameters of the next one are being fetched.
  void scatter_chunk(const AdamChunk& chunk) {
    const std::int64_t n = chunk.salient, state = chunk.state, end = chunk.begin + chunk.length;
    widen_run(grad_ + state, n, buffers_.g);
    if (!kLean && t_->counts != nullptr) {
      for (std::int64_t j = 0; j < n; ++j) correct(j, state + j);
    }
    advance_run(n, k_.scaled, false, t_->exp_avg + state, t_->exp_avg_sq + state,
                t_->max_exp_avg_sq != nullptr ? t_->max_exp_avg_sq + state : nullptr);
    const std::int64_t length = (chunk.length / n * kBlockEntries + 63) / 64 * 64;
    std::uint16_t *listed = buffers_.index, *next = buffers_.next_index;
    std::int64_t begin = chunk.begin, stop = end - begin < length ? end : begin + length;
    std::int64_t count = list_block(begin, stop, listed);
    const float* u = buffers_.g;
    while (begin < end) {
      const std::int64_t after = end - stop < length ? end : stop + length;
      const std::int64_t count_after = stop < end ? list_block(stop, after, next) : 0;
      scatter_updates(begin, count, listed, u, false);
      u += count;
      count = count_after;
      begin = stop;
      stop = after;
      std::uint16_t* const other = listed;
      listed = next;
      next = other;
    }
  }

  // Fills `listed` with the entries to update, relative to `begin`; returns their number.
  PF_NOINLINE std::int64_t list_entries(std::int64_t begin, std::int64_t end, bool few, std::uint16_t* listed) {
    if (!step_.masked) {
      for (std::int64_t i = begin; i < end; ++i) listed[i - begin] = static_cast<std::uint16_t>(i - begin);
      return end - begin;
    }
    return few ? list_bits<2, false>(begin, end, listed) : list_bits<4, false>(begin, end, listed);
  }

  // The same of a block of scatter_chunk, whose parameters are needed soon.
  PF_NOINLINE std::int64_t list_block(std::int64_t begin, std::int64_t end, std::uint16_t* listed) {
    return list_bits<6, true>(begin, end, listed);
  }

  // kSlots: bits per 64 entries that are listed without a branch; most words should have no more. kPrefetch: prefetch
  // all parameters, because lines fetched in order arrive faster than those of single entries.
  template <int kSlots, bool kPrefetch>
  std::int64_t list_bits(std::int64_t begin, std::int64_t end, std::uint16_t* listed) {
    const std::uint32_t* const words = t_->words;
    std::int64_t n = 0, i = begin;
    const auto add = [&](std::uint64_t pair) {
      std::uint16_t* out = listed + n;
      n += count_bits(pair);
      do {
        PF_UNROLL
        for (int slot = 0; slot < kSlots; ++slot) {
          *out++ = static_cast<std::uint16_t>(i - begin + lowest_bit(pair));
          pair &= pair - 1;
        }
      } while (pair != 0);
    };
    for (; end - i >= 64; i += 64) {
      if (kPrefetch) {
        prefetch_word(param_ + i);
        prefetch_word(param_ + i + 32);
      }
      add(words[i >> 5] | static_cast<std::uint64_t>(words[(i >> 5) + 1]) << 32);
    }
    if (i < end) {
      std::uint64_t pair = words[i >> 5];
      if (end - i > 32) pair |= static_cast<std::uint64_t>(words[(i >> 5) + 1]) << 32;
      add(pair & ((std::uint64_t{1} << (end - i)) - 1));
    }
    return n;
  }

  // Listed gradients and parameters (or masters) into the buffers. Almost every entry has a cache line of
  // its own: loading both here was faster than prefetching parameters for scatter_updates to load.
  PF_NOINLINE void gather_entries(std::int64_t begin, std::int64_t n, std::int64_t state) {
    const std::uint16_t* const index = buffers_.index;
    const P* const param = param_ + begin;
    const P* const grad = grad_ != nullptr ? grad_ + begin : nullptr;
    const float* const master = !kLean && t_->master != nullptr ? t_->master + begin : nullptr;
    const float factor = step_.scalars.grad_factor;
    float* const g = buffers_.g;
    float* const x = buffers_.x;
    if (step_.packed_grads || step_.packed_masters) {
      if (step_.packed_grads) {
        for (std::int64_t j = 0; j < n; ++j) g[j] = widen(grad_[state + j]) * factor;
      } else {
        for (std::int64_t j = 0; j < n; ++j) g[j] = widen(grad[index[j]]) * factor;
      }
      if (step_.packed_masters) {
        copy_run(t_->master + state, n, x);
      } else if (master != nullptr) {
        for (std::int64_t j = 0; j < n; ++j) x[j] = master[index[j]];
      } else {
        for (std::int64_t j = 0; j < n; ++j) x[j] = widen(param[index[j]]);
      }
    } else if (grad != nullptr && master == nullptr) {
      for (std::int64_t j = 0; j < n; ++j) {
        x[j] = widen(param[index[j]]);
        g[j] = widen(grad[index[j]]) * factor;
      }
    } else {
      for (std::int64_t j = 0; j < n; ++j) {
        x[j] = master != nullptr ? master[index[j]] : widen(param[index[j]]);
        g[j] = grad != nullptr ? widen(grad[index[j]]) * factor : 0.0f;
      }
    }
    if (masked_grad_ == nullptr) return;
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t i = begin + index[j];
      buffers_.h[j] = g[j];
      if (t_->words == nullptr || is_salient(t_->words, i)) g[j] += widen(masked_grad_[i]) * factor;
    }
  }

  // Applies the updates `u` to n entries, listed relative to `begin`. `staged`: their values are in buffers_.x.
  PF_NOINLINE void scatter_updates(std::int64_t begin, std::int64_t n, const std::uint16_t* index, const float* u,
                                   bool staged) {
    const float* const x = buffers_.x;
    P* const param = param_ + begin;
    const float decay = step_.scalars.decay;
    float* const master = !kLean && t_->master != nullptr ? t_->master + begin : nullptr;
    const bool stochastic = !kLean && step_.stochastic_rounding;
    if (master == nullptr && !stochastic) {
      if (staged) {
        for (std::int64_t j = 0; j < n; ++j) narrow(x[j] * decay - u[j], param + index[j]);
      } else {
        for (std::int64_t j = 0; j < n; ++j) narrow(widen(param[index[j]]) * decay - u[j], param + index[j]);
      }
    } else {
      for (std::int64_t j = 0; j < n; ++j) {
        const std::int64_t i = index[j];
        const float old = staged ? x[j] : master != nullptr ? master[i] : widen(param[i]);
        const float moved = old * decay - u[j];
        if (master != nullptr) master[i] = moved;
        if (stochastic) {
          narrow_stochastic(moved, random_bits(t_->random_state, begin + i), param + i);
        } else {
          narrow(moved, param + i);
        }
      }
    }
    if (t_->ema == nullptr || (step_.masked && step_.ema_everywhere)) return;
    float* const ema = t_->ema + begin;
    const float weight = step_.scalars.ema_weight;
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t i = index[j];
      ema[i] += weight * ((master != nullptr ? master[i] : widen(param[i])) - ema[i]);
    }
  }

  void copy_from(const float* dense, std::int64_t n, float* staged) {
    for (std::int64_t j = 0; j < n; ++j) staged[j] = dense[buffers_.index[j]];
  }

  void copy_to(const float* staged, std::int64_t n, float* dense) {
    for (std::int64_t j = 0; j < n; ++j) dense[buffers_.index[j]] = staged[j];
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
  bool makes_values_, stages_values_;
  Buffers& buffers_;
  Constants k_;
  const AdamTensor<float>* t_ = nullptr;
  P* param_ = nullptr;
  const P* grad_ = nullptr;
  const P* masked_grad_ = nullptr;
};

template <typename P, bool kHasM, bool kLean>
void run_chunks(const AdamStep<float>& step, const AdamTensor<float>* tensors, const AdamChunk* chunks,
                std::int64_t count) {
  Buffers buffers;
  AdamRunner<P, kHasM, kLean> runner(step, buffers);
  for (std::int64_t i = 0; i < count; ++i) runner.run(tensors[chunks[i].tensor], chunks[i]);
}

template <typename P>
void run_chunks(const AdamStep<float>& step, const AdamTensor<float>* tensors, const AdamChunk* chunks,
                std::int64_t count) {
  const bool lean = !step.scalars.zero_nonfinite && !(step.scalars.max_update < HUGE_VALF) && !step.retain_variance &&
                    !step.has_max_exp_avg_sq && !step.has_counts && !step.stochastic_rounding && !step.has_master;
  if (step.has_exp_avg) {
    lean ? run_chunks<P, true, true>(step, tensors, chunks, count)
         : run_chunks<P, true, false>(step, tensors, chunks, count);
  } else {
    lean ? run_chunks<P, false, true>(step, tensors, chunks, count)
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
