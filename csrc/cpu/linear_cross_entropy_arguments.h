// what the softmax passes of the loss require of their arguments
#pragma once

#include "pages.h"
#include "linear_cross_entropy_rows.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace apical {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct LossTensors {
  const Tensor& logits;
  const std::optional<Tensor>& bias;
  const Tensor &ids, &id_weight;
  const std::optional<Tensor>& class_weight;
  const std::optional<Tensor>& half;
};

struct LossRules {
  double smoothing, z_loss, softcap, logit_scale;
};

inline void check_matrix(const Tensor& tensor, const char* name, ScalarType type,
                         const char* wanted, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous() && tensor.size(0) == rows &&
                      tensor.size(1) == columns,
                  name, " must be a contiguous (", rows, ", ", columns, ") matrix");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", wanted);
}

inline const float* vector_of(const Tensor& tensor, const char* name, int64_t size,
                              const char* of) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous(), name,
                  " must be a contiguous vector with one entry per ", of, " of logits (", size,
                  ")");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline const float* row_values(const Tensor& tensor, const char* name, int64_t rows) {
  return vector_of(tensor, name, rows, "row");
}

inline const float* column_values(const std::optional<Tensor>& tensor, const char* name,
                                  int64_t columns) {
  return tensor ? vector_of(*tensor, name, columns, "column") : nullptr;
}

inline void check_tensors(const LossTensors& x) {
  STD_TORCH_CHECK(x.logits.dim() == 2 && x.logits.is_contiguous(),
                  "logits must be a contiguous (R, V) matrix");
  const int64_t rows = x.logits.size(0), size = x.logits.size(1);
  STD_TORCH_CHECK(x.logits.scalar_type() == ScalarType::Float, "logits must be float32");
  STD_TORCH_CHECK(x.ids.dim() == 2 && x.ids.size(1) > 0, "ids must be an (R, K) matrix, K >= 1");
  check_matrix(x.ids, "ids", ScalarType::Long, "int64", rows, x.ids.size(1));
  check_matrix(x.id_weight, "id_weight", ScalarType::Float, "float32", rows, x.ids.size(1));
  if (x.half) check_matrix(*x.half, "half", ScalarType::BFloat16, "bfloat16", rows, size);
}

inline LossJob job_of(const LossTensors& x, const LossRules& rules) {
  check_tensors(x);
  LossJob job{};
  // chosen here: an error must not be thrown inside parallel_for
  job.loops = &loops();
  job.rows = x.logits.size(0), job.size = x.logits.size(1), job.labels = x.ids.size(1);
  job.logits = static_cast<float*>(x.logits.mutable_data_ptr());
  job.half = x.half ? static_cast<uint16_t*>(x.half->mutable_data_ptr()) : nullptr;
  if (job.half) bring_in(job.half, job.rows * job.size * 2);
  job.ids = static_cast<const int64_t*>(x.ids.const_data_ptr());
  job.id_weight = static_cast<const float*>(x.id_weight.const_data_ptr());
  job.bias = column_values(x.bias, "bias", job.size);
  job.class_weight = column_values(x.class_weight, "class_weight", job.size);
  job.z_loss = rules.z_loss, job.cap = rules.softcap, job.scale = rules.logit_scale;
  job.uniform = job.size ? rules.smoothing / static_cast<double>(job.size) : 0.0;
  job.smoothed = rules.smoothing;
  if (job.class_weight && rules.smoothing != 0)
    job.smoothed =
        job.uniform * job.loops->row_sum[0](job.class_weight, job.size, job.class_weight);
  return job;
}

// of the rows that count: those with a weight other than 0, or all
inline void check_ids(const LossJob& job, const float* token_weight) {
  for (int64_t r = 0; r < job.rows; ++r) {
    if (token_weight && token_weight[r] == 0) continue;
    for (int64_t k = 0; k < job.labels; ++k) {
      const int64_t id = job.ids[r * job.labels + k];
      STD_TORCH_CHECK(id >= 0 && id < job.size, "ids[", r, ", ", k, "] is ", id,
                      ", expected 0 <= id < V = ", job.size);
    }
  }
}

}  // namespace apical
