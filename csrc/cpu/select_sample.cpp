#include "cpu/select_sample.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "common/adam_math.h"

namespace pecker_fast {
namespace {

// Groups in the sample, and entries in a group: more groups would tell more about data with similar neighbours, but the
// wait for a group costs as much as its entries.
constexpr std::int64_t kGroups = 8192;
constexpr std::int64_t kGroup = 64;
// A pivot comes from every so many groups.
constexpr std::int64_t kGroupsPerPivot = 4;
// The bracket is wider by this many entries of the sample, because the deviation may be underestimated.
constexpr double kGuard = 96.0;
// Bounds may be off by this share of the half-width, outwards.
constexpr double kTolerance = 1.0 / 16;

}  // namespace

Sample::Sample(const Pieces& pieces)
    : pieces_(pieces), keys_(make_large_array<std::uint32_t>(kGroups * kGroup)), group_begin_(kGroups + 1), group_first_(kGroups) {
  const std::int64_t tasks = pieces.tasks(), entries = pieces.entries();
  pieces.for_tasks([&](std::int64_t task) {
    const std::int64_t begin = kGroups * task / tasks, end = kGroups * (task + 1) / tasks;
    const double part = static_cast<double>(entries) / kGroups;
    // Number of groups that are prefetched.
    constexpr std::int64_t kAhead = 24;
    struct Group {
      const Piece* piece;
      std::int64_t offset, length;
    };
    Group ahead[kAhead];
    Quotients quotients;
    std::int64_t p = 0;
    for (std::int64_t g = begin; g < end + kAhead; ++g) {
      if (g - kAhead >= begin) {
        const Group& group = ahead[g % kAhead];
        read_keys(group.piece->range(group.offset, group.length, &quotients), keys_.get() + (g - kAhead) * kGroup);
      }
      if (g >= end) continue;
      // A fixed hash chooses the place, so that the sample cannot be in step with periodic data.
      const double u = mix_bits(static_cast<std::uint32_t>(g) * 0x9e3779b9u) * 0x1p-32;
      const std::int64_t at = std::min(entries - 1, static_cast<std::int64_t>((static_cast<double>(g) + u) * part));
      // Parts ascend, so the pieces are walked and not searched.
      while (p + 1 < pieces.size() && pieces[p + 1].first <= at) ++p;
      const Piece& piece = pieces[p];
      const std::int64_t last = std::max<std::int64_t>(0, piece.length - kGroup);
      const std::int64_t offset = std::min(last, (at - piece.first) / kGroup * kGroup);
      const std::int64_t length = std::min(kGroup, piece.length - offset);
      piece.prefetch(offset, length);
      ahead[g % kAhead] = {&piece, offset, length};
      group_first_[g] = piece.first + offset;
      group_begin_[g] = length;
    }
  });
  // Sizes to offsets; gaps that short tensors have left are closed.
  std::int64_t size = 0;
  for (std::int64_t g = 0; g < kGroups; ++g) {
    const std::int64_t length = group_begin_[g];
    if (size != g * kGroup) std::copy_n(keys_.get() + g * kGroup, length, keys_.get() + size);
    group_begin_[g] = size;
    size += length;
  }
  group_begin_[kGroups] = size;
  for (std::int64_t g = 0; g < kGroups; g += kGroupsPerPivot) {
    const std::int64_t length = group_begin_[g + 1] - group_begin_[g];
    pivots_.keys.push_back(keys_[group_begin_[g] + g / kGroupsPerPivot % length]);
  }
  std::sort(pivots_.keys.begin(), pivots_.keys.end(), std::greater<std::uint32_t>());
}

double Pivots::share(std::uint32_t low, std::uint32_t high) const {
  const auto count = std::count_if(keys.begin(), keys.end(), [&](std::uint32_t key) { return low <= key && key < high; });
  return static_cast<double>(count) / static_cast<double>(keys.size());
}

Sample::Neighbourhood Sample::neighbourhood(double rank, double radius) const {
  Neighbourhood result;
  result.keys.reset(new std::uint32_t[size() + kCollectSlack]);
  const double scale = static_cast<double>(pivots_.keys.size()) / static_cast<double>(size());
  const double pivot = rank * scale, deviation = std::sqrt(pivot * std::max(0.0, 1.0 - rank / static_cast<double>(size())));
  const double above = std::floor(pivot - radius * scale - 4 * deviation - 2);
  const double below = std::ceil(pivot + radius * scale + 4 * deviation + 2);
  result.high = above < 0 ? kInfKey : pivots_.keys[static_cast<std::size_t>(above)];
  result.low = below >= static_cast<double>(pivots_.keys.size()) ? 0 : pivots_.keys[static_cast<std::size_t>(below)];
  const auto collect = [&] {
    result.size = collect_keys(keys_.get(), size(), result.low, result.high, 0, result.keys.get(), nullptr);
    result.larger = count_above(keys_.get(), size(), result.high);
  };
  collect();
  const double end = static_cast<double>(result.larger + result.size);
  const bool contains = static_cast<double>(result.larger) <= std::max(0.0, rank - radius) &&
                        end >= std::min(static_cast<double>(size()), rank + radius + 1);
  if (!contains) {
    result.low = 0;
    result.high = kInfKey;
    collect();
  }
  return result;
}

std::int64_t Sample::slot_of(std::uint32_t key, std::int64_t rank) const {
  std::int64_t slot = 0;
  while (keys_[slot] != key || rank-- > 0) ++slot;
  return slot;
}

std::int64_t Sample::index_of(std::int64_t slot) const {
  const auto next = std::upper_bound(group_begin_.begin(), group_begin_.end(), slot);
  const std::int64_t g = next - group_begin_.begin() - 1;
  return group_first_[g] + slot - group_begin_[g];
}

// Variance of the number of entries of the sample that are larger than this key, or have it and a slot before this one.
// Neighbours are alike, so groups are what varies independently; differences of successive groups leave out what varies
// slowly, which the parts of equal size take care of.
double Sample::variance_above(std::uint32_t key, std::int64_t slot) const {
  // A part of the pairs is enough.
  constexpr std::int64_t kStep = 4;
  const auto above = [&](std::int64_t g) {
    const std::uint32_t threshold = key + (group_begin_[g] >= slot ? 1 : 0);
    std::int32_t count = 0;
    for (std::int64_t i = group_begin_[g]; i < group_begin_[g + 1]; ++i) count += keys_[i] >= threshold;
    return count;
  };
  double sum = 0.0;
  for (std::int64_t g = 0; g < kGroups; g += kStep) {
    const double difference = above(g) - above(g + 1);
    sum += difference * difference / 2;
  }
  return sum * kStep;
}

Bracket Sample::bracket(std::int64_t k, double sigmas) const {
  const double entries = static_cast<double>(pieces_.entries()), total = static_cast<double>(size());
  const double share = static_cast<double>(std::min(k, pieces_.entries())) / entries;
  const double rank = share * total;
  // The variance for groups of equal entries.
  const double widest = sigmas * std::sqrt(kGroup * share * (1 - share) * total) + kGuard;
  const Neighbourhood near = neighbourhood(rank, widest);
  const KeyHistogram histogram({{near.keys.get(), near.size}}, near.low, near.high);
  const auto locate = [&](double at, double tolerance) {
    const std::int64_t wanted = std::clamp<std::int64_t>(static_cast<std::int64_t>(at), 0, size() - 1);
    KeyInterval interval = histogram.locate(wanted - near.larger, static_cast<std::int64_t>(tolerance));
    interval.larger += near.larger;
    return interval;
  };

  const KeyInterval pivot = locate(rank, kTolerance * widest);
  const bool shared = pivot.one_key() && static_cast<double>(pivot.count) > kTolerance * widest;
  const std::int64_t before = std::min(static_cast<std::int64_t>(rank), size() - 1) - pivot.larger;
  const double variance = variance_above(pivot.low, shared ? slot_of(pivot.low, before) : kNoIndex);
  const double margin = std::min(widest, sigmas * std::sqrt(variance) + kGuard);

  Bracket bracket;
  double first = std::floor(rank - margin), end = std::ceil(rank + margin);
  const double tolerance = kTolerance * margin;
  // One key that many entries share is cut at an index.
  const auto cut = [&](const KeyInterval& interval) {
    return interval.one_key() && interval.low != 0 && static_cast<double>(interval.count) > tolerance;
  };
  if (first >= 0) {
    const KeyInterval interval = locate(first, tolerance);
    if (cut(interval)) {
      bracket.high = {interval.low, index_of(slot_of(interval.low, static_cast<std::int64_t>(first) - interval.larger))};
    } else {
      bracket.high = {interval.high + 1};
      first = static_cast<double>(interval.larger);
    }
  }
  if (end < total) {
    const KeyInterval interval = locate(end, tolerance);
    if (cut(interval)) {
      bracket.low = {interval.low, index_of(slot_of(interval.low, static_cast<std::int64_t>(end) - interval.larger))};
    } else if (interval.low != 0) {
      bracket.low = {interval.low};
      end = static_cast<double>(interval.larger + interval.count);
    }
  }
  bracket.pivot = std::clamp(pivot.low, bracket.low.key, bracket.high.key);
  bracket.expected = static_cast<std::int64_t>((std::min(end, total) - std::max(first, 0.0)) / total * entries);
  return bracket;
}

}  // namespace pecker_fast
