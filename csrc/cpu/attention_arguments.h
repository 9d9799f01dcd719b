// the arguments of the attention operators, checked: an error must not be thrown by a thread
#pragma once

#include "attention_job.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace apical {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

Kind kind_of(const Tensor& tensor, const char* name) {
  if (tensor.scalar_type() == ScalarType::Float) return Kind::kFloat;
  if (tensor.scalar_type() == ScalarType::BFloat16) return Kind::kBfloat16;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Half, name,
                  " must be float32, bfloat16 or float16");
  return Kind::kHalf;
}

// (tokens, heads, size) with contiguous channels
View view(const Tensor& tensor, const char* name, int64_t tokens, int64_t heads, int64_t size) {
  const Kind kind = kind_of(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == tokens && tensor.size(1) == heads &&
                      tensor.size(2) == size && (tensor.stride(2) == 1 || size <= 1),
                  name, " must be (", tokens, ", ", heads, ", ", size,
                  ") with contiguous channels");
  const int64_t bytes = kind == Kind::kFloat ? 4 : 2;
  return {static_cast<char*>(tensor.data_ptr()), tensor.stride(0) * bytes,
          tensor.stride(1) * bytes, kind};
}

// (tokens, heads) of float32
View numbers(const Tensor& tensor, const char* name, int64_t tokens, int64_t heads) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
                      tensor.size(0) == tokens && tensor.size(1) == heads,
                  name, " must be (", tokens, ", ", heads, ") float32");
  return {static_cast<char*>(tensor.data_ptr()), tensor.stride(0) * 4, tensor.stride(1) * 4,
          Kind::kFloat};
}

const float* vector_of(const Tensor& tensor, const char* name, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.size(tensor.dim() - 1) == size,
                  name, " must be contiguous float32 with ", size, " columns");
  return static_cast<const float*>(tensor.const_data_ptr());
}

struct Options {
  double scale;
  int64_t left, right, limit, transform;
  double a, b, dropout;
  int64_t seed;
};

void set_options(const Options& options, Job& job) {
  STD_TORCH_CHECK(options.left >= 0 && options.left + options.right >= 0 && options.limit > 0,
                  "left must not be negative, left + right neither, limit must be positive");
  STD_TORCH_CHECK(0 <= options.transform && options.transform <= 3, "transform must be 0 to 3");
  STD_TORCH_CHECK(0 <= options.dropout && options.dropout < 1, "dropout must be in [0, 1)");
  job.scale = static_cast<float>(options.scale);
  job.left = options.left, job.right = options.right, job.limit = options.limit;
  job.transform = static_cast<Transform>(options.transform);
  job.a = static_cast<float>(options.a), job.b = static_cast<float>(options.b);
  job.threshold = static_cast<uint32_t>(options.dropout * 4294967296.0);
  job.keep = static_cast<float>(1.0 / (1.0 - options.dropout));
  job.seed[0] = static_cast<uint32_t>(options.seed);
  job.seed[1] = static_cast<uint32_t>(static_cast<uint64_t>(options.seed) >> 32);
}

Job job_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
           const Optional& slopes, const Optional& gain, const Options& options) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3,
                  "q, k and v must be (tokens, heads, size)");
  const int64_t tokens_q = q.size(0), heads = q.size(1), tokens_k = k.size(0);
  Job job{};
  job.size = q.size(2), job.value_size = v.size(2), job.kv_heads = k.size(1);
  STD_TORCH_CHECK(job.kv_heads > 0 && heads % job.kv_heads == 0, "H must be a multiple of K");
  job.group = heads / job.kv_heads;
  job.q = view(q, "q", tokens_q, heads, job.size);
  job.k = view(k, "k", tokens_k, job.kv_heads, job.size);
  job.v = view(v, "v", tokens_k, job.kv_heads, job.value_size);
  job.out = view(out, "out", tokens_q, heads, job.value_size);
  job.lse = numbers(lse, "lse", tokens_q, heads);
  set_options(options, job);
  if (slopes) {
    job.slopes = vector_of(*slopes, "alibi_slopes", heads);
    job.slopes_of_document = slopes->dim() == 2 ? heads : 0;
  }
  if (gain) job.gain = numbers(*gain, "gain", tokens_q, heads);
  return job;
}

std::vector<Document> documents_of(const Tensor& rows, int64_t tokens_q, int64_t tokens_k,
                                   const Job& job, const Optional& slopes) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.is_contiguous() &&
                      rows.dim() == 2 && rows.size(1) == 5,
                  "documents must be a contiguous (N, 5) int64 matrix");
  std::vector<Document> documents(rows.size(0));
  const auto* from = static_cast<const int64_t*>(rows.const_data_ptr());
  for (Document& doc : documents) {
    doc = {from[0], from[1], from[2], from[3], from[4], 0};
    from += 5;
    STD_TORCH_CHECK(0 <= doc.q && doc.q < doc.q_end && doc.q_end <= tokens_q && 0 <= doc.k &&
                        doc.k < doc.k_end && doc.k_end <= tokens_k,
                    "documents must lie inside q and k, and not be empty");
    STD_TORCH_CHECK(Sight(job, doc).end(0) > 0, "the first row of a document must see a key");
    STD_TORCH_CHECK(!job.slopes_of_document || (0 <= doc.index && doc.index < slopes->size(0)),
                    "alibi_slopes must have a row for every document");
  }
  // the longest first, so that no thread is left with one at the end
  std::stable_sort(documents.begin(), documents.end(), [](const Document& a, const Document& b) {
    return a.rows() * a.keys() > b.rows() * b.keys();
  });
  return documents;
}

}  // namespace
}  // namespace apical
