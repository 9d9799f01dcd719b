// products of packed bfloat16 tiles on the matrix unit (AMX)
#pragma once

#include <immintrin.h>

#include <cstdint>

#define AMX_TARGET \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16,prfchw")))

namespace apical::amx {

// a tile has 16 rows of 64 bytes: 32 bfloat16, or 16 float32 sums
constexpr int64_t kSide = 16, kDeep = 32;
constexpr int64_t kTile = kSide * kDeep, kSums = kSide * kSide, kTileRow = 64;

static inline int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// all registers are whole tiles: what is smaller is padded with zeros
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// a matrix of packed tiles; those along the sum of products are `step` elements apart
struct Operand {
  uint16_t* data;
  int64_t tile, step;

  Operand at(int64_t tiles, int64_t steps) const {
    return {data + tiles * tile + steps * step, tile, step};
  }
};

// float32 tiles: `down` and `across` in elements, `row` in bytes; all 0 where there is no data
struct Sums {
  float* data;
  int64_t down, across, row;
};

// the intrinsics do not tell the compiler that they read memory
static inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

template <int M, int N>
AMX_TARGET static inline void load_sums(const Sums& from) {
  if (!from.data) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, from.data, from.row);
  if (N > 1) _tile_loadd(1, from.data + from.across, from.row);
  if (M > 1) _tile_loadd(2, from.data + from.down, from.row);
  if (M > 1 && N > 1) _tile_loadd(3, from.data + from.down + from.across, from.row);
}

template <int M, int N>
AMX_TARGET static inline void store_sums(const Sums& to) {
  _tile_stored(0, to.data, to.row);
  if (N > 1) _tile_stored(1, to.data + to.across, to.row);
  if (M > 1) _tile_stored(2, to.data + to.down, to.row);
  if (M > 1 && N > 1) _tile_stored(3, to.data + to.down + to.across, to.row);
}

// to (M, N tiles) = from + a b, over `depth` tiles of each
template <int M, int N>
AMX_TARGET static inline void multiply(const Operand& a, const Operand& b, int64_t depth,
                                       const Sums& from, const Sums& to) {
  finish_stores();
  load_sums<M, N>(from);
  const uint16_t *left = a.data, *right = b.data;
  for (int64_t k = 0; k < depth; ++k, left += a.step, right += b.step) {
    _tile_loadd(6, right, kTileRow);
    _tile_loadd(4, left, kTileRow);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) {
      _tile_loadd(7, right + b.tile, kTileRow);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (M > 1) {
      _tile_loadd(5, left + a.tile, kTileRow);
      _tile_dpbf16ps(2, 5, 6);
      if (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums<M, N>(to);
}

}  // namespace apical::amx
