#include "cpu/select_candidates.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/select_order.h"

namespace pecker_fast {
namespace {

// Plain arrays: a vector would write zeros over memory that is about to be written.
template <typename T>
void grow(std::int64_t size, std::int64_t room, std::unique_ptr<T[]>* array) {
  std::unique_ptr<T[]> grown(new T[room]);
  std::copy_n(array->get(), size, grown.get());
  *array = std::move(grown);
}

// The candidates with low <= key <= high.
Unsettled collect(const std::vector<Candidates>& parts, std::uint32_t low, std::uint32_t high) {
  constexpr std::int64_t kPart = 16384;
  Unsettled result;
  std::int64_t size = 0, room = 0;
  result.begin.push_back(0);
  for (const Candidates& part : parts) {
    for (std::int64_t first = 0; first < part.size(); first += kPart) {
      const std::int64_t count = std::min(kPart, part.size() - first);
      if (size + count + kCollectSlack > room) {
        room = 2 * room + 4 * kPart;
        grow(size, room, &result.keys);
        grow(size, room, &result.indices);
      }
      size += collect_keys(part.keys() + first, count, low, high, static_cast<std::uint32_t>(first),
                           result.keys.get() + size, result.indices.get() + size);
    }
    result.begin.push_back(size);
  }
  return result;
}

}  // namespace

// Tasks differ in how many candidates they meet, so each starts with its share and may grow to what was expected of all
// together.
Candidates::Candidates(std::int64_t expected, std::int64_t tasks) : limit_(expected * 5 / 4 + 4096) {
  reserve(expected / tasks * 9 / 8 + 1024);
}

void Candidates::reserve(std::int64_t wanted) {
  if (wanted <= room_) return;
  room_ = std::max(wanted, room_ * 3 / 2);
  grow(size_, room_, &keys_);
  grow(size_, room_, &offsets_);
}

std::int64_t Candidates::scan(const ScanRange& range, std::int64_t offset, const Quantization* quantization,
                              ScanRow* rows, int count) {
  reserve(size_ + range.length + kOpenSlack);
  OpenEntries open{keys_.get() + size_, offsets_.get() + size_, offset};
  const std::int64_t nan = scan_range(range, quantization, rows, count, &open);
  overflow_ |= size_ + open.count > limit_;
  if (!overflow_) size_ += open.count;
  return nan;
}

void Candidates::settle(const Choice& choice, std::size_t task, std::int64_t ties, const Pieces& pieces,
                        std::uint32_t* words) const {
  // The words have left the cache since they were written, so they are fetched ahead.
  struct Change {
    std::uint32_t* word;
    std::uint32_t bit;
    bool keep;
  };
  constexpr std::int64_t kAhead = 16;
  Change ahead[kAhead];
  const auto apply = [](const Change& change) {
    *change.word = change.keep ? *change.word | change.bit : *change.word & ~change.bit;
  };
  const std::uint32_t* const indices = choice.unsettled.indices.get();
  std::int64_t changes = 0, piece = 0;
  const std::int64_t pieces_in_task = static_cast<std::int64_t>(piece_begin_.size());
  for (std::int64_t i = choice.unsettled.begin[task]; i < choice.unsettled.begin[task + 1]; ++i) {
    const std::uint32_t index = indices[i], key = keys_[index];
    if (key < choice.first || key > choice.last) continue;
    while (piece + 1 < pieces_in_task && piece_begin_[piece + 1] <= index) ++piece;
    const bool tie = key == choice.key, keep = key > choice.key || (tie && ties > 0);
    ties -= tie;
    Change& change = ahead[changes % kAhead];
    if (changes >= kAhead) apply(change);
    const std::uint16_t offset = offsets_[index];
    change.word = words + pieces[pieces.begin(static_cast<std::int64_t>(task)) + piece].word + offset / kWordBits;
    change.bit = std::uint32_t{1} << (offset % kWordBits);
    change.keep = keep;
    prefetch_read(change.word);
    ++changes;
  }
  for (std::int64_t j = std::max<std::int64_t>(0, changes - kAhead); j < changes; ++j) apply(ahead[j % kAhead]);
}

Choice choose(const std::vector<Candidates>& parts, const Bracket& bracket, std::int64_t kept, std::int64_t k,
              bool ties_all) {
  Choice choice;
  for (const Candidates& part : parts) {
    if (part.overflow()) return choice;
  }
  // Either more candidates are to be kept, the largest below the pivot, or fewer, all but the smallest from it on. They
  // are near the pivot, so an interval next to it is tried before the bracket's half.
  const std::uint32_t low = bracket.low.key, pivot = bracket.pivot_key(), end = bracket.largest() + 1;
  const std::int64_t missing = k - kept;
  const bool more = missing > 0;
  const double share = std::abs(static_cast<double>(missing)) / static_cast<double>(bracket.expected + 1);
  const std::uint32_t half = more ? pivot - low : end - pivot;
  const std::uint32_t near = static_cast<std::uint32_t>(std::min(1.0, 1.5 * share + 0.03) * (end - low));
  std::uint32_t first = 0, last = 0;
  bool contains = false;
  for (const std::uint32_t width : {std::min(half, near), half}) {
    if (width == 0) continue;
    first = more ? pivot - width : pivot;
    last = more ? pivot - 1 : pivot + width - 1;
    choice.unsettled = collect(parts, first, last);
    contains = more ? missing <= choice.unsettled.size() : -missing < choice.unsettled.size();
    if (contains || width == half) break;
  }
  if (!contains) {
    if (more && bracket.reaches_the_end()) choice.kind = Choice::Kind::everything;
    return choice;
  }
  const std::int64_t size = choice.unsettled.size(), wanted = more ? missing : size + missing;
  const KeyInterval interval = KeyHistogram(choice.unsettled.keys.get(), size, first, last).locate(wanted - 1, 0);
  choice.kind = Choice::Kind::decided;
  choice.key = interval.low;
  choice.first = more ? choice.key : first;
  choice.last = more ? last : choice.key;
  choice.ties = ties_all ? kAllTies : wanted - interval.larger;
  choice.count = ties_all ? k - wanted + interval.larger + interval.count : k;
  return choice;
}

}  // namespace pecker_fast
