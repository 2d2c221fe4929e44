// A sample of the entries, and the brackets around wanted ranks that follow from it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/select_order.h"
#include "cpu/select_pieces.h"

namespace pecker_fast {

constexpr std::int64_t kNoIndex = INT64_MAX;

// A bound of keys and, because many entries may share one key, of indices: the entries from `index` on need a larger
// key than the others.
struct Bound {
  std::uint32_t key;
  std::int64_t index = kNoIndex;

  // The smallest key that is within the bound, of entries that start at `entry` and lie on one side of the index.
  std::uint32_t at(std::int64_t entry) const { return key + (entry >= index ? 1 : 0); }
};

// Entries within `high` are kept; those within `low` alone are candidates.
struct Bracket {
  Bound high{kInfKey + 1};
  Bound low{1};
  std::uint32_t pivot = kInfKey + 1;  // the likely key of the k-th largest entry; from low.key to high.key
  std::int64_t expected = 0;          // candidates

  bool is_cut() const { return high.index != kNoIndex || low.index != kNoIndex; }
  bool reaches_the_end() const { return low.key == 1 && low.index == kNoIndex; }
  // Largest key of a candidate.
  std::uint32_t largest() const { return high.index == kNoIndex ? std::min(high.key - 1, kInfKey) : high.key; }
  // Candidates from this key on are kept until the choice. Where indices cut the bracket, none are.
  std::uint32_t pivot_key() const { return is_cut() ? largest() + 1 : pivot; }
};

// A small part of the sample, largest first.
struct Pivots {
  std::vector<std::uint32_t> keys;

  // About the share of the entries with low <= key < high.
  double share(std::uint32_t low, std::uint32_t high) const;
};

// Groups of neighbouring entries, one from each of many parts of equal size.
class Sample {
 public:
  explicit Sample(const Pieces& pieces);

  // The bracket around the k-th largest entry: this many standard deviations of the rank to either side.
  Bracket bracket(std::int64_t k, double sigmas) const;
  const Pivots& pivots() const { return pivots_; }

 private:
  // The keys of the sample from `low` to `high`, and the number of larger ones.
  struct Neighbourhood {
    std::unique_ptr<std::uint32_t[]> keys;
    std::uint32_t low, high;
    std::int64_t size, larger;
  };

  std::int64_t size() const { return group_begin_.back(); }
  Neighbourhood neighbourhood(double rank, double radius) const;
  // The place in `keys_` of the entry with this key that `rank` others of this key precede.
  std::int64_t slot_of(std::uint32_t key, std::int64_t rank) const;
  // Index of an entry of the sample among all entries.
  std::int64_t index_of(std::int64_t slot) const;
  double variance_above(std::uint32_t key, std::int64_t slot) const;

  const Pieces& pieces_;
  LargeArray<std::uint32_t> keys_;         // group after group; 0 for NaN
  std::vector<std::int64_t> group_begin_;  // in `keys_`, and the end
  std::vector<std::int64_t> group_first_;  // index of a group's first entry among all entries
  Pivots pivots_;
};

}  // namespace pecker_fast
