// the weight of a sparse plus low-rank layer on CUDA, made anew for each pass
#include "sparse_low_rank_mma.cuh"

#include "sparse_low_rank.cuh"

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <stdexcept>

// weak, so that the same library also loads where torch has no CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace apical {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_rank(const Tensor& x, const char* name, int64_t dim, const Tensor& a) {
  STD_TORCH_CHECK(x.dim() == dim && x.is_contiguous(), name, " must be contiguous, of ", dim,
                  " dimensions");
  STD_TORCH_CHECK(x.get_device_index() == a.get_device_index(), name,
                  " must be on the device of a");
}

void check(const Tensor& a, const Tensor& b, const Tensor& values, const Tensor& starts,
           const Tensor& columns) {
  check_rank(a, "a", 2, a), check_rank(b, "b", 2, a), check_rank(values, "values", 1, a);
  check_rank(starts, "starts", 1, a), check_rank(columns, "columns", 1, a);
  STD_TORCH_CHECK(b.size(1) == a.size(0), "b must be (n, ", a.size(0), ") as a has ", a.size(0),
                  " rows, got ", b.size(1), " columns");
  STD_TORCH_CHECK(b.scalar_type() == a.scalar_type() && values.scalar_type() == a.scalar_type(),
                  "a, b and values must be of one dtype");
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Int && starts.size(0) == b.size(0) + 1,
                  "starts must be (", b.size(0) + 1, ",) int32");
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Int && columns.size(0) == values.size(0),
                  "columns must be (", values.size(0), ",) int32");
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <class Product, bool kVectors, class T>
void launch(const Rebuild<T>& job, cudaStream_t stream) {
  const auto kernel = rebuild_kernel<Product, kVectors, T>;
  constexpr int bytes = kSharedBytes<Product>;
  require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const dim3 grid(static_cast<unsigned>((job.m + kTile - 1) / kTile),
                  static_cast<unsigned>((job.n + kTile - 1) / kTile));
  kernel<<<grid, kThreads, bytes, stream>>>(job);
  require(cudaGetLastError());
}

template <class T>
void run(const Tensor& a, const Tensor& b, const Tensor& values, const Tensor& starts,
         const Tensor& columns, double scale, Tensor& out, cudaStream_t stream) {
  Rebuild<T> job{static_cast<const T*>(a.const_data_ptr()),
                 static_cast<const T*>(b.const_data_ptr()),
                 static_cast<const T*>(values.const_data_ptr()),
                 static_cast<const int32_t*>(starts.const_data_ptr()),
                 static_cast<const int32_t*>(columns.const_data_ptr()),
                 static_cast<T*>(out.mutable_data_ptr()),
                 static_cast<float>(scale),
                 b.size(0),
                 a.size(1),
                 a.size(0)};
  if constexpr (sizeof(T) == 4) {
    launch<FloatProduct, false>(job, stream);
  } else if (job.rank % 8 || job.m % 8 || !aligned(job.a) || !aligned(job.b) || !aligned(job.out)) {
    launch<TensorProduct<T, false>, false>(job, stream);
  } else {
    launch<TensorProduct<T, true>, true>(job, stream);
  }
}

Tensor sparse_rebuild(const Tensor& a, const Tensor& b, const Tensor& values, const Tensor& starts,
                      const Tensor& columns, double scale) {
  check(a, b, values, starts, columns);
  // rows of tiles are numbered by 16 bits
  STD_TORCH_CHECK(b.size(0) <= 65535 * static_cast<int64_t>(kTile), "b has too many rows: ",
                  b.size(0));
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  Tensor out = torch::stable::new_empty(a, {b.size(0), a.size(1)});
  if (out.numel() == 0) return out;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(a.get_device_index(), &stream));
  const auto here = static_cast<cudaStream_t>(stream);
  switch (a.scalar_type()) {
    case ScalarType::BFloat16:
      run<__nv_bfloat16>(a, b, values, starts, columns, scale, out, here);
      break;
    case ScalarType::Half:
      run<__half>(a, b, values, starts, columns, scale, out, here);
      break;
    default:
      STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float,
                      "a must be float32, float16 or bfloat16");
      run<float>(a, b, values, starts, columns, scale, out, here);
  }
  return out;
}

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  m.def(
      "sparse_rebuild(Tensor a, Tensor b, Tensor values, Tensor starts, Tensor columns, "
      "float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(apical, CUDA, m) {
  m.impl("sparse_rebuild", TORCH_BOX(&apical::sparse_rebuild));
}
