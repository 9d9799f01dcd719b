// forward on the matrix unit: transposed scores, so that a vector holds one key of 16 rows and the
// softmax of a row never leaves its lane
#pragma once

#include "attention_amx_pack.h"

namespace apical::amx {

// keys of a block: the scores of 32 rows fill two thirds of the first level of cache
constexpr int64_t kForwardKeys = 256;

struct ForwardScratch {
  int64_t depth, value_tiles, key_steps;  // tiles of D, of E, and of the keys
  uint16_t *keys, *values, *query, *p;
  float *s, *result;

  ForwardScratch(Arena& arena, const Job& job, int64_t longest_keys) {
    depth = round_up(job.size, kDeep) / kDeep;
    value_tiles = round_up(job.value_size, kDeep) / kSide;
    key_steps = round_up(longest_keys, kDeep) / kDeep;
    keys = arena.take<uint16_t>(2 * key_steps * depth * kTile);
    values = arena.take<uint16_t>(key_steps * value_tiles * kTile);
    query = arena.take<uint16_t>(2 * depth * kTile);
    p = arena.take<uint16_t>(kForwardKeys * kDeep);
    s = arena.take<float>(kForwardKeys * kDeep);
    result = arena.take<float>(2 * value_tiles * kSums);
  }

  Operand key_rows() const { return {keys, depth * kTile, kTile}; }
  Operand value_columns() const { return {values, key_steps * kTile, kTile}; }
};

// N tiles of 16 rows: what they see, and their softmax over the keys so far
template <int N>
struct Rows {
  int64_t first, end;
  __m512i low[N], high[N];
  __m512 max[N], sum[N];  // the maximum is of scores times scale, in units of ln 2

  AMX_TARGET Rows(const Band& band, int64_t first_row, int64_t rows, const float* sink)
      : first(first_row), end(first_row + std::min(rows, N * kSide)) {
    alignas(64) int32_t lows[N * kSide], highs[N * kSide];
    for (int64_t r = 0; r < N * kSide; ++r) {
      lows[r] = static_cast<int32_t>(band.low(first + r));
      highs[r] = static_cast<int32_t>(band.high(first + r));
    }
    for (int n = 0; n < N; ++n) {
      low[n] = _mm512_load_si512(lows + n * kSide);
      high[n] = _mm512_load_si512(highs + n * kSide);
      max[n] = _mm512_set1_ps(sink ? *sink * kLog2E : -std::numeric_limits<float>::infinity());
      sum[n] = _mm512_set1_ps(sink ? 1.0f : 0.0f);
    }
  }
};

// the largest of kDeep scores of each row; what a row does not see becomes -inf
template <int N, bool kMasked>
AMX_TARGET static inline void largest(float* s, int64_t key, const Rows<N>& rows, __m512* top) {
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
#pragma GCC unroll 4
  for (int j = 0; j < kDeep; ++j) {
    for (int n = 0; n < N; ++n) {
      float* at = s + j * kDeep + n * kSide;
      __m512 x = _mm512_load_ps(at);
      if (kMasked) {
        const __m512i index = _mm512_set1_epi32(static_cast<int32_t>(key + j));
        const __mmask16 seen = _mm512_cmp_epi32_mask(rows.low[n], index, _MM_CMPINT_LE);
        x = _mm512_mask_blend_ps(
            _mm512_mask_cmp_epi32_mask(seen, rows.high[n], index, _MM_CMPINT_NLT), nothing, x);
        _mm512_store_ps(at, x);
      }
      top[n] = _mm512_max_ps(top[n], x);
    }
  }
}

template <bool kMasked>
AMX_TARGET static inline __m512 weight(const float* s, __m512 scale, __m512 max) {
  const __m512 x = _mm512_load_ps(s), p = exp2_nonpositive(_mm512_fmsub_ps(x, scale, max));
  if (!kMasked) return p;
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, nothing, _CMP_NEQ_UQ), p);
}

// kDeep scores of each row to weights, in pairs of keys, which are added up
template <int N, bool kMasked>
AMX_TARGET static inline void weights(const float* s, __m512 scale, const __m512* max, __m512* sum,
                                      uint16_t* p) {
  alignas(64) static const uint16_t kInterleave[kDeep] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
#pragma GCC unroll 2
  for (int j = 0; j < kDeep; j += 2) {
    for (int n = 0; n < N; ++n) {
      const float* at = s + j * kDeep + n * kSide;
      const __m512 a = weight<kMasked>(at, scale, max[n]);
      const __m512 b = weight<kMasked>(at + kDeep, scale, max[n]);
      sum[n] = _mm512_add_ps(sum[n], _mm512_add_ps(a, b));
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      _mm512_store_si512(p + n * kTile + j / 2 * kDeep,
                         _mm512_permutexvar_epi16(interleave, both));
    }
  }
}

// result (value tiles, N) of the keys before, relative to a maximum that has grown
template <int N>
AMX_TARGET static inline void shrink(float* result, int64_t value_tiles, const __m512* keep) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __mmask16 changed = 0;
  for (int n = 0; n < N; ++n) changed |= _mm512_cmp_ps_mask(keep[n], one, _CMP_NEQ_UQ);
  if (!changed) return;
  for (int64_t i = 0; i < value_tiles; ++i)
    for (int n = 0; n < N; ++n, result += kSums)
#pragma GCC unroll 16
      for (int r = 0; r < kSide; ++r)
        _mm512_store_ps(result + r * kSide,
                        _mm512_mul_ps(_mm512_load_ps(result + r * kSide), keep[n]));
}

// the keys from begin to end into the softmax of rows and, unless it is the first block, into
// their result; begin is a multiple of kDeep
template <int N>
AMX_TARGET static void attend(const Job& job, const ForwardScratch& x, const Band& band,
                              int64_t begin, int64_t end, bool first, Rows<N>& rows,
                              Ahead& ahead) {
  const __m512 scale = _mm512_set1_ps(job.log2_scale());
  const Operand query{x.query, x.depth * kTile, kTile};
  __m512 top[N], keep[N], from[N];
  for (int n = 0; n < N; ++n) top[n] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t key = begin; key < end; key += kDeep) {
    float* s = x.s + (key - begin) * kDeep;
    ahead.step();
    multiply<2, N>(x.key_rows().at(key / kSide, 0), query, x.depth, {},
                   {s, kSide * kDeep, kSide, kDeep * sizeof(float)});
    if (band.all(rows.first, rows.end, key)) {
      largest<N, false>(s, key, rows, top);
    } else {
      largest<N, true>(s, key, rows, top);
    }
  }
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int n = 0; n < N; ++n) {
    const __m512 max = _mm512_max_ps(rows.max[n], _mm512_mul_ps(top[n], scale));
    // a row that has seen nothing yet: inf - inf must not spoil what may follow
    from[n] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(max, nothing, _CMP_NEQ_UQ), max);
    keep[n] = exp2_nonpositive(_mm512_sub_ps(rows.max[n], from[n]));
    rows.max[n] = max;
    rows.sum[n] = _mm512_mul_ps(rows.sum[n], keep[n]);
  }
  for (int64_t key = begin; key < end; key += kDeep) {
    const float* s = x.s + (key - begin) * kDeep;
    uint16_t* p = x.p + (key - begin) * (N * kSide);
    ahead.step();
    if (band.all(rows.first, rows.end, key)) {
      weights<N, false>(s, scale, from, rows.sum, p);
    } else {
      weights<N, true>(s, scale, from, rows.sum, p);
    }
  }
  if (!first) shrink<N>(x.result, x.value_tiles, keep);
  const int64_t steps = (end - begin + kDeep - 1) / kDeep;
  for (int64_t e = 0; e < x.value_tiles; e += 2) {
    const Sums sums{x.result + e * N * kSums, N * kSums, kSums, kTileRow};
    multiply<2, N>(x.value_columns().at(e, begin / kDeep), {x.p, kTile, N * kTile}, steps,
                   first ? Sums{} : sums, sums);
  }
}

// divides by the sums and turns the result into rows again
template <int N>
AMX_TARGET static void finish(const Job& job, const Document& doc, int64_t head, float* result,
                              const Rows<N>& rows, bool any) {
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int n = 0; n < N; ++n) {
    const int64_t token = doc.q + rows.first + n * kSide;
    const int64_t count = std::min(kSide, rows.end - rows.first - n * kSide);
    const __mmask16 sees = _mm512_cmp_ps_mask(rows.max[n], nothing, _CMP_NEQ_UQ);
    alignas(64) float lse[kSide];
    _mm512_store_ps(lse, _mm512_mask_blend_ps(sees, nothing,
                                              _mm512_fmadd_ps(rows.max[n], _mm512_set1_ps(kLn2),
                                                              log_of(rows.sum[n]))));
    for (int64_t r = 0; r < count; ++r) *job.lse.at(token + r, head) = lse[r];
    const __m512 factor = _mm512_maskz_div_ps(sees, _mm512_set1_ps(1.0f), rows.sum[n]);
    for (int64_t e = 0; e < job.value_size; e += kDeep) {
      __m512i half[2][kSide];
      for (int h = 0; h < 2; ++h) {
        const float* from = result + ((e / kSide + h) * N + n) * kSums;
#pragma GCC unroll 16
        for (int r = 0; r < kSide; ++r) {
          const __m512 value = any ? _mm512_load_ps(from + r * kSide) : _mm512_setzero_ps();
          half[h][r] = _mm512_castps_si512(_mm512_maskz_mul_ps(sees, value, factor));
        }
        transpose(half[h]);
      }
      for (int64_t r = 0; r < count; ++r)
        store_channels(job.out.at(token + r, head) + e, _mm512_castsi512_ps(half[0][r]),
                       _mm512_castsi512_ps(half[1][r]), job.value_size - e);
    }
  }
}

template <int N>
AMX_TARGET static void forward_rows(const Job& job, const Document& doc, int64_t head,
                                    int64_t first, const ForwardScratch& x, Ahead& ahead) {
  const Band band(job, doc);
  Rows<N> rows(band, first, doc.rows() - first, job.sinks ? job.sinks + head : nullptr);
  pack_rows<true>({job.q, doc.q + first, head, rows.end - first, job.size}, N * kSide, job.flip(),
                  x.query, ahead);
  const int64_t begin = band.low(first) / kDeep * kDeep, end = band.high(rows.end - 1) + 1;
  for (int64_t key = begin; key < end; key += kForwardKeys)
    attend<N>(job, x, band, key, std::min(end, key + kForwardKeys), key == begin, rows, ahead);
  finish<N>(job, doc, head, x.result, rows, begin < end);
}

AMX_TARGET static void forward(const Job& job, const Document& doc, int64_t kv_head, Arena arena,
                               Ahead ahead) {
  const ForwardScratch x(arena, job, doc.keys());
  const int64_t keys = doc.keys();
  pack_rows<false>({job.k, doc.k, kv_head, keys, job.size}, round_up(keys, kDeep),
                   _mm512_setzero_si512(), x.keys, ahead);
  pack_pairs<true>({job.v, doc.k, kv_head, keys, job.value_size}, x.value_columns(), ahead);
  for (int64_t g = 0; g < job.group; ++g) {
    const int64_t head = kv_head * job.group + g;
    int64_t first = 0;
    for (; first + kSide < doc.rows(); first += kDeep) {
      forward_rows<2>(job, doc, head, first, x, ahead);
    }
    if (first < doc.rows()) {
      forward_rows<1>(job, doc, head, first, x, ahead);
    }
  }
}

}  // namespace apical::amx
