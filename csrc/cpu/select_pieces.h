// The entries of many tensors, cut into pieces for the kernels and divided among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "common/bit_words.h"
#include "cpu/quotients.h"
#include "cpu/select.h"

namespace pecker_fast {

struct ScoreTensor {
  const void* data;
  ParamType type;
  std::int64_t numel;
  const void* others = nullptr;  // the denominators of relative scores, of the same type and size
  float damping = 0.0f;
};

// Most entries of a piece with quotients: they stay in the first-level cache.
constexpr std::int64_t kQuotientPiece = 4096;

// Room for the quotients of one piece, empty until it is needed.
class Quotients {
 public:
  float* room() {
    if (values_.empty()) values_.resize(kQuotientPiece);
    return values_.data();
  }

 private:
  std::vector<float> values_;
};

// Runs task(0) ... task(n - 1), in any order, on any threads.
using Parallel = std::function<void(std::int64_t n, const std::function<void(std::int64_t)>& task)>;

// At most kScanPiece entries of one tensor, or kQuotientPiece.
struct Piece {
  const char* data;
  ParamType type;
  std::int64_t length;
  std::int64_t first;  // index of the first entry among all entries
  std::int64_t word;   // index of the first word in a row of the mask
  std::int64_t tensor;
  const char* others;  // null if the entries themselves are ranked
  float damping;

  // The values to rank: the entries, or their quotients, which are valid until `quotients` is used again.
  ScanRange range(std::int64_t offset, std::int64_t count, Quotients* quotients) const {
    const ScanRange entries = ScanRange{data, type, length}.part(offset, count);
    if (others == nullptr) return entries;
    float* const room = quotients->room();
    write_quotients({entries, ScanRange{others, type, length}.part(offset, count).data, damping}, room);
    return {room, ParamType::f32, count};
  }
  ScanRange range(Quotients* quotients) const { return range(0, length, quotients); }

  // Prefetches entries that will be read soon.
  void prefetch(std::int64_t offset, std::int64_t count) const {
    constexpr std::int64_t kLine = 64;
    const std::int64_t width = type == ParamType::f32 ? 4 : 2;
    for (std::int64_t at = offset * width; at < (offset + count) * width; at += kLine) {
      prefetch_read(data + at);
      if (others != nullptr) prefetch_read(others + at);
    }
  }
};

class Pieces {
 public:
  // `tasks`: the number of parts of equal size that the entries are divided into.
  Pieces(const std::vector<ScoreTensor>& tensors, std::int64_t tasks, Parallel parallel)
      : parallel_(std::move(parallel)) {
    std::int64_t number = 0;
    for (const ScoreTensor& tensor : tensors) {
      const std::int64_t width = tensor.type == ParamType::f32 ? 4 : 2;
      const auto* const others = static_cast<const char*>(tensor.others);
      const std::int64_t most = others == nullptr ? kScanPiece : kQuotientPiece;
      for (std::int64_t begin = 0; begin < tensor.numel; begin += most) {
        pieces_.push_back({static_cast<const char*>(tensor.data) + begin * width, tensor.type,
                           std::min(most, tensor.numel - begin), entries_ + begin, words_ + begin / kWordBits, number,
                           others == nullptr ? nullptr : others + begin * width, tensor.damping});
      }
      entries_ += tensor.numel;
      words_ += word_count(tensor.numel);
      bytes_ += tensor.numel * width;
      ++number;
    }
    for (std::int64_t task = 0, piece = 0; task < tasks; ++task) {
      task_begin_.push_back(piece);
      const std::int64_t target = entries_ / tasks * (task + 1);
      while (piece < size() && (pieces_[piece].first < target || task + 1 == tasks)) ++piece;
    }
    task_begin_.push_back(size());
  }

  std::int64_t size() const { return static_cast<std::int64_t>(pieces_.size()); }
  const Piece& operator[](std::int64_t p) const { return pieces_[p]; }
  std::int64_t entries() const { return entries_; }
  std::int64_t words() const { return words_; }
  std::int64_t bytes() const { return bytes_; }

  std::int64_t tasks() const { return static_cast<std::int64_t>(task_begin_.size()) - 1; }
  // The pieces of a task: begin(task) to begin(task + 1) - 1.
  std::int64_t begin(std::int64_t task) const { return task_begin_[task]; }
  const Parallel& parallel() const { return parallel_; }

  // Runs body(task) for all tasks.
  void for_tasks(const std::function<void(std::int64_t)>& body) const { parallel_(tasks(), body); }

 private:
  std::vector<Piece> pieces_;
  std::vector<std::int64_t> task_begin_;
  Parallel parallel_;
  std::int64_t entries_ = 0, words_ = 0, bytes_ = 0;
};

}  // namespace pecker_fast
