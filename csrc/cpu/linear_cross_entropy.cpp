// the softmax passes of the fused linear cross-entropy, in place on a chunk of logits
#include "linear_cross_entropy_arguments.h"

#include <torch/csrc/stable/library.h>

namespace apical {
namespace {

using RowLosses = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// where the values of each row go
class Losses {
 public:
  explicit Losses(const Tensor& logits) {
    for (int i = 0; i < 5; ++i) {
      tensors_.push_back(torch::stable::new_empty(logits, {logits.size(0)}));
      values_[i] = static_cast<float*>(tensors_[i].mutable_data_ptr());
    }
  }

  void put(int64_t r, const RowLoss& row) const {
    const double all[] = {row.loss, row.nll, row.lse, row.entropy, row.correct};
    for (int i = 0; i < 5; ++i) values_[i][r] = static_cast<float>(all[i]);
  }

  RowLosses result() const {
    return {tensors_[0], tensors_[1], tensors_[2], tensors_[3], tensors_[4]};
  }

 private:
  std::vector<Tensor> tensors_;
  float* values_[5];
};

// errors are thrown before: they must not be inside parallel_for
template <class Step>
void each_row(const LossJob& job, const Step& step) {
  torch::stable::parallel_for(0, job.rows, 1, [&](int64_t begin, int64_t end) {
    LossScratch scratch(job);
    for (int64_t r = begin; r < end; ++r) {
      LossRow row(job, r, scratch);
      step(r, row);
    }
  });
}

RowLosses softmax_gradient(Tensor logits, const std::optional<Tensor>& bias, const Tensor& ids,
                           const Tensor& id_weight, const std::optional<Tensor>& class_weight,
                           const Tensor& token_weight, double smoothing, double z_loss,
                           double softcap, double logit_scale, std::optional<Tensor> half) {
  const LossJob job = job_of({logits, bias, ids, id_weight, class_weight, half},
                             {smoothing, z_loss, softcap, logit_scale});
  const float* weight = row_values(token_weight, "token_weight", job.rows);
  check_ids(job, weight);
  const Losses losses(logits);
  each_row(job, [&](int64_t r, LossRow& row) {
    if (weight[r] == 0) {
      row.clear();
      losses.put(r, {});
    } else {
      losses.put(r, row.loss());
      row.gradient({weight[r], 0.0, 0.0});
    }
  });
  return losses.result();
}

RowLosses softmax_statistics(Tensor logits, const std::optional<Tensor>& bias, const Tensor& ids,
                             const Tensor& id_weight, const std::optional<Tensor>& class_weight,
                             double smoothing, double z_loss, double softcap,
                             double logit_scale) {
  const LossJob job = job_of({logits, bias, ids, id_weight, class_weight, std::nullopt},
                             {smoothing, z_loss, softcap, logit_scale});
  check_ids(job, nullptr);
  const Losses losses(logits);
  each_row(job, [&](int64_t r, LossRow& row) { losses.put(r, row.loss()); });
  return losses.result();
}

void softmax_backward(Tensor logits, const std::optional<Tensor>& bias, const Tensor& ids,
                      const Tensor& id_weight, const std::optional<Tensor>& class_weight,
                      const Tensor& grad_loss, const std::optional<Tensor>& grad_nll,
                      const std::optional<Tensor>& grad_lse, const Tensor& lse, double smoothing,
                      double z_loss, double softcap, double logit_scale,
                      std::optional<Tensor> half) {
  const LossJob job = job_of({logits, bias, ids, id_weight, class_weight, half},
                             {smoothing, z_loss, softcap, logit_scale});
  check_ids(job, nullptr);
  const float* up = row_values(grad_loss, "grad_loss", job.rows);
  const float* up_nll = grad_nll ? row_values(*grad_nll, "grad_nll", job.rows) : nullptr;
  const float* up_lse = grad_lse ? row_values(*grad_lse, "grad_lse", job.rows) : nullptr;
  const float* known = row_values(lse, "lse", job.rows);
  each_row(job, [&](int64_t r, LossRow& row) {
    row.gradient({up[r], up_nll ? up_nll[r] : 0.0, up_lse ? up_lse[r] : 0.0}, known[r]);
  });
}

std::string cpu_isa() { return loops().isa; }

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  // logits (R, V) are raw products, become scale * (raw + bias), capped, and then the gradient of
  // the sum of token_weight * loss with respect to the raw products, unless that goes to half, in
  // bfloat16. The first of the ids (R, K) is the target. Rows with token_weight 0 are left out:
  // their ids are not read, all their results are 0
  m.def("softmax_gradient_(Tensor(a!) logits, Tensor? bias, Tensor ids, Tensor id_weight,"
        " Tensor? class_weight, Tensor token_weight, float smoothing, float z_loss,"
        " float softcap, float logit_scale, Tensor(b!)? half)"
        " -> (Tensor loss, Tensor nll, Tensor lse, Tensor entropy, Tensor correct)");
  // the loss alone; logits are scratch
  m.def("softmax_statistics_(Tensor(a!) logits, Tensor? bias, Tensor ids, Tensor id_weight,"
        " Tensor? class_weight, float smoothing, float z_loss, float softcap, float logit_scale)"
        " -> (Tensor loss, Tensor nll, Tensor lse, Tensor entropy, Tensor correct)");
  // the gradient alone, where lse is known, of grad_loss * loss + grad_nll * nll + grad_lse * lse
  m.def("softmax_backward_(Tensor(a!) logits, Tensor? bias, Tensor ids, Tensor id_weight,"
        " Tensor? class_weight, Tensor grad_loss, Tensor? grad_nll, Tensor? grad_lse, Tensor lse,"
        " float smoothing, float z_loss, float softcap, float logit_scale, Tensor(b!)? half)"
        " -> ()");
  // the instruction set that the CPU passes use
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(apical, CPU, m) {
  m.impl("softmax_gradient_", TORCH_BOX(&apical::softmax_gradient));
  m.impl("softmax_statistics_", TORCH_BOX(&apical::softmax_statistics));
  m.impl("softmax_backward_", TORCH_BOX(&apical::softmax_backward));
}

STABLE_TORCH_LIBRARY_IMPL(apical, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&apical::cpu_isa));
}
