// the kernel of the rebuilt weight on the CPU: every CUDA thread is a thread, and the instructions
// of tensor cores are written out as the PTX manual defines them (sections on ldmatrix and
// mma.m16n8k16)
#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Index {
  unsigned x, y;
};
thread_local Index threadIdx;
Index blockIdx;
std::barrier<> block(256);
inline void __syncthreads() { block.arrive_and_wait(); }

// a copy is made when it is waited for: what is read before is old
struct Copy {
  void* to;
  const void* from;
  int size, zeros;
};
thread_local std::vector<std::vector<Copy>> copies;
inline void __pipeline_memcpy_async(void* to, const void* from, int size, int zeros) {
  if (copies.empty()) copies.emplace_back();
  copies.back().push_back({to, from, size, zeros});
}
inline void __pipeline_commit() {
  if (copies.empty()) copies.emplace_back();
  copies.emplace_back();
}
inline void __pipeline_wait_prior(int left) {
  // the last of them is open
  while (static_cast<int>(copies.size()) - 1 > left) {
    for (const Copy& one : copies.front()) {
      std::memset(one.to, 0, one.size);
      std::memcpy(one.to, one.from, one.size - one.zeros);
    }
    copies.erase(copies.begin());
  }
}

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    bits = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};

namespace apical {

alignas(128) unsigned char memory[1 << 17];

struct Warp {
  std::barrier<> barrier{32};
  const void* rows[32];
  unsigned left[32][4], right[32][2];
};
Warp warps[8];

template <bool kTransposed>
void load_matrices(unsigned (&to)[4], const void* row) {
  Warp& warp = warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  warp.rows[lane] = row;
  warp.barrier.arrive_and_wait();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      int r = lane / 4, c = lane % 4 * 2 + j;
      if (kTransposed) std::swap(r, c);
      pair[j] = static_cast<const uint16_t*>(warp.rows[8 * i + r])[c];
    }
    std::memcpy(&to[i], pair, 4);
  }
  warp.barrier.arrive_and_wait();
}

template <class T>
float half_of(unsigned pair, int which) {
  T both[2];
  std::memcpy(both, &pair, 4);
  return static_cast<float>(both[which]);
}

template <class T>
void multiply_add(float (&sums)[4], const unsigned (&left)[4], unsigned low, unsigned high) {
  Warp& warp = warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  std::copy(left, left + 4, warp.left[lane]);
  warp.right[lane][0] = low, warp.right[lane][1] = high;
  warp.barrier.arrive_and_wait();
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k) {
      const unsigned a = warp.left[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const unsigned b = warp.right[column * 4 + k % 8 / 2][k / 8];
      sums[e] += half_of<T>(a, k % 2) * half_of<T>(b, k % 2);
    }
  }
  warp.barrier.arrive_and_wait();
}

}  // namespace apical

#include "../../csrc/cuda/sparse_low_rank.cuh"

namespace {

template <class Product, bool kVectors, class T>
void run(const apical::Rebuild<T>& job) {
  for (unsigned y = 0; y * apical::kTile < job.n; ++y) {
    for (unsigned x = 0; x * apical::kTile < job.m; ++x) {
      blockIdx = {x, y};
      // bits of a NaN in every dtype: what was not written shows
      std::memset(apical::memory, 0xff, apical::kSharedBytes<Product>);
      std::vector<std::thread> threads;
      for (unsigned i = 0; i < apical::kThreads; ++i) {
        threads.emplace_back([&job, i] {
          threadIdx = {i, 0};
          apical::rebuild_kernel<Product, kVectors, T>(job);
        });
      }
      for (auto& each : threads) each.join();
    }
  }
}

template <class T>
apical::Rebuild<T> job_of(const void* const* pointers, float scale, const int64_t* sizes) {
  return {static_cast<const T*>(pointers[0]),
          static_cast<const T*>(pointers[1]),
          static_cast<const T*>(pointers[2]),
          static_cast<const int32_t*>(pointers[3]),
          static_cast<const int32_t*>(pointers[4]),
          static_cast<T*>(const_cast<void*>(pointers[5])),
          scale,
          sizes[0],
          sizes[1],
          sizes[2]};
}

template <class T>
void run_half(const apical::Rebuild<T>& job, bool vectors) {
  if (vectors) {
    run<apical::TensorProduct<T, true>, true>(job);
  } else {
    run<apical::TensorProduct<T, false>, false>(job);
  }
}

}  // namespace

// pointers: a, b, values, starts, columns, out; sizes: n, m, rank; bytes of float32, or 2 and -2
extern "C" void rebuild(const void* const* pointers, float scale, const int64_t* sizes, int dtype,
                        bool vectors) {
  if (dtype == 4) {
    run<apical::FloatProduct, false>(job_of<float>(pointers, scale, sizes));
  } else if (dtype == 2) {
    run_half(job_of<bfloat16>(pointers, scale, sizes), vectors);
  } else {
    run_half(job_of<_Float16>(pointers, scale, sizes), vectors);
  }
}
