// scratch memory of loops over vectors
#pragma once

#include <cstdint>
#include <memory>

namespace apical {

// floats from the start of a line of the cache, so that no vector lies in two
class Lines {
 public:
  explicit Lines(int64_t size = 0) : all_(new float[size + kLine]) {}

  float* data() const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(all_.get());
    return all_.get() + (0 - at) % (kLine * sizeof(float)) / sizeof(float);
  }

 private:
  static constexpr int64_t kLine = 16;
  std::unique_ptr<float[]> all_;
};

}  // namespace apical
