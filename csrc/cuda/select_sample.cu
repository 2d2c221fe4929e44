// The bracket: a sample of all scores, and the ranks in it that lie safely to both sides of the wanted one.
//
// Clusters of 8 adjacent entries (a 32-byte sector of float32) are drawn one from each of 2 ** log_clusters equal parts
// of all positions, at a place that is a hash of the part. A key of rank k among N entries has rank about r = k n / N
// among the n sampled ones, with the variance of a cluster sample, sum (c - p n_c)^2 over the clusters, where c of the
// n_c entries of a cluster are that large and p = r / n.
//
// Equal keys are ordered by position, like everywhere, but only to 1/256 of all positions: ranks are rounded outwards
// to that. So the bracket is narrow for constant and two-valued scores too.
#include "select_state.cuh"

namespace pecker_fast {
namespace {

constexpr int kCluster = 8;
constexpr int kClusterBits = 3;

__device__ __forceinline__ u64 num_octets(const Scores& scores) { return static_cast<u64>(scores.num_words) * 4; }

// The cluster of part `part`: positions 8 * octet to 8 * octet + 7.
__device__ __forceinline__ u64 cluster_octet(u32 part, int log_clusters, u64 octets) {
  u32 h = part * 0x9e3779b9u;
  h ^= h >> 15;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  // (part + fraction) * octets / clusters. At most 17 + 16 + 30 bits, see plan_select.
  return ((static_cast<u64>(part) << 16 | (h & 0xffffu)) * octets) >> (16 + log_clusters);
}

__device__ __forceinline__ u64 octet_group(u64 octet, u64 octets) { return (octet << kGroupBits) / octets; }

// First position of a group.
__device__ __forceinline__ u64 group_position(u64 group, u64 octets) {
  return ((group * octets + (1 << kGroupBits) - 1) >> kGroupBits) * kCluster;
}

// Rank in the sample that corresponds to rank k among all scores.
__device__ __forceinline__ double sample_rank(const Scores& scores, std::int64_t k, u64 valid) {
  const double share = static_cast<double>(k) / static_cast<double>(scores.numel > 0 ? scores.numel : 1);
  return fmin(fmax(share, 0.0), 1.0) * static_cast<double>(valid);
}

// For all rows together.
template <bool kRelative>
__global__ void __launch_bounds__(kSelectThreads) sample_kernel(Scores scores, int log_clusters, const std::int64_t* ks,
                                                                int rows, Workspace workspace) {
  __shared__ u32 bins[kDigits];
  for (int bin = threadIdx.x; bin < kDigits; bin += kSelectThreads) bins[bin] = 0;
  __syncthreads();
  const u64 octets = num_octets(scores);
  const u32 n = 1u << (log_clusters + kClusterBits);
  u64 valid = 0, zeros = 0;
  for (u32 i = blockIdx.x * kSelectThreads + threadIdx.x; i < n; i += gridDim.x * kSelectThreads) {
    const u64 position = cluster_octet(i / kCluster, log_clusters, octets) * kCluster + i % kCluster;
    const ScoreTensor tensor = find_word(scores, static_cast<std::int64_t>(position >> 5));
    const std::int64_t index = static_cast<std::int64_t>(position) - tensor.first_word * 32;
    u32 key = kNoSample;
    if (index < tensor.numel) {
      key = float_key(load_ranked<kRelative>(entries_of<kRelative>(scores, tensor), index));
      if (key > kInfKey) key = 0;
      valid += 1;
      zeros += key == 0;
      atomicAdd(&bins[key >> (31 - kDigitBits)], 1u);
    }
    workspace.sample_keys[i] = key;
  }
  block_add(valid, &workspace.sample->valid);
  block_add(zeros, &workspace.sample->zeros);
  for (int bin = threadIdx.x; bin < kDigits; bin += kSelectThreads) {
    if (bins[bin] != 0) atomicAdd(workspace.sample_histogram + bin, bins[bin]);
  }
  if (!is_last_block(&workspace.sample->ticket, gridDim.x)) return;
  const u64 all = __ldcg(&workspace.sample->valid);
  for (int row = 0; row < rows && all > 0; ++row) {
    const double rank = ceil(sample_rank(scores, ks[row], all));
    const RankedBin found = find_rank(workspace.sample_histogram, kDigits, rank < 1 ? 1 : static_cast<u64>(rank));
    if (threadIdx.x == 0) {
      workspace.rows[row].edge = static_cast<u32>(found.bin) << (31 - kDigitBits);
      workspace.rows[row].at_least = found.above + found.count;
      workspace.rows[row].in_bin = found.count;
    }
  }
}

__global__ void __launch_bounds__(kSelectThreads)
    variance_kernel(Scores scores, int log_clusters, const std::int64_t* ks, float sigmas, float slack,
                    Workspace workspace) {
  RowState* const state = workspace.rows + blockIdx.y;
  const u32 edge = state->edge;
  u64 sum_cc = 0, sum_cn = 0, sum_nn = 0;
  const u32 clusters = 1u << log_clusters;
  for (u32 i = blockIdx.x * kSelectThreads + threadIdx.x; i < clusters; i += gridDim.x * kSelectThreads) {
    const uint4* keys = reinterpret_cast<const uint4*>(workspace.sample_keys) + 2 * static_cast<std::int64_t>(i);
    const uint4 a = keys[0], b = keys[1];
    const u32 key[kCluster] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    u32 c = 0, n = 0;
#pragma unroll
    for (int j = 0; j < kCluster; ++j) {
      n += key[j] != kNoSample;
      c += key[j] != kNoSample && key[j] >= edge;
    }
    sum_cc += c * c;
    sum_cn += c * n;
    sum_nn += n * n;
  }
  block_add(sum_cc, &state->sum_cc);
  block_add(sum_cn, &state->sum_cn);
  block_add(sum_nn, &state->sum_nn);
  if (!is_last_block(&state->tickets[0], gridDim.x)) return;

  const u64 valid = __ldcg(&workspace.sample->valid), nonzero = valid - __ldcg(&workspace.sample->zeros);
  const double n = static_cast<double>(valid > 0 ? valid : 1), rank = sample_rank(scores, ks[blockIdx.y], valid);
  const double p = static_cast<double>(state->at_least) / n;
  const double independent = rank * (1 - rank / n);
  double variance = static_cast<double>(__ldcg(&state->sum_cc)) - 2 * p * static_cast<double>(__ldcg(&state->sum_cn)) +
                    p * p * static_cast<double>(__ldcg(&state->sum_nn));
  variance = fmax(variance, independent);
  // If the edge is too far from the wanted rank, assume the worst: all entries of a cluster are alike.
  if (state->in_bin > valid / 16) variance = fmax(variance, kCluster * independent);
  const double half_width = sigmas * sqrt(variance) + slack;
  // If all entries other than 0 are kept, some have to be candidates for the threshold to be known.
  const double high = fmin(floor(rank - half_width), static_cast<double>(nonzero) - 1 - slack);
  const double low = ceil(rank + half_width);
  for (int side = 0; side < 2; ++side) {
    const double wanted = side == 0 ? high : low;
    RadixState bound = {};
    if (wanted < 1 || wanted > static_cast<double>(nonzero)) {
      bound.done = true;
      if (threadIdx.x == 0 && side == 0) state->high = {0, kInfKey};
      if (threadIdx.x == 0 && side == 1) state->low = {kEndPosition, 1};
    } else {
      const RankedBin found = find_rank(workspace.sample_histogram, kDigits, static_cast<u64>(wanted));
      bound.prefix = static_cast<u64>(found.bin);
      bound.rank = static_cast<u64>(wanted) - found.above;
      bound.bits = kSampleBits - kDigitBits;
    }
    if (threadIdx.x == 0) state->bounds[side] = bound;
  }
}

// blockIdx.y: two a row, for the upper bound and for the lower one.
__global__ void __launch_bounds__(kSelectThreads)
    sample_level_kernel(Scores scores, int log_clusters, bool ties_all, Workspace workspace) {
  const int side = blockIdx.y % 2;
  RowState* const state = workspace.rows + blockIdx.y / 2;
  if (state->bounds[side].done) return;
  const u64 octets = num_octets(scores);
  const auto value = [&](std::int64_t i) -> u64 {
    const u32 key = workspace.sample_keys[i];
    const u64 group = octet_group(cluster_octet(static_cast<u32>(i) / kCluster, log_clusters, octets), octets);
    // A missing entry has more bits than any prefix.
    return static_cast<u64>(key) << kGroupBits | ((1 << kGroupBits) - 1 - group);
  };
  RadixState bound;
  if (!radix_level(&state->bounds[side], workspace.level_histograms + blockIdx.y * kDigits, &state->tickets[1 + side],
                   std::int64_t{1} << (log_clusters + kClusterBits), value, &bound) ||
      !bound.done || threadIdx.x != 0) {
    return;
  }
  // Rounded outwards: values within the bin are candidates on both sides.
  const u64 first = bound.prefix + (side == 0 ? 1 : 0);
  const u32 key = static_cast<u32>(first >> kGroupBits);
  const u64 group = (1 << kGroupBits) - 1 - (first & ((1 << kGroupBits) - 1));
  const Bound result = {group_position(group + 1, octets), key};
  if (side == 0) {
    state->high = key > kInfKey ? Bound{0, kInfKey} : result;
  } else if (key == 0) {
    state->low = {kEndPosition, 1};
  } else {
    // With all ties kept, entries of one key stay together.
    state->low = ties_all ? Bound{kEndPosition, key} : result;
  }
}

unsigned sample_grid(const SelectPlan& plan, std::int64_t items) {
  const std::int64_t wanted = (items + 4 * kSelectThreads - 1) / (4 * kSelectThreads);
  return static_cast<unsigned>(wanted < plan.tuning.blocks ? wanted : plan.tuning.blocks);
}

}  // namespace

void bracket_ranks(const Scores& scores, const SelectPlan& plan, const std::int64_t* ks, int rows, bool ties_all,
                   const Workspace& workspace, cudaStream_t stream) {
  const std::int64_t clusters = std::int64_t{1} << plan.log_clusters, n = clusters * kCluster;
  for_ranking(scores, [&](auto relative) {
    PF_LAUNCH(sample_kernel<decltype(relative)::value>, sample_grid(plan, n), kSelectThreads, 0, stream, scores,
              plan.log_clusters, ks, rows, workspace);
  });
  PF_LAUNCH(variance_kernel, dim3(sample_grid(plan, clusters), static_cast<unsigned>(rows)), kSelectThreads, 0, stream,
            scores, plan.log_clusters, ks, plan.tuning.sigmas, plan.tuning.slack, workspace);
  const dim3 grid(sample_grid(plan, n), 2 * static_cast<unsigned>(rows));
  for (int level = 1; level < kSampleLevels; ++level) {
    PF_LAUNCH(sample_level_kernel, grid, kSelectThreads, 0, stream, scores, plan.log_clusters, ties_all, workspace);
  }
}

}  // namespace pecker_fast
