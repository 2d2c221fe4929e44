// Order statistics of keys in memory.
#pragma once

#include <cstdint>
#include <vector>

namespace pecker_fast {

// Number of keys from `low` to `high`, and of keys larger than `high`.
struct KeyInterval {
  std::uint32_t low, high;
  std::int64_t larger, count;

  bool one_key() const { return low == high; }
};

struct KeyRun {
  const std::uint32_t* keys;
  std::int64_t size;
};

// Histogram of keys, all in [low, high], with bins of equal width. The keys must outlive it.
class KeyHistogram {
 public:
  KeyHistogram(std::vector<KeyRun> runs, std::uint32_t low, std::uint32_t high);

  // The interval of the key at `rank`, 0 for the largest. It is one key, or at most `tolerance` keys of the histogram.
  KeyInterval locate(std::int64_t rank, std::int64_t tolerance) const;

 private:
  std::vector<KeyRun> runs_;
  std::uint32_t low_, high_;
  int shift_ = 0;  // a bin's width is 2 ** shift
  std::vector<std::int64_t> bins_;
};

}  // namespace pecker_fast
