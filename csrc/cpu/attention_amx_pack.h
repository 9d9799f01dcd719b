// how rows of one head are packed as operands of the matrix unit, and how results become rows
#pragma once

#include "attention_amx.h"

namespace apical::amx {

// a square of 16 x 16 elements of 32 bits
AMX_TARGET static inline void transpose(__m512i* x) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

AMX_TARGET static inline __mmask32 first_lanes(int64_t count) {
  return count >= kDeep ? 0xffffffffu : (1u << count) - 1;
}

// rows of one head
struct Source {
  const uint16_t* data;
  int64_t stride, rows, size;

  Source(const View<uint16_t>& view, int64_t token, int64_t head, int64_t count, int64_t channels)
      : data(view.at(token, head)), stride(view.token), rows(count), size(channels) {}

  // 32 channels, 0 where there are fewer or no such row
  AMX_TARGET __m512i load(int64_t row, int64_t channel) const {
    if (row >= rows) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16(first_lanes(size - channel), data + row * stride + channel);
  }
};

// (rows, size) as tiles of 16 rows and 32 channels, or, as columns, of 16 pairs of channels and 16
// rows: the left and the right side of products along the channels; zeros up to `padded` rows
template <bool kColumns, class Fetch>
AMX_TARGET static void pack_rows(const Source& from, int64_t padded, __m512i flip, uint16_t* to,
                                 Fetch& ahead) {
  for (int64_t r = 0; r < padded; r += kSide) {
    ahead.step();
    for (int64_t d = 0; d < from.size; d += kDeep, to += kTile) {
      __m512i x[kSide];
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) x[i] = _mm512_xor_si512(from.load(r + i, d), flip);
      if (kColumns) transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) _mm512_store_si512(to + i * kDeep, x[i]);
    }
  }
}

// which elements of two rows make a row of pairs: the first or the last 16 channels
AMX_TARGET static inline __m512i pair_index(int first) {
  alignas(64) uint16_t index[kDeep];
  for (int i = 0; i < kDeep; ++i) index[i] = static_cast<uint16_t>(first + i / 2 + i % 2 * kDeep);
  return _mm512_load_si512(index);
}

// (rows, size) as tiles of 16 pairs of rows and 16 channels, or, as columns, of 16 channels and 32
// rows: the right and the left side of products along the rows
template <bool kColumns, class Fetch>
AMX_TARGET static void pack_pairs(const Source& from, const Operand& to, Fetch& ahead) {
  const __m512i first = pair_index(0), last = pair_index(kSide);
  for (int64_t r = 0; r < from.rows; r += kDeep) {
    ahead.step();
    for (int64_t d = 0; d < from.size; d += kDeep) {
      __m512i x[kSide], y[kSide];
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        const __m512i a = from.load(r + 2 * i, d), b = from.load(r + 2 * i + 1, d);
        x[i] = _mm512_permutex2var_epi16(a, first, b);
        y[i] = _mm512_permutex2var_epi16(a, last, b);
      }
      if (kColumns) transpose(x), transpose(y);
      uint16_t* tile = to.at(d / kSide, r / kDeep).data;
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        _mm512_store_si512(tile + i * kDeep, x[i]);
        _mm512_store_si512(tile + to.tile + i * kDeep, y[i]);
      }
    }
  }
}

// 32 channels, or the first `left` of them, rounded to bfloat16; whole cache lines past the caches,
// which would first have to read them: 15 against 48 cycles (Xeon with AMX, 2026-11-21)
AMX_TARGET static inline void store_channels(uint16_t* to, __m512 low, __m512 high, int64_t left) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  if (left >= kDeep && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
  } else {
    _mm512_mask_storeu_epi16(to, first_lanes(left), both);
  }
}

}  // namespace apical::amx
