#include "cpu/select_order.h"

#include <algorithm>
#include <memory>

#include "cpu/select.h"

namespace pecker_fast {
namespace {

constexpr std::uint32_t kBins = 2048;

}  // namespace

KeyHistogram::KeyHistogram(const std::uint32_t* keys, std::int64_t size, std::uint32_t low, std::uint32_t high)
    : keys_(keys), size_(size), low_(low), high_(high) {
  while ((high - low) >> shift_ >= kBins) ++shift_;
  bins_.resize(((high - low) >> shift_) + 1);
  for (std::int64_t i = 0; i < size; ++i) ++bins_[(keys[i] - low) >> shift_];
}

KeyInterval KeyHistogram::locate(std::int64_t rank, std::int64_t tolerance) const {
  std::size_t bin = bins_.size() - 1;
  std::int64_t larger = 0;
  while (larger + bins_[bin] <= rank) larger += bins_[bin--];
  const std::uint32_t low = low_ + (static_cast<std::uint32_t>(bin) << shift_);
  const std::uint32_t high = std::min(high_, low + ((std::uint32_t{1} << shift_) - 1));
  const KeyInterval interval{low, high, larger, bins_[bin]};
  if (interval.one_key() || interval.count <= tolerance) return interval;

  std::unique_ptr<std::uint32_t[]> inside(new std::uint32_t[interval.count + kCollectSlack]);
  collect_keys(keys_, size_, low, high, 0, inside.get(), nullptr);
  KeyInterval result = KeyHistogram(inside.get(), interval.count, low, high).locate(rank - larger, tolerance);
  result.larger += larger;
  return result;
}

}  // namespace pecker_fast
