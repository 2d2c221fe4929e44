#include "cpu/select_candidates.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/select_order.h"

namespace pecker_fast {
namespace {

template <typename T>
void grow(std::int64_t size, std::int64_t room, LargeArray<T>* array) {
  LargeArray<T> grown = make_large_array<T>(room);
  std::copy_n(array->get(), size, grown.get());
  *array = std::move(grown);
}

}  // namespace

// Tasks meet different numbers of candidates, so each starts with its share of the expected number and may grow to all
// of it.
Candidates::Candidates(std::int64_t expected, std::int64_t tasks) : limit_(expected * 5 / 4 + 4096) {
  reserve(expected / tasks * 9 / 8 + 1024 + kScanPiece + kOpenSlack);
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

void Candidates::collect(const std::vector<Window>& windows) const {
  // A part stays in the cache for all windows.
  constexpr std::int64_t kPart = 4096;
  for (const Window& window : windows) window.unsettled->size = 0;
  for (std::int64_t first = 0; first < size_; first += kPart) {
    const std::int64_t count = std::min(kPart, size_ - first);
    for (const Window& window : windows) {
      Unsettled& unsettled = *window.unsettled;
      if (unsettled.size + count + kCollectSlack > unsettled.room) {
        unsettled.room = 2 * unsettled.room + 4 * kPart;
        unsettled.keys.resize(static_cast<std::size_t>(unsettled.room));
        unsettled.indices.resize(static_cast<std::size_t>(unsettled.room));
      }
      unsettled.size += collect_keys(keys_.get() + first, count, window.first, window.last,
                                     static_cast<std::uint32_t>(first), unsettled.keys.data() + unsettled.size,
                                     unsettled.indices.data() + unsettled.size);
    }
  }
}

void Candidates::settle(const Unsettled& unsettled, const Decision& decision, const Pieces& pieces,
                        std::int64_t first_piece, std::uint32_t* words) const {
  // The words have left the cache since they were written, so they are prefetched.
  struct Change {
    std::uint32_t* word;
    std::uint32_t bit;
    bool keep;
  };
  constexpr std::int64_t kAhead = 48;
  Change ahead[kAhead];
  const auto apply = [](const Change& change) {
    *change.word = change.keep ? *change.word | change.bit : *change.word & ~change.bit;
  };
  std::int64_t changes = 0, piece = 0, ties = decision.ties;
  const std::int64_t piece_count = static_cast<std::int64_t>(piece_begin_.size());
  for (std::int64_t i = 0; i < unsettled.size; ++i) {
    const std::uint32_t key = unsettled.keys[i], index = unsettled.indices[i];
    if (key < decision.first || key > decision.last) continue;
    while (piece + 1 < piece_count && piece_begin_[piece + 1] <= index) ++piece;
    const bool tie = key == decision.key, keep = key > decision.key || (tie && ties > 0);
    ties -= tie;
    Change& change = ahead[changes % kAhead];
    if (changes >= kAhead) apply(change);
    const std::uint16_t offset = offsets_[index];
    change = {words + pieces[first_piece + piece].word + offset / kWordBits, std::uint32_t{1} << (offset % kWordBits), keep};
    prefetch_read(change.word);
    ++changes;
  }
  for (std::int64_t j = std::max<std::int64_t>(0, changes - kAhead); j < changes; ++j) apply(ahead[j % kAhead]);
}

Search::Search(const Bracket& bracket, std::int64_t kept, std::int64_t k, std::int64_t tasks)
    : bracket_(bracket), k_(k), missing_(k - kept), unsettled_(static_cast<std::size_t>(tasks)) {
  const std::uint32_t low = bracket.low.key, pivot = bracket.pivot_key(), end = bracket.largest() + 1;
  const double share = std::abs(static_cast<double>(missing_)) / static_cast<double>(bracket.expected + 1);
  half_ = more() ? pivot - low : end - pivot;
  near_ = std::min(half_, static_cast<std::uint32_t>(std::min(1.0, 1.5 * share + 0.03) * (end - low)));
}

bool Search::advance() {
  if (found_ || width_ == half_) return false;
  width_ = width_ == 0 && near_ > 0 ? near_ : half_;
  const std::uint32_t pivot = bracket_.pivot_key();
  first_ = more() ? pivot - width_ : pivot;
  last_ = more() ? pivot - 1 : pivot + width_ - 1;
  return true;
}

void Search::look(bool ties_all) {
  std::vector<KeyRun> runs;
  std::int64_t size = 0;
  for (const Unsettled& unsettled : unsettled_) {
    runs.push_back({unsettled.keys.data(), unsettled.size});
    size += unsettled.size;
  }
  found_ = more() ? missing_ <= size : -missing_ < size;
  if (!found_) return;
  const std::int64_t wanted = more() ? missing_ : size + missing_;
  const KeyInterval interval = KeyHistogram(runs, first_, last_).locate(wanted - 1, 0);
  key_ = interval.low;
  ties_ = ties_all ? kAllTies : wanted - interval.larger;
  count_ = ties_all ? k_ - wanted + interval.larger + interval.count : k_;
}

Decision Search::decision(std::int64_t task) const {
  std::int64_t ties = ties_;
  // Less the ties that earlier tasks have met.
  for (std::int64_t t = 0; t < task && ties_ != kAllTies; ++t) {
    ties -= std::count(unsettled_[t].keys.data(), unsettled_[t].keys.data() + unsettled_[t].size, key_);
  }
  return {more() ? key_ : first_, more() ? last_ : key_, key_, ties};
}

}  // namespace pecker_fast
