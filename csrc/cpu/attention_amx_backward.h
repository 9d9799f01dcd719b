// backward on the matrix unit: transposed scores again, whose weights are at once the left side of
// the products for keys and values, and in pairs of keys the right side of the one for queries
#pragma once

#include "attention_amx_pack.h"

namespace apical::amx {

// rows and keys of a block: what is packed of them, and their score gradients, stay in the second
// level of cache; blocks of 512 take a twentieth longer
constexpr int64_t kBackwardRows = 256, kBackwardKeys = 256;

struct BackwardScratch {
  int64_t depth, value_depth, key_steps, row_steps;  // tiles of D, E, the keys and a block of rows
  uint16_t *key, *key_column, *value, *query, *query_column, *grad, *grad_column;
  uint16_t *p, *d, *pairs;
  float *s, *dp, *grad_query, *grad_key, *grad_value, *lse, *delta;
  int32_t *low, *high;

  BackwardScratch(Arena& arena, const Job& job, int64_t longest_rows, int64_t longest_keys) {
    depth = round_up(job.size, kDeep) / kDeep;
    value_depth = round_up(job.value_size, kDeep) / kDeep;
    key_steps = round_up(longest_keys, kDeep) / kDeep;
    row_steps = round_up(std::min(longest_rows, kBackwardRows), kDeep) / kDeep;
    const int64_t block_keys = std::min(key_steps, kBackwardKeys / kDeep);
    for (uint16_t** of_keys : {&key, &key_column})
      *of_keys = arena.take<uint16_t>(2 * key_steps * depth * kTile);
    value = arena.take<uint16_t>(2 * key_steps * value_depth * kTile);
    for (uint16_t** of_rows : {&query, &query_column})
      *of_rows = arena.take<uint16_t>(2 * row_steps * depth * kTile);
    for (uint16_t** of_rows : {&grad, &grad_column})
      *of_rows = arena.take<uint16_t>(2 * row_steps * value_depth * kTile);
    for (uint16_t** of_strip : {&p, &d}) *of_strip = arena.take<uint16_t>(2 * row_steps * kTile);
    pairs = arena.take<uint16_t>(2 * row_steps * block_keys * kTile);
    for (float** square : {&s, &dp}) *square = arena.take<float>(4 * kSums);
    grad_query = arena.take<float>(4 * row_steps * depth * kSums);
    grad_key = arena.take<float>(4 * key_steps * depth * kSums);
    grad_value = arena.take<float>(4 * key_steps * value_depth * kSums);
    for (float** of_row : {&lse, &delta}) *of_row = arena.take<float>(row_steps * kDeep);
    for (int32_t** of_row : {&low, &high}) *of_row = arena.take<int32_t>(row_steps * kDeep);
  }

  // by 16 keys or rows, along the channels
  Operand keys() const { return {key, depth * kTile, kTile}; }
  Operand values() const { return {value, value_depth * kTile, kTile}; }
  Operand query_columns() const { return {query_column, depth * kTile, kTile}; }
  Operand grad_columns() const { return {grad_column, value_depth * kTile, kTile}; }
  // by 16 channels, along the keys or rows
  Operand key_columns() const { return {key_column, key_steps * kTile, kTile}; }
  Operand queries() const { return {query, kTile, 2 * depth * kTile}; }
  Operand grads() const { return {grad, kTile, 2 * value_depth * kTile}; }
};

// a block of rows of one head
struct RowBlock {
  int64_t head, first, rows;

  int64_t end_of(int64_t step) const { return std::min(first + (step + 1) * kDeep, first + rows); }
};

// g . o of 16 rows
AMX_TARGET static __m512 dot_rows(const Job& job, int64_t token, int64_t head, int64_t rows) {
  __m512i sum[kSide];
  for (int64_t r = 0; r < kSide; ++r) {
    __m512 dot = _mm512_setzero_ps();
    for (int64_t e = 0; r < rows && e < job.value_size; e += kDeep) {
      const __mmask32 lanes = first_lanes(job.value_size - e);
      const uint16_t *g = job.grad_out.at(token + r, head), *o = job.out.at(token + r, head);
      dot = _mm512_dpbf16_ps(dot, (__m512bh)_mm512_maskz_loadu_epi16(lanes, g + e),
                             (__m512bh)_mm512_maskz_loadu_epi16(lanes, o + e));
    }
    sum[r] = _mm512_castps_si512(dot);
  }
  transpose(sum);
  __m512 total = _mm512_setzero_ps();
  for (int r = 0; r < kSide; ++r) total = _mm512_add_ps(total, _mm512_castsi512_ps(sum[r]));
  return total;
}

// what the weights and their gradients need of each row; of padding q and g are 0, and all products
AMX_TARGET static void statistics(const Job& job, const Document& doc, const Band& band,
                                  const RowBlock& block, const BackwardScratch& x) {
  for (int64_t r = 0; r < round_up(block.rows, kDeep); ++r) {
    const int64_t token = doc.q + block.first + r;
    if (r % kSide == 0)
      _mm512_store_ps(x.delta + r, dot_rows(job, token, block.head, block.rows - r));
    const bool inside = r < block.rows;
    x.lse[r] = inside ? *job.lse.at(token, block.head) * kLog2E : 0.0f;
    const float grad = inside && job.grad_lse.data ? *job.grad_lse.at(token, block.head) : 0.0f;
    x.delta[r] = grad - x.delta[r];
    x.low[r] = static_cast<int32_t>(band.low(block.first + r));
    x.high[r] = static_cast<int32_t>(band.high(block.first + r));
  }
}

// scores (32 keys, 32 rows) to weights p, and g . v - delta to score gradients d; d in pairs of
// keys as well, whose rows then lie in the order of the halves of each 8
template <bool kMasked>
AMX_TARGET static inline void gradients(const BackwardScratch& x, __m512 scale, int64_t row,
                                        int64_t key, uint16_t* p, uint16_t* d, int64_t tile,
                                        uint16_t* pairs) {
  const __m512 lse[2] = {_mm512_load_ps(x.lse + row), _mm512_load_ps(x.lse + row + kSide)};
  for (int64_t j = 0; j < kDeep; j += 2) {
    __m512i of_key[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m512 weight[2], change[2];
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const int64_t at = (j + i) * kDeep + n * kSide;
        weight[n] = exp2_nonpositive(_mm512_fmsub_ps(_mm512_load_ps(x.s + at), scale, lse[n]));
        const __m512 dp = _mm512_load_ps(x.dp + at);
        if (kMasked) {
          const __m512i index = _mm512_set1_epi32(static_cast<int32_t>(key + j + i));
          const __m512i low = _mm512_load_si512(x.low + row + n * kSide);
          const __m512i high = _mm512_load_si512(x.high + row + n * kSide);
          const __mmask16 seen = _mm512_mask_cmp_epi32_mask(
              _mm512_cmp_epi32_mask(low, index, _MM_CMPINT_LE), high, index, _MM_CMPINT_NLT);
          weight[n] = _mm512_maskz_mov_ps(seen, weight[n]);
          change[n] = _mm512_maskz_mul_ps(seen, weight[n], dp);
        } else {
          change[n] = _mm512_mul_ps(weight[n], dp);
        }
      }
      const int64_t at = (j + i) / kSide * tile + (j + i) % kSide * kDeep;
      of_key[i] = (__m512i)_mm512_cvtne2ps_pbh(change[1], change[0]);
      _mm512_store_si512(p + at, (__m512i)_mm512_cvtne2ps_pbh(weight[1], weight[0]));
      _mm512_store_si512(d + at, of_key[i]);
    }
    _mm512_store_si512(pairs + j / 2 * kDeep, _mm512_unpacklo_epi16(of_key[0], of_key[1]));
    _mm512_store_si512(pairs + kTile + j / 2 * kDeep, _mm512_unpackhi_epi16(of_key[0], of_key[1]));
  }
}

// the gradients of 32 keys and values from a block of rows, and the score gradients in pairs,
// `pairs` elements from one step of rows to the next
AMX_TARGET static void backward_strip(const Job& job, const Band& band, const RowBlock& block,
                                      int64_t key, const BackwardScratch& x, uint16_t* pairs,
                                      int64_t pairs_step, Ahead& ahead) {
  const __m512 scale = _mm512_set1_ps(job.log2_scale());
  const int64_t steps = (block.rows + kDeep - 1) / kDeep, tile = x.row_steps * kTile;
  const Sums square{x.s, kSide * kDeep, kSide, kDeep * sizeof(float)};
  int64_t begin = steps, end = 0;
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t first = block.first + i * kDeep, row = i * kDeep;
    if (!band.any(first, block.end_of(i), key)) continue;
    begin = std::min(begin, i), end = i + 1;
    ahead.step();
    multiply<2, 2>(x.keys().at(key / kSide, 0), x.query_columns().at(2 * i, 0), x.depth, {},
                   square);
    // a row of zero bytes' stride fills all rows of a tile: sums begin with -delta
    multiply<2, 2>(x.values().at(key / kSide, 0), x.grad_columns().at(2 * i, 0), x.value_depth,
                   {x.delta + row, 0, kSide, 0}, {x.dp, square.down, square.across, square.row});
    ahead.step();
    uint16_t *p = x.p + i * kTile, *d = x.d + i * kTile, *pair = pairs + i * pairs_step;
    if (band.all(first, block.end_of(i), key)) {
      gradients<false>(x, scale, row, key, p, d, tile, pair);
    } else {
      gradients<true>(x, scale, row, key, p, d, tile, pair);
    }
  }
  if (begin >= end) return;
  for (int64_t e = 0; e < 2 * x.value_depth; e += 2) {
    const Sums sums{x.grad_value + (key / kSide * 2 * x.value_depth + e) * kSums,
                    2 * x.value_depth * kSums, kSums, kTileRow};
    multiply<2, 2>({x.p + begin * kTile, tile, kTile}, x.grads().at(e, begin), end - begin, sums,
                   sums);
  }
  for (int64_t c = 0; c < 2 * x.depth; c += 2) {
    const Sums sums{x.grad_key + (key / kSide * 2 * x.depth + c) * kSums, 2 * x.depth * kSums,
                    kSums, kTileRow};
    multiply<2, 2>({x.d + begin * kTile, tile, kTile}, x.queries().at(c, begin), end - begin, sums,
                   sums);
  }
}

// the score gradients of a block of keys into the gradients of its rows
AMX_TARGET static void grad_queries(const Band& band, const RowBlock& block, int64_t key,
                                    int64_t end, const BackwardScratch& x, int64_t pairs_step) {
  for (int64_t i = 0; i * kDeep < block.rows; ++i) {
    const int64_t first = block.first + i * kDeep, last = block.end_of(i) - 1;
    const int64_t from = std::max(key, band.low(first) / kDeep * kDeep);
    const int64_t to = std::min(end, band.high(last) + 1);
    if (from >= to) continue;
    const Operand pairs{x.pairs + i * pairs_step, kTile, 2 * kTile};
    for (int64_t c = 0; c < 2 * x.depth; c += 2) {
      const Sums sums{x.grad_query + (i * 2 * x.depth + c) * 2 * kSums, 2 * kSums, kSums,
                      kTileRow};
      multiply<2, 2>(x.key_columns().at(c, from / kDeep), pairs.at(0, (from - key) / kDeep),
                     (to - from + kDeep - 1) / kDeep, sums, sums);
    }
  }
}

AMX_TARGET static void store_grad_queries(const Job& job, const Document& doc,
                                          const RowBlock& block, const BackwardScratch& x) {
  const __m512 scale = _mm512_set1_ps(job.scale);
  for (int64_t i = 0; i * kSide < round_up(block.rows, kDeep); ++i) {
    for (int64_t c = 0; c < job.size; c += kDeep) {
      __m512i half[2][kSide];
      for (int h = 0; h < 2; ++h) {
        const float* from =
            x.grad_query + ((i / 2 * 2 * x.depth + c / kSide + h) * 2 + i % 2) * kSums;
#pragma GCC unroll 16
        for (int r = 0; r < kSide; ++r)
          half[h][r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(from + r * kSide), scale));
        transpose(half[h]);
      }
      for (int64_t r = 0; r < kSide; ++r) {
        // as `gradients` has left them: 4 of each 8 in the one tile, 4 in the other
        const int64_t row = i / 2 * kDeep + r / 4 * 8 + i % 2 * 4 + r % 4;
        if (row < block.rows)
          store_channels(job.grad_q.at(doc.q + block.first + row, block.head) + c,
                         _mm512_castsi512_ps(half[0][r]), _mm512_castsi512_ps(half[1][r]),
                         job.size - c);
      }
    }
  }
}

AMX_TARGET static void backward_rows(const Job& job, const Document& doc, const RowBlock& block,
                                     const BackwardScratch& x, Ahead& ahead) {
  const Band band(job, doc);
  const int64_t padded = round_up(block.rows, kDeep), token = doc.q + block.first;
  const Source q(job.q, token, block.head, block.rows, job.size);
  const Source g(job.grad_out, token, block.head, block.rows, job.value_size);
  pack_rows<true>(q, padded, job.flip(), x.query_column, ahead);
  pack_pairs<false>(q, x.queries(), ahead);
  pack_rows<true>(g, padded, _mm512_setzero_si512(), x.grad_column, ahead);
  pack_pairs<false>(g, x.grads(), ahead);
  statistics(job, doc, band, block, x);
  std::fill_n(x.grad_query, padded * 2 * x.depth * kSide, 0.0f);
  const int64_t begin = band.low(block.first) / kDeep * kDeep;
  const int64_t end = band.high(block.first + block.rows - 1) + 1;
  const int64_t pairs_step = 2 * std::min(x.key_steps, kBackwardKeys / kDeep) * kTile;
  for (int64_t key = begin; key < end; key += kBackwardKeys) {
    const int64_t stop = std::min(end, key + kBackwardKeys);
    for (int64_t strip = key; strip < stop; strip += kDeep) {
      backward_strip(job, band, block, strip, x, x.pairs + (strip - key) / kDeep * 2 * kTile,
                     pairs_step, ahead);
    }
    grad_queries(band, block, key, stop, x, pairs_step);
  }
  store_grad_queries(job, doc, block, x);
}

// rows of tiles (keys, channels), times scale
AMX_TARGET static void store_rows(const float* from, int64_t tiles, int64_t rows, int64_t size,
                                  float factor, uint16_t* to, int64_t stride) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = from + r / kSide * tiles * kSums + r % kSide * kSide;
    for (int64_t d = 0; d < size; d += kDeep) {
      const float* at = row + d / kSide * kSums;
      store_channels(to + r * stride + d, _mm512_mul_ps(_mm512_load_ps(at), scale),
                     _mm512_mul_ps(_mm512_load_ps(at + kSums), scale), size - d);
    }
  }
}

AMX_TARGET static void backward(const Job& job, const Document& doc, int64_t kv_head, Arena arena,
                                Ahead ahead) {
  const BackwardScratch x(arena, job, doc.rows(), doc.keys());
  const __m512i keep = _mm512_setzero_si512();
  const int64_t keys = doc.keys(), padded = round_up(keys, kDeep);
  const Source k(job.k, doc.k, kv_head, keys, job.size);
  const Source v(job.v, doc.k, kv_head, keys, job.value_size);
  pack_rows<false>(k, padded, keep, x.key, ahead);
  pack_pairs<true>(k, x.key_columns(), ahead);
  pack_rows<false>(v, padded, keep, x.value, ahead);
  std::fill_n(x.grad_key, padded * 2 * x.depth * kSide, 0.0f);
  std::fill_n(x.grad_value, padded * 2 * x.value_depth * kSide, 0.0f);
  for (int64_t g = 0; g < job.group; ++g)
    for (int64_t first = 0; first < doc.rows(); first += kBackwardRows)
      backward_rows(job, doc,
                    {kv_head * job.group + g, first, std::min(kBackwardRows, doc.rows() - first)},
                    x, ahead);
  store_rows(x.grad_key, 2 * x.depth, keys, job.size, job.scale, job.grad_k.at(doc.k, kv_head),
             job.grad_k.token);
  store_rows(x.grad_value, 2 * x.value_depth, keys, job.value_size, 1.0f,
             job.grad_v.at(doc.k, kv_head), job.grad_v.token);
}

}  // namespace apical::amx
