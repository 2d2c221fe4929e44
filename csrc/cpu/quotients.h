// Quotients that rank relative scores, and exact sums of magnitudes; compiled for several instruction sets. Raw
// pointers only.
#pragma once

#include <cstdint>

#include "cpu/select.h"

namespace pecker_fast {

// Two ranges of the same length and type.
struct QuotientRange {
  ScanRange scores;
  const void* others;
  float damping;
};

// Writes the quotients (common/radix_key.h) of a range, one float per entry.
void write_quotients(const QuotientRange& range, float* quotients);

// Adds the magnitudes of a range to the kSumColumns sums.
void add_magnitudes(const ScanRange& range, std::int64_t* sums);

}  // namespace pecker_fast
