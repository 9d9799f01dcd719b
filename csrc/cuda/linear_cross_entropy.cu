// the softmax passes of the fused linear cross-entropy on CUDA: one block per row, in place
#include "../linear_cross_entropy.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <stdexcept>

// weak, so that the same library also loads where torch has no CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace apical {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// the largest logit seen, and the sum of exp(logit - max)
struct MaxSum {
  float max, sum;
};

// exp(x - max), also when every logit so far is -inf
__device__ float exp_below(float x, float max) { return x == -INFINITY ? 0.0f : expf(x - max); }

__device__ MaxSum merge(MaxSum a, MaxSum b) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * exp_below(a.max, max) + b.sum * exp_below(b.max, max)};
}

__device__ MaxSum merge_warp(MaxSum value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = merge(value, {__shfl_xor_sync(kFullWarp, value.max, offset),
                          __shfl_xor_sync(kFullWarp, value.sum, offset)});
  }
  return value;
}

// the same order of additions in every run: deterministic
__device__ MaxSum merge_block(MaxSum value) {
  __shared__ MaxSum warps[kWarps];
  value = merge_warp(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  return merge_warp(lane < kWarps ? warps[lane] : MaxSum{-INFINITY, 0.0f});
}

// every entry of the row but the target
__device__ MaxSum rest_of_row(const float* row, int64_t size, int64_t target) {
  MaxSum value{-INFINITY, 0.0f};
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const float x = row[i];
    if (i == target) continue;
    if (x > value.max) {
      value.sum *= exp_below(value.max, x);
      value.max = x;
    }
    value.sum += exp_below(x, value.max);
  }
  return merge_block(value);
}

__device__ void fill_row(float* row, int64_t size, float value) {
  for (int64_t i = threadIdx.x; i < size; i += kThreads) row[i] = value;
}

__device__ void gradient_row(float* row, int64_t size, int64_t target, float max, float slope,
                             float at_target) {
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    row[i] = i == target ? at_target : slope * exp_below(row[i], max);
  }
}

// scale is null when only the loss is wanted
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(float* logits, const int64_t* targets, const float* scales, float z_loss,
                   int64_t size, float* nll, float* lse) {
  const int64_t r = blockIdx.x;
  float* row = logits + r * size;
  const int64_t target = targets[r];
  const bool ignored = scales && scales[r] == 0.0f;
  if (ignored || target < 0 || target >= size) {
    // a label outside the vocabulary shows as NaN: raising here would need a host sync
    const float value = ignored ? 0.0f : NAN;
    if (scales) fill_row(row, size, value);
    if (threadIdx.x == 0) nll[r] = lse[r] = value;
    return;
  }
  const float logit = row[target];
  const MaxSum rest = rest_of_row(row, size, target);
  const float max = fmaxf(rest.max, logit);
  const float others = rest.sum * exp_below(rest.max, max), own = exp_below(logit, max);
  // log1p keeps a loss far below float's epsilon when the target has the largest logit
  const float log_sum = log1pf(others + (own - 1.0f)), row_lse = max + log_sum;
  if (threadIdx.x == 0) {
    nll[r] = log_sum + (max - logit);
    lse[r] = row_lse;
  }
  if (!scales) return;
  // every thread has read row[target] before any writes it: merge_block is a barrier
  const float sum = others + own, pull = 2.0f * z_loss * row_lse, per_sum = scales[r] / sum;
  gradient_row(row, size, target, max, (1.0f + pull) * per_sum, (pull * own - others) * per_sum);
}

std::tuple<Tensor, Tensor> launch(const Tensor& logits, const Tensor& target, const float* scale,
                                  double z_loss) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  auto [nll, lse] = new_row_values(logits);
  const int64_t rows = logits.size(0);
  if (rows == 0) return {nll, lse};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device_index(), &stream));
  softmax_kernel<<<static_cast<unsigned>(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<float*>(logits.mutable_data_ptr()),
      static_cast<const int64_t*>(target.const_data_ptr()), scale, static_cast<float>(z_loss),
      logits.size(1), static_cast<float*>(nll.mutable_data_ptr()),
      static_cast<float*>(lse.mutable_data_ptr()));
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return {nll, lse};
}

std::tuple<Tensor, Tensor> softmax_grad(Tensor logits, const Tensor& target, const Tensor& scale,
                                        double z_loss) {
  check_rows(logits, target);
  check_vector(scale, "scale", ScalarType::Float, logits.size(0));
  return launch(logits, target, static_cast<const float*>(scale.const_data_ptr()), z_loss);
}

std::tuple<Tensor, Tensor> softmax_nll(Tensor logits, const Tensor& target) {
  check_rows(logits, target);
  return launch(logits, target, nullptr, 0.0);
}

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_IMPL(apical, CUDA, m) {
  m.impl("softmax_grad_", TORCH_BOX(&apical::softmax_grad));
  m.impl("softmax_nll_", TORCH_BOX(&apical::softmax_nll));
}
