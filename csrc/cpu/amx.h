// whether this process may use the matrix unit (AMX) for bfloat16
#pragma once

// compilers without these instructions leave the operations out, and `amx_supported` says so
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define APICAL_AMX 1
// gcc 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#endif

namespace apical {

#ifdef APICAL_AMX
inline bool ask_for_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & 1u << 22) && (d & 1u << 24);
  const bool bfloat16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
  // these ask whether the system keeps the registers, too
  const bool vectors = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl");
  // the system hands out the tile registers to a process that asks: ARCH_REQ_XCOMP_PERM, tile data
  return tiles && bfloat16 && vectors && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

// a narrower set of instructions that the environment names has none of this
inline bool amx_supported() {
  static const bool found = !std::getenv("APICAL_ISA") && ask_for_amx();
  return found;
}
#else
inline bool amx_supported() { return false; }
#endif

}  // namespace apical
