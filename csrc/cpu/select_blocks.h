// The keys of kScanBlock entries in registers, for one instruction set: PF_SIMD_LEVEL 0 (portable C++), 1 (AVX2) or 2
// (AVX-512), in namespace PF_ISA. No include guard: see simd.h.
//
// Both vector levels work on 256 bits: comparisons of 512 bits go through mask registers, which costs more than it
// saves here. AVX-512 has the larger number of registers, though.
//
// Keys32    keys of float entries.
// Keys16    magnitudes of 16-bit entries, or float keys as int16 on the grid of a quantization.
// Row32, Row16, Row8    a row's pivot and its span from low to high, which keys are compared with. An empty span
//           contains no key. Row8 takes Keys16 as offsets from the pivot, limited to int8.
// Open      the keys of a block that have been in the span of any row.
// Lanes     a register of running maxima or minima; its elements are Lane32 or Lane16 by the width of keys.
//
// load, load_halves    keys from memory; load_quantized also tracks the largest.
// set_row         a row from its numbers: pivot, low and high.
// at_least        the bits of the keys >= the row's pivot.
// add_open        adds the keys within the row's span to those of open_none; open_bits gives the bits of all.
// track_largest   the largest key of all blocks, lane by lane.
// track_nearest   the smallest key - pivot of all blocks, lane by lane; unsigned, so keys below the pivot come last.
namespace pecker_fast {
namespace PF_ISA {

#if PF_SIMD_LEVEL > 0

using Lanes = __m256i;
using Lane32 = std::uint32_t;
using Lane16 = std::uint16_t;
struct Keys32 {
  __m256i r[8];
};
// Of each 32 keys: 0-7 and 16-23, then 8-15 and 24-31. Packed to bytes, two registers are in order.
struct Keys16 {
  __m256i r[4];
};

inline Lanes all_lanes(int value) { return _mm256_set1_epi32(value); }

inline Keys32 load(const float* p) {
  Keys32 keys;
  for (int i = 0; i < 8; ++i) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * i));
    keys.r[i] = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  }
  return keys;
}
inline Keys16 load_halves(const void* p) {
  Keys16 keys;
  for (int i = 0; i < 4; i += 2) {
    const __m256i* const from = static_cast<const __m256i*>(p) + i;
    const __m256i mask = _mm256_set1_epi16(0x7fff);
    const __m256i a = _mm256_and_si256(_mm256_loadu_si256(from), mask);
    const __m256i b = _mm256_and_si256(_mm256_loadu_si256(from + 1), mask);
    keys.r[i] = _mm256_permute2x128_si256(a, b, 0x20);
    keys.r[i + 1] = _mm256_permute2x128_si256(a, b, 0x31);
  }
  return keys;
}
inline Keys16 load_quantized(const float* p, const Quantization& quantization, Lanes* largest) {
  const __m256i origin = _mm256_set1_epi32(static_cast<int>(quantization.origin));
  const __m128i shift = _mm_cvtsi32_si128(quantization.shift);
  Keys16 out;
  for (int i = 0; i < 2; ++i) {
    __m256i q[4];
    for (int j = 0; j < 4; ++j) {
      const __m128i* const from = reinterpret_cast<const __m128i*>(p + 32 * i + 4 * j);
      const __m256i bits = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(from)), _mm_loadu_si128(from + 4), 1);
      const __m256i key = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
      *largest = _mm256_max_epi32(*largest, key);
      q[j] = _mm256_sra_epi32(_mm256_sub_epi32(key, origin), shift);
    }
    out.r[2 * i] = _mm256_packs_epi32(q[0], q[1]);
    out.r[2 * i + 1] = _mm256_packs_epi32(q[2], q[3]);
  }
  return out;
}

// Bits of 32 lanes that are all ones or zero, of 32 bits each. The packs interleave 128-bit halves; one permutation
// restores the order.
inline std::uint64_t gather_lanes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return static_cast<std::uint32_t>(_mm256_movemask_epi8(ordered));
}
// The same of 16 bits each, in the order of Keys16; and of bytes.
inline std::uint64_t gather_lanes(__m256i a, __m256i b) {
  return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(a, b)));
}
inline std::uint64_t gather_bytes(__m256i a, __m256i b) {
  return static_cast<std::uint32_t>(_mm256_movemask_epi8(a)) |
         static_cast<std::uint64_t>(static_cast<std::uint32_t>(_mm256_movemask_epi8(b))) << 32;
}

struct Row32 {
  __m256i pivot, below_pivot, low, last;  // last: high - 1 - low
};
inline void set_row(std::int32_t pivot, std::int32_t low, std::int32_t high, Row32* row) {
  const bool empty = low >= high;
  row->pivot = _mm256_set1_epi32(pivot);
  row->below_pivot = _mm256_set1_epi32(pivot - 1);
  row->low = _mm256_set1_epi32(empty ? INT32_MIN : low);
  row->last = _mm256_set1_epi32(empty ? 0 : high - 1 - low);
}
struct Open32 {
  __m256i within[8];
};
inline void open_none(Open32* open) {
  for (__m256i& within : open->within) within = _mm256_setzero_si256();
}
inline std::uint64_t at_least(const Keys32& keys, const Row32& row) {
  __m256i r[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_cmpgt_epi32(keys.r[i], row.below_pivot);
  return gather_lanes(r[0], r[1], r[2], r[3]) | gather_lanes(r[4], r[5], r[6], r[7]) << 32;
}
inline void add_open(const Keys32& keys, const Row32& row, Open32* open) {
  for (int i = 0; i < 8; ++i) {
    const __m256i offset = _mm256_sub_epi32(keys.r[i], row.low);
    const __m256i within = _mm256_cmpeq_epi32(_mm256_min_epu32(offset, row.last), offset);
    open->within[i] = _mm256_or_si256(open->within[i], within);
  }
}
inline std::uint64_t open_bits(const Open32& open) {
  const __m256i* const r = open.within;
  return gather_lanes(r[0], r[1], r[2], r[3]) | gather_lanes(r[4], r[5], r[6], r[7]) << 32;
}

struct Row16 {
  __m256i pivot, below_pivot, low, last;  // last: high - 1 - low
};
inline void set_row(std::int32_t pivot, std::int32_t low, std::int32_t high, Row16* row) {
  const bool empty = low >= high;
  row->pivot = _mm256_set1_epi16(static_cast<short>(pivot));
  row->below_pivot = _mm256_set1_epi16(static_cast<short>(pivot - 1));
  row->low = _mm256_set1_epi16(static_cast<short>(empty ? INT16_MIN : low));
  row->last = _mm256_set1_epi16(static_cast<short>(empty ? 0 : high - 1 - low));
}
// How far keys are from the nearest span.
struct Open16 {
  __m256i distance[4];
};
inline void open_none(Open16* open) {
  for (__m256i& distance : open->distance) distance = _mm256_set1_epi32(-1);
}
inline std::uint64_t at_least(const Keys16& keys, const Row16& row) {
  __m256i r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm256_cmpgt_epi16(keys.r[i], row.below_pivot);
  return gather_lanes(r[0], r[1]) | gather_lanes(r[2], r[3]) << 32;
}
inline void add_open(const Keys16& keys, const Row16& row, Open16* open) {
  for (int i = 0; i < 4; ++i) {
    const __m256i offset = _mm256_sub_epi16(keys.r[i], row.low);
    open->distance[i] = _mm256_min_epu16(open->distance[i], _mm256_subs_epu16(offset, row.last));
  }
}
inline std::uint64_t open_bits(const Open16& open) {
  __m256i r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm256_cmpeq_epi16(open.distance[i], _mm256_setzero_si256());
  return gather_lanes(r[0], r[1]) | gather_lanes(r[2], r[3]) << 32;
}

struct Row8 {
  __m256i pivot, low, last;  // low: relative to the pivot
};
inline void set_row(std::int32_t pivot, std::int32_t low, std::int32_t high, Row8* row) {
  row->pivot = _mm256_set1_epi16(static_cast<short>(pivot));
  row->low = _mm256_set1_epi8(static_cast<char>(low - pivot));
  row->last = _mm256_set1_epi8(static_cast<char>(high - 1 - low));
}
struct Open8 {
  __m256i distance[2];
};
inline void open_none(Open8* open) {
  for (__m256i& distance : open->distance) distance = _mm256_set1_epi32(-1);
}
inline std::uint64_t at_least_and_open(const Keys16& keys, const Row8& row, Open8* open) {
  __m256i offset[2];
  for (int i = 0; i < 2; ++i) {
    offset[i] = _mm256_packs_epi16(_mm256_subs_epi16(keys.r[2 * i], row.pivot),
                                   _mm256_subs_epi16(keys.r[2 * i + 1], row.pivot));
    const __m256i from_low = _mm256_sub_epi8(offset[i], row.low);
    open->distance[i] = _mm256_min_epu8(open->distance[i], _mm256_subs_epu8(from_low, row.last));
  }
  return ~gather_bytes(offset[0], offset[1]);
}
inline std::uint64_t open_bits(const Open8& open) {
  const __m256i zero = _mm256_setzero_si256();
  return gather_bytes(_mm256_cmpeq_epi8(open.distance[0], zero), _mm256_cmpeq_epi8(open.distance[1], zero));
}

inline void track_largest(const Keys32& keys, Lanes* largest) {
  for (const __m256i& r : keys.r) *largest = _mm256_max_epi32(*largest, r);
}
inline void track_largest(const Keys16& keys, Lanes* largest) {
  for (const __m256i& r : keys.r) *largest = _mm256_max_epi16(*largest, r);
}
inline void track_nearest(const Keys32& keys, const Row32& row, Lanes* nearest) {
  for (const __m256i& r : keys.r) *nearest = _mm256_min_epu32(*nearest, _mm256_sub_epi32(r, row.pivot));
}
inline void track_nearest(const Keys16& keys, const Row16& row, Lanes* nearest) {
  for (const __m256i& r : keys.r) *nearest = _mm256_min_epu16(*nearest, _mm256_sub_epi16(r, row.pivot));
}

#else

// Loops over a fixed number of lanes, which compilers vectorise for the target.
using Lane32 = std::uint32_t;
using Lane16 = std::uint32_t;
struct Lanes {
  std::uint32_t r[kScanBlock];
};
struct Keys32 {
  std::int32_t r[kScanBlock];
};
struct Keys16 {
  std::int16_t r[kScanBlock];
};

inline Lanes all_lanes(int value) {
  Lanes lanes;
  for (std::uint32_t& lane : lanes.r) lane = static_cast<std::uint32_t>(value);
  return lanes;
}

inline Keys32 load(const float* p) {
  Keys32 keys;
  std::memcpy(keys.r, p, sizeof(keys.r));
  for (std::int32_t& key : keys.r) key &= 0x7fffffff;
  return keys;
}
inline Keys16 load_halves(const void* p) {
  Keys16 keys;
  std::memcpy(keys.r, p, sizeof(keys.r));
  for (std::int16_t& key : keys.r) key &= 0x7fff;
  return keys;
}
template <typename Keys>
inline void track_largest(const Keys& keys, Lanes* largest) {
  for (int i = 0; i < kScanBlock; ++i) {
    const std::uint32_t key = static_cast<std::uint32_t>(keys.r[i]);
    largest->r[i] = key > largest->r[i] ? key : largest->r[i];
  }
}
inline std::int32_t limited(std::int32_t x, std::int32_t low, std::int32_t high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}
inline Keys16 load_quantized(const float* p, const Quantization& quantization, Lanes* largest) {
  const Keys32 keys = load(p);
  track_largest(keys, largest);
  const std::int32_t origin = static_cast<std::int32_t>(quantization.origin);
  Keys16 out;
  for (int i = 0; i < kScanBlock; ++i) {
    out.r[i] = static_cast<std::int16_t>(limited((keys.r[i] - origin) >> quantization.shift, -32768, 32767));
  }
  return out;
}

// Eight bytes of 0 or 1 to eight bits, by a multiplication that moves byte i to bit 56 + i.
inline std::uint64_t gather_flags(const std::uint8_t* flags) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  constexpr std::uint64_t kGather = 0x8040201008040201u;
#else
  constexpr std::uint64_t kGather = 0x0102040810204080u;
#endif
  std::uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    std::uint64_t bytes;
    std::memcpy(&bytes, flags + 8 * i, sizeof(bytes));
    bits |= (bytes * kGather >> 56) << (8 * i);
  }
  return bits;
}

template <typename Key>
struct ExactRow {
  std::int32_t pivot, low, high;
};
using Row32 = ExactRow<std::int32_t>;
using Row16 = ExactRow<std::int16_t>;
using Row8 = ExactRow<std::int8_t>;
template <typename Key>
inline void set_row(std::int32_t pivot, std::int32_t low, std::int32_t high, ExactRow<Key>* row) {
  *row = {pivot, low, high};
}
struct Open {
  std::uint8_t flags[kScanBlock];
};
inline void open_none(Open* open) { std::memset(open->flags, 0, sizeof(open->flags)); }
using Open32 = Open;
using Open16 = Open;
using Open8 = Open;
template <typename Keys, typename Key>
inline std::uint64_t at_least(const Keys& keys, const ExactRow<Key>& row) {
  const Key pivot = static_cast<Key>(row.pivot);
  std::uint8_t flags[kScanBlock];
  for (int i = 0; i < kScanBlock; ++i) flags[i] = keys.r[i] >= pivot;
  return gather_flags(flags);
}
template <typename Keys, typename Key>
inline void add_open(const Keys& keys, const ExactRow<Key>& row, Open* open) {
  const Key low = static_cast<Key>(row.low), high = static_cast<Key>(row.high);
  for (int i = 0; i < kScanBlock; ++i) open->flags[i] |= (keys.r[i] >= low) & (keys.r[i] < high);
}
inline std::uint64_t at_least_and_open(const Keys16& keys, const Row8& row, Open* open) {
  const Row16 wide{row.pivot, row.low, row.high};
  add_open(keys, wide, open);
  return at_least(keys, wide);
}
inline std::uint64_t open_bits(const Open& open) { return gather_flags(open.flags); }

template <typename Keys, typename Row>
inline void track_nearest(const Keys& keys, const Row& row, Lanes* nearest) {
  for (int i = 0; i < kScanBlock; ++i) {
    const std::uint32_t difference = static_cast<std::uint32_t>(keys.r[i] - row.pivot);
    nearest->r[i] = difference < nearest->r[i] ? difference : nearest->r[i];
  }
}

#endif

template <typename Keys, typename Row, typename Open>
inline std::uint64_t at_least_and_open(const Keys& keys, const Row& row, Open* open) {
  add_open(keys, row, open);
  return at_least(keys, row);
}

}  // namespace PF_ISA
}  // namespace pecker_fast
