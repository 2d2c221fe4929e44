// Exact selection over many tensors on the CPU. Raw pointers only; the caller lends the threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/select.h"

namespace pecker_fast {

struct ScoreTensor {
  const void* data;
  ParamType type;
  std::int64_t numel;
};

struct RowResult {
  std::uint32_t smallest_key = kInfKey;  // of the entries kept
  std::int64_t count = 0;
  std::int64_t nan = 0;
};

constexpr std::int64_t kAllTies = INT64_MAX;

// Runs task(0) ... task(n - 1), in any order, on any threads.
using Parallel = std::function<void(std::int64_t n, const std::function<void(std::int64_t)>& task)>;

class Selector {
 public:
  // `tasks`: into how many parts of equal size the entries are split. Results do not depend on it.
  Selector(std::vector<ScoreTensor> tensors, std::int64_t tasks, Parallel parallel);

  std::int64_t words() const { return words_; }

  // The operators' rows; `words` has room for words() words a row, all of which are written. All rows go through the
  // data together.
  void select(const std::int64_t* ks, std::int64_t rows, bool ties_all, std::uint32_t* words, RowResult* results);
  void threshold(const std::uint32_t* keys, const std::int64_t* tie_limits, std::int64_t rows, std::uint32_t* words,
                 RowResult* results);
  // `bins`: rows x 2 ** kRadixBits[level], zeroed here.
  void histogram(const std::uint32_t* prefixes, std::int64_t rows, int level, std::int64_t* bins);

 private:
  // At most kScanPiece entries of one tensor.
  struct Piece {
    std::int64_t tensor, begin, length;
    std::int64_t first;  // index of the first entry among all entries
    std::int64_t word;   // number of the first word in a row
  };
  struct Sample;
  struct Bracket;
  struct Candidates;

  ScanRange range(const Piece& piece, std::int64_t offset, std::int64_t length) const;
  void for_pieces(const std::function<void(std::int64_t task, std::int64_t piece)>& body) const;
  Sample draw_sample() const;
  Bracket bracket(const Sample& sample, std::int64_t k) const;
  void scan_bracket(const Piece& piece, const Bracket& bracket, std::uint32_t* words,
                    Candidates* candidates, Pending* pending) const;
  bool finish(const Bracket& bracket, std::int64_t k, bool ties_all, std::vector<Candidates>& parts,
              std::uint32_t* words, RowResult* result);
  void select_sampled(const std::vector<std::int64_t>& rows, const std::int64_t* ks,
                      const std::vector<Bracket>& brackets, bool ties_all, std::uint32_t* words, RowResult* results,
                      std::vector<std::int64_t>* missed);
  std::uint32_t smallest_key(const std::uint32_t* words) const;
  void select_by_radix(std::int64_t k, bool ties_all, std::uint32_t* words, RowResult* result);

  std::vector<ScoreTensor> tensors_;
  std::vector<Piece> pieces_;
  std::vector<std::int64_t> task_begin_;  // first piece of each task, and the end
  Parallel parallel_;
  std::int64_t entries_ = 0, words_ = 0, bytes_ = 0;
};

}  // namespace pecker_fast
