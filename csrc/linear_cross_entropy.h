// what the softmax passes of the loss require of their arguments, on every device
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace apical {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_vector(const Tensor& tensor, const char* name, ScalarType type, int64_t size) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous(), name,
                  " must be a contiguous vector with one entry per row of logits (", size, ")");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
}

inline void check_rows(const Tensor& logits, const Tensor& target) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(),
                  "logits must be a contiguous (R, V) matrix");
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "logits must be float32");
  check_vector(target, "target", ScalarType::Long, logits.size(0));
  STD_TORCH_CHECK(target.get_device_index() == logits.get_device_index(),
                  "target and logits must be on one device");
}

inline std::tuple<Tensor, Tensor> new_row_values(const Tensor& logits) {
  const int64_t rows = logits.size(0);
  return {torch::stable::new_empty(logits, {rows}), torch::stable::new_empty(logits, {rows})};
}

}  // namespace apical
