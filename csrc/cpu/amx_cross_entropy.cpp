// the cross-entropy of a chunk of tokens and its gradients on the matrix unit (AMX), without the
// logits in memory: two sweeps over the vocabulary, of which the first leaves exponentials
#include "amx.h"
#include "pages.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#ifdef APICAL_AMX
#include "amx_loss_gradients.h"
#endif

namespace apical {
namespace {

#ifdef APICAL_AMX
using amx::Factors;
using amx::Found;
using amx::kDeep;
using amx::kSide;
using amx::LossChunk;
using amx::Range;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// how far a logit may be above the target's: far from the ends of bfloat16's range
constexpr double kFurthest = 50.0;

struct Labels {
  const float *id_weight, *token_weight;
  double z_loss, logit_scale;
};

// loss, nll, lse, entropy, correct
class Values {
 public:
  Values(const Tensor& like, int64_t size) {
    for (float*& value : values_) {
      tensors_.push_back(torch::stable::new_empty(like, {size}, ScalarType::Float));
      value = static_cast<float*>(tensors_.back().mutable_data_ptr());
    }
  }

  void put(int64_t i, const double (&row)[5]) const {
    for (int k = 0; k < 5; ++k) values_[k][i] = static_cast<float>(row[k]);
  }
  const Tensor& operator[](int i) const { return tensors_[i]; }

 private:
  std::vector<Tensor> tensors_;
  float* values_[5];
};

// a token's sums over the vocabulary but for its target, of all workers in order
struct Sums {
  double rest = 0, products = 0, max = amx::kLowest;

  Sums(const std::vector<Found>& found, int64_t i) {
    for (const Found& part : found) {
      rest += part.exps[i], products += part.products[i];
      max = std::max<double>(max, part.max[i]);
    }
  }

  // as if the target's logit had been so many nats lower
  void raise(double by) {
    products = std::exp(by) * (products + by * amx::kLog2E * rest);
    rest *= std::exp(by);
  }

  // NaN and infinities are not
  bool usable(double target) const {
    return std::isfinite(rest) && std::isfinite(target) && max <= kFurthest * amx::kLog2E;
  }
};

// the product of a token with its target, which the sweep rounds in every sum: a loss of 1e-6 has the
// error of a logit of 30
double exact_target(const LossChunk& chunk, int64_t i) {
  using torch::headeronly::BFloat16;
  const auto* x = reinterpret_cast<const BFloat16*>(chunk.x.at(i, 0));
  const auto* w = reinterpret_cast<const BFloat16*>(chunk.w.at(chunk.ids[i], 0));
  double sum = 0;
  for (int64_t k = 0; k < chunk.x.columns; ++k)
    sum += static_cast<double>(static_cast<float>(x[k])) * static_cast<float>(w[k]);
  return sum;
}

// values and factors of all tokens; false if some are out of reach of these exponentials
bool finish_tokens(const LossChunk& chunk, const std::vector<Found>& found, const Labels& labels,
                   const Values& values, Factors& factors) {
  bool usable = true;
  for (int64_t i = 0; i < chunk.x.rows; ++i) {
    Sums sums(found, i);
    const double target = labels.logit_scale * exact_target(chunk, i);
    usable = usable && sums.usable(target);
    const double by = labels.logit_scale * *(chunk.targets.floats() + i) - target;
    sums.raise(by);
    const double share = labels.id_weight[i], sum = 1.0 + sums.rest;
    // never a difference of large numbers: the target's exponential is 1
    const double nll = std::log1p(sums.rest), lse = target + nll;
    const double entropy = nll - sums.products * amx::kLn2 / sum;
    values.put(i, {share * nll + labels.z_loss * lse * lse, nll, lse, entropy,
                   sums.max <= 0 ? 1.0 : 0.0});
    const double outer = labels.logit_scale * labels.token_weight[i] / sum;
    const double slope = 2.0 * labels.z_loss * lse;
    factors.others[i] = static_cast<float>(outer * (share + slope) * std::exp(by));
    factors.target[i] = static_cast<float>(outer * (slope - share * sums.rest));
  }
  return usable;
}

std::vector<Found> sweep(const LossChunk& chunk) {
  amx::each_worker(chunk.blocks, [&](int64_t i) { chunk.prepare(i); });
  const int64_t workers = amx::workers_for((chunk.panels + amx::kPanels - 1) / amx::kPanels);
  std::vector<Found> found;
  for (int64_t i = 0; i < workers; ++i) found.emplace_back(chunk);
  amx::each_worker(workers, [&](int64_t i) {
    amx::LossSweep(chunk, found[i]).run(Range{0, chunk.panels}.part(i, workers, amx::kPanels));
  });
  return found;
}

void make_input_gradient(const LossChunk& chunk, std::vector<Found>& found, const Factors& factors,
                         float* to) {
  const amx::InputGradient gradient(chunk, found, factors, to);
  const int64_t parts = (chunk.x.rows + kSide - 1) / kSide;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) gradient.rows(i * kSide);
  });
}

void make_weight_gradient(const LossChunk& chunk, const Factors& factors, float* to, bool add) {
  const int64_t rows = chunk.w.rows, size = chunk.w.columns;
  const amx::WeightGradient gradient(chunk, factors, {to, size, rows, size}, add);
  torch::stable::parallel_for(0, chunk.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) gradient.prepare(i);
  });
  const int64_t workers = amx::workers_for(chunk.panels);
  amx::each_worker(workers, [&](int64_t i) {
    gradient.run(Range{0, chunk.panels}.part(i, workers, 1));
  });
}

void check(const Tensor& tensor, const char* name, ScalarType type, std::vector<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.is_contiguous();
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(same, name, " must be contiguous and of ", shape[0], " rows",
                  shape.size() > 1 ? ", of the width of x" : "");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ",
                  type == ScalarType::Long    ? "int64"
                  : type == ScalarType::Float ? "float32"
                                              : "bfloat16");
}

template <typename T>
const T* checked(const Tensor& tensor, const char* name, ScalarType type,
                 std::vector<int64_t> shape) {
  check(tensor, name, type, std::move(shape));
  return static_cast<const T*>(tensor.const_data_ptr());
}

float* result(std::optional<Tensor>& tensor, const char* name, int64_t rows, int64_t columns) {
  if (!tensor) return nullptr;
  check(*tensor, name, ScalarType::Float, {rows, columns});
  auto* data = static_cast<float*>(tensor->mutable_data_ptr());
  bring_in(data, rows * columns * 4);
  return data;
}

amx::Halves operand(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  return {checked<uint16_t>(tensor, name, ScalarType::BFloat16, {rows, columns}), columns, rows,
          columns};
}

uint16_t* scratch(const std::optional<Tensor>& exps, int64_t tokens, int64_t vocabulary) {
  const int64_t size = amx::round_up(tokens, kDeep) * amx::round_up(vocabulary, kDeep);
  STD_TORCH_CHECK(exps, "grad_weight needs exps");
  STD_TORCH_CHECK(exps->is_contiguous() && exps->scalar_type() == ScalarType::BFloat16 &&
                      exps->numel() >= size,
                  "exps must be bfloat16, contiguous, of at least ", size, " elements");
  auto* data = static_cast<uint16_t*>(exps->mutable_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 64 == 0, "exps must start a cache line");
  bring_in(data, size * 2);
  return data;
}

void check_call(const Tensor& x, const Tensor& weight, double logit_scale) {
  STD_TORCH_CHECK(amx_supported(), "this processor has no matrix unit for bfloat16 (AMX)");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(0) > 0 && x.size(1) > 0,
                  "x must be (C, H) and weight (V, H), C and H at least 1");
  STD_TORCH_CHECK(logit_scale != 0 && std::isfinite(logit_scale),
                  "logit_scale must be finite and not 0");
}

const int64_t* labels_of(const Tensor& ids, int64_t rows, int64_t vocabulary) {
  const auto* labels = checked<int64_t>(ids, "ids", ScalarType::Long, {rows});
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(labels[i] >= 0 && labels[i] < vocabulary, "ids[", i, "] is ", labels[i],
                    ", expected 0 <= id < V = ", vocabulary);
  return labels;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, bool>;

Results chunk_loss(const Tensor& x, const Tensor& weight, const Tensor& ids,
                   const Tensor& id_weight, const Tensor& token_weight, double z_loss,
                   double logit_scale, std::optional<Tensor> exps,
                   std::optional<Tensor> grad_input, std::optional<Tensor> grad_weight,
                   bool add) {
  check_call(x, weight, logit_scale);
  const int64_t rows = x.size(0), size = x.size(1), vocabulary = weight.size(0);
  const int64_t* targets = labels_of(ids, rows, vocabulary);
  float* to_input = result(grad_input, "grad_input", rows, size);
  float* to_weight = result(grad_weight, "grad_weight", vocabulary, size);
  const LossChunk chunk(operand(x, "x", rows, size), operand(weight, "weight", vocabulary, size),
                        targets, static_cast<float>(logit_scale) * amx::kLog2E,
                        to_weight ? scratch(exps, rows, vocabulary) : nullptr,
                        to_input != nullptr);
  const Labels labels{checked<float>(id_weight, "id_weight", ScalarType::Float, {rows}),
                      checked<float>(token_weight, "token_weight", ScalarType::Float, {rows}),
                      z_loss, logit_scale};
  std::vector<Found> found = sweep(chunk);
  const Values values(x, rows);
  Factors factors{std::vector<float>(rows), std::vector<float>(rows)};
  const bool usable = finish_tokens(chunk, found, labels, values, factors);
  if (usable && to_input) make_input_gradient(chunk, found, factors, to_input);
  if (usable && to_weight) make_weight_gradient(chunk, factors, to_weight, add);
  return {values[0], values[1], values[2], values[3], values[4], usable};
}
#endif

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  // of bfloat16 rows x (C, H) and weight (V, H), hard labels: the loss without token_weight, the
  // gradients of the sum of token_weight * loss, float32, where a result is given; that of the
  // weight may be added. exps is scratch for it. The last result is false where a logit is too far
  // above its target's or not finite: then none of the others means anything, nothing is written
  m.def("amx_cross_entropy(Tensor x, Tensor weight, Tensor ids, Tensor id_weight,"
        " Tensor token_weight, float z_loss, float logit_scale, Tensor(a!)? exps,"
        " Tensor(b!)? grad_input, Tensor(c!)? grad_weight, bool add)"
        " -> (Tensor loss, Tensor nll, Tensor lse, Tensor entropy, Tensor correct, bool usable)");
}

#ifdef APICAL_AMX
STABLE_TORCH_LIBRARY_IMPL(apical, CPU, m) {
  m.impl("amx_cross_entropy", TORCH_BOX(&apical::chunk_loss));
}
#endif
