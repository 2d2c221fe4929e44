// Lane permutations for instruction sets without compress and expand: one row for each of the 256 masks of 8 lanes.
#pragma once

#include <cstdint>

namespace pecker_fast {

struct LaneTable {
  alignas(64) std::uint8_t rows[256][8];
};

// Row b lists the set bits of b, lowest first; the rest is 0.
constexpr LaneTable make_compress_table() {
  LaneTable table{};
  for (int bits = 0; bits < 256; ++bits) {
    int count = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (bits >> lane & 1) table.rows[bits][count++] = static_cast<std::uint8_t>(lane);
    }
  }
  return table;
}

// Entry i of row b is the number of set bits below bit i, with the sign bit set where bit i is.
constexpr LaneTable make_spread_table() {
  LaneTable table{};
  for (int bits = 0; bits < 256; ++bits) {
    int count = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const int bit = bits >> lane & 1;
      table.rows[bits][lane] = static_cast<std::uint8_t>(count | bit << 7);
      count += bit;
    }
  }
  return table;
}

inline constexpr LaneTable kCompressTable = make_compress_table();
inline constexpr LaneTable kSpreadTable = make_spread_table();

}  // namespace pecker_fast
