// the softmax passes of the fused linear cross-entropy, in place on a chunk of logits
#include "../linear_cross_entropy.h"
#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

#define ISA_SOURCE "vector_rows.h"
#include "each_isa.h"

namespace apical {
namespace {

struct Loops {
  const char* isa;
  float (*row_max)(const float*, int64_t);
  double (*exp_sum)(float*, int64_t, float);
  double (*exp_sum_keep)(float*, int64_t, float);
  void (*scale_row)(float*, int64_t, float);
};

#define APICAL_LOOPS(isa) \
  {#isa, isa::row_max, isa::exp_sum<false>, isa::exp_sum<true>, isa::scale_row}

const Loops& loops() {
  static const Loops all[] = {
      APICAL_LOOPS(baseline),
#if defined(__x86_64__)
      APICAL_LOOPS(avx2),
      APICAL_LOOPS(avx512),
#endif
  };
  return all[isa()];
}

// a row's softmax, without rounding 1 - p: `rest` is the sum over every entry but the target
struct Softmax {
  double rest, target, nll, lse;
};

// leaves exp(logits - max) in the row when kKeep, and 0 or the logit's -inf at the target
template <bool kKeep>
Softmax softmax(const Loops& loops, float* row, int64_t size, int64_t target) {
  const float logit = row[target];
  row[target] = -std::numeric_limits<float>::infinity();
  const float max = std::max(loops.row_max(row, size), logit);
  const double rest = (kKeep ? loops.exp_sum_keep : loops.exp_sum)(row, size, max);
  // 0 when the target has the largest logit: then log1p keeps a loss far below float's epsilon
  const double below = static_cast<double>(logit) - max;
  const double own = std::exp(below), log_sum = std::log1p(rest + (own - 1.0));
  return {rest, own, log_sum - below, max + log_sum};
}

// d (nll + z lse^2) / d logits = (1 + 2 z lse) softmax - onehot, times scale
void gradient_row(const Loops& loops, float* row, int64_t size, int64_t target, double scale,
                  double z_loss, float* nll, float* lse) {
  const Softmax s = softmax<true>(loops, row, size, target);
  const double sum = s.rest + s.target, pull = 2.0 * z_loss * s.lse;
  loops.scale_row(row, size, static_cast<float>(scale * (1.0 + pull) / sum));
  row[target] = static_cast<float>(scale * (pull * s.target - s.rest) / sum);
  *nll = static_cast<float>(s.nll);
  *lse = static_cast<float>(s.lse);
}

void check_targets(const int64_t* target, const float* scale, int64_t rows, int64_t size) {
  for (int64_t r = 0; r < rows; ++r) {
    if (scale && scale[r] == 0.0f) continue;
    STD_TORCH_CHECK(target[r] >= 0 && target[r] < size, "target[", r, "] is ", target[r],
                    ", expected 0 <= target < V = ", size);
  }
}

std::tuple<Tensor, Tensor> softmax_grad(Tensor logits, const Tensor& target, const Tensor& scale,
                                        double z_loss) {
  check_rows(logits, target);
  check_vector(scale, "scale", ScalarType::Float, logits.size(0));
  const int64_t rows = logits.size(0), size = logits.size(1);
  auto* p = static_cast<float*>(logits.mutable_data_ptr());
  const auto* t = static_cast<const int64_t*>(target.const_data_ptr());
  const auto* s = static_cast<const float*>(scale.const_data_ptr());
  check_targets(t, s, rows, size);
  auto [nll, lse] = new_row_values(logits);
  auto* n = static_cast<float*>(nll.mutable_data_ptr());
  auto* l = static_cast<float*>(lse.mutable_data_ptr());
  // chosen here: an error must not be thrown inside parallel_for
  const Loops& best = loops();
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (s[r] == 0.0f) {
        std::fill_n(p + r * size, size, 0.0f);
        n[r] = l[r] = 0.0f;
      } else {
        gradient_row(best, p + r * size, size, t[r], s[r], z_loss, n + r, l + r);
      }
    }
  });
  return {nll, lse};
}

std::tuple<Tensor, Tensor> softmax_nll(Tensor logits, const Tensor& target) {
  check_rows(logits, target);
  const int64_t rows = logits.size(0), size = logits.size(1);
  auto* p = static_cast<float*>(logits.mutable_data_ptr());
  const auto* t = static_cast<const int64_t*>(target.const_data_ptr());
  check_targets(t, nullptr, rows, size);
  auto [nll, lse] = new_row_values(logits);
  auto* n = static_cast<float*>(nll.mutable_data_ptr());
  auto* l = static_cast<float*>(lse.mutable_data_ptr());
  const Loops& best = loops();
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Softmax s = softmax<false>(best, p + r * size, size, t[r]);
      n[r] = static_cast<float>(s.nll);
      l[r] = static_cast<float>(s.lse);
    }
  });
  return {nll, lse};
}

std::string cpu_isa() { return loops().isa; }

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  // rows with scale 0 are ignored: their target is not read, and they become 0
  m.def("softmax_grad_(Tensor(a!) logits, Tensor target, Tensor scale, float z_loss)"
        " -> (Tensor nll, Tensor lse)");
  // the loss alone; logits are scratch
  m.def("softmax_nll_(Tensor(a!) logits, Tensor target) -> (Tensor nll, Tensor lse)");
  // the instruction set that the CPU passes use
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(apical, CPU, m) {
  m.impl("softmax_grad_", TORCH_BOX(&apical::softmax_grad));
  m.impl("softmax_nll_", TORCH_BOX(&apical::softmax_nll));
}

STABLE_TORCH_LIBRARY_IMPL(apical, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&apical::cpu_isa));
}
