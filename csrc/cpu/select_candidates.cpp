#include "cpu/select_candidates.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/select_order.h"

namespace pecker_fast {
namespace {

// The candidates with low <= key <= high.
Unsettled collect(const std::vector<Candidates>& parts, std::uint32_t low, std::uint32_t high) {
  std::int64_t room = kCollectSlack;
  for (const Candidates& part : parts) room += part.size();
  Unsettled result;
  result.keys.reset(new std::uint32_t[room]);
  result.indices.reset(new std::uint32_t[room]);
  result.begin.push_back(0);
  for (const Candidates& part : parts) {
    const std::int64_t size = result.size();
    const std::int64_t more = collect_keys(part.keys(), part.size(), low, high, result.keys.get() + size,
                                           result.indices.get() + size);
    result.begin.push_back(size + more);
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
  const std::int64_t room = std::max(wanted, room_ * 3 / 2);
  std::unique_ptr<std::uint32_t[]> keys(new std::uint32_t[room]);
  std::unique_ptr<std::uint16_t[]> offsets(new std::uint16_t[room]);
  std::copy_n(keys_.get(), size_, keys.get());
  std::copy_n(offsets_.get(), size_, offsets.get());
  keys_ = std::move(keys);
  offsets_ = std::move(offsets);
  room_ = room;
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

void Candidates::settle(const std::uint32_t* indices, std::int64_t size, std::uint32_t key, std::int64_t ties,
                        const Pieces& pieces, std::int64_t first_piece, std::uint32_t* words) const {
  // The words have left the cache since they were written, so they are fetched ahead.
  constexpr std::int64_t kAhead = 16;
  std::uint32_t* ahead[kAhead];
  std::size_t p = 0;
  for (std::int64_t i = 0; i < size + kAhead; ++i) {
    if (i >= kAhead) {
      const std::uint32_t index = indices[i - kAhead], shift = offsets_[index] % kWordBits;
      const bool tie = keys_[index] == key;
      const std::uint32_t keep = keys_[index] > key || (tie && ties > 0);
      ties -= tie;
      std::uint32_t& word = *ahead[i % kAhead];
      word = (word & ~(std::uint32_t{1} << shift)) | keep << shift;
    }
    if (i >= size) continue;
    while (p + 1 < piece_begin_.size() && piece_begin_[p + 1] <= indices[i]) ++p;
    ahead[i % kAhead] = words + pieces[first_piece + static_cast<std::int64_t>(p)].word + offsets_[indices[i]] / kWordBits;
    prefetch_read(ahead[i % kAhead]);
  }
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
  choice.ties = ties_all ? kAllTies : wanted - interval.larger;
  choice.count = ties_all ? k - wanted + interval.larger + interval.count : k;
  return choice;
}

}  // namespace pecker_fast
