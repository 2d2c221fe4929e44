// Large blocks of fresh memory in large pages: otherwise the first write to every 4 KB is a page fault.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pecker_fast {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Requests large pages for a block that is about to be written as a whole. The system may ignore this hint.
inline void advise_huge_pages(void* block, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(block) + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(block) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(block);
  static_cast<void>(bytes);
#endif
}

struct FreeLarge {
  void operator()(void* block) const { ::operator delete(block, std::align_val_t{kHugePage}); }
};
// An array without initial values, of integers.
template <typename T>
using LargeArray = std::unique_ptr<T[], FreeLarge>;

template <typename T>
LargeArray<T> make_large_array(std::int64_t size) {
  std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
  // The last large page may be half empty.
  if (bytes % kHugePage >= kHugePage / 2) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* const block = ::operator new(bytes, std::align_val_t{kHugePage});
  advise_huge_pages(block, bytes);
  return LargeArray<T>(static_cast<T*>(block));
}

}  // namespace pecker_fast
