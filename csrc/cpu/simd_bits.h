// Bit counts for one instruction set, in namespace PF_ISA. No include guard: see simd.h.
namespace pecker_fast {
namespace PF_ISA {

inline int count_bits(std::uint64_t x) {
#if PF_SIMD_LEVEL > 0
  return static_cast<int>(_mm_popcnt_u64(x));
#else
  x -= x >> 1 & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<int>(x * 0x0101010101010101u >> 56);
#endif
}

// Index of the lowest set bit; anything for 0.
inline int lowest_bit(std::uint64_t x) {
#if PF_SIMD_LEVEL > 0
  return static_cast<int>(_tzcnt_u64(x));
#else
  return count_bits((x & (0u - x)) - 1u) & 63;
#endif
}

}  // namespace PF_ISA
}  // namespace pecker_fast
