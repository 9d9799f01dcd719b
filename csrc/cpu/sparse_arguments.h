// arguments that all products with sparse matrices have
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

namespace apical {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t element_size(const Tensor& tensor, const char* name) {
  const bool half = tensor.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(half || tensor.scalar_type() == ScalarType::Float, name,
                  " must be float32 or bfloat16");
  return half ? 2 : 4;
}

inline const int32_t* integers(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous() &&
                      tensor.scalar_type() == ScalarType::Int,
                  name, " must be a contiguous vector of int32");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

}  // namespace apical
