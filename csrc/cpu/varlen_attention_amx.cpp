// attention of packed documents in bfloat16 on the matrix unit (AMX): one task per document and
// key head
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "amx.h"

#ifdef APICAL_AMX
#include "attention_amx_backward.h"
#include "attention_amx_forward.h"
#endif

namespace apical {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef APICAL_AMX
template <typename T>
amx::View<T> view(const Tensor& tensor, const char* name) {
  constexpr bool is_float = sizeof(T) == 4;
  STD_TORCH_CHECK(tensor.scalar_type() == (is_float ? ScalarType::Float : ScalarType::BFloat16),
                  name, " must be ", is_float ? "float32" : "bfloat16");
  if (is_float) {
    STD_TORCH_CHECK(tensor.dim() == 2, name, " must be (tokens, heads)");
  } else {
    STD_TORCH_CHECK(tensor.dim() == 3 && (tensor.stride(2) == 1 || tensor.size(2) <= 1), name,
                    " must be (tokens, heads, size) with contiguous channels");
  }
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
}

amx::Job job_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                const Tensor& lse, double scale, int64_t left, int64_t right, int64_t limit) {
  STD_TORCH_CHECK(amx_supported(), "this processor has no matrix unit for bfloat16 (AMX)");
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "H must be a multiple of K");
  amx::Job job{};
  job.q = view<uint16_t>(q, "q"), job.k = view<uint16_t>(k, "k"), job.v = view<uint16_t>(v, "v");
  job.out = view<uint16_t>(out, "out"), job.lse = view<float>(lse, "lse");
  job.size = q.size(2), job.value_size = v.size(2);
  job.kv_heads = k.size(1), job.group = q.size(1) / k.size(1);
  job.scale = static_cast<float>(scale);
  job.left = left, job.right = right, job.limit = limit;
  return job;
}

std::vector<amx::Document> documents_of(const Tensor& rows, int64_t tokens_q, int64_t tokens_k) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.is_contiguous() &&
                      rows.dim() == 2 && rows.size(1) == 5,
                  "documents must be a contiguous (N, 5) int64 matrix");
  std::vector<amx::Document> documents(rows.size(0));
  const auto* from = static_cast<const int64_t*>(rows.const_data_ptr());
  for (amx::Document& doc : documents) {
    doc = {from[0], from[1], from[2], from[3]};
    from += 5;
    STD_TORCH_CHECK(0 <= doc.q && doc.q <= doc.q_end && doc.q_end <= tokens_q && 0 <= doc.k &&
                        doc.k <= doc.k_end && doc.k_end <= tokens_k,
                    "documents must lie inside q and k");
  }
  // the longest tasks first, so that no thread is left with one at the end
  std::stable_sort(documents.begin(), documents.end(),
                   [](const amx::Document& a, const amx::Document& b) {
                     return a.rows() * a.keys() > b.rows() * b.keys();
                   });
  return documents;
}

AMX_TARGET void take_tasks(const amx::Job& job, const std::vector<amx::Document>& documents,
                           bool backward, int64_t workers, std::atomic<int64_t>& next,
                           amx::Arena arena) {
  static const amx::TileConfig config;
  const int64_t tasks = static_cast<int64_t>(documents.size()) * job.kv_heads;
  _tile_loadconfig(&config);
  for (int64_t i = next++, then = 0; i < tasks; i = then) {
    // taken early, to fetch what it reads, except the last tasks: they may fall to other threads
    const bool early = i + 2 * workers < tasks;
    if (early) then = next++;
    const int64_t ahead = early && then < tasks ? then : i;
    const amx::Document& doc = documents[i / job.kv_heads];
    (backward ? amx::backward : amx::forward)(
        job, doc, i % job.kv_heads, arena,
        {job, documents[ahead / job.kv_heads], ahead % job.kv_heads, doc});
    if (!early) then = next++;
  }
  _mm_sfence();  // stores past the caches
  // what follows saves and restores less state
  _tile_release();
}

// threads take tasks one by one; each writes to its own rows and heads alone
void run(const amx::Job& job, const std::vector<amx::Document>& documents, bool backward) {
  int64_t rows = 0, keys = 0;
  for (const amx::Document& doc : documents)
    rows = std::max(rows, doc.rows()), keys = std::max(keys, doc.keys());
  amx::Arena needed{0};
  if (backward) {
    amx::BackwardScratch(needed, job, rows, keys);
  } else {
    amx::ForwardScratch(needed, job, keys);
  }
  const int64_t tasks = static_cast<int64_t>(documents.size()) * job.kv_heads;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  const std::unique_ptr<char[]> scratch(new char[workers * needed.next + 64]);
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(scratch.get()) + 63) / 64 * 64;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) {
    take_tasks(job, documents, backward, workers, next, {aligned + begin * needed.next});
  });
}

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& documents,
                       const std::optional<Tensor>& sinks, double scale, int64_t left,
                       int64_t right, int64_t limit, Tensor out, Tensor lse) {
  amx::Job job = job_of(q, k, v, out, lse, scale, left, right, limit);
  if (sinks) {
    STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->is_contiguous() &&
                        sinks->dim() == 1 && sinks->size(0) == q.size(1),
                    "sinks must be a contiguous (H,) float32 vector");
    job.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  run(job, documents_of(documents, q.size(0), k.size(0)), false);
}

void attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                        const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& documents, double scale, int64_t left,
                        int64_t right, int64_t limit, Tensor grad_q, Tensor grad_k,
                        Tensor grad_v) {
  amx::Job job = job_of(q, k, v, out, lse, scale, left, right, limit);
  if (grad_lse) job.grad_lse = view<float>(*grad_lse, "grad_lse");
  job.grad_out = view<uint16_t>(grad_out, "grad_out");
  job.grad_q = view<uint16_t>(grad_q, "grad_q");
  job.grad_k = view<uint16_t>(grad_k, "grad_k"), job.grad_v = view<uint16_t>(grad_v, "grad_v");
  run(job, documents_of(documents, q.size(0), k.size(0)), true);
}
#endif

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  // bfloat16, with lse, grad_lse and sinks (H,) in float32. documents (N, 5) int64: first and end
  // row in q, first and end row in k, index. Row i of I sees key j of J where -left <= j - i -
  // (J - I) <= right and j < limit. What belongs to no document is not written
  m.def("varlen_attention_amx_forward(Tensor q, Tensor k, Tensor v, Tensor documents,"
        " Tensor? sinks, float scale, int left, int right, int limit, Tensor(a!) out,"
        " Tensor(b!) lse) -> ()");
  m.def("varlen_attention_amx_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k,"
        " Tensor v, Tensor out, Tensor lse, Tensor documents, float scale, int left, int right,"
        " int limit, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
}

#ifdef APICAL_AMX
STABLE_TORCH_LIBRARY_IMPL(apical, CPU, m) {
  m.impl("varlen_attention_amx_forward", TORCH_BOX(&apical::attention_forward));
  m.impl("varlen_attention_amx_backward", TORCH_BOX(&apical::attention_backward));
}
#endif

