// float32 times a number, rounded to bfloat16: a gradient on its way out, in one pass over memory
#include "amx.h"
#include "pages.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef APICAL_AMX
#include "attention_amx_pack.h"
#endif

namespace apical {
namespace {

#ifdef APICAL_AMX
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLine = 32, kGrain = 1024;  // elements of a line, lines of a task

AMX_TARGET void round_line(const float* from, float factor, uint16_t* to, int64_t left) {
  const __mmask32 mask = amx::first_lanes(left);
  const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
  const __m512 by = _mm512_set1_ps(factor);
  amx::store_channels(to, _mm512_mul_ps(_mm512_maskz_loadu_ps(low, from), by),
                      _mm512_mul_ps(_mm512_maskz_loadu_ps(high, from + kLine / 2), by), left);
}

AMX_TARGET void round_lines(const float* from, float factor, uint16_t* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kLine) round_line(from + i, factor, to + i, size - i);
  _mm_sfence();  // stores past the caches
}

Tensor rounded(const Tensor& from, const Tensor& factor) {
  STD_TORCH_CHECK(amx_supported(), "this processor has no matrix unit for bfloat16 (AMX)");
  STD_TORCH_CHECK(from.is_contiguous() && from.scalar_type() == ScalarType::Float,
                  "from must be contiguous and float32");
  STD_TORCH_CHECK(factor.numel() == 1 && factor.scalar_type() == ScalarType::Float,
                  "factor must be one float32 number");
  Tensor out = torch::stable::new_empty(from, from.sizes(), ScalarType::BFloat16);
  const auto* source = static_cast<const float*>(from.const_data_ptr());
  const float by = *static_cast<const float*>(factor.const_data_ptr());
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  const int64_t size = from.numel(), lines = (size + kLine - 1) / kLine;
  bring_in(to, size * 2);
  torch::stable::parallel_for(0, lines, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLine;
    round_lines(source + first, by, to + first, std::min(size, end * kLine) - first);
  });
  return out;
}
#endif

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  // float32 times a float32 number, as bfloat16
  m.def("amx_rounded(Tensor from, Tensor factor) -> Tensor");
}

#ifdef APICAL_AMX
STABLE_TORCH_LIBRARY_IMPL(apical, CPU, m) { m.impl("amx_rounded", TORCH_BOX(&apical::rounded)); }
#endif
