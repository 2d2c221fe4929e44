// The candidates of a selection, and the choice among them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/select_pieces.h"
#include "cpu/select_sample.h"

namespace pecker_fast {

constexpr std::int64_t kAllTies = INT64_MAX;
// Bytes that a candidate takes.
constexpr std::int64_t kCandidateBytes = 6;

// Candidates of one task with keys in an interval: their keys, and their indices among the task's, in order.
struct Unsettled {
  std::vector<std::uint32_t> keys, indices;  // with room for more
  std::int64_t size = 0, room = 0;
};

struct Window {
  std::uint32_t first, last;  // keys
  Unsettled* unsettled;
};

// Candidates with keys from `first` to `last` change sides: those with keys above `key` are kept, and `ties` of those
// with this key.
struct Decision {
  std::uint32_t first, last, key;
  std::int64_t ties;
};

// The candidates of one task, in the order of the entries; those of several rows together.
class Candidates {
 public:
  // `expected`: the number expected in all tasks together.
  Candidates(std::int64_t expected, std::int64_t tasks);

  void start_piece() { piece_begin_.push_back(size_); }
  // Scans a range that starts at `offset` in the current piece, adds its open entries, and returns the number of NaN.
  std::int64_t scan(const ScanRange& range, std::int64_t offset, const Quantization* quantization, ScanRow* rows,
                    int count);

  // Whether some did not fit; then the list is incomplete.
  bool overflow() const { return overflow_; }
  void collect(const std::vector<Window>& windows) const;
  // Applies a decision about unsettled candidates to the words of a row. The pieces are those from `first_piece` on.
  void settle(const Unsettled& unsettled, const Decision& decision, const Pieces& pieces, std::int64_t first_piece,
              std::uint32_t* words) const;

 private:
  void reserve(std::int64_t wanted);

  LargeArray<std::uint32_t> keys_;
  LargeArray<std::uint16_t> offsets_;  // in the piece
  std::vector<std::int64_t> piece_begin_;
  std::int64_t size_ = 0, room_ = 0, limit_;
  bool overflow_ = false;
};

// The search for the k-th largest entry of a row among its candidates. Either the scan has kept too few of them, and
// the largest ones below the pivot are added, or too many, and the smallest ones from the pivot on are dropped. These
// are near the pivot, so an interval next to it is tried before the bracket's half.
class Search {
 public:
  // `kept`: number of entries that the scan has kept, all with keys >= bracket.pivot_key().
  Search(const Bracket& bracket, std::int64_t kept, std::int64_t k, std::int64_t tasks);

  // The next interval to collect; false if there is none, or the entry is found.
  bool advance();
  Window window(std::int64_t task) { return {first_, last_, &unsettled_[task]}; }
  // Looks for the entry among the collected keys.
  void look(bool ties_all);

  bool found() const { return found_; }
  // If the entry was not found: whether all entries except zeros and NaN are kept. If not, the bracket has missed.
  bool keeps_everything() const { return more() && bracket_.reaches_the_end(); }
  std::uint32_t key() const { return key_; }
  // Entries kept in all.
  std::int64_t count() const { return count_; }
  const Unsettled& unsettled(std::int64_t task) const { return unsettled_[task]; }
  Decision decision(std::int64_t task) const;

 private:
  bool more() const { return missing_ > 0; }

  Bracket bracket_;
  std::int64_t k_, missing_;  // entries still to be added; negative: to be dropped
  std::uint32_t half_, near_; // widths
  std::uint32_t width_ = 0, first_ = 0, last_ = 0, key_ = 0;
  std::int64_t ties_ = 0, count_ = 0;
  bool found_ = false;
  std::vector<Unsettled> unsettled_;  // by task
};

}  // namespace pecker_fast
