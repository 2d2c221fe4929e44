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

// Candidates near the k-th largest entry of a row, of all tasks: their keys, and their indices in the task's.
struct Unsettled {
  std::unique_ptr<std::uint32_t[]> keys, indices;
  std::vector<std::int64_t> begin;  // of each task, and the end

  std::int64_t size() const { return begin.back(); }
};

// How a row ends: the k-th largest entry is outside its bracket, or beyond the candidates' room; every entry that is
// neither zero nor NaN is kept; or the key of the k-th largest entry is decided.
struct Choice {
  enum class Kind { missed, everything, decided } kind = Kind::missed;
  std::uint32_t key = 1;
  std::int64_t ties = 0;   // how many candidates with this key are kept
  std::int64_t count = 0;  // entries kept in all
  // Candidates with keys from `first` to `last` change sides; they are among the unsettled.
  std::uint32_t first = 0, last = 0;
  Unsettled unsettled;
};

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
  // Sets or clears the bits of a choice's candidates in the words of its row, `ties` of those at its key.
  void settle(const Choice& choice, std::size_t task, std::int64_t ties, const Pieces& pieces,
              std::uint32_t* words) const;

 private:
  void reserve(std::int64_t wanted);

  std::unique_ptr<std::uint32_t[]> keys_;
  std::unique_ptr<std::uint16_t[]> offsets_;  // in the piece
  std::vector<std::int64_t> piece_begin_;
  std::int64_t size_ = 0, room_ = 0, limit_;
  bool overflow_ = false;
};

// `kept`: entries that the scan has kept, all with keys >= bracket.pivot_key().
Choice choose(const std::vector<Candidates>& parts, const Bracket& bracket, std::int64_t kept, std::int64_t k,
              bool ties_all);

}  // namespace pecker_fast
