// attention of packed documents in float32: one task per document and key head
#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace apical {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (tokens, heads, size), the last dimension contiguous
struct View {
  float* data;
  int64_t token, head;

  float* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

struct Document {
  int64_t q, q_end, k, k_end;

  int64_t rows() const { return q_end - q; }
  int64_t keys() const { return k_end - k; }
};

struct Job {
  View q, k, v, out, lse, grad_out, grad_q, grad_k, grad_v;
  int64_t size, kv_heads, group;
  float scale;
  bool causal;
};

// rows and keys of a block: their scores stay in the first and second level of cache
constexpr int64_t kRows = 48, kKeys = 512;
// not a power of two, which would put every row into the same few sets of the cache
constexpr int64_t kStride = kKeys + 16;

}  // namespace
}  // namespace apical

#define ISA baseline
#define ISA_TARGET
#define ISA_BYTES 16
#include "attention_document.h"

#if defined(__x86_64__)
#define ISA avx2
#define ISA_TARGET __attribute__((target("avx2,fma")))
#define ISA_BYTES 32
#include "attention_document.h"

#define ISA avx512
#define ISA_TARGET __attribute__((target("avx512f")))
#define ISA_BYTES 64
#include "attention_document.h"
#endif

namespace apical {
namespace {

typedef void (*Task)(const Job&, const Document&, int64_t, float*);

struct Passes {
  Task forward, backward;
};

const Passes& passes() {
  static const Passes all[] = {
      {baseline::forward, baseline::backward},
#if defined(__x86_64__)
      {avx2::forward, avx2::backward},
      {avx512::forward, avx512::backward},
#endif
  };
  return all[isa()];
}

View view(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(tensor.dim() == 3 && (tensor.stride(2) == 1 || tensor.size(2) == 1), name,
                  " must be (tokens, heads, size) with contiguous channels");
  return {static_cast<float*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
}

Job job_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
           bool causal, double scale) {
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "H must be a multiple of K");
  STD_TORCH_CHECK(lse.dim() == 2 && lse.scalar_type() == ScalarType::Float, "lse must be float32");
  Job job{};
  job.q = view(q, "q"), job.k = view(k, "k"), job.v = view(v, "v"), job.out = view(out, "out");
  job.lse = {static_cast<float*>(lse.data_ptr()), lse.stride(0), lse.stride(1)};
  job.size = q.size(2), job.kv_heads = k.size(1), job.group = q.size(1) / k.size(1);
  job.scale = static_cast<float>(scale), job.causal = causal;
  return job;
}

std::vector<Document> documents_of(const Tensor& rows, int64_t tokens_q, int64_t tokens_k) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.is_contiguous() &&
                      rows.dim() == 2 && rows.size(1) == 4,
                  "documents must be a contiguous (N, 4) int64 matrix");
  std::vector<Document> documents(rows.size(0));
  const auto* from = static_cast<const int64_t*>(rows.const_data_ptr());
  for (Document& doc : documents) {
    doc = {from[0], from[1], from[2], from[3]};
    from += 4;
    STD_TORCH_CHECK(0 <= doc.q && doc.q <= doc.q_end && doc.q_end <= tokens_q && 0 <= doc.k &&
                        doc.k <= doc.k_end && doc.k_end <= tokens_k,
                    "documents must lie inside q and k");
  }
  // the longest tasks first, so that no thread is left with one at the end
  std::stable_sort(documents.begin(), documents.end(), [](const Document& a, const Document& b) {
    return a.rows() * a.keys() > b.rows() * b.keys();
  });
  return documents;
}

// threads take tasks one by one; each writes to its own rows and heads alone
void run(const Job& job, const std::vector<Document>& documents, Task task) {
  // as Buffers: five blocks of keys, three of rows, two of scores, each with its padding
  const int64_t width = (job.size + 15) / 16 * 16;
  const int64_t floats = (5 * kKeys + 3 * kRows) * width + 2 * kRows * kStride;
  const int64_t tasks = static_cast<int64_t>(documents.size()) * job.kv_heads;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  std::vector<float> scratch(workers * floats + 16);
  // on a cache line, which vectors should not cross
  float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) &
                                            ~static_cast<uintptr_t>(63));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++)
      task(job, documents[i / job.kv_heads], i % job.kv_heads, aligned + begin * floats);
  });
}

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& documents,
                       bool causal, double scale, Tensor out, Tensor lse) {
  const Job job = job_of(q, k, v, out, lse, causal, scale);
  run(job, documents_of(documents, q.size(0), k.size(0)), passes().forward);
}

void attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& out, const Tensor& lse, const Tensor& documents, bool causal,
                        double scale, Tensor grad_q, Tensor grad_k, Tensor grad_v) {
  Job job = job_of(q, k, v, out, lse, causal, scale);
  job.grad_out = view(grad_out, "grad_out");
  job.grad_q = view(grad_q, "grad_q");
  job.grad_k = view(grad_k, "grad_k"), job.grad_v = view(grad_v, "grad_v");
  run(job, documents_of(documents, q.size(0), k.size(0)), passes().backward);
}

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  // documents (N, 4) int64: first and end row in q, first and end row in k; each has a row and a
  // key, and every row sees a key. What belongs to no document is not written
  m.def("varlen_attention_cpu_forward(Tensor q, Tensor k, Tensor v, Tensor documents, bool causal,"
        " float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("varlen_attention_cpu_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out,"
        " Tensor lse, Tensor documents, bool causal, float scale, Tensor(a!) grad_q,"
        " Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(apical, CPU, m) {
  m.impl("varlen_attention_cpu_forward", TORCH_BOX(&apical::attention_forward));
  m.impl("varlen_attention_cpu_backward", TORCH_BOX(&apical::attention_backward));
}
