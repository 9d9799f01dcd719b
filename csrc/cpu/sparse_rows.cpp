// products with a sparse matrix given by compressed rows, and samples of a product at its entries
#include "sparse_rows_arguments.h"

#include <torch/csrc/stable/library.h>

namespace apical {
namespace {

int kind_of(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
void to_plan(const Plan& plan, const void* values, float* to) {
  for (size_t i = 0; i < plan.entries.size(); ++i)
    to[i] = static_cast<float>(static_cast<const T*>(values)[plan.entries[i]]);
}

template <class T>
void from_plan(const Plan& plan, const float* from, void* values) {
  for (size_t i = 0; i < plan.entries.size(); ++i)
    static_cast<T*>(values)[plan.entries[i]] = static_cast<T>(from[i]);
}

void sparse_add(Tensor out, const Tensor& input, const Tensor& values, const Tensor& starts,
                const Tensor& columns) {
  SparseJob job = job_of(out, "out", input);
  check_written(out);
  const Support support = support_of(starts, columns, job.left.size, job.input.size);
  check_values(values, columns, input);
  const Plan plan(support, kAddTokens);
  const Lines ordered(columns.size(0));
  (kind_of(input) ? to_plan<BFloat16> : to_plan<float>)(plan, values.const_data_ptr(),
                                                        ordered.data());
  job.plan = &plan, job.values = ordered.data();
  const auto add = sparse_loops().add[kind_of(input)];
  const int64_t packs = ceil_div(job.input.rows, kAddTokens);
  torch::stable::parallel_for(0, packs, 1, [&](int64_t begin, int64_t end) {
    const Lines scratch(job.scratch(kAddTokens));
    for (int64_t i = begin; i < end; ++i) add(job, i * kAddTokens, scratch.data());
  });
}

// tokens in parts that depend on their number alone, so that the sums do not depend on threads
struct Parts {
  static constexpr int64_t kMost = 32, kPacks = 4;

  explicit Parts(int64_t tokens)
      : packs(ceil_div(tokens, kSampleTokens)),
        count(std::min(kMost, ceil_div(packs, kPacks))) {}

  int64_t begin(int64_t part) const { return packs * part / count; }

  const int64_t packs, count;
};

// the sums of all parts, in order, in place of the first
void add_parts(const Parts& parts, int64_t stored, int64_t stride, float* sums) {
  torch::stable::parallel_for(0, stored, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts.count; ++part)
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[part * stride + i];
  });
}

Tensor sparse_sampled(const Tensor& grad, const Tensor& input, const Tensor& starts,
                      const Tensor& columns) {
  SparseJob job = job_of(grad, "grad", input);
  const Plan plan(support_of(starts, columns, job.left.size, job.input.size), kSampleTokens);
  job.plan = &plan;
  const auto sample = sparse_loops().sample[kind_of(input)];
  const Parts parts(job.input.rows);
  const int64_t stored = columns.size(0), stride = ceil_div(stored, 16) * 16;
  const Lines sums(stride * std::max<int64_t>(1, parts.count));
  std::fill(sums.data(), sums.data() + stored, 0.0f);
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    const Lines scratch(job.scratch(kSampleTokens));
    for (int64_t part = begin; part < end; ++part) {
      float* to = sums.data() + part * stride;
      std::fill(to, to + stored, 0.0f);
      for (int64_t i = parts.begin(part); i < parts.begin(part + 1); ++i)
        sample(job, i * kSampleTokens, scratch.data(), to);
    }
  });
  add_parts(parts, stored, stride, sums.data());
  Tensor result = torch::stable::new_empty(input, {stored});
  (kind_of(input) ? from_plan<BFloat16> : from_plan<float>)(plan, sums.data(),
                                                            result.mutable_data_ptr());
  return result;
}

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  // out (T, n) += input (T, m) S^T; row r of S (n, m) has values[starts[r] : starts[r + 1]], in
  // ascending columns
  m.def("sparse_add_(Tensor(a!) out, Tensor input, Tensor values, Tensor starts, Tensor columns)"
        " -> ()");
  // (S,): the entries of grad^T input, grad (T, n), at the rows and columns of S
  m.def("sparse_sampled(Tensor grad, Tensor input, Tensor starts, Tensor columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(apical, CPU, m) {
  m.impl("sparse_add_", TORCH_BOX(&apical::sparse_add));
  m.impl("sparse_sampled", TORCH_BOX(&apical::sparse_sampled));
}
