// Exact selection and exact sums over many tensors on the CPU. Raw pointers only; the caller lends the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/select_candidates.h"
#include "cpu/select_pieces.h"

namespace pecker_fast {

struct RowResult {
  std::uint32_t smallest_key = kInfKey;  // of the entries kept
  std::int64_t count = 0;
  std::int64_t nan = 0;
};

class Selector {
 public:
  // `tasks`: the number of parts of equal size that the entries are divided into. Results do not depend on it.
  Selector(const std::vector<ScoreTensor>& tensors, std::int64_t tasks, Parallel parallel)
      : pieces_(tensors, tasks, std::move(parallel)) {}

  std::int64_t words() const { return pieces_.words(); }

  // The operators' rows; `words` has room for words() words a row, all of which are written. A pass over the entries
  // serves up to kScanRows rows.
  void select(const std::int64_t* ks, std::int64_t rows, bool ties_all, std::uint32_t* words, RowResult* results) const;
  void threshold(const std::uint32_t* keys, const std::int64_t* tie_limits, std::int64_t rows, std::uint32_t* words,
                 RowResult* results) const;
  // `bins`: rows x 2 ** kRadixBits[level], zeroed here.
  void histogram(const std::uint32_t* prefixes, std::int64_t rows, int level, std::int64_t* bins) const;

 private:
  // A row to select: its k and bracket, and its place in the results.
  struct Row {
    std::int64_t k;
    std::uint32_t* words;
    RowResult* result;
    Bracket bracket;
  };
  // Rows that share their candidates, and the results of their scan.
  struct Group {
    std::vector<Row> rows;
    bool quantized = false;
    Quantization quantization{};
    std::vector<Candidates> parts;                // one a task
    std::vector<std::vector<std::int64_t>> kept;  // by task and row

    bool overflow() const {
      return std::any_of(parts.begin(), parts.end(), [](const Candidates& part) { return part.overflow(); });
    }
  };
  // A row whose threshold is known.
  struct KnownRow {
    std::uint32_t key;
    std::int64_t tie_limit;
    std::uint32_t* words;
    RowResult* result;
  };

  std::vector<Row> select_by_sample(std::vector<Row> rows, double sigmas, bool ties_all) const;
  void select_by_radix(const std::vector<Row>& rows, bool ties_all) const;
  std::vector<Group> make_groups(const Pivots& pivots, const std::vector<Row>& rows) const;
  void scan_groups(std::vector<Group>* groups) const;
  std::int64_t scan_piece(const Piece& piece, const ScanRange& entries, std::int64_t task, Group* group) const;
  void finish(const std::vector<Group>& groups, bool ties_all, std::vector<Row>* missed) const;
  void keep_known(const std::vector<KnownRow>& rows) const;
  void keep(const std::vector<KnownRow>& rows) const;
  void keep_first_ties(const std::vector<KnownRow>& rows) const;

  Pieces pieces_;
};

// Writes kSumColumns sums of each tensor.
void sum_magnitudes(const std::vector<ScoreTensor>& tensors, std::int64_t tasks, const Parallel& parallel,
                    std::int64_t* sums);

}  // namespace pecker_fast
