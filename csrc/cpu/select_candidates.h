// The candidates of a selection, and the choice among them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/select_pieces.h"
#include "cpu/select_sample.h"

namespace pecker_fast {

constexpr std::int64_t kAllTies = INT64_MAX;
// Bytes that a candidate takes.
constexpr std::int64_t kCandidateBytes = 6;

// The candidates that one task has met, in the order of the entries; those of several rows together.
class Candidates {
 public:
  // `expected`: of all tasks together.
  Candidates(std::int64_t expected, std::int64_t tasks);

  void start_piece() { piece_begin_.push_back(size_); }
  // Scans a range that starts at `offset` in the present piece, adds its open entries, and returns the number of NaN.
  std::int64_t scan(const ScanRange& range, std::int64_t offset, const Quantization* quantization, ScanRow* rows,
                    int count);

  std::int64_t size() const { return size_; }
  // Whether there was no room for some; then the keys are incomplete.
  bool overflow() const { return overflow_; }
  const std::uint32_t* keys() const { return keys_.get(); }
  // Sets or clears the bits of candidates, which `indices` name in order, in the words of a row: those with keys above
  // `key` are kept, and the first `ties` at it. The pieces are those from `first_piece` on.
  void settle(const std::uint32_t* indices, std::int64_t size, std::uint32_t key, std::int64_t ties,
              const Pieces& pieces, std::int64_t first_piece, std::uint32_t* words) const;

 private:
  void reserve(std::int64_t wanted);

  // Plain arrays: a vector would write zeros over memory that is about to be written.
  std::unique_ptr<std::uint32_t[]> keys_;
  std::unique_ptr<std::uint16_t[]> offsets_;  // in the piece
  std::vector<std::int64_t> piece_begin_;
  std::int64_t size_ = 0, room_ = 0, limit_;
  bool overflow_ = false;
};

// The candidates of a row that are not settled yet, of all tasks.
struct Unsettled {
  std::unique_ptr<std::uint32_t[]> keys, indices;
  std::vector<std::int64_t> begin;  // of each task, and the end

  std::int64_t size() const { return begin.back(); }
};

// How a row ends: the k-th largest entry is outside its bracket, or beyond the candidates' room; every entry that is
// neither zero nor NaN is kept; or the key of the k-th largest entry is decided, how many candidates with this key are
// kept, and how many entries in all.
struct Choice {
  enum class Kind { missed, everything, decided } kind = Kind::missed;
  std::uint32_t key = 1;
  std::int64_t ties = 0, count = 0;
  Unsettled unsettled;
};

// `kept`: entries that the scan has kept, all with keys >= bracket.pivot_key().
Choice choose(const std::vector<Candidates>& parts, const Bracket& bracket, std::int64_t kept, std::int64_t k,
              bool ties_all);

}  // namespace pecker_fast
