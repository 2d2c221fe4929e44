#include "cpu/selector.h"

#include <algorithm>
#include <numeric>

#include "cpu/select_sample.h"

namespace pecker_fast {
namespace {

// Up to here three histograms of the entries cost less than a sample and a bracket.
constexpr std::int64_t kSmallest = std::int64_t{1} << 18;
// Half-widths of brackets in standard deviations. One of the first kind misses in 400 selections; a second pass over the
// entries is then cheaper than wider brackets for all.
constexpr double kSigmas[] = {3.0, 6.0};
// Candidates take at most this share of the scores' bytes.
constexpr double kCandidateShare = 0.045;

}  // namespace

void Selector::select(const std::int64_t* ks, std::int64_t rows, bool ties_all, std::uint32_t* words,
                      RowResult* results) const {
  std::vector<Row> left;
  for (std::int64_t r = 0; r < rows; ++r) {
    results[r] = RowResult();
    left.push_back({ks[r], words + r * pieces_.words(), results + r, Bracket()});
  }
  for (const double sigmas : kSigmas) {
    if (pieces_.entries() > kSmallest && !left.empty()) left = select_by_sample(std::move(left), sigmas, ties_all);
  }
  if (!left.empty()) select_by_radix(left, ties_all);
}

// Returns the remaining rows: their candidates need too much room, or the bracket has missed.
std::vector<Selector::Row> Selector::select_by_sample(std::vector<Row> rows, double sigmas, bool ties_all) const {
  Pivots pivots;
  {
    const Sample sample(pieces_);
    pieces_.parallel()(static_cast<std::int64_t>(rows.size()), [&](std::int64_t r) {
      rows[r].bracket = sample.bracket(rows[r].k, sigmas);
    });
    pivots = sample.pivots();
    // Freed here, so that the candidates can use its memory.
  }
  const std::int64_t room =
      static_cast<std::int64_t>(kCandidateShare * static_cast<double>(pieces_.bytes())) / kCandidateBytes;
  std::vector<Row> left;
  for (std::size_t next = 0; next < rows.size();) {
    // As many rows share a pass over the entries as there is room for their candidates.
    std::vector<Row> together;
    std::int64_t used = 0;
    for (; next < rows.size() && together.size() < kScanRows; ++next) {
      const std::int64_t expected = rows[next].bracket.expected;
      if (expected > room) {
        left.push_back(rows[next]);
        continue;
      }
      if (used + expected > room) break;
      used += expected;
      together.push_back(rows[next]);
    }
    std::vector<Group> groups = make_groups(pivots, together);
    scan_groups(&groups);
    finish(groups, ties_all, &left);
  }
  return left;
}

// A row whose bracket is cut at an index is a group by itself. The others share a group with keys on a grid, to which
// their brackets are rounded outwards. A row whose bracket is too wide for the grid, or would get many more candidates
// by the rounding, has a group with exact keys.
std::vector<Selector::Group> Selector::make_groups(const Pivots& pivots, const std::vector<Row>& rows) const {
  const auto width = [](const Row& row) { return row.bracket.high.key - row.bracket.low.key; };
  std::uint32_t narrowest = kInfKey;
  for (const Row& row : rows) {
    if (!row.bracket.is_cut()) narrowest = std::min(narrowest, width(row));
  }
  constexpr std::uint32_t kMuchWider = 16;
  std::vector<Group> groups(1);
  std::uint32_t low = kInfKey, high = 0;
  const auto fits = [&](const Row& row) { return !row.bracket.is_cut() && width(row) / kMuchWider <= narrowest; };
  for (const Row& row : rows) {
    if (!fits(row)) continue;
    low = std::min(low, row.bracket.low.key);
    high = std::max(high, row.bracket.high.key);
  }
  Quantization grid{0, 0};
  const auto round_down = [&](std::uint32_t key) { return key - ((key - low) & ((std::uint32_t{1} << grid.shift) - 1)); };
  const auto round_up = [&](std::uint32_t key) { return round_down(key + ((std::uint32_t{1} << grid.shift) - 1)); };
  const auto rounded = [&](Bracket bracket) {
    bracket.low.key = round_down(bracket.low.key);
    bracket.pivot = round_down(bracket.pivot);
    bracket.high.key = round_up(bracket.high.key);
    return bracket;
  };
  for (const Row& row : rows) {
    const auto too_fine = [&] {
      const Bracket bracket = rounded(row.bracket);
      const std::uint32_t steps = std::max(bracket.pivot - bracket.low.key, bracket.high.key - bracket.pivot);
      return steps >> grid.shift > kMostSteps || (high - low) >> grid.shift > 65533;
    };
    while (fits(row) && too_fine()) ++grid.shift;
  }
  // The lowest bound is step -32767, so that keys below it differ from it.
  grid.origin = low + (std::uint32_t{32767} << grid.shift);
  for (const Row& row : rows) {
    const Bracket bracket = rounded(row.bracket);
    const double share = pivots.share(bracket.low.key, row.bracket.low.key) +
                         pivots.share(row.bracket.high.key, bracket.high.key);
    const std::int64_t more = static_cast<std::int64_t>(share * static_cast<double>(pieces_.entries()));
    // Keys on the grid are int32, and so is the distance of any key, such as 0, from its origin.
    if (fits(row) && more <= bracket.expected / 4 && std::max(bracket.high.key, grid.origin) <= INT32_MAX) {
      groups[0].rows.push_back(row);
      groups[0].rows.back().bracket = bracket;
      groups[0].rows.back().bracket.expected += more;
    } else {
      groups.emplace_back();
      groups.back().rows.push_back(row);
    }
  }
  groups[0].quantized = true;
  groups[0].quantization = grid;
  if (groups[0].rows.empty()) groups.erase(groups.begin());
  return groups;
}

void Selector::scan_groups(std::vector<Group>* groups) const {
  const std::int64_t tasks = pieces_.tasks();
  for (Group& group : *groups) {
    std::int64_t expected = 0;
    for (const Row& row : group.rows) expected += row.bracket.expected;
    for (std::int64_t task = 0; task < tasks; ++task) {
      group.parts.emplace_back(expected, tasks);
      group.kept.emplace_back(group.rows.size());
    }
  }
  std::vector<std::int64_t> nan(static_cast<std::size_t>(tasks));
  pieces_.for_tasks([&](std::int64_t task) {
    Quotients quotients;
    for (std::int64_t p = pieces_.begin(task); p < pieces_.begin(task + 1); ++p) {
      const ScanRange entries = pieces_[p].range(&quotients);
      std::int64_t in_piece = 0;
      for (Group& group : *groups) in_piece = scan_piece(pieces_[p], entries, task, &group);
      nan[task] += in_piece;
    }
  });
  for (const Group& group : *groups) {
    for (const Row& row : group.rows) row.result->nan = std::accumulate(nan.begin(), nan.end(), std::int64_t{0});
  }
}

// Scans a piece for a group's rows and returns the number of NaN. A bound that is cut inside the piece is moved to a
// word's start: the bracket is a guess, which the counts confirm.
std::int64_t Selector::scan_piece(const Piece& piece, const ScanRange& entries, std::int64_t task, Group* group) const {
  std::int64_t cuts[4] = {0, 0, 0, piece.length};
  const Bracket& only = group->rows[0].bracket;
  if (only.is_cut()) {
    const auto cut = [&](const Bound& bound) {
      const std::int64_t inside = std::clamp<std::int64_t>(bound.index - piece.first, 0, piece.length);
      return inside == piece.length ? inside : inside / kWordBits * kWordBits;
    };
    cuts[1] = std::min(cut(only.high), cut(only.low));
    cuts[2] = std::max(cut(only.high), cut(only.low));
  }
  const int count = static_cast<int>(group->rows.size());
  Candidates& candidates = group->parts[task];
  candidates.start_piece();
  std::int64_t nan = 0;
  for (int c = 0; c < 3; ++c) {
    if (cuts[c] == cuts[c + 1]) continue;
    ScanRow scans[kScanRows];
    for (int r = 0; r < count; ++r) {
      const Bracket& bracket = group->rows[r].bracket;
      // Before the end of the part, not at its start: that may have been moved.
      const std::int64_t last = piece.first + cuts[c + 1] - 1;
      scans[r].high = std::min(bracket.high.at(last), kInfKey + 1);
      scans[r].low = std::min(bracket.low.at(last), scans[r].high);
      scans[r].pivot = bracket.is_cut() ? scans[r].high : bracket.pivot;
      scans[r].words = group->rows[r].words + piece.word + cuts[c] / kWordBits;
    }
    const ScanRange range = entries.part(cuts[c], cuts[c + 1] - cuts[c]);
    nan += candidates.scan(range, cuts[c], group->quantized ? &group->quantization : nullptr, scans, count);
    for (int r = 0; r < count; ++r) group->kept[task][r] += scans[r].kept;
  }
  return nan;
}

// Completes the rows from their candidates, except rows whose bracket has missed.
void Selector::finish(const std::vector<Group>& groups, bool ties_all, std::vector<Row>* missed) const {
  const std::int64_t tasks = pieces_.tasks();
  std::vector<std::vector<Search>> searches;
  for (const Group& group : groups) {
    searches.emplace_back();
    for (std::size_t r = 0; r < group.rows.size(); ++r) {
      std::int64_t kept = 0;
      for (const std::vector<std::int64_t>& part : group.kept) kept += part[r];
      searches.back().emplace_back(group.rows[r].bracket, kept, group.rows[r].k, tasks);
    }
  }
  for (;;) {
    std::vector<std::vector<Search*>> active(groups.size());
    std::vector<Search*> all;
    for (std::size_t g = 0; g < groups.size(); ++g) {
      if (groups[g].overflow()) continue;
      for (Search& search : searches[g]) {
        if (search.advance()) active[g].push_back(&search);
      }
      all.insert(all.end(), active[g].begin(), active[g].end());
    }
    if (all.empty()) break;
    pieces_.for_tasks([&](std::int64_t task) {
      for (std::size_t g = 0; g < groups.size(); ++g) {
        std::vector<Window> windows;
        for (Search* search : active[g]) windows.push_back(search->window(task));
        if (!windows.empty()) groups[g].parts[task].collect(windows);
      }
    });
    pieces_.parallel()(static_cast<std::int64_t>(all.size()), [&](std::int64_t i) { all[i]->look(ties_all); });
  }
  // Entries of the lower bound's key that its index cuts off are no candidates.
  const auto cuts_ties = [&](const Row& row, const Search& search) {
    return ties_all && search.key() == row.bracket.low.key && row.bracket.low.index != kNoIndex;
  };
  pieces_.for_tasks([&](std::int64_t task) {
    for (std::size_t g = 0; g < groups.size(); ++g) {
      for (std::size_t r = 0; r < searches[g].size(); ++r) {
        const Search& search = searches[g][r];
        const Row& row = groups[g].rows[r];
        if (!search.found() || cuts_ties(row, search)) continue;
        groups[g].parts[task].settle(search.unsettled(task), search.decision(task), pieces_, pieces_.begin(task),
                                     row.words);
      }
    }
  });
  for (std::size_t g = 0; g < groups.size(); ++g) {
    for (std::size_t r = 0; r < searches[g].size(); ++r) {
      const Search& search = searches[g][r];
      const Row& row = groups[g].rows[r];
      if (search.found() ? cuts_ties(row, search) : !groups[g].overflow() && search.keeps_everything()) {
        keep({{search.found() ? search.key() : 1, kAllTies, row.words, row.result}});
      } else if (search.found()) {
        row.result->smallest_key = search.key();
        row.result->count = search.count();
      } else {
        missed->push_back(row);
      }
    }
  }
}

void Selector::select_by_radix(const std::vector<Row>& rows, bool ties_all) const {
  std::vector<std::uint32_t> prefixes(rows.size());
  std::vector<std::int64_t> needed, bins;
  for (const Row& row : rows) needed.push_back(row.k);
  for (int level = 0; level < 3; ++level) {
    const std::int64_t size = std::int64_t{1} << kRadixBits[level];
    bins.resize(rows.size() * static_cast<std::size_t>(size));
    histogram(prefixes.data(), static_cast<std::int64_t>(rows.size()), level, bins.data());
    for (std::size_t r = 0; r < rows.size(); ++r) {
      if (needed[r] == kAllTies) continue;
      const std::int64_t* const row_bins = bins.data() + static_cast<std::int64_t>(r) * size;
      std::int64_t bin = size - 1;
      while (bin >= 0 && row_bins[bin] < needed[r]) needed[r] -= row_bins[bin--];
      prefixes[r] = prefixes[r] << kRadixBits[level] | static_cast<std::uint32_t>(bin);
      // Fewer than k entries are neither zero nor NaN: all of them are kept.
      if (bin < 0) needed[r] = kAllTies;
    }
  }
  std::vector<KnownRow> known;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const bool everything = needed[r] == kAllTies;
    *rows[r].result = RowResult();
    known.push_back({everything ? 1 : prefixes[r], ties_all ? kAllTies : needed[r], rows[r].words, rows[r].result});
  }
  keep_known(known);
}

void Selector::threshold(const std::uint32_t* keys, const std::int64_t* tie_limits, std::int64_t rows,
                         std::uint32_t* words, RowResult* results) const {
  std::vector<KnownRow> known;
  for (std::int64_t r = 0; r < rows; ++r) {
    results[r] = RowResult();
    known.push_back({keys[r], tie_limits[r], words + r * pieces_.words(), results + r});
  }
  keep_known(known);
}

void Selector::keep_known(const std::vector<KnownRow>& rows) const {
  std::vector<KnownRow> all_ties, some_ties;
  for (const KnownRow& row : rows) (row.tie_limit == kAllTies ? all_ties : some_ties).push_back(row);
  for (std::size_t first = 0; first < all_ties.size(); first += kScanRows) {
    const auto begin = all_ties.begin() + static_cast<std::ptrdiff_t>(first);
    keep({begin, begin + std::min<std::ptrdiff_t>(kScanRows, all_ties.end() - begin)});
  }
  if (!some_ties.empty()) keep_first_ties(some_ties);
}

// Keeps all entries with at least the key of each row, at most kScanRows.
void Selector::keep(const std::vector<KnownRow>& rows) const {
  const int count = static_cast<int>(rows.size());
  std::vector<std::vector<RowResult>> parts(static_cast<std::size_t>(pieces_.tasks()));
  pieces_.for_tasks([&](std::int64_t task) {
    std::vector<RowResult> results(rows.size());
    KeepRow scans[kScanRows];
    Quotients quotients;
    for (std::int64_t p = pieces_.begin(task); p < pieces_.begin(task + 1); ++p) {
      for (int r = 0; r < count; ++r) {
        scans[r].key = rows[r].key;
        scans[r].words = rows[r].words + pieces_[p].word;
      }
      const std::int64_t nan = keep_range(pieces_[p].range(&quotients), scans, count);
      for (int r = 0; r < count; ++r) {
        results[r].count += scans[r].kept;
        results[r].nan += nan;
        results[r].smallest_key = std::min(results[r].smallest_key, scans[r].smallest);
      }
    }
    parts[task] = std::move(results);
  });
  for (int r = 0; r < count; ++r) {
    RowResult total;
    for (const std::vector<RowResult>& part : parts) {
      total.count += part[r].count;
      total.nan += part[r].nan;
      total.smallest_key = std::min(total.smallest_key, part[r].smallest_key);
    }
    *rows[r].result = total;
  }
}

// Keeps all entries above the key of each row, and the first ones with this key.
void Selector::keep_first_ties(const std::vector<KnownRow>& rows) const {
  const std::size_t count = rows.size(), pieces = static_cast<std::size_t>(pieces_.size());
  struct Scratch {
    std::vector<std::uint32_t> keys = std::vector<std::uint32_t>(kScanPiece + kOpenSlack);
    std::vector<std::uint16_t> positions = std::vector<std::uint16_t>(kScanPiece + kOpenSlack);
    Quotients quotients;
    std::int64_t above = 0, ties = 0, nan = 0;
  };
  const auto scan = [&](std::size_t r, std::int64_t p, const ScanRange& entries, Scratch* scratch) {
    ScanRow row{rows[r].key + 1, rows[r].key, rows[r].key + 1, rows[r].words + pieces_[p].word};
    OpenEntries open{scratch->keys.data(), scratch->positions.data(), 0};
    scratch->nan = scan_range(entries, nullptr, &row, 1, &open);
    scratch->above = row.kept;
    scratch->ties = open.count;
  };
  std::vector<std::int64_t> above(count * pieces), ties(count * pieces), nan(pieces);
  pieces_.for_tasks([&](std::int64_t task) {
    Scratch scratch;
    for (std::int64_t p = pieces_.begin(task); p < pieces_.begin(task + 1); ++p) {
      const ScanRange entries = pieces_[p].range(&scratch.quotients);
      for (std::size_t r = 0; r < count; ++r) {
        scan(r, p, entries, &scratch);
        above[r * pieces + p] = scratch.above;
        ties[r * pieces + p] = scratch.ties;
        nan[p] = scratch.nan;
      }
    }
  });
  // Number of ties to keep in each piece.
  std::vector<std::int64_t> wanted(count * pieces), kept(count);
  for (std::size_t r = 0; r < count; ++r) {
    RowResult& result = *rows[r].result;
    result = RowResult();
    for (std::size_t p = 0; p < pieces; ++p) {
      wanted[r * pieces + p] = std::min(ties[r * pieces + p], rows[r].tie_limit - kept[r]);
      kept[r] += wanted[r * pieces + p];
      result.count += above[r * pieces + p];
      result.nan += nan[p];
    }
    result.count += kept[r];
    result.smallest_key = rows[r].key;
  }
  pieces_.for_tasks([&](std::int64_t task) {
    Scratch scratch;
    for (std::int64_t p = pieces_.begin(task); p < pieces_.begin(task + 1); ++p) {
      for (std::size_t r = 0; r < count; ++r) {
        if (wanted[r * pieces + p] == 0) continue;
        scan(r, p, pieces_[p].range(&scratch.quotients), &scratch);
        for (std::int64_t i = 0; i < wanted[r * pieces + p]; ++i) {
          const std::uint16_t at = scratch.positions[i];
          rows[r].words[pieces_[p].word + at / kWordBits] |= std::uint32_t{1} << (at % kWordBits);
        }
      }
    }
  });
  for (std::size_t r = 0; r < count; ++r) {
    if (kept[r] > 0) continue;
    RowResult above_key;
    keep({{rows[r].key + 1, kAllTies, rows[r].words, &above_key}});
    rows[r].result->smallest_key = above_key.smallest_key;
  }
}

void Selector::histogram(const std::uint32_t* prefixes, std::int64_t rows, int level, std::int64_t* bins) const {
  const std::int64_t size = std::int64_t{1} << kRadixBits[level], tasks = pieces_.tasks();
  std::vector<std::int64_t> parts(static_cast<std::size_t>(tasks * rows * size));
  pieces_.for_tasks([&](std::int64_t task) {
    std::int64_t* const own = parts.data() + task * rows * size;
    Quotients quotients;
    for (std::int64_t p = pieces_.begin(task); p < pieces_.begin(task + 1); ++p) {
      const ScanRange entries = pieces_[p].range(&quotients);
      for (std::int64_t r = 0; r < rows; ++r) histogram_range(entries, prefixes[r], level, own + r * size);
    }
  });
  std::fill(bins, bins + rows * size, 0);
  for (std::int64_t task = 0; task < tasks; ++task) {
    for (std::int64_t i = 0; i < rows * size; ++i) bins[i] += parts[task * rows * size + i];
  }
}

void sum_magnitudes(const std::vector<ScoreTensor>& tensors, std::int64_t tasks, const Parallel& parallel,
                    std::int64_t* sums) {
  const Pieces pieces(tensors, tasks, parallel);
  // Sums of each task and each tensor that it has a part of.
  struct Part {
    std::int64_t tensor;
    std::int64_t sums[kSumColumns];
  };
  std::vector<std::vector<Part>> parts(static_cast<std::size_t>(tasks));
  pieces.for_tasks([&](std::int64_t task) {
    for (std::int64_t p = pieces.begin(task); p < pieces.begin(task + 1); ++p) {
      if (parts[task].empty() || parts[task].back().tensor != pieces[p].tensor) {
        parts[task].push_back({pieces[p].tensor, {}});
      }
      add_magnitudes(pieces[p].range(nullptr), parts[task].back().sums);
    }
  });
  std::fill(sums, sums + static_cast<std::int64_t>(tensors.size()) * kSumColumns, 0);
  for (const std::vector<Part>& of_task : parts) {
    for (const Part& part : of_task) {
      for (int c = 0; c < kSumColumns; ++c) sums[part.tensor * kSumColumns + c] += part.sums[c];
    }
  }
}

}  // namespace pecker_fast
