// the loops over stored entries, for the instruction set of this processor
#pragma once

#include "isa.h"
#include "sparse_rows_plan.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace apical {
namespace {

// tokens that are packed together: few, so that a tile stays in the nearest caches; more where the
// sums of lanes at the end are shared by them. Of 32, 64 and 128 tokens and blocks of 128 to 512
// columns these were the fastest (2048 x 1024 x 1024 and 2048^3, density .03, Xeon with AMX)
constexpr int64_t kAddTokens = 32, kSampleTokens = 128;
static_assert(Plan::kWidth * kSampleTokens <= 1 << 16, "offsets have 16 bits");

struct Matrix {
  void* data;
  int64_t rows, size, stride;
};

struct SparseJob {
  Matrix left;  // (T, n): the output, or its gradient
  Matrix input;
  const Plan* plan;
  const float* values;  // in the order of the plan

  // floats of scratch for one thread
  int64_t scratch(int64_t tokens) const { return (Plan::kWidth + left.size) * tokens; }
};

}  // namespace
}  // namespace apical

#define ISA_SOURCE "sparse_rows_vector.h"
#include "each_isa.h"

namespace apical {
namespace {

// by type: float32, bfloat16
struct SparseLoops {
  void (*add[2])(const SparseJob&, int64_t, float*);
  void (*sample[2])(const SparseJob&, int64_t, float*, float*);
};

#define APICAL_SPARSE_LOOPS(isa)                              \
  {{isa::add_tokens<float>, isa::add_tokens<isa::Bfloat16>},  \
   {isa::sample_tokens<float>, isa::sample_tokens<isa::Bfloat16>}}

const SparseLoops& sparse_loops() {
  static const SparseLoops all[] = {
      APICAL_SPARSE_LOOPS(baseline),
#if defined(__x86_64__)
      APICAL_SPARSE_LOOPS(avx2),
      APICAL_SPARSE_LOOPS(avx512),
#endif
  };
  return all[isa()];
}

}  // namespace
}  // namespace apical
