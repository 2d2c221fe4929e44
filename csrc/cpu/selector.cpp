#include "cpu/selector.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "common/bit_words.h"

namespace pecker_fast {
namespace {

// Up to here three histograms of the data cost less than a sample and its bracket.
constexpr std::int64_t kSmallest = std::int64_t{1} << 18;
// Groups of neighbouring entries in the sample, and entries in a group: a cache line of floats.
constexpr std::int64_t kGroups = 16384;
constexpr std::int64_t kGroup = 16;
// Half-width of the bracket in standard deviations of the rank: a miss in about 2 million selections.
constexpr double kSigmas = 5.0;
// Candidates take 6 bytes each; together at most this share of the scores' bytes.
constexpr double kCandidateShare = 0.045;
constexpr std::int64_t kCandidateBytes = 6;

// An entry of the sample: key, then index with the lower one larger. All are different, whatever the keys.
using Composite = std::uint64_t;
constexpr int kIndexBits = 33;

}  // namespace

struct Selector::Sample {
  std::vector<Composite> entries;         // group after group
  std::vector<std::int64_t> group_begin;  // and the end
  std::vector<std::int64_t> bins = std::vector<std::int64_t>(std::size_t{1} << kRadixBits[0]);  // by the first digit
  int index_shift = 0;

  std::int64_t size() const { return static_cast<std::int64_t>(entries.size()); }

  Composite composite(std::uint32_t key, std::int64_t index) const {
    const Composite last = (Composite{1} << kIndexBits) - 1;
    return Composite{key} << kIndexBits | (last - static_cast<Composite>(index >> index_shift));
  }
  static std::uint32_t key(Composite c) { return static_cast<std::uint32_t>(c >> kIndexBits); }
  static std::size_t digit(Composite c) { return static_cast<std::size_t>(c >> (kIndexBits + kRadixShift[0])); }
  std::int64_t index(Composite c) const {
    const Composite last = (Composite{1} << kIndexBits) - 1;
    return static_cast<std::int64_t>(last - (c & last)) << index_shift;
  }

  // The bin of the entry that `rank` others are larger than, and how many are in larger bins.
  std::size_t bin_at(std::int64_t rank, std::int64_t* above) const {
    std::size_t bin = bins.size() - 1;
    *above = 0;
    while (*above + bins[bin] <= rank) *above += bins[bin--];
    return bin;
  }

  // Variance of the number of entries of the sample that are at least `pivot`. Neighbours are alike, so groups are what
  // varies independently; differences of successive groups leave out what varies slowly, which the strata take care of.
  double variance_above(Composite pivot) const {
    double variance = 0.0;
    std::int64_t last = 0;
    for (std::size_t g = 0; g + 1 < group_begin.size(); ++g) {
      std::int64_t above = 0;
      for (std::int64_t i = group_begin[g]; i < group_begin[g + 1]; ++i) above += entries[i] >= pivot;
      const double difference = static_cast<double>(above - last);
      if (g > 0) variance += difference * difference / 2;
      last = above;
    }
    return variance;
  }
};

// Entries above the bracket are kept, entries within are candidates. A key alone cannot bound it where many entries
// share one, so each bound is a key and an index: of the entries with this key those before the index are above it.
struct Selector::Bracket {
  std::uint32_t high_key = kInfKey + 1;
  std::int64_t high_index = 0;
  std::uint32_t low_key = 1;
  std::int64_t low_index = INT64_MAX;
  std::int64_t expected = 0;  // candidates

  bool reaches_the_end() const { return low_key == 1 && low_index == INT64_MAX; }
};

// What one task found, in the order of the entries.
struct Selector::Candidates {
  // Plain arrays: a vector would write zeros over memory that is about to be written.
  std::unique_ptr<std::uint32_t[]> keys;
  std::unique_ptr<std::uint16_t[]> offsets;  // in the piece
  std::vector<std::int64_t> piece_begin;
  std::int64_t size = 0, room = 0;
  std::int64_t limit = 0;
  std::int64_t kept = 0, pending = 0, nan = 0;
  bool overflow = false;

  // Makes room for `wanted` in all. Parts differ in how many they have, so each starts with its share and may grow to
  // what was expected of all together; what does not fit even then is found by radix.
  bool reserve(std::int64_t wanted) {
    if (wanted <= room) return true;
    overflow |= wanted > limit;
    if (overflow) return false;
    room = std::min(limit, std::max(wanted, room * 3 / 2));
    std::unique_ptr<std::uint32_t[]> more_keys(new std::uint32_t[room]);
    std::unique_ptr<std::uint16_t[]> more_offsets(new std::uint16_t[room]);
    std::copy_n(keys.get(), size, more_keys.get());
    std::copy_n(offsets.get(), size, more_offsets.get());
    keys = std::move(more_keys);
    offsets = std::move(more_offsets);
    return true;
  }
};

Selector::Selector(std::vector<ScoreTensor> tensors, std::int64_t tasks, Parallel parallel)
    : tensors_(std::move(tensors)), parallel_(std::move(parallel)) {
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    const std::int64_t numel = tensors_[t].numel;
    for (std::int64_t begin = 0; begin < numel; begin += kScanPiece) {
      pieces_.push_back({static_cast<std::int64_t>(t), begin, std::min(kScanPiece, numel - begin), entries_ + begin,
                         words_ + begin / 32});
    }
    entries_ += numel;
    words_ += (numel + 31) / 32;
    bytes_ += numel * (tensors_[t].type == ParamType::f32 ? 4 : 2);
  }
  // Parts of about equally many entries.
  for (std::int64_t task = 0, piece = 0; task < tasks; ++task) {
    task_begin_.push_back(piece);
    const std::int64_t target = entries_ / tasks * (task + 1);
    while (piece < static_cast<std::int64_t>(pieces_.size()) && (pieces_[piece].first < target || task + 1 == tasks)) {
      ++piece;
    }
  }
  task_begin_.push_back(static_cast<std::int64_t>(pieces_.size()));
}

ScanRange Selector::range(const Piece& piece, std::int64_t offset, std::int64_t length) const {
  const ScoreTensor& tensor = tensors_[piece.tensor];
  const std::int64_t width = tensor.type == ParamType::f32 ? 4 : 2;
  return {static_cast<const char*>(tensor.data) + (piece.begin + offset) * width, tensor.type, length};
}

void Selector::for_pieces(const std::function<void(std::int64_t, std::int64_t)>& body) const {
  parallel_(static_cast<std::int64_t>(task_begin_.size()) - 1, [&](std::int64_t task) {
    for (std::int64_t p = task_begin_[task]; p < task_begin_[task + 1]; ++p) body(task, p);
  });
}

Selector::Sample Selector::draw_sample() const {
  Sample sample;
  while (entries_ >> sample.index_shift >> kIndexBits != 0) ++sample.index_shift;
  sample.entries.resize(kGroups * kGroup);
  const std::int64_t tasks = static_cast<std::int64_t>(task_begin_.size()) - 1;
  std::vector<std::uint8_t> sizes(kGroups);
  std::vector<std::vector<std::int64_t>> bins(tasks, sample.bins);
  parallel_(tasks, [&](std::int64_t task) {
    struct Place {
      std::int64_t piece, offset;
    };
    const std::int64_t begin = kGroups * task / tasks, end = kGroups * (task + 1) / tasks;
    std::vector<Place> places;
    places.reserve(static_cast<std::size_t>(end - begin));
    const double stratum = static_cast<double>(entries_) / kGroups;
    // Strata ascend, so the pieces are walked along and not searched.
    const std::int64_t pieces = static_cast<std::int64_t>(pieces_.size());
    std::int64_t p = 0;
    for (std::int64_t g = begin; g < end; ++g) {
      // One group from each stratum, at a place that a fixed hash chooses: periodic data must not meet it in step.
      const double u = mix_bits(static_cast<std::uint32_t>(g) * 0x9e3779b9u) * 0x1p-32;
      const std::int64_t at = std::min(entries_ - 1, static_cast<std::int64_t>((static_cast<double>(g) + u) * stratum));
      while (p + 1 < pieces && pieces_[p + 1].first <= at) ++p;
      places.push_back({p, (at - pieces_[p].first) / kGroup * kGroup});
    }
    constexpr std::int64_t kAhead = 24;
    for (std::int64_t g = begin; g < end; ++g) {
      if (g + kAhead < end) {
        const Place& later = places[g + kAhead - begin];
        prefetch_read(range(pieces_[later.piece], later.offset, 0).data);
      }
      const Place& place = places[g - begin];
      const Piece& piece = pieces_[place.piece];
      const ScoreTensor& tensor = tensors_[piece.tensor];
      const std::int64_t size = std::min(kGroup, piece.length - place.offset);
      sizes[g] = static_cast<std::uint8_t>(size);
      for (std::int64_t i = 0; i < size; ++i) {
        const std::uint32_t key = key_at(tensor.data, tensor.type, piece.begin + place.offset + i);
        const Composite c = sample.composite(key > kInfKey ? 0 : key, piece.first + place.offset + i);
        sample.entries[g * kGroup + i] = c;
        ++bins[task][Sample::digit(c)];
      }
    }
  });
  // Close the gaps that the ends of small tensors have left.
  sample.group_begin.reserve(kGroups + 1);
  std::int64_t size = 0;
  for (std::int64_t g = 0; g < kGroups; ++g) {
    sample.group_begin.push_back(size);
    if (size != g * kGroup) {
      for (std::int64_t i = 0; i < sizes[g]; ++i) sample.entries[size + i] = sample.entries[g * kGroup + i];
    }
    size += sizes[g];
  }
  sample.group_begin.push_back(size);
  sample.entries.resize(static_cast<std::size_t>(size));
  for (const std::vector<std::int64_t>& part : bins) {
    for (std::size_t b = 0; b < part.size(); ++b) sample.bins[b] += part[b];
  }
  return sample;
}

Selector::Bracket Selector::bracket(const Sample& sample, std::int64_t k) const {
  const std::int64_t size = sample.size();
  const double share = static_cast<double>(std::min(k, entries_)) / static_cast<double>(entries_);
  const double rank = share * static_cast<double>(size);
  const auto clamped = [&](double r) { return std::clamp<std::int64_t>(static_cast<std::int64_t>(r), 0, size - 1); };
  // The widest bracket there can be, that of groups whose entries are all alike, bounds the entries to look at.
  const double widest = kSigmas * std::sqrt(kGroup * share * (1 - share) * static_cast<double>(size)) + 6 * kGroup;
  std::int64_t above = 0, ignored = 0;
  const std::size_t highest = sample.bin_at(clamped(rank - widest), &above);
  const std::size_t lowest = sample.bin_at(clamped(rank + widest), &ignored);
  std::vector<Composite> inside;
  for (const Composite c : sample.entries) {
    if (Sample::digit(c) <= highest && Sample::digit(c) >= lowest) inside.push_back(c);
  }
  const auto larger_first = std::greater<Composite>();
  const auto pivot = inside.begin() + (clamped(rank) - above);
  std::nth_element(inside.begin(), pivot, inside.end(), larger_first);

  const double margin = std::min(widest, kSigmas * std::sqrt(sample.variance_above(*pivot)) + 6 * kGroup);
  const double top = std::floor(rank - margin), bottom = std::ceil(rank + margin);
  Bracket found;
  if (top >= 0) {
    const auto high = inside.begin() + (clamped(top) - above);
    if (high < pivot) std::nth_element(inside.begin(), high, pivot, larger_first);
    const std::uint32_t key = Sample::key(*high);
    found.high_key = std::max(key, std::uint32_t{1});
    found.high_index = key == 0 ? INT64_MAX : sample.index(*high);
  }
  if (bottom < static_cast<double>(size)) {
    const auto low = inside.begin() + (clamped(bottom) - above);
    if (low > pivot) std::nth_element(pivot + 1, low, inside.end(), larger_first);
    if (Sample::key(*low) > 0) {
      found.low_key = Sample::key(*low);
      found.low_index = sample.index(*low);
    }
  }
  const double width = std::min(bottom, static_cast<double>(size)) - std::max(top, 0.0);
  found.expected = static_cast<std::int64_t>(width / static_cast<double>(size) * static_cast<double>(entries_));
  return found;
}

void Selector::scan_bracket(const Piece& piece, const Bracket& bracket, std::uint32_t* words,
                            Candidates* candidates, Pending* pending) const {
  candidates->piece_begin.push_back(candidates->size);
  // The thresholds are the same for all entries between the bounds' indices. A bound inside the piece moves to a word's
  // start: the bracket is a guess, which the counts confirm.
  std::int64_t cuts[4] = {0, 0, 0, piece.length};
  const auto cut = [&](std::int64_t index) {
    const std::int64_t inside = std::clamp<std::int64_t>(index - piece.first, 0, piece.length);
    return inside == piece.length ? inside : inside / 32 * 32;
  };
  const std::int64_t high = cut(bracket.high_index), low = cut(bracket.low_index);
  cuts[1] = std::min(high, low);
  cuts[2] = std::max(high, low);
  for (int c = 0; c < 3; ++c) {
    if (cuts[c] == cuts[c + 1]) continue;
    const std::uint32_t high_threshold = bracket.high_key + (cuts[c] >= high ? 1 : 0);
    const std::uint32_t low_threshold = bracket.low_key + (cuts[c] >= low ? 1 : 0);
    const std::uint32_t from = std::min(high_threshold, kInfKey + 1);
    const ScanRange piece_range = range(piece, cuts[c], cuts[c + 1] - cuts[c]);
    const ScanCounts counts =
        scan_range(piece_range, from, std::min(low_threshold, from), words + cuts[c] / 32, pending);
    candidates->kept += counts.kept;
    candidates->pending += counts.pending;
    candidates->nan += counts.nan;
    if (!candidates->reserve(candidates->size + counts.pending)) continue;
    list_pending(piece_range, *pending, cuts[c], candidates->keys.get() + candidates->size,
                 candidates->offsets.get() + candidates->size);
    candidates->size += counts.pending;
  }
}

bool Selector::finish(const Bracket& bracket, std::int64_t k, bool ties_all, std::vector<Candidates>& parts,
                      std::uint32_t* words, RowResult* result) {
  std::int64_t kept = 0, pending = 0;
  bool overflow = false;
  for (const Candidates& part : parts) {
    kept += part.kept;
    pending += part.pending;
    overflow |= part.overflow;
    result->nan += part.nan;
  }
  std::int64_t need = k - kept;
  const bool everything = need > pending && bracket.reaches_the_end();
  // kept == k would leave the smallest kept magnitude unknown.
  if (overflow || need <= 0 || (need > pending && !everything)) return false;
  std::uint32_t key = 1;
  std::int64_t ties = kAllTies;
  if (!everything) {
    // Histogram of the candidates over their range of keys, then the one bin that holds the wanted candidate.
    const std::uint32_t low = bracket.low_key, span = std::min(bracket.high_key, kInfKey) - low;
    int shift = 0;
    while (span >> shift >= 4096) ++shift;
    std::vector<std::vector<std::int64_t>> counts(parts.size());
    parallel_(static_cast<std::int64_t>(parts.size()), [&](std::int64_t t) {
      counts[t].resize((span >> shift) + 1);
      for (std::int64_t i = 0; i < parts[t].size; ++i) ++counts[t][(parts[t].keys[i] - low) >> shift];
    });
    std::vector<std::int64_t>& bins = counts[0];
    for (std::size_t t = 1; t < parts.size(); ++t) {
      for (std::size_t b = 0; b < bins.size(); ++b) bins[b] += counts[t][b];
    }
    std::size_t bin = bins.size() - 1;
    while (bins[bin] < need) need -= bins[bin--];
    std::vector<std::uint32_t> inside;
    if (shift == 0) {
      key = low + static_cast<std::uint32_t>(bin);
      ties = need;
    } else {
      inside.reserve(static_cast<std::size_t>(bins[bin]));
      for (const Candidates& part : parts) {
        for (std::int64_t i = 0; i < part.size; ++i) {
          if ((part.keys[i] - low) >> shift == bin) inside.push_back(part.keys[i]);
        }
      }
      std::nth_element(inside.begin(), inside.begin() + (need - 1), inside.end(), std::greater<std::uint32_t>());
      key = inside[need - 1];
      ties = need;
      for (const std::uint32_t other : inside) ties -= other > key;
    }
    if (ties_all) {
      // Entries with this key beyond the bracket's lower bound are not among the candidates.
      if (key == bracket.low_key && !bracket.reaches_the_end()) {
        threshold(&key, &kAllTies, 1, words, result);
        return true;
      }
      ties = kAllTies;
    }
  }
  result->smallest_key = key;
  // Ties before each part, and entries taken from it.
  std::vector<std::int64_t> before(parts.size()), added(parts.size());
  if (ties != kAllTies) {
    std::int64_t seen = 0;
    for (std::size_t t = 0; t + 1 < parts.size(); ++t) {
      seen += std::count(parts[t].keys.get(), parts[t].keys.get() + parts[t].size, key);
      before[t + 1] = seen;
    }
  }
  parallel_(static_cast<std::int64_t>(parts.size()), [&](std::int64_t t) {
    const Candidates& part = parts[t];
    std::int64_t left = ties == kAllTies ? kAllTies : std::max<std::int64_t>(0, ties - before[t]);
    std::int64_t taken = 0;
    for (std::size_t p = 0; p < part.piece_begin.size(); ++p) {
      std::uint32_t* const piece_words = words + pieces_[task_begin_[t] + static_cast<std::int64_t>(p)].word;
      const std::int64_t end = p + 1 < part.piece_begin.size() ? part.piece_begin[p + 1] : part.size;
      for (std::int64_t i = part.piece_begin[p]; i < end; ++i) {
        const bool tie = part.keys[i] == key;
        const bool take = part.keys[i] > key || (tie && left > 0);
        left -= tie;
        piece_words[part.offsets[i] >> 5] |= static_cast<std::uint32_t>(take) << (part.offsets[i] & 31);
        taken += take;
      }
    }
    added[t] = taken;
  });
  result->count = kept;
  for (const std::int64_t n : added) result->count += n;
  if (everything) {
    result->smallest_key = smallest_key(words);
  }
  return true;
}

void Selector::select(const std::int64_t* ks, std::int64_t rows, bool ties_all, std::uint32_t* words,
                      RowResult* results) {
  std::vector<std::int64_t> by_radix, sampled;
  std::vector<Bracket> brackets(static_cast<std::size_t>(rows));
  const double room = kCandidateShare * static_cast<double>(bytes_) / static_cast<double>(kCandidateBytes);
  if (entries_ > kSmallest) {
    const Sample sample = draw_sample();
    for (std::int64_t r = 0; r < rows; ++r) brackets[r] = bracket(sample, ks[r]);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const bool fits = entries_ > kSmallest && static_cast<double>(brackets[r].expected) <= room;
    (fits ? sampled : by_radix).push_back(r);
  }
  // As many rows go through the data together as there is room for their candidates.
  for (std::size_t first = 0, end = 0; first < sampled.size(); first = end) {
    double used = 0.0;
    while (end < sampled.size()) {
      used += static_cast<double>(brackets[sampled[end]].expected);
      if (end > first && used > room) break;
      ++end;
    }
    const std::vector<std::int64_t> together(sampled.begin() + first, sampled.begin() + end);
    select_sampled(together, ks, brackets, ties_all, words, results, &by_radix);
  }
  for (const std::int64_t r : by_radix) select_by_radix(ks[r], ties_all, words + r * words_, results + r);
}

// One pass over the data for some of the rows; those whose bracket has missed are added to `missed`.
void Selector::select_sampled(const std::vector<std::int64_t>& rows, const std::int64_t* ks,
                              const std::vector<Bracket>& brackets, bool ties_all, std::uint32_t* words,
                              RowResult* results, std::vector<std::int64_t>* missed) {
  const std::int64_t tasks = static_cast<std::int64_t>(task_begin_.size()) - 1;
  std::vector<std::vector<Candidates>> found;
  for (std::size_t s = 0; s < rows.size(); ++s) found.emplace_back(static_cast<std::size_t>(tasks));
  parallel_(tasks, [&](std::int64_t task) {
    Pending pending;
    for (std::size_t s = 0; s < rows.size(); ++s) {
      found[s][task].limit = brackets[rows[s]].expected * 5 / 4 + 4096;
      found[s][task].reserve(brackets[rows[s]].expected / tasks * 9 / 8 + 1024);
    }
    for (std::int64_t p = task_begin_[task]; p < task_begin_[task + 1]; ++p) {
      // Row by row while the piece is in the cache.
      for (std::size_t s = 0; s < rows.size(); ++s) {
        scan_bracket(pieces_[p], brackets[rows[s]], words + rows[s] * words_ + pieces_[p].word, &found[s][task],
                     &pending);
      }
    }
  });
  for (std::size_t s = 0; s < rows.size(); ++s) {
    const std::int64_t r = rows[s];
    results[r] = RowResult();
    if (!finish(brackets[r], ks[r], ties_all, found[s], words + r * words_, results + r)) missed->push_back(r);
    found[s].clear();
  }
}

void Selector::select_by_radix(std::int64_t k, bool ties_all, std::uint32_t* words, RowResult* result) {
  std::uint32_t prefix = 0;
  std::int64_t need = k;
  std::vector<std::int64_t> bins(std::size_t{1} << kRadixBits[0]);
  for (int level = 0; level < 3; ++level) {
    histogram(&prefix, 1, level, bins.data());
    std::int64_t bin = (std::int64_t{1} << kRadixBits[level]) - 1;
    while (bin >= 0 && bins[bin] < need) need -= bins[bin--];
    if (bin < 0) {
      // Fewer than k entries are neither zero nor NaN: all of them are kept.
      prefix = 1;
      need = kAllTies;
      break;
    }
    prefix = prefix << kRadixBits[level] | static_cast<std::uint32_t>(bin);
  }
  const std::int64_t limit = ties_all ? kAllTies : need;
  threshold(&prefix, &limit, 1, words, result);
}

void Selector::threshold(const std::uint32_t* keys, const std::int64_t* tie_limits, std::int64_t rows,
                         std::uint32_t* words, RowResult* results) {
  const std::int64_t tasks = static_cast<std::int64_t>(task_begin_.size()) - 1;
  std::vector<std::int64_t> ties(pieces_.size());
  for (std::int64_t r = 0; r < rows; ++r) {
    std::uint32_t* const row = words + r * words_;
    const std::uint32_t key = keys[r];
    const bool limited = tie_limits[r] != kAllTies;
    std::vector<RowResult> parts(tasks);
    for_pieces([&](std::int64_t task, std::int64_t p) {
      Pending pending;
      const Piece& piece = pieces_[p];
      const ScanCounts counts =
          scan_range(range(piece, 0, piece.length), limited ? key + 1 : key, key, row + piece.word, &pending);
      parts[task].count += counts.kept;
      parts[task].nan += counts.nan;
      ties[p] = counts.pending;
      // Of limited ties at least one is kept nearly always, then the smallest key is known.
      if (!limited || tie_limits[r] == 0) {
        const std::uint32_t smallest = smallest_kept(range(piece, 0, piece.length), row + piece.word);
        parts[task].smallest_key = std::min(parts[task].smallest_key, smallest);
      }
    });
    RowResult& result = results[r] = RowResult();
    for (const RowResult& part : parts) {
      result.count += part.count;
      result.nan += part.nan;
      result.smallest_key = std::min(result.smallest_key, part.smallest_key);
    }
    if (!limited || tie_limits[r] == 0) continue;
    std::int64_t left = tie_limits[r];
    for (std::size_t p = 0; p < pieces_.size() && left > 0; ++p) {
      if (ties[p] == 0) continue;
      const Piece& piece = pieces_[p];
      if (ties[p] <= left) {
        Pending pending;
        scan_range(range(piece, 0, piece.length), key, key, row + piece.word, &pending);
        left -= ties[p];
        result.count += ties[p];
      } else {
        const ScoreTensor& tensor = tensors_[piece.tensor];
        for (std::int64_t i = 0; i < piece.length && left > 0; ++i) {
          if (key_at(tensor.data, tensor.type, piece.begin + i) != key) continue;
          row[piece.word + (i >> 5)] |= std::uint32_t{1} << (i & 31);
          --left;
          ++result.count;
        }
      }
    }
    result.smallest_key = left < tie_limits[r] ? key : smallest_key(row);
  }
}

std::uint32_t Selector::smallest_key(const std::uint32_t* words) const {
  std::vector<std::uint32_t> found(task_begin_.size(), kInfKey);
  for_pieces([&](std::int64_t task, std::int64_t p) {
    const Piece& piece = pieces_[p];
    found[task] = std::min(found[task], smallest_kept(range(piece, 0, piece.length), words + piece.word));
  });
  return *std::min_element(found.begin(), found.end());
}

void Selector::histogram(const std::uint32_t* prefixes, std::int64_t rows, int level, std::int64_t* bins) {
  const std::int64_t size = std::int64_t{1} << kRadixBits[level];
  const std::int64_t tasks = static_cast<std::int64_t>(task_begin_.size()) - 1;
  std::vector<std::int64_t> parts(static_cast<std::size_t>(tasks * rows * size));
  for_pieces([&](std::int64_t task, std::int64_t p) {
    const ScanRange piece = range(pieces_[p], 0, pieces_[p].length);
    for (std::int64_t r = 0; r < rows; ++r) {
      histogram_range(piece, prefixes[r], level, parts.data() + (task * rows + r) * size);
    }
  });
  std::fill(bins, bins + rows * size, 0);
  for (std::int64_t task = 0; task < tasks; ++task) {
    for (std::int64_t i = 0; i < rows * size; ++i) bins[i] += parts[task * rows * size + i];
  }
}

}  // namespace pecker_fast
