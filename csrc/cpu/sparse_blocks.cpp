// products with a matrix of blocks, S (out_features, in_features), and its gradient
#include "sparse_blocks_arguments.h"
#include "sparse_blocks_loops.h"

#include <torch/csrc/stable/library.h>

namespace apical {
namespace {

// a task of less work than this many tokens is not worth a thread
constexpr int64_t kFewTokens = 48;

// out += input S^T, or, transposed, input S
void add_blocks(const Tensor& out, const Tensor& input, const char* name, const Tensor& values,
                const BlockIndex& index, bool transposed) {
  const BlockRows to = block_rows(out, "out"), from = block_rows(input, name);
  check_tokens(out, "out", input, name);
  check_same_type(out, "out", input, name);
  check_same_type(values, "values", input, name);
  const Tensor &wide = transposed ? input : out, &narrow = transposed ? out : input;
  const Blocks blocks = blocks_of(index, wide.size(1), narrow.size(1));
  const bool half = input.scalar_type() == ScalarType::BFloat16;
  const BlockJob job{blocks, input.size(0), from, to, block_values(values, blocks),
                     out.size(1)};
  if (!job.tokens) return;
  // chosen here: an error must not be thrown inside parallel_for
  const BlockLoops& loops = block_loops();
  const BlockPlan plan = loops.plan(blocks, transposed);
  torch::stable::parallel_for(0, plan.products.size(), 1, [&](int64_t begin, int64_t end) {
    loops.pack[half](job, plan, begin, end);
  });
  torch::stable::parallel_for(0, job.tokens, kFewTokens, [&](int64_t begin, int64_t end) {
    loops.add[half](job, plan, begin, end);
  });
}

void blocks_add(Tensor out, const Tensor& input, const Tensor& values, const Tensor& group_starts,
                const Tensor& chunks, int64_t rows, int64_t columns) {
  add_blocks(out, input, "input", values, {group_starts, chunks, rows, columns}, false);
}

void blocks_add_transposed(Tensor out, const Tensor& grad, const Tensor& values,
                           const Tensor& group_starts, const Tensor& chunks, int64_t rows,
                           int64_t columns) {
  add_blocks(out, grad, "grad", values, {group_starts, chunks, rows, columns}, true);
}

Tensor blocks_sampled(const Tensor& grad, const Tensor& input, const Tensor& group_starts,
                      const Tensor& chunks, int64_t rows, int64_t columns) {
  const BlockRows output = block_rows(grad, "grad"), from = block_rows(input, "input");
  check_tokens(input, "input", grad, "grad");
  check_same_type(input, "input", grad, "grad");
  const BlockIndex index{group_starts, chunks, rows, columns};
  const Blocks blocks = blocks_of(index, grad.size(1), input.size(1));
  const Tensor values = torch::stable::new_empty(grad, {blocks.values()});
  const bool half = grad.scalar_type() == ScalarType::BFloat16;
  const BlockJob job{blocks, grad.size(0), from, output,
                     static_cast<char*>(values.mutable_data_ptr()), grad.size(1)};
  const BlockLoops& loops = block_loops();
  torch::stable::parallel_for(0, blocks.groups, 1, [&](int64_t begin, int64_t end) {
    loops.sample[half](job, begin, end);
  });
  return values;
}

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  // S has blocks of rows x columns entries; those in rows g * rows and following are, by column of
  // blocks, chunks[group_starts[g] .. group_starts[g + 1]]. The values of a block are, for each of
  // its columns, its rows. Matrices are (tokens, features), float32 or bfloat16, summed in float32
  m.def("blocks_add_(Tensor(a!) out, Tensor input, Tensor values, Tensor group_starts,"
        " Tensor chunks, int rows, int columns) -> ()");
  m.def("blocks_add_transposed_(Tensor(a!) out, Tensor grad, Tensor values, Tensor group_starts,"
        " Tensor chunks, int rows, int columns) -> ()");
  m.def("blocks_sampled(Tensor grad, Tensor input, Tensor group_starts, Tensor chunks, int rows,"
        " int columns) -> Tensor values");
}

STABLE_TORCH_LIBRARY_IMPL(apical, CPU, m) {
  m.impl("blocks_add_", TORCH_BOX(&apical::blocks_add));
  m.impl("blocks_add_transposed_", TORCH_BOX(&apical::blocks_add_transposed));
  m.impl("blocks_sampled", TORCH_BOX(&apical::blocks_sampled));
}
