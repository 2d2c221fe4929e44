// The loops of pointwise.h for one instruction set. No include guard: see simd.h.
namespace pecker_fast {
namespace PF_ISA {

// The mask word of the 32 entries from `i` on, without the bits past `numel`.
inline std::uint32_t valid_word(const std::uint32_t* words, std::int64_t i, std::int64_t numel) {
  const std::uint32_t word = words[i >> 5];
  return numel - i < 32 ? word & ((1u << (numel - i)) - 1u) : word;
}

inline float reduced(Reduce reduce, float x) {
  return reduce == Reduce::sq_sum ? x * x : reduce == Reduce::abs_sum && !(x >= 0.0f) ? 0.0f - x : x;
}

template <typename P>
void accumulate_entries(Reduce reduce, float* accumulator, const P* grad, std::int64_t numel) {
  std::int64_t i = 0;
  const auto each = [&](auto value) {
    for (; i + kLanes <= numel; i += kLanes) {
      store(accumulator + i, load(accumulator + i) + value(load_wide(grad + i)));
    }
  };
  if (reduce == Reduce::sum) each([](Vec x) { return x; });
  if (reduce == Reduce::abs_sum) each([](Vec x) { return absolute(x); });
  if (reduce == Reduce::sq_sum) each([](Vec x) { return x * x; });
  for (; i < numel; ++i) accumulator[i] += reduced(reduce, widen(grad[i]));
}

void accumulate(ParamType type, Reduce reduce, float* accumulator, const void* grad, std::int64_t numel) {
  switch (type) {
    case ParamType::f32:
      return accumulate_entries(reduce, accumulator, static_cast<const float*>(grad), numel);
    case ParamType::bf16:
      return accumulate_entries(reduce, accumulator, static_cast<const bf16*>(grad), numel);
    case ParamType::fp16:
      return accumulate_entries(reduce, accumulator, static_cast<const fp16*>(grad), numel);
    default:
      for (std::int64_t i = 0; i < numel; ++i) {
        accumulator[i] += reduced(reduce, static_cast<float>(static_cast<const double*>(grad)[i]));
      }
  }
}

template <typename U>
void apply_mask_entries(U* x, const std::uint32_t* words, std::int64_t numel) {
  for (std::int64_t i = 0; i < numel; i += 32) {
    const std::uint32_t word = valid_word(words, i, numel);
    const std::int64_t count = numel - i < 32 ? numel - i : 32;
    if (word == 0xffffffffu) continue;
    if (word == 0) {
      std::memset(x + i, 0, static_cast<std::size_t>(count) * sizeof(U));
    } else if (sizeof(U) == 4 && count == 32) {
      float* const lanes = reinterpret_cast<float*>(x + i);
      for (int j = 0; j < 32; j += kLanes) store(lanes + j, keep(mask_of(word, j), load(lanes + j)));
    } else if (sizeof(U) == 2 && count == 32) {
      for (int j = 0; j < 32; j += kLanes) {
        store16(x + i + j, blend16(mask_of(word, j), load16(x + i + j), Raw16{}));
      }
    } else {
      for (std::int64_t j = 0; j < count; ++j) x[i + j] = word >> j & 1u ? x[i + j] : U{0};
    }
  }
}

template <typename U>
std::int64_t pack_entries(const U* dense, const std::uint32_t* words, std::int64_t numel, U* packed) {
  std::int64_t n = 0;
  for (std::int64_t i = 0; i < numel; i += 32) {
    std::uint32_t word = valid_word(words, i, numel);
    if (word == 0) continue;
    if (sizeof(U) == 4 && count_bits(word) > 4 && numel - i >= 32) {
      // Full-width stores would reach into the next piece's entries, which another thread may be writing.
      float staged[32 + kLanes];
      int count = 0;
      for (int j = 0; j < 32; j += kLanes) {
        const std::uint32_t bits = word >> j & kLaneMask;
        store(staged + count, compress(bits, load(reinterpret_cast<const float*>(dense + i + j))));
        count += count_bits(bits);
      }
      std::memcpy(packed + n, staged, static_cast<std::size_t>(count) * sizeof(U));
      n += count;
    } else {
      for (; word != 0; word &= word - 1) packed[n++] = dense[i + lowest_bit(word)];
    }
  }
  return n;
}

template <typename U>
void unpack_entries(const U* packed, std::int64_t count, const std::uint32_t* words, std::int64_t numel, U* dense) {
  std::int64_t n = 0;
  for (std::int64_t i = 0; i < numel; i += 32) {
    std::uint32_t word = valid_word(words, i, numel);
    const std::int64_t length = numel - i < 32 ? numel - i : 32;
    if (sizeof(U) == 4 && length == 32 && n + 32 + kLanes <= count) {
      for (int j = 0; j < 32; j += kLanes) {
        const std::uint32_t bits = word >> j & kLaneMask;
        const Vec lanes = load(reinterpret_cast<const float*>(packed + n));
        store(reinterpret_cast<float*>(dense + i + j), keep(mask_of(bits, 0), spread(bits, lanes).value));
        n += count_bits(bits);
      }
    } else {
      std::memset(dense + i, 0, static_cast<std::size_t>(length) * sizeof(U));
      for (; word != 0; word &= word - 1) dense[i + lowest_bit(word)] = packed[n++];
    }
  }
}

// Calls `body` with a null pointer of a type of that size; float where vectors are used, so that nothing is aliased.
template <typename Body>
auto with_element(int element_size, Body body) {
  switch (element_size) {
    case 1:
      return body(static_cast<std::uint8_t*>(nullptr));
    case 2:
      return body(static_cast<std::uint16_t*>(nullptr));
    case 4:
      return body(static_cast<float*>(nullptr));
    default:
      return body(static_cast<std::uint64_t*>(nullptr));
  }
}

void apply_mask(int element_size, void* x, const std::uint32_t* words, std::int64_t numel) {
  with_element(element_size, [&](auto* type) { apply_mask_entries(static_cast<decltype(type)>(x), words, numel); });
}

std::int64_t pack(int element_size, const void* dense, const std::uint32_t* words, std::int64_t numel, void* packed) {
  return with_element(element_size, [&](auto* type) {
    using U = decltype(type);
    return pack_entries(static_cast<U>(const_cast<void*>(dense)), words, numel, static_cast<U>(packed));
  });
}

void unpack(int element_size, const void* packed, std::int64_t count, const std::uint32_t* words, std::int64_t numel,
            void* dense) {
  with_element(element_size, [&](auto* type) {
    using U = decltype(type);
    unpack_entries(static_cast<U>(const_cast<void*>(packed)), count, words, numel, static_cast<U>(dense));
  });
}

template <typename P, typename T>
std::int64_t count_entries(const P* grad, const P* masked_grad, const std::uint32_t* words, bool salient_only,
                           T inv_scale, std::int64_t begin, std::int64_t end) {
  std::int64_t count = 0;
  for (std::int64_t i = begin; i < end; ++i) {
    const bool salient = words == nullptr || words[i >> 5] >> (i & 31) & 1u;
    if (salient_only && !salient) continue;
    T g = grad != nullptr ? widen(grad[i]) * inv_scale : T(0);
    if (masked_grad != nullptr && salient) g += widen(masked_grad[i]) * inv_scale;
    count += !is_finite(g);
  }
  return count;
}

template <typename P>
std::int64_t count_vectors(const P* grad, const P* masked_grad, const std::uint32_t* words, bool salient_only,
                           float inv_scale, std::int64_t numel) {
  const Vec scale = set(inv_scale), infinity = set(HUGE_VALF);
  const std::int64_t body = numel - numel % 32;
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < body; i += kLanes) {
    const std::uint32_t bits = words != nullptr ? words[i >> 5] >> (i & 31) & kLaneMask : kLaneMask;
    Vec g = grad != nullptr ? load_wide(grad + i) * scale : set(0.0f);
    if (masked_grad != nullptr) g = g + keep(mask_of(bits, 0), load_wide(masked_grad + i) * scale);
    const std::uint32_t bad = kLaneMask & ~bits_of(less(absolute(g), infinity));
    count += count_bits(salient_only ? bad & bits : bad);
  }
  return count + count_entries<P, float>(grad, masked_grad, words, salient_only, inv_scale, body, numel);
}

std::int64_t count_nonfinite(ParamType type, const void* grad, const void* masked_grad, const std::uint32_t* words,
                             bool salient_only, double inv_scale, std::int64_t numel) {
  const float scale = static_cast<float>(inv_scale);
  const auto count = [&](const auto* g, const auto* f) {
    return count_vectors(g, f, words, salient_only, scale, numel);
  };
  switch (type) {
    case ParamType::f32:
      return count(static_cast<const float*>(grad), static_cast<const float*>(masked_grad));
    case ParamType::bf16:
      return count(static_cast<const bf16*>(grad), static_cast<const bf16*>(masked_grad));
    case ParamType::fp16:
      return count(static_cast<const fp16*>(grad), static_cast<const fp16*>(masked_grad));
    default:
      return count_entries(static_cast<const double*>(grad), static_cast<const double*>(masked_grad), words,
                           salient_only, inv_scale, 0, numel);
  }
}

}  // namespace PF_ISA
}  // namespace pecker_fast
