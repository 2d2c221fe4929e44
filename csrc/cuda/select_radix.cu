// Selection by histograms of all keys, 11 + 10 + 10 bits in three reads of the scores: for few entries, and for rows
// whose bracket did not hold. Also finds the last entry that is kept of several equal ones.
#include "select_state.cuh"

namespace pecker_fast {
namespace {

// Histograms of a block in shared memory; several, so that warps contend less.
constexpr int kCopies = 4;

// Beyond the end of the positions, whatever the number of entries.
constexpr u64 kAnyPosition = 1ull << 62;

// Device code cannot use host arrays, but it can use their entries as constants.
template <int kLevel>
struct Level {
  static constexpr int kBits = kRadixBits[kLevel], kShift = kRadixShift[kLevel];
};

// Counts the keys that begin with `prefix` by their next digit, and adds the counts to `histogram`.
template <int kLevel, bool kRelative>
__device__ __forceinline__ void count_digits(const Scores& scores, u32 prefix, u64* histogram) {
  constexpr int kBins = 1 << Level<kLevel>::kBits, kShift = Level<kLevel>::kShift;
  __shared__ u32 bins[kCopies][kBins];
  for (int bin = threadIdx.x; bin < kCopies * kBins; bin += kSelectThreads) bins[0][bin] = 0;
  __syncthreads();
  u32* own = bins[warp_id() % kCopies];
  const auto part = [&](const Batch&, int, const float* x, auto) {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const u32 key = float_key(x[i]);
      // Neither 0, which includes entries past the end, nor NaN.
      bool counted = key - 1 < kInfKey;
      if (kLevel > 0) counted = counted && key >> (kShift + Level<kLevel>::kBits) == prefix;
      // The result is not used, so the hardware can combine equal bins of a warp.
      if (counted) atomicAdd(own + (key >> kShift & (kBins - 1)), 1u);
    }
  };
  for_each_batch<kRelative>(scores, part, [](const Batch&, auto) {});
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) {
    u64 count = 0;
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) count += bins[copy][bin];
    if (count != 0) atomicAdd(histogram + bin, count);
  }
}

template <int kLevel, bool kRelative>
__global__ void __launch_bounds__(kSelectThreads, 4)
    histogram_kernel(Scores scores, const std::int32_t* prefixes, u64* histograms) {
  const u32 prefix = kLevel > 0 ? static_cast<u32>(prefixes[blockIdx.y]) : 0;
  count_digits<kLevel, kRelative>(scores, prefix,
                                  histograms + (static_cast<std::int64_t>(blockIdx.y) << Level<kLevel>::kBits));
}

template <int kLevel, bool kRelative>
__global__ void __launch_bounds__(kSelectThreads, 4)
    radix_kernel(Scores scores, const std::int64_t* ks, bool ties_all, bool always, Workspace workspace) {
  RowState* const state = workspace.rows + blockIdx.y;
  u64* const histogram = workspace.radix_histograms + blockIdx.y * kRadixBins;
  if ((!always && !state->fallback) || state->radix.done) return;
  constexpr int kBins = 1 << Level<kLevel>::kBits;
  count_digits<kLevel, kRelative>(scores, static_cast<u32>(state->radix.prefix), histogram);
  if (!is_last_block(&state->tickets[7 + kLevel], gridDim.x)) return;
  u64 rank = state->radix.rank;
  if (kLevel == 0) {
    const u64 all = histogram_total(histogram, kBins);
    const std::int64_t k = ks[blockIdx.y];
    rank = k < 1 ? 0 : min(static_cast<u64>(k), all);
    if (rank == 0) {
      for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) histogram[bin] = 0;
      if (threadIdx.x == 0) {
        state->cut = {0, kInfKey};
        state->radix.done = true;
      }
      return;
    }
  }
  const RankedBin found = find_rank(histogram, kBins, rank);
  for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) histogram[bin] = 0;
  if (threadIdx.x != 0) return;
  rank -= found.above;
  state->radix.prefix = (state->radix.prefix << Level<kLevel>::kBits) | static_cast<u64>(found.bin);
  state->radix.rank = rank;
  if (kLevel == 2) {
    state->radix.done = true;
    state->cut = {kAnyPosition, static_cast<u32>(state->radix.prefix)};
    state->count_ties = !ties_all && rank < found.count;
    state->tie_limit = rank;
  }
}

__global__ void threshold_kernel(Scores scores, const std::int32_t* keys, const std::int64_t* tie_limits, int rows,
                                 RowState* states) {
  const int row = static_cast<int>(threadIdx.x);
  if (row == 0 && rows == 0) states[0].cut = {0, kInfKey};
  if (row >= rows) return;
  // The keys are on the device, where no error can be raised: a key out of range keeps the entries above it.
  const std::int64_t limit = tie_limits[row];
  const u32 key = static_cast<u32>(min(max(keys[row], 1), static_cast<int>(kInfKey)));
  const bool allowed = static_cast<int>(key) == keys[row];
  states[row].cut = {limit > 0 && allowed ? kAnyPosition : 0, keys[row] < 1 ? 0u : key};
  if (keys[row] < 1) states[row].cut = {kAnyPosition, 1};
  states[row].count_ties = allowed && limit > 0 && limit < scores.numel;
  states[row].tie_limit = static_cast<u64>(max(limit, std::int64_t{0}));
}

// Narrows the cut to the first tie_limit entries of its key.
template <bool kRelative>
__global__ void __launch_bounds__(kSelectThreads, 4) tie_kernel(Scores scores, bool always, Workspace workspace) {
  RowState* const state = workspace.rows + blockIdx.y;
  u32* const chunk_ties = workspace.chunk_ties + blockIdx.y * scores.num_chunks;
  if ((!always && !state->fallback) || !state->count_ties) return;
  const float threshold = __uint_as_float(state->cut.key);
  u32 ties = 0;
  const auto part = [&](const Batch&, int half, const float* x, auto) {
    if (half == 0) ties = 0;
#pragma unroll
    for (int i = 0; i < kPart; ++i) ties += fabsf(x[i]) == threshold;
  };
  const auto finish = [&](const Batch& batch, auto) {
    const u32 sum = __reduce_add_sync(kFullWarp, ties);
    if (lane_id() == 0 && sum != 0) atomicAdd(chunk_ties + batch.chunk, sum);
  };
  for_each_batch<kRelative>(scores, part, finish);
  if (!is_last_block(&state->tickets[10], gridDim.x)) return;

  // The chunk of the last kept tie; every thread looks through a run of chunks.
  __shared__ std::int64_t chunk_found;
  __shared__ u64 chunk_limit;
  if (threadIdx.x == 0) chunk_found = -1;
  const u64 limit = state->tie_limit;
  const std::int64_t each = (scores.num_chunks + kSelectThreads - 1) / kSelectThreads;
  const std::int64_t begin = threadIdx.x * each;
  const std::int64_t end = min(begin + each, scores.num_chunks);
  u64 sum = 0, total;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) sum += __ldcg(chunk_ties + chunk);
  u64 before = block_exclusive_sum(sum, &total);
  const bool here = before < limit && limit <= before + sum;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    const u32 ties = __ldcg(chunk_ties + chunk);
    if (here && before < limit && limit <= before + ties) {
      chunk_found = chunk;
      chunk_limit = limit - before;
    }
    before += ties;
  }
  __syncthreads();
  const std::int64_t chunk = chunk_found;
  if (chunk < 0) return;

  // The tie itself; every thread looks through 32 entries.
  const u64 left = chunk_limit;
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

void radix_select(const Scores& scores, int blocks, const std::int64_t* ks, int rows, bool ties_all, bool always,
                  const Workspace& workspace, cudaStream_t stream) {
  const dim3 grid = score_grid(scores, blocks, rows);
  for_ranking(scores, [&](auto relative) {
    constexpr bool kRelative = decltype(relative)::value;
    PF_LAUNCH((radix_kernel<0, kRelative>), grid, kSelectThreads, 0, stream, scores, ks, ties_all, always, workspace);
    PF_LAUNCH((radix_kernel<1, kRelative>), grid, kSelectThreads, 0, stream, scores, ks, ties_all, always, workspace);
    PF_LAUNCH((radix_kernel<2, kRelative>), grid, kSelectThreads, 0, stream, scores, ks, ties_all, always, workspace);
  });
}

void prepare_thresholds(const Scores& scores, const std::int32_t* keys, const std::int64_t* tie_limits, int rows,
                        const Workspace& workspace, cudaStream_t stream) {
  PF_LAUNCH(threshold_kernel, 1, kMaxRows, 0, stream, scores, keys, tie_limits, rows, workspace.rows);
}

void locate_ties(const Scores& scores, int blocks, int rows, bool always, const Workspace& workspace,
                 cudaStream_t stream) {
  for_ranking(scores, [&](auto relative) {
    PF_LAUNCH(tie_kernel<decltype(relative)::value>, score_grid(scores, blocks, rows), kSelectThreads, 0, stream,
              scores, always, workspace);
  });
}

void launch_radix_histogram(const Scores& scores, const std::int32_t* prefixes, std::int64_t rows, int level,
                            std::int64_t* counts, int blocks, cudaStream_t stream) {
  const std::size_t bytes = static_cast<std::size_t>(rows) * sizeof(std::int64_t) << kRadixBits[level];
  check_cuda(cudaMemsetAsync(counts, 0, bytes, stream), "radix_histogram");
  if (level == 0) {
    launch_histogram<0>(scores, prefixes, rows, counts, blocks, stream);
  } else if (level == 1) {
    launch_histogram<1>(scores, prefixes, rows, counts, blocks, stream);
  } else {
    launch_histogram<2>(scores, prefixes, rows, counts, blocks, stream);
  }
}

}  // namespace pecker_fast
