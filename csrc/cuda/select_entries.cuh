// Shared by the selection kernels: positions of entries, how a warp reads 1024 of them, and ranks in histograms.
//
// position: 32 * word + bit of an entry in a mask row. It orders entries as ties are broken: by tensor, then by index.
// key: float32 bits of the magnitude (0 for zeros). composite: key and position in one number that is larger for a
// larger key and, at equal keys, for a smaller position. Composites are all different, whatever the data. Keys and
// positions have as many bits of it as a call needs, so that few of a radix selection's digits are the same for all.
#pragma once

#include "common/bit_words.h"
#include "common/radix_key.h"
#include "select.h"

namespace pecker_fast {

constexpr int kMaxPositionBits = 33;
// Beyond every position.
constexpr u64 kEndPosition = 1ull << kMaxPositionBits;

constexpr int kSelectThreads = 256;
constexpr int kSelectWarps = kSelectThreads / 32;
// Entries that a warp handles at a time: 32 a lane.
constexpr int kWarpEntries = 1024;
static_assert(kSelectChunk == kSelectWarps * kWarpEntries, "each warp of a block handles one batch of a chunk");

// The entries with key > `key`, and those with key == `key` at a position < `position`.
struct Bound {
  u64 position;
  u32 key;
};

// How a call's composites are made: bits of positions, and lowest bits of keys that are left out because all are 0.
struct CompositeForm {
  int position_bits, spare_key_bits;
};

__device__ __forceinline__ u64 composite(u32 key, u64 position, const CompositeForm& form) {
  const u64 last = (u64{1} << form.position_bits) - 1;
  return (static_cast<u64>(key >> form.spare_key_bits) << form.position_bits) + (last - position);
}

// The composite of the last entry that the bound takes in: entries within it have this composite or a larger one.
__device__ __forceinline__ u64 composite(const Bound& bound, const CompositeForm& form) {
  const u64 end = u64{1} << form.position_bits;
  const u32 key = bound.key >> form.spare_key_bits;
  // No entry has a key between two with spare bits of 0.
  if (key << form.spare_key_bits != bound.key) return (static_cast<u64>(key) + 1) << form.position_bits;
  return (static_cast<u64>(key) << form.position_bits) + (end - min(bound.position, end));
}

__device__ __forceinline__ u64 composite_position(u64 composite, const CompositeForm& form) {
  const u64 last = (u64{1} << form.position_bits) - 1;
  return last - (composite & last);
}

__device__ __forceinline__ u32 composite_key(u64 composite, const CompositeForm& form) {
  return static_cast<u32>(composite >> form.position_bits) << form.spare_key_bits;
}

__device__ __forceinline__ u32 float_key(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Reads of the scores leave the caches to the words and tables: each entry is read once in a pass.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#else
  return *p;
#endif
}

// The low half of a word.
__device__ __forceinline__ float widen_half(u32 word) { return widen(fp16{static_cast<std::uint16_t>(word)}); }

struct FloatScore {
  using Storage = float;
  static __device__ __forceinline__ float widen(float x) { return x; }
  // The `kVector` entries of 16 bytes.
  static constexpr int kVector = 4;
  static __device__ __forceinline__ void widen(const uint4& v, float* x) {
    x[0] = __uint_as_float(v.x);
    x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z);
    x[3] = __uint_as_float(v.w);
  }
};

struct BFloat16Score {
  using Storage = unsigned short;
  static __device__ __forceinline__ float widen(Storage x) { return __uint_as_float(static_cast<u32>(x) << 16); }
  static constexpr int kVector = 8;
  static __device__ __forceinline__ void widen(const uint4& v, float* x) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
};

struct HalfScore {
  using Storage = unsigned short;
  static __device__ __forceinline__ float widen(Storage x) { return widen_half(x); }
  static constexpr int kVector = 8;
  static __device__ __forceinline__ void widen(const uint4& v, float* x) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = widen_half(words[i]);
      x[2 * i + 1] = widen_half(words[i] >> 16);
    }
  }
};

// One entry as float; for the few accesses that are not a stream.
__device__ __forceinline__ float load_entry(const void* data, int type, std::int64_t index) {
  if (type == kScoreFloat) return static_cast<const float*>(data)[index];
  const unsigned short bits = static_cast<const unsigned short*>(data)[index];
  return type == kScoreBFloat16 ? BFloat16Score::widen(bits) : HalfScore::widen(bits);
}

// Addresses of a tensor's entries. They are ranked by magnitude or, if kRelative, by quotient.
struct Entries {
  const void* data;
  const void* others;
  float damping;
  int type;
};

template <bool kRelative>
__device__ __forceinline__ Entries entries_of(const Scores& scores, const ScoreTensor& tensor) {
  if constexpr (!kRelative) return {tensor.data, nullptr, 0.0f, tensor.type};
  return {tensor.data, scores.others[tensor.index], scores.damping[tensor.index], tensor.type};
}

template <bool kRelative>
__device__ __forceinline__ float load_ranked(const Entries& entries, std::int64_t index) {
  const float score = load_entry(entries.data, entries.type, index);
  return kRelative ? quotient(score, load_entry(entries.others, entries.type, index), entries.damping) : score;
}

// A warp's batch: 1024 entries of one tensor from `first` on, `valid` of them (the others read as 0).
struct Batch {
  Entries entries;
  std::int64_t chunk, first, index;
  u64 position;
  int valid;
};

// How the lanes of a warp hold a batch: `Run` adjacent entries of each lane at a time, so that entry i of lane l is
// entry offset(i, l) of the batch. A lane has 32 entries; it reads them in two parts of 16, which come from the first
// and the second half of the batch.
constexpr int kPart = 16;
constexpr int kPartEntries = 32 * kPart;

template <int Run>
struct Arrangement {
  static constexpr int kRun = Run;
  static __device__ __forceinline__ int offset(int i, int lane) { return (i / Run * 32 + lane) * Run + i % Run; }

  // From one bit for each of the lane's entries to mask words. Between them lie S x S squares of kRun-bit fields,
  // S = 32 / kRun, lanes by fields, to be transposed. The result is word `word_of(lane)` of the batch.
  static __device__ __forceinline__ u32 to_word(u32 bits, int lane) {
    u32 low_fields = 0xffffffffu;
#pragma unroll
    for (int step = 16 / Run; step > 0; step >>= 1) {
      const int shift = step * Run;
      low_fields ^= low_fields << shift;
      const u32 other = __shfl_xor_sync(kFullWarp, bits, step);
      bits = lane & step ? (bits & ~low_fields) | ((other >> shift) & low_fields)
                         : (bits & low_fields) | ((other & low_fields) << shift);
    }
    return bits;
  }
  static __device__ __forceinline__ int word_of(int lane) {
    constexpr int kSide = 32 / Run;
    return lane % kSide * Run + lane / kSide;
  }
};

template <typename Score, bool kAhead, bool kRelative, typename Part, typename Finish>
__device__ __forceinline__ void read_batch(const Batch& batch, Part& part, Finish& finish) {
  using Storage = typename Score::Storage;
  const int lane = lane_id();
  const auto* data = static_cast<const Storage*>(batch.entries.data) + batch.first;
  const auto* others = kRelative ? static_cast<const Storage*>(batch.entries.others) + batch.first : nullptr;
  const float damping = batch.entries.damping;
  // A tensor that does not start at a multiple of 16 bytes never meets its mask words at one, however it is peeled:
  // its lanes read single entries side by side.
  const std::uintptr_t addresses = reinterpret_cast<std::uintptr_t>(data) | reinterpret_cast<std::uintptr_t>(others);
  if (batch.valid == kWarpEntries && addresses % 16 == 0) {
    constexpr int kLoads = kPart / Score::kVector;
    // For 16-bit entries both halves are in flight before the first is used; for others one half has as many bytes,
    // and so has one half of two tensors.
    constexpr bool kBoth = kAhead && !kRelative && sizeof(Storage) == 2;
    uint4 raw[kBoth ? 2 : 1][kLoads];
    const auto load_half = [&](const Storage* from, int half, uint4(&to)[kLoads]) {
      const auto* const vectors = reinterpret_cast<const uint4*>(from) + lane;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        to[i] = load_streaming(vectors + half * (kPartEntries / Score::kVector) + 32 * i);
      }
    };
    if constexpr (kBoth) {
      load_half(data, 0, raw[0]);
      load_half(data, 1, raw[1]);
    }
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float x[kPart];
      if constexpr (!kBoth) load_half(data, half, raw[0]);
      if constexpr (kRelative) {
        // Two vectors of the other tensor at a time: there are no registers for more.
        constexpr int kHalfVectors = kPartEntries / Score::kVector;
        const auto* const vectors = reinterpret_cast<const uint4*>(others) + lane + half * kHalfVectors;
#pragma unroll
        for (int i = 0; i < kLoads; i += 2) {
          const uint4 pair[2] = {load_streaming(vectors + 32 * i), load_streaming(vectors + 32 * (i + 1))};
#pragma unroll
          for (int j = 0; j < 2 * Score::kVector; ++j) {
            float y[Score::kVector];
            if (j % Score::kVector == 0) Score::widen(raw[0][i + j / Score::kVector], x + i * Score::kVector + j);
            Score::widen(pair[j / Score::kVector], y);
            float& own = x[i * Score::kVector + j];
            own = quotient(own, y[j % Score::kVector], damping);
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) Score::widen(raw[0][i], x + i * Score::kVector);
      }
      part(batch, half, x, Arrangement<Score::kVector>());
      if constexpr (kBoth) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) raw[0][i] = raw[1][i];
      }
    }
    finish(batch, Arrangement<Score::kVector>());
  } else {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float x[kPart];
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        const int offset = half * kPartEntries + 32 * i + lane;
        const bool exists = offset < batch.valid;
        x[i] = exists ? Score::widen(__ldcs(data + offset)) : 0.0f;
        if constexpr (kRelative) x[i] = exists ? quotient(x[i], Score::widen(__ldcs(others + offset)), damping) : 0.0f;
      }
      part(batch, half, x, Arrangement<1>());
    }
    finish(batch, Arrangement<1>());
  }
}

// The tensor of a chunk that is not before that of tensor `low`: in a large tensor it is that one, and otherwise often
// the next.
__device__ __forceinline__ int find_chunk(const Scores& scores, std::int64_t chunk, int low) {
  const auto ends_after = [&](int i) {
    return i + 1 >= scores.num_tensors || chunk < scores.tensors[i + 1].first_chunk;
  };
  if (ends_after(low)) return low;
  if (ends_after(low + 1)) return low + 1;
  int high = scores.num_tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (scores.tensors[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ ScoreTensor find_word(const Scores& scores, std::int64_t word) {
  int low = 0, high = scores.num_tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (scores.tensors[middle].first_word <= word) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return scores.tensors[low];
}

// For the warp's batch in every chunk of this block: calls part(batch, half, x, arrangement) for both halves of it,
// with what is ranked of the lane's 16 entries, then finish(batch, arrangement). Warps without entries in a chunk are
// not called: both may use the warp's collectives, not the block's. kAhead: there are registers to load more than is
// worked on.
template <bool kRelative, bool kAhead = true, typename Part, typename Finish>
__device__ __forceinline__ void for_each_batch(const Scores& scores, Part&& part, Finish&& finish) {
  int index = 0;
  for (std::int64_t chunk = blockIdx.x; chunk < scores.num_chunks; chunk += gridDim.x) {
    index = find_chunk(scores, chunk, index);
    const ScoreTensor tensor = scores.tensors[index];
    Batch batch;
    batch.chunk = chunk;
    batch.first = (chunk - tensor.first_chunk) * kSelectChunk + warp_id() * kWarpEntries;
    batch.position = static_cast<u64>(tensor.first_word) * 32 + batch.first;
    batch.index = tensor.index;
    batch.entries = entries_of<kRelative>(scores, tensor);
    const std::int64_t left = tensor.numel - batch.first;
    if (left <= 0) continue;
    batch.valid = left < kWarpEntries ? static_cast<int>(left) : kWarpEntries;
    if (tensor.type == kScoreFloat) {
      read_batch<FloatScore, kAhead, kRelative>(batch, part, finish);
    } else if (tensor.type == kScoreBFloat16) {
      read_batch<BFloat16Score, kAhead, kRelative>(batch, part, finish);
    } else {
      read_batch<HalfScore, kAhead, kRelative>(batch, part, finish);
    }
  }
}

// One bit for each of the lane's entries in a half of a batch that are within the bound, at the place that the entry
// has among the lane's 32. An entry beyond the end reads as 0 and a NaN is not comparable, so neither is, for keys of
// at least 1.
template <typename Order>
__device__ __forceinline__ u32 entries_within(const float* x, Order, const Bound& bound, const Batch& batch, int half) {
  u32 bits = 0;
  const std::int64_t cut = static_cast<std::int64_t>(bound.position - batch.position) - half * kPartEntries;
  if (cut <= 0 || cut >= kPartEntries) {
    const float threshold = __uint_as_float(bound.key + (cut <= 0));
#pragma unroll
    for (int i = 0; i < kPart; ++i) bits |= fabsf(x[i]) >= threshold ? 1u << i : 0u;
  } else {
    const int lane_cut = static_cast<int>(cut) - lane_id() * Order::kRun;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const u32 threshold = bound.key + (Order::offset(i, 0) >= lane_cut);
      bits |= fabsf(x[i]) >= __uint_as_float(threshold) ? 1u << i : 0u;
    }
  }
  return bits << (half * kPart);
}

// Number of NaN among the lane's entries. 0 * x is 0 unless x is inf or NaN, which is rare and then looked at again.
__device__ __forceinline__ u32 count_nan(const float* x) {
  float zero[4] = {};
#pragma unroll
  for (int i = 0; i < kPart; ++i) zero[i % 4] = fmaf(x[i], 0.0f, zero[i % 4]);
  u32 count = 0;
  const float sum = (zero[0] + zero[1]) + (zero[2] + zero[3]);
  if (sum != sum) {
#pragma unroll
    for (int i = 0; i < kPart; ++i) count += x[i] != x[i];
  }
  return count;
}

// Calls body(integral_constant) with whether quotients are ranked: kernels are compiled for either.
template <typename Body>
void for_ranking(const Scores& scores, const Body& body) {
  for_constant<bool, false, true>(scores.damping != nullptr, body);
}

// Adds up over the block into *total (one atomic a block). All threads of the block must call it.
__device__ __forceinline__ void block_add(u64 value, u64* total) {
  __shared__ u64 sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  value = warp_sum(value);
  if (lane_id() == 0 && value != 0) atomicAdd(&sum, value);
  __syncthreads();
  if (threadIdx.x == 0 && sum != 0) atomicAdd(total, sum);
  __syncthreads();
}

// Whether this is the last block of `blocks` to come here; what the others wrote before is then visible to all its
// threads. All threads must call it. The ticket is back at 0 afterwards.
__device__ __forceinline__ bool is_last_block(u32* ticket, u32 blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) == blocks - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  const bool result = last;
  if (result) __threadfence();
  __syncthreads();
  return result;
}

// Sum of the values of all lower threads of the block; *total becomes the sum of all.
__device__ __forceinline__ u64 block_exclusive_sum(u64 value, u64* total) {
  __shared__ u64 sums[kSelectWarps];
  u64 warp_total;
  u64 before = warp_exclusive_sum(value, &warp_total);
  if (lane_id() == 0) sums[warp_id()] = warp_total;
  __syncthreads();
  u64 all = 0;
#pragma unroll
  for (int warp = 0; warp < kSelectWarps; ++warp) {
    if (warp < warp_id()) before += sums[warp];
    all += sums[warp];
  }
  __syncthreads();
  *total = all;
  return before;
}

// The bin that holds the entry of rank `rank` (1 is the highest) of a histogram.
struct RankedBin {
  int bin;
  // Entries in all higher bins, and in this one.
  u64 above, count;
};

// All threads of the block must call it with the same rank, 1 <= rank <= entries in the histogram; all get the result.
// read(bin) is the number of entries in a bin.
template <typename Read>
__device__ __forceinline__ RankedBin find_rank_of(int bins, u64 rank, const Read& read) {
  __shared__ RankedBin found;
  const int each = (bins + kSelectThreads - 1) / kSelectThreads;
  const int top = bins - 1 - static_cast<int>(threadIdx.x) * each;
  u64 sum = 0, total;
  for (int bin = top; bin > top - each && bin >= 0; --bin) sum += read(bin);
  u64 above = block_exclusive_sum(sum, &total);
  if (above < rank && rank <= above + sum) {
    for (int bin = top; bin > top - each && bin >= 0; --bin) {
      const u64 count = read(bin);
      if (rank <= above + count) {
        found = {bin, above, count};
        break;
      }
      above += count;
    }
  }
  __syncthreads();
  const RankedBin result = found;
  __syncthreads();
  return result;
}

// Written by other blocks, the counts are read past the first-level cache.
template <typename Count>
__device__ __forceinline__ RankedBin find_rank(const Count* histogram, int bins, u64 rank) {
  return find_rank_of(bins, rank, [&](int bin) { return static_cast<u64>(__ldcg(histogram + bin)); });
}

template <typename Count>
__device__ __forceinline__ u64 histogram_total(const Count* histogram, int bins) {
  u64 sum = 0, total;
  for (int bin = threadIdx.x; bin < bins; bin += kSelectThreads) sum += __ldcg(histogram + bin);
  block_exclusive_sum(sum, &total);
  return total;
}

}  // namespace pecker_fast
