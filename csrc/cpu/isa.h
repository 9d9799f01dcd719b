// which of the instruction sets that a source is compiled for this process uses
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string>

namespace apical {

struct Isa {
  const char* name;
  bool supported;
};

// from the narrowest to the widest: tables of functions, one entry per set, have the same order
inline int choose_isa() {
  const Isa all[] = {
      {"baseline", true},
#if defined(__x86_64__)
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"avx512", __builtin_cpu_supports("avx512f") != 0},
#endif
  };
  const char* wanted = std::getenv("APICAL_ISA");
  for (int i = static_cast<int>(sizeof(all) / sizeof(*all)) - 1; i >= 0; --i) {
    if (all[i].supported && (!wanted || wanted == std::string(all[i].name))) return i;
  }
  STD_TORCH_CHECK(false, "APICAL_ISA=", wanted, " is unknown or not supported by this processor; ",
                  "use baseline, avx2 or avx512, or unset it");
}

// the widest supported set, or the one that the environment variable APICAL_ISA names
inline int isa() {
  static const int chosen = choose_isa();
  return chosen;
}

}  // namespace apical
