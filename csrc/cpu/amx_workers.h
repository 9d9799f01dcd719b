// how products on the matrix unit are shared among threads
#pragma once

#include "amx_gemm.h"

#include <torch/csrc/stable/ops.h>

#include <memory>

namespace apical::amx {

// memory for packed tiles, in whole cache lines
class Scratch {
 public:
  explicit Scratch(int64_t elements) : memory_(new char[elements * 2 + 64]) {}

  uint16_t* data() const {
    return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }
  float* floats() const { return reinterpret_cast<float*>(data()); }

 private:
  std::unique_ptr<char[]> memory_;
};

struct Range {
  int64_t begin, end;

  // one of `parts` nearly equal ones, cut at multiples of `unit`
  Range part(int64_t index, int64_t parts, int64_t unit) const {
    const int64_t units = (end - begin + unit - 1) / unit;
    return {std::min(end, begin + units * index / parts * unit),
            std::min(end, begin + units * (index + 1) / parts * unit)};
  }
};

// runs step(index) for so many workers, with the matrix unit configured
template <class Step>
AMX_TARGET void configured(int64_t begin, int64_t end, const Step& step) {
  static const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t i = begin; i < end; ++i) step(i);
  _mm_sfence();  // stores past the caches
  // what follows saves and restores less state
  _tile_release();
}

template <class Step>
void each_worker(int64_t workers, const Step& step) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    configured(begin, end, step);
  });
}

inline int64_t workers_for(int64_t units) {
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), units));
}

}  // namespace apical::amx
