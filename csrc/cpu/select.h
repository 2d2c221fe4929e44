// Selection kernels on the CPU: one instruction set's versions, and the choice among them. Raw pointers only.
#pragma once

#include <cstdint>

#include "common/radix_key.h"
#include "cpu/param_type.h"

namespace pecker_fast {

// Entries that a scan takes at a time: their offsets fit 16 bits, and they stay in the second-level cache.
constexpr std::int64_t kScanPiece = 16384;
constexpr std::int64_t kScanWords = kScanPiece / 32;

// What a scan found. `pending` counts entries with low <= key < high; their words are listed in `Pending`.
struct ScanCounts {
  std::int64_t kept = 0;
  std::int64_t pending = 0;
  std::int64_t nan = 0;
};

// Words with pending entries: number of the word in the piece, and their bits.
struct Pending {
  std::int64_t size = 0;
  std::uint16_t word[kScanWords];
  std::uint32_t bits[kScanWords];
};

// A run of entries of one tensor, at most kScanPiece.
struct ScanRange {
  const void* data;
  ParamType type;
  std::int64_t length;
};

// Writes the mask words of a range: bit set where high <= key <= kInfKey. Lists and counts the entries with
// low <= key < high. 1 <= low <= high <= kInfKey + 1. Bits past the end are 0.
ScanCounts scan_range(const ScanRange& range, std::uint32_t high, std::uint32_t low, std::uint32_t* words,
                      Pending* pending);

// Keys of the pending entries of a range, and their positions counted from `base`, in order.
void list_pending(const ScanRange& range, const Pending& pending, std::int64_t base, std::uint32_t* keys,
                  std::uint16_t* positions);

// Key of entry i of a tensor.
std::uint32_t key_at(const void* data, ParamType type, std::int64_t i);

// Set bits of the words of `entries` entries; bits past the end do not count.
std::int64_t count_bits(const std::uint32_t* words, std::int64_t entries);

// Smallest key of the entries whose bit is set; kInfKey if there are none.
std::uint32_t smallest_kept(const ScanRange& range, const std::uint32_t* words);

// Adds to bins[b] the entries that are neither zero nor NaN, have `prefix` above the level's bits, and b in them.
void histogram_range(const ScanRange& range, std::uint32_t prefix, int level, std::int64_t* bins);

}  // namespace pecker_fast
