// The bracket: a sample of all scores, and the ranks in it that lie safely to both sides of the wanted one.
//
// Clusters of 8 adjacent entries (a 32-byte sector of float32) are drawn one from each of 2 ** log_clusters equal parts
// of all positions, at a place that is a hash of the part. A key of rank k among N entries has rank about r = k n / N
// among the n sampled ones, with the variance of a cluster sample, sum (c - p n_c)^2 over the clusters, where c of the
// n_c entries of a cluster are that large and p = r / n. The sum of c^2 counts the pairs of a cluster, an entry with
// itself included, of which both are that large: a histogram of the pairs by their smaller key gives it for all keys.
//
// Equal keys are ordered by position, like everywhere, but only to 1/256 of all positions: ranks are rounded outwards
// to that. So the bracket is narrow for constant and two-valued scores too. Two digits of 13 bits decide for 16-bit
// scores. For others they leave 13 bits open, by which a side is rounded outwards unless too many sampled entries share
// the digits; then the last block takes a third one.
#include "select_state.cuh"

namespace pecker_fast {
namespace {

constexpr int kCluster = 8;
constexpr int kClusterBits = 3;
// The key of a sampled place that has no entry.
constexpr u32 kNoSample = 0xffffffffu;

// Bits of a sampled entry's value: its key and its part of the positions.
__device__ __forceinline__ int sample_bits(const Scores& scores) {
  return kKeyBits + kGroupBits - spare_key_bits(scores);
}

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

// Whole block: turns counts into ranks: ranks[i] entries are in the highest i + 1 bins. Written by other blocks, the
// counts are read past the first-level cache.
template <int kBins>
__device__ __forceinline__ void rank_bins(const u32* counts, u32* ranks) {
  constexpr int kSegment = kBins / kSelectWarps;
  __shared__ u32 totals[kSelectWarps];
  const int first = warp_id() * kSegment;
  u32 before = 0;
  for (int i = first + lane_id(); i < first + kSegment; i += 32) {
    u32 total;
    const u32 count = __ldcg(counts + kBins - 1 - i), above = warp_exclusive_sum(count, &total);
    ranks[i] = before + above + count;
    before += total;
  }
  if (lane_id() == 0) totals[warp_id()] = before;
  __syncthreads();
  before = 0;
  for (int warp = 0; warp < warp_id(); ++warp) before += totals[warp];
  for (int i = first + lane_id(); i < first + kSegment; i += 32) ranks[i] += before;
  __syncthreads();
}

// The number of the highest bins that hold less than `rank` entries: the next one has the entry of that rank.
template <int kBins>
__device__ __forceinline__ int bins_before(const u32* ranks, u32 rank) {
  int low = 0, high = kBins - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ranks[middle] < rank) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// How many times larger the variance at a key is than that of independent entries; 0 if none or all of the n sampled
// entries are at least as large as the key. `large`: how many are; `pairs`: pairs of which both are.
__device__ __forceinline__ double design_effect(double large, double pairs, double squares, double n) {
  const double independent = large * (1 - large / n);
  // Clusters have few different sizes: the sum of c n_c is nearly that for a mean size.
  return independent > 0 ? (pairs - large * large * squares / (n * n)) / independent : 0;
}

// Both sides of a row's bracket, by one thread. ranks, pairs: from rank_bins.
__device__ void choose_sides(const Scores& scores, const SampleState& sample, std::int64_t k, float sigmas, float slack,
                             const u32* ranks, const u32* pairs, RowState* state) {
  const u64 nonzero = sample.valid - sample.zeros;
  const double n = static_cast<double>(sample.valid > 0 ? sample.valid : 1);
  const double rank = sample_rank(scores, k, sample.valid), squares = static_cast<double>(sample.squares);
  // The edges of the wanted rank's bin for the variance. ranks has four bins of each.
  constexpr int kEach = kDigits / kPairBins;
  const int bin = bins_before<kDigits>(ranks, static_cast<u32>(fmax(ceil(rank), 1.0))) / kEach;
  const auto large_at = [&](int end) { return end > 0 ? static_cast<double>(ranks[end * kEach - 1]) : 0.0; };
  const auto pairs_at = [&](int end) { return end > 0 ? static_cast<double>(pairs[end - 1]) : 0.0; };
  const double above = large_at(bin), at_least = large_at(bin + 1);
  double effect = design_effect(at_least, pairs_at(bin + 1), squares, n);
  // A few entries would say little.
  if (2 * above >= rank) effect = fmax(effect, design_effect(above, pairs_at(bin), squares, n));
  // If both edges are too far from the wanted rank, assume the worst: all entries of a cluster are alike.
  if (effect == 0 || fmin(rank - above, at_least - rank) > n / 16) effect = kCluster;
  effect = fmin(fmax(effect, 1.0), static_cast<double>(kCluster));
  const double half_width = sigmas * sqrt(effect * rank * (1 - rank / n)) + slack;
  state->tolerance = half_width > 0 ? static_cast<u64>(half_width / 8) : 0;
  // If all entries other than 0 are kept, some have to be candidates for the threshold to be known.
  const double high = fmin(floor(rank - half_width), static_cast<double>(nonzero) - 1 - slack);
  const double low = ceil(rank + half_width);
  for (int side = 0; side < 2; ++side) {
    const double wanted = side == 0 ? high : low;
    RadixState bound = {0, 0, 0, sample_bits(scores), true};
    if (!(wanted < 1 || wanted > static_cast<double>(nonzero))) {
      bound.done = false;
      bound.rank = static_cast<u64>(wanted);
      const int i = bins_before<kDigits>(ranks, static_cast<u32>(bound.rank));
      const u64 higher = i > 0 ? ranks[i - 1] : 0;
      bound = with_digit(bound, {kDigits - 1 - i, higher, ranks[i] - higher});
    } else if (side == 0) {
      state->high = {0, kInfKey};
    } else {
      state->low = {kEndPosition, 1};
    }
    state->bounds[side] = bound;
  }
}

// For all rows together.
template <bool kRelative>
__global__ void __launch_bounds__(kSelectThreads)
    sample_kernel(Scores scores, int log_clusters, const std::int64_t* ks, int rows, float sigmas, float slack,
                  Workspace workspace) {
  __shared__ u32 bins[kDigits], pairs[kPairBins];
  for (int bin = threadIdx.x; bin < kDigits; bin += kSelectThreads) bins[bin] = 0;
  for (int bin = threadIdx.x; bin < kPairBins; bin += kSelectThreads) pairs[bin] = 0;
  __syncthreads();
  const u64 octets = num_octets(scores);
  const u32 n = 1u << (log_clusters + kClusterBits);
  const int lane = lane_id();
  u64 valid = 0, zeros = 0, squares = 0;
  for (u32 first = blockIdx.x * kSelectThreads + warp_id() * 32; first < n; first += gridDim.x * kSelectThreads) {
    const u32 i = first + lane;
    u32 key = kNoSample;
    if (i < n) {
      const u64 position = cluster_octet(i / kCluster, log_clusters, octets) * kCluster + i % kCluster;
      const ScoreTensor tensor = find_word(scores, static_cast<std::int64_t>(position >> 5));
      const std::int64_t index = static_cast<std::int64_t>(position) - tensor.first_word * 32;
      if (index < tensor.numel) {
        key = float_key(load_ranked<kRelative>(entries_of<kRelative>(scores, tensor), index));
        if (key > kInfKey) key = 0;
      }
      workspace.sample_keys[i] = key;
    }
    const bool exists = key != kNoSample;
    const u32 size = __popc(__ballot_sync(kFullWarp, exists) >> (lane & ~(kCluster - 1)) & ((1u << kCluster) - 1));
    // Entries of the cluster that are larger, in some order of equal ones.
    const int own = exists ? static_cast<int>(key) : -1;
    u32 larger = 0;
#pragma unroll
    for (int step = 1; step < kCluster; ++step) {
      const int other = __shfl_xor_sync(kFullWarp, own, step);
      larger += other > own || (other == own && (lane ^ step) < lane);
    }
    if (!exists) continue;
    valid += 1;
    zeros += key == 0;
    squares += size;
    atomicAdd(&bins[key >> (kKeyBits - kDigitBits)], 1u);
    // Pairs with an entry as large or larger, in both orders, and with itself.
    atomicAdd(&pairs[key >> (kKeyBits - kPairBits)], 2 * larger + 1);
  }
  SampleState* const sample = workspace.sample;
  block_add(valid, &sample->valid);
  block_add(zeros, &sample->zeros);
  block_add(squares, &sample->squares);
  for (int bin = threadIdx.x; bin < kDigits; bin += kSelectThreads) {
    if (bins[bin] != 0) atomicAdd(workspace.sample_histogram + bin, bins[bin]);
  }
  for (int bin = threadIdx.x; bin < kPairBins; bin += kSelectThreads) {
    if (pairs[bin] != 0) atomicAdd(workspace.pair_histogram + bin, pairs[bin]);
  }
  if (!is_last_block(&sample->ticket, gridDim.x)) return;
  rank_bins<kDigits>(workspace.sample_histogram, bins);
  rank_bins<kPairBins>(workspace.pair_histogram, pairs);
  const SampleState all = {__ldcg(&sample->valid), __ldcg(&sample->zeros), __ldcg(&sample->squares), 0};
  if (threadIdx.x < static_cast<unsigned>(rows)) {
    choose_sides(scores, all, ks[threadIdx.x], sigmas, slack, bins, pairs, workspace.rows + threadIdx.x);
  }
}

// blockIdx.y: two a row, for the upper bound and for the lower one.
__global__ void __launch_bounds__(kSelectThreads)
    bound_kernel(Scores scores, int log_clusters, bool ties_all, Workspace workspace) {
  __shared__ u32 bins[kDigits];
  const int row = blockIdx.y / 2, side = blockIdx.y % 2;
  RowState* const state = workspace.rows + row;
  if (state->bounds[side].done) return;
  const u64 octets = num_octets(scores);
  const int spare = workspace.form.spare_key_bits;
  const auto value = [&](std::int64_t i) -> u64 {
    const u32 key = workspace.sample_keys[i];
    // A missing entry has more bits than any prefix.
    if (key == kNoSample) return ~u64{0};
    const u64 group = octet_group(cluster_octet(static_cast<u32>(i) / kCluster, log_clusters, octets), octets);
    return static_cast<u64>(key >> spare) << kGroupBits | ((1 << kGroupBits) - 1 - group);
  };
  const std::int64_t n = std::int64_t{1} << (log_clusters + kClusterBits);
  RadixState bound;
  if (!radix_level(&state->bounds[side], bins, workspace.half_histogram(row, side),
                   &state->tickets[kBoundTicket + side], n, value, &bound)) {
    return;
  }
  if (!bound.done && bound.count > state->tolerance) bound = block_level(bound, bins, n, value);
  if (threadIdx.x != 0) return;
  // Rounded outwards: values within the bin are candidates on both sides.
  const u64 first = (bound.prefix + (side == 0 ? 1 : 0)) << bound.bits;
  const u32 key = static_cast<u32>(first >> kGroupBits) << spare;
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
  const std::int64_t n = std::int64_t{1} << (plan.log_clusters + kClusterBits);
  for_ranking(scores, [&](auto relative) {
    PF_LAUNCH(sample_kernel<decltype(relative)::value>, sample_grid(plan, n), kSelectThreads, 0, stream, scores,
              plan.log_clusters, ks, rows, plan.tuning.sigmas, plan.tuning.slack, workspace);
  });
  PF_LAUNCH(bound_kernel, dim3(sample_grid(plan, n), 2 * static_cast<unsigned>(rows)), kSelectThreads, 0, stream,
            scores, plan.log_clusters, ties_all, workspace);
}

}  // namespace pecker_fast
