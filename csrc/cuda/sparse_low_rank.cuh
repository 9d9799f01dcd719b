// W = scale b a + S, a tile of 128 x 128 by each block of threads: the product in registers, then
// in shared memory, where the tile's sparse entries are added in float32 before the one rounding.
//
// includes nothing of CUDA, so that a test can compile it for the CPU, too: first comes
// sparse_low_rank_mma.cuh or what stands in for it
#pragma once

#include <cstdint>

namespace apical {

constexpr int kTile = 128;
constexpr int kThreads = 256;
// a row of the tile in float32: eight banks off the one before
constexpr int kPitch = kTile + 8;
constexpr int kResultBytes = kTile * kPitch * 4;

template <class T>
struct Rebuild {
  const T *a, *b, *values;         // (R, m), (n, R), (S,)
  const int32_t *starts, *columns;  // (n + 1,), (S,): ascending in each row
  T* out;                           // (n, m)
  float scale;
  int64_t n, m, rank;
};

// the first entry in begin .. end whose column is not before `column`
__device__ inline int lower_bound(const int32_t* columns, int begin, int end, int64_t column) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (columns[middle] < column) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// where the entries of each row of the tile begin and end: two threads a row
template <class T>
__device__ void find_entries(const Rebuild<T>& job, int64_t row, int64_t column, int* found) {
  const int64_t r = row + threadIdx.x / 2;
  const int64_t edge = column + threadIdx.x % 2 * kTile;
  found[threadIdx.x] =
      r < job.n ? lower_bound(job.columns, job.starts[r], job.starts[r + 1], edge) : 0;
}

// no two entries of a row have one column: nothing is added to twice
template <class T>
__device__ void add_entries(const Rebuild<T>& job, int64_t column, const int* found, float* tile) {
  const int row = threadIdx.x / 2;
  for (int i = found[2 * row] + threadIdx.x % 2; i < found[2 * row + 1]; i += 2) {
    tile[row * kPitch + (job.columns[i] - column)] += static_cast<float>(job.values[i]);
  }
}

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T of[kCount];
};

// kVectors: rows of every matrix begin at multiples of 16 bytes, and end there
template <bool kVectors, class T>
__device__ void write_tile(const Rebuild<T>& job, int64_t row, int64_t column, const float* tile) {
  constexpr int kCount = kVectors ? 16 / sizeof(T) : 1;
  for (int i = threadIdx.x * kCount; i < kTile * kTile; i += kThreads * kCount) {
    const int r = i / kTile, c = i % kTile;
    if (row + r >= job.n || column + c >= job.m) continue;
    const auto sums = *reinterpret_cast<const Vector<float, kCount>*>(tile + r * kPitch + c);
    Vector<T, kCount> some;
#pragma unroll
    for (int j = 0; j < kCount; ++j) some.of[j] = static_cast<T>(sums.of[j]);
    *reinterpret_cast<Vector<T, kCount>*>(job.out + (row + r) * job.m + column + c) = some;
  }
}

// a block of kHeight x kWidth of a matrix to shared memory, zeros past its `rows` and `columns`
template <int kHeight, int kWidth, int kStride, bool kVectors, class T>
__device__ void copy_block(T* to, const T* from, int64_t stride, int64_t rows, int64_t columns) {
  constexpr int kCount = kVectors ? 16 / sizeof(T) : 1;
#pragma unroll(kVectors ? 4 : 1)
  for (int i = threadIdx.x * kCount; i < kHeight * kWidth; i += kThreads * kCount) {
    const int r = i / kWidth, c = i % kWidth;
    const bool inside = r < rows && c < columns;
    const T* source = from + (inside ? r * stride + c : 0);
    if constexpr (kVectors) {
      __pipeline_memcpy_async(to + r * kStride + c, source, 16, inside ? 0 : 16);
    } else {
      to[r * kStride + c] = inside ? *source : static_cast<T>(0.0f);
    }
  }
}

// bfloat16 and float16: eight warps, each 64 x 32 of the tile, on tensor cores
template <class T, bool kVectors>
struct TensorProduct {
  static constexpr int kStages = 4, kDepth = 32;
  static constexpr int kStrideB = kDepth + 8, kStrideA = kTile + 8;
  static constexpr int kSizeB = kTile * kStrideB, kSizeA = kDepth * kStrideA;
  static constexpr int kBytes = kStages * (kSizeB + kSizeA) * static_cast<int>(sizeof(T));

  static __device__ void load(const Rebuild<T>& job, int64_t row, int64_t column, int step,
                              T* memory) {
    const int64_t k = static_cast<int64_t>(step) * kDepth;
    if (k < job.rank) {
      T* stage = memory + step % kStages * (kSizeB + kSizeA);
      copy_block<kTile, kDepth, kStrideB, kVectors>(stage, job.b + row * job.rank + k, job.rank,
                                                    job.n - row, job.rank - k);
      copy_block<kDepth, kTile, kStrideA, kVectors>(stage + kSizeB, job.a + k * job.m + column,
                                                    job.m, job.rank - k, job.m - column);
    }
    __pipeline_commit();
  }

  // the fragments are those of mma.m16n8k16: a lane has two columns, of a row and of the eighth
  // after it
  static __device__ void multiply(const T* stage, int top, int left, float (&sums)[4][4][4]) {
    const int lane = threadIdx.x % 32, along = lane % 16, aside = lane / 16 * 8;
    const T* b = stage + (top + along) * kStrideB + aside;
    const T* a = stage + kSizeB + along * kStrideA + left + aside;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      unsigned right[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) load_matrices<true>(right[j], a + k * kStrideA + 16 * j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned one[4];
        load_matrices<false>(one, b + 16 * i * kStrideB + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const unsigned* half = right[j / 2] + j % 2 * 2;
          multiply_add<T>(sums[i][j], one, half[0], half[1]);
        }
      }
    }
  }

  static __device__ void run(const Rebuild<T>& job, int64_t row, int64_t column,
                             unsigned char* memory) {
    T* stages = reinterpret_cast<T*>(memory);
    const int warp = threadIdx.x / 32, top = warp / 4 * 64, left = warp % 4 * 32;
    float sums[4][4][4] = {};
    const int steps = static_cast<int>((job.rank + kDepth - 1) / kDepth);
    for (int step = 0; step < kStages - 1; ++step) load(job, row, column, step, stages);
    for (int step = 0; step < steps; ++step) {
      __pipeline_wait_prior(kStages - 2);
      // all have the block of this step, and are done with the one that is overwritten now
      __syncthreads();
      load(job, row, column, step + kStages - 1, stages);
      multiply(stages + step % kStages * (kSizeB + kSizeA), top, left, sums);
    }
    __pipeline_wait_prior(0);
    __syncthreads();
    store(reinterpret_cast<float*>(memory), top, left, sums, job.scale);
  }

  static __device__ void store(float* tile, int top, int left, const float (&sums)[4][4][4],
                               float scale) {
    const int lane = threadIdx.x % 32;
    float* corner = tile + (top + lane / 4) * kPitch + left + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          corner[(16 * i + e / 2 * 8) * kPitch + 8 * j + e % 2] = sums[i][j][e] * scale;
        }
      }
    }
  }
};

// float32: each thread 8 x 8 of the tile, no tensor core
struct FloatProduct {
  static constexpr int kDepth = 16, kStrideB = kDepth + 1;
  static constexpr int kBytes = (kTile * kStrideB + kDepth * kPitch) * 4;

  static __device__ void run(const Rebuild<float>& job, int64_t row, int64_t column,
                             unsigned char* memory) {
    float *b = reinterpret_cast<float*>(memory), *a = b + kTile * kStrideB;
    const int top = threadIdx.x / 16 * 8, left = threadIdx.x % 16;
    float sums[8][8] = {};
    for (int64_t k = 0; k < job.rank; k += kDepth) {
      copy_block<kTile, kDepth, kStrideB, false>(b, job.b + row * job.rank + k, job.rank,
                                                 job.n - row, job.rank - k);
      copy_block<kDepth, kTile, kPitch, false>(a, job.a + k * job.m + column, job.m, job.rank - k,
                                               job.m - column);
      __syncthreads();
#pragma unroll 2
      for (int d = 0; d < kDepth; ++d) {
        float one[8], other[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) one[i] = b[(top + i) * kStrideB + d];
#pragma unroll
        for (int j = 0; j < 8; ++j) other[j] = a[d * kPitch + left + 16 * j];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[i][j] += one[i] * other[j];
        }
      }
      __syncthreads();
    }
    float* tile = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) tile[(top + i) * kPitch + left + 16 * j] = sums[i][j] * job.scale;
    }
  }
};

// bytes of shared memory: of the product or of its result, and where each row's entries are
template <class Product>
constexpr int kProductBytes = Product::kBytes > kResultBytes ? Product::kBytes : kResultBytes;
template <class Product>
constexpr int kSharedBytes = kProductBytes<Product> + kThreads * 4;

template <class Product, bool kVectors, class T>
__global__ void __launch_bounds__(kThreads, 2) rebuild_kernel(Rebuild<T> job) {
  extern __shared__ __align__(128) unsigned char memory[];
  int* found = reinterpret_cast<int*>(memory + kProductBytes<Product>);
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kTile;
  find_entries(job, row, column, found);
  Product::run(job, row, column, memory);
  __syncthreads();
  float* tile = reinterpret_cast<float*>(memory);
  add_entries(job, column, found, tile);
  __syncthreads();
  write_tile<kVectors>(job, row, column, tile);
}

}  // namespace apical
