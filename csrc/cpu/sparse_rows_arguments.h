// the arguments of the products with a compressed sparse matrix, checked: an error must not be
// thrown by a thread
#pragma once

#include "lines.h"
#include "sparse_arguments.h"
#include "sparse_rows_loops.h"

namespace apical {
namespace {

Matrix matrix_of(const Tensor& tensor, const char* name, const Tensor& like) {
  element_size(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name,
                  " must have the dtype of input");
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1), name,
                  " must be a matrix whose rows are contiguous");
  STD_TORCH_CHECK(tensor.size(0) == like.size(0), name, " has ", tensor.size(0),
                  " rows, input has ", like.size(0), ": expected the same tokens");
  STD_TORCH_CHECK(tensor.size(1) < std::numeric_limits<int32_t>::max(), name,
                  " has more columns than an int32 can number");
  return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

SparseJob job_of(const Tensor& left, const char* name, const Tensor& input) {
  const Matrix right = matrix_of(input, "input", input);
  return {matrix_of(left, name, input), right, nullptr, nullptr};
}

// of (rows, size); which columns there are is checked where they are read
Support support_of(const Tensor& starts, const Tensor& columns, int64_t rows, int64_t size) {
  const Support support{integers(starts, "starts"), integers(columns, "columns"), rows, size};
  STD_TORCH_CHECK(starts.size(0) == rows + 1, "starts has ", starts.size(0),
                  " entries, expected one more than there are rows (", rows + 1, ")");
  STD_TORCH_CHECK(support.starts[0] == 0 && support.starts[rows] == columns.size(0),
                  "starts must begin with 0 and end with the number of columns (", columns.size(0),
                  "), got ", support.starts[0], " and ", support.starts[rows]);
  for (int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK(support.starts[row] <= support.starts[row + 1], "starts must not decrease: ",
                    support.starts[row], " and then ", support.starts[row + 1], " at row ", row);
  return support;
}

void check_values(const Tensor& values, const Tensor& columns, const Tensor& input) {
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous() &&
                      values.size(0) == columns.size(0),
                  "values must be a contiguous vector with one entry per column (",
                  columns.size(0), ")");
  STD_TORCH_CHECK(values.scalar_type() == input.scalar_type(),
                  "values must have the dtype of input");
}

// rows that share memory would be added to by several threads
void check_written(const Tensor& out) {
  STD_TORCH_CHECK(out.size(0) <= 1 || out.stride(0) >= out.size(1),
                  "out must not have rows that overlap");
}

}  // namespace
}  // namespace apical
