// attention of packed documents on the CPU, computed in float32
#include "attention_ahead.h"
#include "attention_arguments.h"
#include "isa.h"
#include "pages.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#define ISA_SOURCE "attention_passes.h"
#include "each_isa.h"

namespace apical {
namespace {

struct Pass {
  void (*run)(const Job&, const Document&, const Task&, Ahead&, Scratch);
  void (*look_ahead)(const Job&, const Document&, const Task&, Ahead&);
  int64_t (*scratch)(const Job&);
};

struct Passes {
  Pass forward, backward;
};

#define APICAL_PASSES(isa)                                                        \
  {{isa::forward, isa::look_ahead_forward, isa::scratch_of<isa::ForwardBuffers>}, \
   {isa::backward, isa::look_ahead_backward, isa::scratch_of<isa::BackwardBuffers>}}

const Passes& passes() {
  static const Passes all[] = {
      APICAL_PASSES(baseline),
#if defined(__x86_64__)
      APICAL_PASSES(avx2),
      APICAL_PASSES(avx512),
#endif
  };
  return all[isa()];
}

// parts of a document follow one another, each for all heads: those of one head rarely meet
template <class Parts>
std::vector<Task> tasks_of(const Job& job, const std::vector<Document>& documents, Parts parts) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < documents.size(); ++i)
    for (int64_t part = 0; part < parts(documents[i]); ++part)
      for (int64_t kv_head = 0; kv_head < job.kv_heads; ++kv_head)
        tasks.push_back({static_cast<int64_t>(i), kv_head, part});
  return tasks;
}

void bring_in(const View& view, int64_t first, int64_t end) {
  if (view.data) apical::bring_in(view.at(first, 0), view.at(end - 1, 0) - view.at(first, 0));
}

// the results of one document
void bring_in(const Job& job, const Document& doc) {
  if (!job.grad_q.data) return bring_in(job.out, doc.q, doc.q_end);
  bring_in(job.grad_q, doc.q, doc.q_end);
  bring_in(job.grad_k, doc.k, doc.k_end);
  bring_in(job.grad_v, doc.k, doc.k_end);
}

// threads take tasks in order, one by one; nothing in here throws once they have begun
void run(const Job& job, const std::vector<Document>& documents, const std::vector<Task>& tasks,
         const Pass& pass) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), count);
  const int64_t bytes = pass.scratch(job);
  const std::unique_ptr<char[]> scratch(new char[workers * bytes + 64]);
  char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch.get()) + 63) &
                                          ~static_cast<uintptr_t>(63));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = next++; i < count; i = next++) {
      if (tasks[i].part == 0 && tasks[i].kv_head == 0)
        bring_in(job, documents[tasks[i].document]);
      Ahead ahead;
      // threads are about equally fast: this one is likely to take that task
      const int64_t then = i + workers;
      if (then < count)
        pass.look_ahead(job, documents[tasks[then].document], tasks[then], ahead);
      pass.run(job, documents[tasks[i].document], tasks[i], ahead, {aligned + begin * bytes});
    }
  });
}

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& documents,
                       const Optional& slopes, const Optional& sinks, const Optional& gain,
                       double scale, int64_t left, int64_t right, int64_t limit,
                       int64_t transform, double a, double b, double dropout, int64_t seed,
                       Tensor out, Tensor lse) {
  const Options options{scale, left, right, limit, transform, a, b, dropout, seed};
  Job job = job_of(q, k, v, out, lse, slopes, gain, options);
  if (sinks) job.sinks = vector_of(*sinks, "sinks", q.size(1));
  const auto all = documents_of(documents, q.size(0), k.size(0), job, slopes);
  const auto parts = [&](const Document& doc) {
    return divide_up(doc.rows(), task_rows(job, doc));
  };
  run(job, all, tasks_of(job, all, parts), passes().forward);
}

void attention_backward(const Tensor& grad_out, const Optional& grad_lse, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                        const Tensor& documents, const Optional& slopes, const Optional& gain,
                        double scale, int64_t left, int64_t right, int64_t limit,
                        int64_t transform, double a, double b, double dropout, int64_t seed,
                        Tensor grad_q, Tensor grad_k, Tensor grad_v, const Optional& grad_gain) {
  const Options options{scale, left, right, limit, transform, a, b, dropout, seed};
  Job job = job_of(q, k, v, out, lse, slopes, gain, options);
  const int64_t heads = q.size(1);
  job.grad_out = view(grad_out, "grad_out", q.size(0), heads, job.value_size);
  job.grad_q = view(grad_q, "grad_q", q.size(0), heads, job.size);
  job.grad_k = view(grad_k, "grad_k", k.size(0), job.kv_heads, job.size);
  job.grad_v = view(grad_v, "grad_v", k.size(0), job.kv_heads, job.value_size);
  if (grad_lse) job.grad_lse = numbers(*grad_lse, "grad_lse", q.size(0), heads);
  if (grad_gain) job.grad_gain = numbers(*grad_gain, "grad_gain", q.size(0), heads);
  auto all = documents_of(documents, q.size(0), k.size(0), job, slopes);
  int64_t turns = 0;
  for (Document& doc : all) {
    if (task_keys(doc) >= doc.keys()) continue;
    doc.turns = turns;
    turns += heads * divide_up(doc.rows(), part_size(doc.rows(), kRows, 6));
  }
  const std::unique_ptr<std::atomic<int32_t>[]> counters(new std::atomic<int32_t>[turns]());
  job.turns = counters.get();
  // blocks of keys add in float32
  job.sum_q = job.grad_q;
  std::unique_ptr<float[]> sums;
  if (turns > 0 && job.grad_q.kind != Kind::kFloat) {
    sums.reset(new float[q.size(0) * heads * job.size]);
    job.sum_q = {reinterpret_cast<char*>(sums.get()), heads * job.size * 4, job.size * 4,
                 Kind::kFloat};
  }
  const auto parts = [](const Document& doc) { return divide_up(doc.keys(), task_keys(doc)); };
  run(job, all, tasks_of(job, all, parts), passes().backward);
}

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  // documents (N, 5) int64: first and end row in q, first and end row in k, index of the document;
  // every row sees a key. What belongs to no document is not written. transform: 0 none,
  // 1 softcap, 2 softplus, 3 power; dropout draws from Philox4x32-10
  m.def("varlen_attention_cpu_forward(Tensor q, Tensor k, Tensor v, Tensor documents,"
        " Tensor? alibi_slopes, Tensor? sinks, Tensor? gain, float scale, int left, int right,"
        " int limit, int transform, float a, float b, float dropout, int seed, Tensor(a!) out,"
        " Tensor(b!) lse) -> ()");
  m.def("varlen_attention_cpu_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k,"
        " Tensor v, Tensor out, Tensor lse, Tensor documents, Tensor? alibi_slopes, Tensor? gain,"
        " float scale, int left, int right, int limit, int transform, float a, float b,"
        " float dropout, int seed, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v,"
        " Tensor(d!)? grad_gain) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(apical, CPU, m) {
  m.impl("varlen_attention_cpu_forward", TORCH_BOX(&apical::attention_forward));
  m.impl("varlen_attention_cpu_backward", TORCH_BOX(&apical::attention_backward));
}
