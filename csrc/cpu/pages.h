// memory of results that is not there yet comes at once, not by a fault on every page
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace apical {

// before the memory is first written. backward of attention 349 to 308 ms (64 documents, 19,709
// tokens, 8 heads of 64, causal), bfloat16 loss 650 to 540 ms (2048 x 576 x 49152; one thread, Xeon
// with AMX, 2026-11-21). Large pages took 470 ms when asked for again and again, and 930 ms after
// anything else had used the memory: a virtual machine's host has to find them
inline void bring_in(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kPage = 4096;
  const auto from = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto to = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (data && from + 4 * kPage < to)
    madvise(reinterpret_cast<void*>(from), to - from, MADV_POPULATE_WRITE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace apical
