// a product on the matrix unit with other work beside it: vectors are computed, and what is needed
// soon is fetched, while the unit multiplies
#pragma once

#include "amx_gemm.h"

namespace apical::amx {

// tiles of 16 rows that are `row` bytes apart: a packed operand, or rows of a matrix as they are
struct LeftOperand {
  const uint16_t* data;
  int64_t tile, step, row = kTileRow;
};

// a block of 32 x 32 sums, row by row
static inline Sums rows_of(float* block) { return {block, kSide * kDeep, kSide, kDeep * 4}; }

// to = from + a b, in blocks of 32 x 32; beside() is called at each of the `depth` steps of the sum
template <class Beside>
AMX_TARGET static inline void multiply_beside(const LeftOperand& a, const Operand& b, int64_t depth,
                                              const Sums& from, const Sums& to,
                                              const Beside& beside) {
  finish_stores();
  load_sums<2, 2>(from);
  const uint16_t *left = a.data, *right = b.data;
  for (int64_t k = 0; k < depth; ++k, left += a.step, right += b.step) {
    _tile_loadd(6, right, kTileRow);
    _tile_loadd(4, left, a.row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + b.tile, kTileRow);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + a.tile, a.row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    beside();
  }
  store_sums<2, 2>(to);
  finish_stores();
}

// adds a block of 32 x 32 sums to a matrix, or overwrites it there, a few rows at a time, and
// fetches the block that is `kAhead` blocks further: 0.11 s for 2048 tokens, H = 576 and
// V = 49152, against 0.20 s with sums loaded into tiles and rows fetched at once
// (Xeon with AMX, 1 thread, 2026-11-21)
class LateSums {
 public:
  static constexpr int64_t kAhead = 4;

  LateSums() = default;
  LateSums(const float* block, const Floats& to, int64_t row, int64_t column, bool add)
      : block_(block),
        at_(to.at(row, column)),
        soon_(ahead(to, row, column)),
        stride_(to.stride),
        rows_(std::min(kDeep, to.rows - row)),
        columns_(std::min(kDeep, to.columns - column)),
        add_(add),
        past_caches_(!add && columns_ == kDeep && to.stride % kSide == 0 &&
                     reinterpret_cast<uintptr_t>(to.data) % 64 == 0) {}

  AMX_TARGET inline void step(int64_t rows) {
    for (; rows > 0 && row_ < rows_; --rows, ++row_) {
      float* to = at_ + row_ * stride_;
      const float* from = block_ + row_ * kDeep;
      if (past_caches_) {
        _mm512_stream_ps(to, _mm512_load_ps(from));
        _mm512_stream_ps(to + kSide, _mm512_load_ps(from + kSide));
        continue;
      }
      if (add_) {
        __builtin_prefetch(soon_ + row_ * stride_, 1, 2);
        __builtin_prefetch(soon_ + row_ * stride_ + kSide, 1, 2);
      }
      half(to, from, columns_);
      half(to + kSide, from + kSide, columns_ - kSide);
    }
  }

  AMX_TARGET inline void finish() { step(kDeep); }

 private:
  // in the same rows, or in the next 32; an address that does not exist fetches nothing
  static const float* ahead(const Floats& to, int64_t row, int64_t column) {
    const int64_t next = column + kAhead * kDeep;
    return next < to.columns ? to.at(row, next) : to.at(row + kDeep, next - to.columns);
  }

  AMX_TARGET inline void half(float* to, const float* from, int64_t left) const {
    if (left <= 0) return;
    const __mmask16 mask = left >= kSide ? 0xffff : (1u << left) - 1;
    __m512 sum = _mm512_load_ps(from);
    if (add_) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
    _mm512_mask_storeu_ps(to, mask, sum);
  }

  const float* block_ = nullptr;
  float* at_ = nullptr;
  const float* soon_ = nullptr;
  int64_t stride_ = 0, rows_ = 0, columns_ = 0, row_ = 0;
  bool add_ = false, past_caches_ = false;
};

}  // namespace apical::amx
