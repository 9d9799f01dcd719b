// loss and gradient of one row of logits, in place, with all that the loss may hold
#pragma once

#include "linear_cross_entropy_loops.h"

#include <torch/headeronly/util/BFloat16.h>

#include <vector>

namespace apical {

// labels: per row, the first is the target; null: no bias, no class weights, no bfloat16 result
struct LossJob {
  const Loops* loops;
  float* logits;
  uint16_t* half;
  const float *bias, *class_weight, *id_weight;
  const int64_t* ids;
  int64_t rows, size, labels;
  double z_loss, cap, scale;
  double uniform, smoothed;  // the share of each class of weight 1, and of all classes
};

// upstream gradients of a row
struct Upstream {
  double loss, nll, lse;
};

struct RowLoss {
  double loss, nll, lse, entropy, correct;
};

// a row's softmax, without rounding 1 - p: `rest` is the sum over every entry but the target
struct Softmax {
  double max, rest, own;

  double sum() const { return rest + own; }
};

// what a thread needs beside its rows: the logits of the labels, and a row of exponentials, which
// stays in the caches, where writing them to the row would send it back to memory
struct LossScratch {
  std::vector<double> labels;
  std::vector<float> exps;

  explicit LossScratch(const LossJob& job) : labels(job.labels), exps(job.half ? job.size : 0) {}
};

class LossRow {
 public:
  LossRow(const LossJob& job, int64_t r, LossScratch& scratch)
      : job_(job),
        row_(job.logits + r * job.size),
        next_(r + 1 < job.rows ? row_ + job.size : row_),
        half_(job.half ? job.half + r * job.size : nullptr),
        ids_(job.ids + r * job.labels),
        shares_(job.id_weight + r * job.labels),
        exps_(job.half && keeps() ? scratch.exps.data() : row_),
        z_(scratch.labels) {}

  // the loss; the row is left to `gradient`
  RowLoss loss() {
    make_logits();
    const double max = job_.loops->row_max(row_, job_.size);
    const double smoothing = job_.uniform != 0 ? job_.uniform * row_sum() : 0.0;
    hide_target();
    const auto [rest, products] =
        job_.loops->exp_sums[keeps()](row_, job_.size, static_cast<float>(max), next_, exps_);
    // 0 when the target has the largest logit: then log1p keeps a loss far below float's epsilon
    const double below = z_[0] - max, own = std::exp(below);
    const double log_sum = std::log1p(rest + (own - 1.0)), lse = max + log_sum;
    softmax_ = {max, rest, own};
    lse_ = lse;
    const double mean = (products + (own > 0 ? own * below : 0.0)) / softmax_.sum();
    double loss = job_.smoothed * lse - smoothing + job_.z_loss * lse * lse;
    for (int64_t k = 0; k < job_.labels; ++k) {
      // a share of nothing is nothing, whatever the logit
      if (shares_[k] != 0) loss += shares_[k] * (log_sum - (z_[k] - max));
    }
    return {loss, log_sum - below, lse, log_sum - mean, below >= 0 && lse == lse ? 1.0 : 0.0};
  }

  // after loss: d (upstream . loss, nll, lse) / d raw products
  void gradient(const Upstream& up) {
    const double pull = pull_of(up);
    write(pull / softmax_.sum(), up, !keeps());
    patch(pull, up);
  }

  // without loss, where lse is known
  void gradient(const Upstream& up, double lse) {
    make_logits();
    hide_target();
    lse_ = lse;
    const double pull = pull_of(up);
    softmax_ = {lse, 0.0, 1.0};
    const double rest = write(pull, up, true);
    softmax_ = {lse, rest, std::exp(z_[0] - lse)};
    patch(pull, up);
  }

  void clear() {
    if (half_) {
      std::fill_n(half_, job_.size, uint16_t{0});
    } else {
      std::fill_n(row_, job_.size, 0.0f);
    }
  }

 private:
  // the slope of the cap needs the logits themselves
  bool keeps() const { return job_.cap == 0; }

  void make_logits() {
    if (job_.bias || job_.cap != 0 || job_.scale != 1)
      job_.loops->make_logits[job_.bias != nullptr][job_.cap != 0](
          row_, job_.size, job_.bias, static_cast<float>(job_.scale),
          static_cast<float>(job_.cap));
    for (int64_t k = 0; k < job_.labels; ++k) z_[k] = row_[ids_[k]];
  }

  double row_sum() const {
    return job_.loops->row_sum[job_.class_weight != nullptr](row_, job_.size, job_.class_weight);
  }

  void hide_target() { row_[ids_[0]] = -std::numeric_limits<float>::infinity(); }

  // the factor of the softmax in the gradient
  double pull_of(const Upstream& up) const {
    double share = job_.smoothed + 2.0 * job_.z_loss * lse_;
    for (int64_t k = 0; k < job_.labels; ++k) share += shares_[k];
    return up.loss * share + up.nll + up.lse;
  }

  // the gradient but for the labels; returns the sum of the exponentials of logits
  double write(double factor, const Upstream& up, bool of_logits) {
    const bool weighted = job_.class_weight && job_.uniform != 0;
    const Slopes slopes{static_cast<float>(softmax_.max), static_cast<float>(factor * job_.scale),
                        static_cast<float>(up.loss * job_.uniform * job_.scale),
                        static_cast<float>(1.0 / job_.cap), job_.class_weight};
    const int kind = job_.cap != 0 ? 2 : of_logits;
    float* from = of_logits ? row_ : exps_;
    return job_.loops->gradient[kind][weighted][half_ != nullptr](from, job_.size, slopes, half_);
  }

  // the gradient at the labels
  void patch(double pull, const Upstream& up) {
    for (int64_t k = 0; k < job_.labels; ++k) {
      const int64_t id = ids_[k];
      if (std::find(ids_, ids_ + k, id) != ids_ + k) continue;
      const double weight = job_.class_weight ? job_.class_weight[id] : 1.0;
      double value = at_label(k, pull, share_of(k, up)) - up.loss * job_.uniform * weight;
      if (job_.cap != 0) value *= 1.0 - z_[k] * z_[k] / (job_.cap * job_.cap);
      const float rounded = static_cast<float>(value * job_.scale);
      if (half_) {
        half_[id] = torch::headeronly::BFloat16(rounded).x;
      } else {
        row_[id] = rounded;
      }
    }
  }

  // of all labels that are the k-th, times the upstream gradient
  double share_of(int64_t k, const Upstream& up) const {
    double share = k == 0 ? up.nll : 0.0;
    for (int64_t i = k; i < job_.labels; ++i)
      if (ids_[i] == ids_[k]) share += up.loss * shares_[i];
    return share;
  }

  // pull * p - share; at the target without the difference p - 1
  double at_label(int64_t k, double pull, double share) const {
    const double sum = softmax_.sum();
    if (k > 0) return pull * std::exp(z_[k] - softmax_.max) / sum - share;
    return ((pull - share) * softmax_.own - share * softmax_.rest) / sum;
  }

  const LossJob& job_;
  float* row_;
  const float* next_;
  uint16_t* half_;
  const int64_t* ids_;
  const float* shares_;
  float* exps_;
  std::vector<double>& z_;
  Softmax softmax_{};
  double lse_ = 0;
};

}  // namespace apical
