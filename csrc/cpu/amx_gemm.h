// products of bfloat16 matrices with float32 sums on the matrix unit, in blocks of 32 x 32 sums:
// operands are packed a panel at a time, padded with zeros to whole blocks
#pragma once

#include "attention_amx_pack.h"

#include <cstring>

namespace apical::amx {

// rows of a matrix, the elements of each contiguous
template <typename T>
struct Matrix {
  T* data;
  int64_t stride, rows, columns;

  T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

using Halves = Matrix<const uint16_t>;
using Floats = Matrix<float>;

// a part of a matrix that is needed soon: fetched a few rows at a time, in passing
class Soon {
 public:
  Soon() = default;
  Soon(const void* data, int64_t stride, int64_t rows, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(data)),
        stride_(stride),
        left_(rows),
        bytes_(bytes),
        pace_((rows + steps - 1) / steps) {}

  AMX_TARGET void step() {
    for (int64_t i = 0; i < pace_ && left_ > 0; ++i, --left_, next_ += stride_)
      for (int64_t byte = 0; byte < bytes_; byte += 64) __builtin_prefetch(next_ + byte, 0, 2);
  }

 private:
  const char* next_ = nullptr;
  int64_t stride_ = 0, left_ = 0, bytes_ = 0, pace_ = 0;
};

// the rows and columns of a panel, as the packing functions read them
static inline Source part(const Halves& m, int64_t row, int64_t rows, int64_t column,
                          int64_t columns) {
  const View<uint16_t> view{const_cast<uint16_t*>(m.data), m.stride, 1};
  return {view, row, column, std::min(rows, m.rows - row), std::min(columns, m.columns - column)};
}

// packed tiles that follow one another along the sum, `depth` of them
static inline Operand tiles(uint16_t* data, int64_t depth) { return {data, depth * kTile, kTile}; }

// one block of 32 x 32 sums of `to` = or += a b, whatever part of it lies inside
AMX_TARGET static inline void block(const Operand& a, const Operand& b, int64_t depth,
                                    const Floats& to, int64_t row, int64_t column, bool add) {
  const int64_t rows = to.rows - row, columns = to.columns - column;
  float* at = to.at(row, column);
  if (rows >= kDeep && columns >= kDeep) {
    const Sums sums{at, kSide * to.stride, kSide, to.stride * 4};
    multiply<2, 2>(a, b, depth, add ? sums : Sums{}, sums);
    return;
  }
  alignas(64) float edge[kDeep * kDeep];
  const Sums sums{edge, kSide * kDeep, kSide, kDeep * 4};
  multiply<2, 2>(a, b, depth, {}, sums);
  finish_stores();
  for (int64_t r = 0; r < std::min(rows, kDeep); ++r)
    for (int64_t c = 0; c < std::min(columns, kDeep); ++c)
      at[r * to.stride + c] = edge[r * kDeep + c] + (add ? at[r * to.stride + c] : 0.0f);
}

// the same for what is not needed soon: whole cache lines go past the caches, which would first
// have to read them
AMX_TARGET static inline void block_past_caches(const Operand& a, const Operand& b, int64_t depth,
                                                const Floats& to, int64_t row, int64_t column) {
  float* at = to.at(row, column);
  const bool whole = to.rows - row >= kDeep && to.columns - column >= kDeep;
  if (!whole || reinterpret_cast<uintptr_t>(at) % 64 || to.stride % kSide)
    return block(a, b, depth, to, row, column, false);
  alignas(64) float sums[kDeep * kDeep];
  multiply<2, 2>(a, b, depth, {}, {sums, kSide * kDeep, kSide, kDeep * 4});
  finish_stores();
  for (int64_t r = 0; r < kDeep; ++r) {
    _mm512_stream_ps(at + r * to.stride, _mm512_load_ps(sums + r * kDeep));
    _mm512_stream_ps(at + r * to.stride + kSide, _mm512_load_ps(sums + r * kDeep + kSide));
  }
}

}  // namespace apical::amx
