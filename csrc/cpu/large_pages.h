// large pages for matrices of which a few lines of each row are used at a time
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace apical {

// before the memory is first written: with small pages, every row is an address to look up
inline void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const auto from = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto to = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace apical
