// Selection kernels on the CPU, each compiled for several instruction sets. Raw pointers only.
#pragma once

#include <cstdint>

#include "common/radix_key.h"
#include "cpu/param_type.h"

namespace pecker_fast {

// Most entries of a range: offsets into it fit 16 bits, and a range stays in the second-level cache.
constexpr std::int64_t kScanPiece = 16384;
// Entries that the kernels hold in registers at a time; their mask bits are one 64-bit word.
constexpr std::int64_t kScanBlock = 64;
// Most rows of one call of scan_range or keep_range.
constexpr int kScanRows = 8;

// Consecutive entries of one tensor, at most kScanPiece.
struct ScanRange {
  const void* data;
  ParamType type;
  std::int64_t length;

  ScanRange part(std::int64_t offset, std::int64_t count) const {
    return {static_cast<const char*>(data) + offset * (type == ParamType::f32 ? 4 : 2), type, count};
  }
};

// A grid of float keys: origin + i * 2 ** shift, with an int16 i. Keys beyond its ends count as its ends.
struct Quantization {
  std::uint32_t origin;
  int shift;
};
// Most steps of the grid from a row's pivot to its bounds.
constexpr std::uint32_t kMostSteps = 127;

// One row of a scan, 1 <= low <= pivot <= high <= kInfKey + 1. Entries with key >= pivot are kept; for those with
// low <= key < high this is provisional ("open").
struct ScanRow {
  std::uint32_t pivot, low, high;
  std::uint32_t* words;  // written: bit set if kept; bits past the end are 0
  std::int64_t kept = 0;
};

// Where a scan writes the keys of the open entries of any row, and their positions counted from `base`, in order. Both
// arrays have room for all entries of the range and kOpenSlack more.
struct OpenEntries {
  std::uint32_t* keys;
  std::uint16_t* positions;
  std::int64_t base;
  std::int64_t count = 0;
};
constexpr std::int64_t kOpenSlack = 2;

// One row of a mask of all entries with key >= `key`, 1 <= key <= kInfKey + 1.
struct KeepRow {
  std::uint32_t key;
  std::uint32_t* words;  // as in ScanRow
  std::int64_t kept = 0;
  std::uint32_t smallest = kInfKey;  // key among the entries kept
};

// Both read the range once for all rows and return the number of NaN, which are neither kept nor open. `quantization`
// is for float entries of rows on its grid: it is faster than exact keys.
std::int64_t scan_range(const ScanRange& range, const Quantization* quantization, ScanRow* rows, int count,
                        OpenEntries* open);
std::int64_t keep_range(const ScanRange& range, KeepRow* rows, int count);

// Keys of the entries of a range; 0 for NaN.
void read_keys(const ScanRange& range, std::uint32_t* keys);

// Writes those of `size` keys that are in [low, high] to `inside`, in order, and returns how many. Unless `indices` is
// null, it receives their indices, counted from `base`. Both have room for kCollectSlack more.
constexpr std::int64_t kCollectSlack = 16;
std::int64_t collect_keys(const std::uint32_t* keys, std::int64_t size, std::uint32_t low, std::uint32_t high,
                          std::uint32_t base, std::uint32_t* inside, std::uint32_t* indices);

// Number of keys above `bound`.
std::int64_t count_above(const std::uint32_t* keys, std::int64_t size, std::uint32_t bound);

// Set bits of the words of `entries` entries; bits past the end do not count.
std::int64_t count_bits(const std::uint32_t* words, std::int64_t entries);

// Adds to bins[b] the entries that are neither zero nor NaN, have `prefix` above the level's bits, and b in them.
void histogram_range(const ScanRange& range, std::uint32_t prefix, int level, std::int64_t* bins);

}  // namespace pecker_fast
