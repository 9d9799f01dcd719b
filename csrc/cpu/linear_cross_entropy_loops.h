// the loops over a row of logits, for the instruction set of this processor
#pragma once

#include "isa.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace apical {

// how exponentials become a gradient
struct Slopes {
  float shift, factor, offset, per_cap;
  const float* weight;
};

}  // namespace apical

#define ISA_SOURCE "vector_rows.h"
#include "each_isa.h"

namespace apical {

using MakeLogits = void (*)(float*, int64_t, const float*, float, float);
using RowSum = double (*)(const float*, int64_t, const float*);
using ExpSums = std::pair<double, double> (*)(const float*, int64_t, float, const float*, float*);
using Gradient = double (*)(float*, int64_t, const Slopes&, uint16_t*);

struct Loops {
  const char* isa;
  MakeLogits make_logits[2][2];  // with a bias, with a cap
  float (*row_max)(const float*, int64_t);
  RowSum row_sum[2];           // weighted
  ExpSums exp_sums[2];         // kept
  Gradient gradient[3][2][2];  // of exponentials, logits, capped logits; weighted; to bfloat16
};

#define APICAL_OUTPUTS(isa, exp, cap, weighted) \
  {isa::gradient<exp, cap, weighted, false>, isa::gradient<exp, cap, weighted, true>}
#define APICAL_GRADIENTS(isa, exp, cap) \
  {APICAL_OUTPUTS(isa, exp, cap, false), APICAL_OUTPUTS(isa, exp, cap, true)}
#define APICAL_LOOPS(isa)                                                                      \
  {#isa,                                                                                       \
   {{isa::make_logits<false, false>, isa::make_logits<false, true>},                           \
    {isa::make_logits<true, false>, isa::make_logits<true, true>}},                            \
   isa::row_max,                                                                               \
   {isa::row_sum<false>, isa::row_sum<true>},                                                  \
   {isa::exp_sums<false>, isa::exp_sums<true>},                                                \
   {APICAL_GRADIENTS(isa, false, false), APICAL_GRADIENTS(isa, true, false),                   \
    APICAL_GRADIENTS(isa, true, true)}}

inline const Loops& loops() {
  static const Loops all[] = {
      APICAL_LOOPS(baseline),
#if defined(__x86_64__)
      APICAL_LOOPS(avx2),
      APICAL_LOOPS(avx512),
#endif
  };
  return all[isa()];
}

}  // namespace apical
