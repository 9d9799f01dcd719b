// everything that attention needs of one instruction set, as vector.h says
#include "tile_products.h"
#include "attention_pack.h"
#include "attention_math.h"
#include "attention_scores.h"
#include "attention_forward.h"
#include "attention_backward.h"

namespace apical::ISA {

// bytes that these buffers take
template <class Buffers>
static int64_t scratch_of(const Job& job) {
  Scratch none{nullptr};
  Buffers(job, none);
  return none.next - static_cast<char*>(nullptr);
}

}  // namespace apical::ISA

#undef ISA
#undef ISA_TARGET
#undef ISA_BYTES
