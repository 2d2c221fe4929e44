// Selection by histograms of all keys: for few entries, and for rows whose bracket did not hold. Digits of 13 + 13 + 5
// bits; 16-bit scores, whose keys end with at least 13 zeros, need the first and the last one only. The last digit is
// counted chunk by chunk, which tells where the last kept one of several equal entries is. So the scores are read three
// times, or twice, before the mask is written.
#include "select_candidates.cuh"

namespace pecker_fast {
namespace {

// Beyond the end of the positions, whatever the number of entries.
constexpr u64 kAnyPosition = 1ull << 62;

constexpr int kFirstShift = kKeyBits - kDigitBits;
static_assert(kFirstShift - kDigitBits == kRestBits, "three digits are all bits of a key");
// Zeros at the end of the keys of all 16-bit types; the last digit of their keys is that above.
constexpr int kNarrowShift = 13;
static_assert(kNarrowShift + kRestBits == kFirstShift);

inline bool are_narrow(const Scores& scores) { return spare_key_bits(scores) >= kNarrowShift; }

// Counts the keys that begin with `prefix` by their next kBits above kShift, and adds the counts to `histogram`.
// `bins`: kDigits in shared memory; if there are fewer digits, several histograms, so that warps contend less.
template <int kShift, int kBits, bool kRelative>
__device__ __forceinline__ void count_digits(const Scores& scores, u32 prefix, u32* bins, u64* histogram) {
  constexpr int kBins = 1 << kBits, kCopies = kDigits / kBins;
  for (int bin = threadIdx.x; bin < kDigits; bin += kSelectThreads) bins[bin] = 0;
  __syncthreads();
  u32* const own = bins + warp_id() % kCopies * kBins;
  const auto part = [&](const Batch&, int, const float* x, auto) {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const u32 key = float_key(x[i]);
      // Neither 0, which includes entries past the end, nor NaN.
      bool counted = key - 1 < kInfKey;
      if (kShift + kBits < kKeyBits) counted = counted && key >> (kShift + kBits) == prefix;
      // The result is not used, so the hardware can combine equal bins of a warp.
      if (counted) atomicAdd(own + (key >> kShift & (kBins - 1)), 1u);
    }
  };
  for_each_batch<kRelative>(scores, part, [](const Batch&, auto) {});
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) {
    u64 count = 0;
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) count += bins[copy * kBins + bin];
    if (count != 0) atomicAdd(histogram + bin, count);
  }
}

// Device code cannot use host arrays, but it can use their entries as constants.
template <int kLevel>
struct Level {
  static constexpr int kBits = kRadixBits[kLevel], kShift = kRadixShift[kLevel];
};

template <int kLevel, bool kRelative>
__global__ void __launch_bounds__(kSelectThreads, 4)
    histogram_kernel(Scores scores, const std::int32_t* prefixes, u64* histograms) {
  __shared__ u32 bins[kDigits];
  const u32 prefix = kLevel > 0 ? static_cast<u32>(prefixes[blockIdx.y]) : 0;
  count_digits<Level<kLevel>::kShift, Level<kLevel>::kBits, kRelative>(
      scores, prefix, bins, histograms + (static_cast<std::int64_t>(blockIdx.y) << Level<kLevel>::kBits));
}

// A digit of 13 bits. The first one also clears the row's chunk counts.
template <int kShift, bool kRelative>
__global__ void __launch_bounds__(kSelectThreads, 4)
    digit_kernel(Scores scores, const std::int64_t* ks, bool sampled, Workspace workspace, MaskGroup out) {
  constexpr bool kFirst = kShift == kFirstShift;
  __shared__ u32 bins[kDigits];
  RowState* const state = workspace.rows + blockIdx.y;
  if (sampled && !state->fallback) return candidate_step(workspace, scores.num_words, out, bins);
  if (state->radix.done) return;
  if (kFirst) {
    u32* const counts = workspace.chunk_counts(blockIdx.y);
    const std::int64_t n = scores.num_chunks * (kRestBins / 2), stride = std::int64_t{gridDim.x} * kSelectThreads;
    for (std::int64_t i = std::int64_t{blockIdx.x} * kSelectThreads + threadIdx.x; i < n; i += stride) counts[i] = 0;
  }
  u64* const histogram = workspace.histogram(blockIdx.y);
  count_digits<kShift, kDigitBits, kRelative>(scores, static_cast<u32>(state->radix.prefix), bins, histogram);
  if (!is_last_block(&state->tickets[kRadixTicket], gridDim.x)) return;
  RadixState before = state->radix;
  if (kFirst) {
    const u64 all = histogram_total(histogram, kDigits);
    const std::int64_t k = ks[blockIdx.y];
    before.rank = k < 1 ? 0 : min(static_cast<u64>(k), all);
    before.bits = kKeyBits;
  }
  if (before.rank == 0) {
    // Nothing is kept.
    before.done = true;
    if (threadIdx.x == 0) state->cut = {0, kInfKey};
  } else {
    before = with_digit(before, find_rank(histogram, kDigits, before.rank));
  }
  for (int bin = threadIdx.x; bin < kDigits; bin += kSelectThreads) histogram[bin] = 0;
  if (threadIdx.x == 0) state->radix = before;
}

// What is kept of the entries with one key: the first `limit`, or all.
struct TieLimit {
  u32 key;
  u64 limit;
  bool some;
};

// The cut at a threshold that is given. Keys are on the device, where no error can be raised: a key out of range keeps
// the entries above it.
__device__ __forceinline__ TieLimit limit_at(std::int32_t key, std::int64_t limit, std::int64_t numel, Bound* cut) {
  const u32 clamped = static_cast<u32>(min(max(key, 1), static_cast<int>(kInfKey)));
  const bool allowed = static_cast<int>(clamped) == key;
  *cut = key < 1 ? Bound{kAnyPosition, 1} : Bound{limit > 0 && allowed ? kAnyPosition : 0, clamped};
  return {clamped, static_cast<u64>(max(limit, std::int64_t{0})), allowed && limit > 0 && limit < numel};
}

// Whole block: the end of the first `tie.limit` entries of that key. `digit`: its bin in the chunk counts.
template <bool kRelative>
__device__ __forceinline__ void cut_ties(const Scores& scores, const TieLimit& tie, int digit, const u32* counts,
                                         RowState* state) {
  // The chunk of the last kept tie; every thread looks through a run of chunks.
  __shared__ std::int64_t chunk_found;
  __shared__ u64 chunk_limit;
  if (threadIdx.x == 0) chunk_found = -1;
  const auto ties_of = [&](std::int64_t chunk) {
    return __ldcg(counts + chunk * (kRestBins / 2) + digit / 2) >> (digit % 2 * 16) & 0xffffu;
  };
  const std::int64_t each = (scores.num_chunks + kSelectThreads - 1) / kSelectThreads;
  const std::int64_t begin = threadIdx.x * each;
  const std::int64_t end = min(begin + each, scores.num_chunks);
  u64 sum = 0, total;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) sum += ties_of(chunk);
  u64 before = block_exclusive_sum(sum, &total);
  const bool here = before < tie.limit && tie.limit <= before + sum;
  for (std::int64_t chunk = begin; here && chunk < end; ++chunk) {
    const u32 ties = ties_of(chunk);
    if (before < tie.limit && tie.limit <= before + ties) {
      chunk_found = chunk;
      chunk_limit = tie.limit - before;
    }
    before += ties;
  }
  __syncthreads();
  const std::int64_t chunk = chunk_found;
  if (chunk < 0) return;

  // The tie itself; every thread looks through 32 entries.
  const u64 left = chunk_limit;
  const float threshold = __uint_as_float(tie.key);
  const ScoreTensor tensor = scores.tensors[find_chunk(scores, chunk, 0)];
  const std::int64_t first = (chunk - tensor.first_chunk) * kSelectChunk + threadIdx.x * 32;
  const Entries entries = entries_of<kRelative>(scores, tensor);
  u32 bits = 0;
  for (int i = 0; i < 32; ++i) {
    if (first + i < tensor.numel && fabsf(load_ranked<kRelative>(entries, first + i)) == threshold) bits |= 1u << i;
  }
  u64 ahead = block_exclusive_sum(__popc(bits), &total);
  if (ahead < left && left <= ahead + __popc(bits)) {
    for (; ahead + 1 < left; ++ahead) bits &= bits - 1;
    state->cut.position = static_cast<u64>(tensor.first_word * 32 + first) + __ffs(static_cast<int>(bits));
  }
}

// The last digit, above `shift`, counted chunk by chunk, and the cut. With kGiven the key is given (keys, tie_limits);
// otherwise radix has the digits before.
template <bool kGiven, bool kRelative>
__global__ void __launch_bounds__(kSelectThreads, 4)
    rest_kernel(Scores scores, const std::int32_t* keys, const std::int64_t* tie_limits, int shift, bool ties_all,
                bool sampled, Workspace workspace, MaskGroup out) {
  const int row = blockIdx.y;
  RowState* const state = workspace.rows + row;
  // In shared memory: registers are needed for the entries.
  __shared__ TieLimit tie;
  __shared__ Bound cut;
  if constexpr (kGiven) {
    if (threadIdx.x == 0) tie = limit_at(keys[row], tie_limits[row], scores.numel, &cut);
    __syncthreads();
    if (!tie.some) {
      if (blockIdx.x == 0 && threadIdx.x == 0) state->cut = cut;
      return;
    }
  } else {
    __shared__ u32 bins[kDigits];
    if (sampled && !state->fallback) return candidate_step(workspace, scores.num_words, out, bins);
    if (state->radix.done) return;
  }
  const u32 prefix = kGiven ? tie.key >> kRestBits : static_cast<u32>(state->radix.prefix);
  __shared__ u32 warp_counts[kSelectWarps][kRestBins], totals[kRestBins];
  u32* const own = warp_counts[warp_id()];
  const int lane = lane_id();
  static_assert(kRestBins == 32, "one bin a lane");
  own[lane] = 0;
  if (threadIdx.x < kRestBins) totals[threadIdx.x] = 0;
  __syncthreads();
  u32* const counts = workspace.chunk_counts(row);
  bool any = false;
  const auto part = [&](const Batch&, int half, const float* x, auto) {
    if (half == 0) any = false;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const u32 key = float_key(x[i]);
      const bool counted = key - 1 < kInfKey && key >> shift >> kRestBits == prefix;
      if (counted) atomicAdd(own + (key >> shift & (kRestBins - 1)), 1u);
      any |= counted;
    }
  };
  const auto finish = [&](const Batch& batch, auto) {
    if (!__any_sync(kFullWarp, any)) return;
    const u32 count = own[lane];
    own[lane] = 0;
    const u32 next = __shfl_down_sync(kFullWarp, count, 1), both = count | next << 16;
    if (lane % 2 == 0 && both != 0) atomicAdd(counts + batch.chunk * (kRestBins / 2) + lane / 2, both);
    if (count != 0) atomicAdd(totals + lane, count);
    __syncwarp();
  };
  for_each_batch<kRelative>(scores, part, finish);
  __syncthreads();
  u64* const histogram = workspace.histogram(row);
  if (!kGiven && threadIdx.x < kRestBins && totals[threadIdx.x] != 0) {
    atomicAdd(histogram + threadIdx.x, static_cast<u64>(totals[threadIdx.x]));
  }
  if (!is_last_block(&state->tickets[kRestTicket], gridDim.x)) return;
  if constexpr (!kGiven) {
    const u64 rank = state->radix.rank;
    const RankedBin found = find_rank(histogram, kRestBins, rank);
    if (threadIdx.x < kRestBins) histogram[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
      tie.key = (prefix << kRestBits | static_cast<u32>(found.bin)) << shift;
      tie.limit = rank - found.above;
      tie.some = !ties_all && tie.limit < found.count;
      cut = {kAnyPosition, tie.key};
    }
  }
  if (threadIdx.x == 0) state->cut = cut;
  __syncthreads();
  if (tie.some) {
    const int digit = static_cast<int>(tie.key >> shift & (kRestBins - 1));
    cut_ties<kRelative>(scores, tie, digit, counts, state);
  }
}

template <int kLevel>
void launch_histogram(const Scores& scores, const std::int32_t* prefixes, std::int64_t rows, std::int64_t* counts,
                      int blocks, cudaStream_t stream) {
  // A launch takes at most 65,535 blocks in y.
  constexpr std::int64_t kMaxRows = 65535;
  for (std::int64_t row = 0; row < rows; row += kMaxRows) {
    const std::int64_t many = rows - row < kMaxRows ? rows - row : kMaxRows;
    u64* histograms = reinterpret_cast<u64*>(counts) + (row << Level<kLevel>::kBits);
    const std::int32_t* first = prefixes + row;
    const dim3 grid(score_grid(scores, blocks), static_cast<unsigned>(many));
    for_ranking(scores, [&](auto relative) {
      PF_LAUNCH((histogram_kernel<kLevel, decltype(relative)::value>), grid, kSelectThreads, 0, stream, scores, first,
                histograms);
    });
  }
}

}  // namespace

void radix_select(const Scores& scores, int blocks, const std::int64_t* ks, bool ties_all, bool sampled,
                  const Workspace& workspace, const MaskGroup& out, cudaStream_t stream) {
  const dim3 grid = score_grid(scores, blocks, out.rows);
  const bool narrow = are_narrow(scores);
  for_ranking(scores, [&](auto relative) {
    constexpr bool kRelative = decltype(relative)::value;
    PF_LAUNCH((digit_kernel<kFirstShift, kRelative>), grid, kSelectThreads, 0, stream, scores, ks, sampled, workspace,
              out);
    if (!narrow) {
      PF_LAUNCH((digit_kernel<kRestBits, kRelative>), grid, kSelectThreads, 0, stream, scores, ks, sampled, workspace,
                out);
    }
    PF_LAUNCH((rest_kernel<false, kRelative>), grid, kSelectThreads, 0, stream, scores, nullptr, nullptr,
              narrow ? kNarrowShift : 0, ties_all, sampled, workspace, out);
  });
}

void cut_at_thresholds(const Scores& scores, int blocks, const std::int32_t* keys, const std::int64_t* tie_limits,
                       const Workspace& workspace, const MaskGroup& out, cudaStream_t stream) {
  for_ranking(scores, [&](auto relative) {
    PF_LAUNCH((rest_kernel<true, decltype(relative)::value>), score_grid(scores, blocks, out.rows), kSelectThreads, 0,
              stream, scores, keys, tie_limits, 0, false, false, workspace, out);
  });
}

void launch_radix_histogram(const Scores& scores, const std::int32_t* prefixes, std::int64_t rows, int level,
                            std::int64_t* counts, int blocks, cudaStream_t stream) {
  if (level == 0) {
    launch_histogram<0>(scores, prefixes, rows, counts, blocks, stream);
  } else if (level == 1) {
    launch_histogram<1>(scores, prefixes, rows, counts, blocks, stream);
  } else {
    launch_histogram<2>(scores, prefixes, rows, counts, blocks, stream);
  }
}

}  // namespace pecker_fast
