// the loops of products with blocks, for the instruction set of this processor
#pragma once

#include "isa.h"
#include "sparse_blocks_job.h"

#include <cstring>
#include <limits>

#define ISA_SOURCE "sparse_blocks_passes.h"
#include "each_isa.h"

namespace apical {

// of float32 and bfloat16
struct BlockLoops {
  BlockPlan (*plan)(const Blocks&, bool transposed);
  void (*pack[2])(const BlockJob&, const BlockPlan&, int64_t, int64_t);  // a range of products
  void (*add[2])(const BlockJob&, const BlockPlan&, int64_t, int64_t);   // a range of tokens
  void (*sample[2])(const BlockJob&, int64_t, int64_t);                  // a range of groups
};

#define APICAL_BOTH(isa, pass) \
  {isa::blocks::pass<float>, isa::blocks::pass<isa::Bfloat16>}
#define APICAL_BLOCKS(isa) \
  {isa::blocks::plan, APICAL_BOTH(isa, pack), APICAL_BOTH(isa, add), APICAL_BOTH(isa, sample)}

inline const BlockLoops& block_loops() {
  static const BlockLoops all[] = {
      APICAL_BLOCKS(baseline),
#if defined(__x86_64__)
      APICAL_BLOCKS(avx2),
      APICAL_BLOCKS(avx512),
#endif
  };
  return all[isa()];
}

}  // namespace apical
