// the gradients of a chunk of tokens, from what a sweep has left: unnormalised exponentials, and
// sums of the rows of the weight with them
#pragma once

#include "amx_loss_sweep.h"

namespace apical::amx {

// what a token's exponentials are multiplied by, and the gradient at its target, which is not
// among them
struct Factors {
  std::vector<float> others, target;
};

// 16 of the columns of a row from `column` on, 0 beyond the last
AMX_TARGET static inline __mmask16 lanes_from(int64_t column, int64_t columns) {
  return columns - column >= kSide ? 0xffff : (1u << (columns - column)) - 1;
}

AMX_TARGET static inline __m512 load_wide(__mmask16 mask, const uint16_t* from) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

// to += factor * from
AMX_TARGET static inline void add_row(float* to, const uint16_t* from, float factor,
                                      int64_t size) {
  for (int64_t d = 0; d < size; d += kSide) {
    const __mmask16 mask = lanes_from(d, size);
    const __m512 sum = _mm512_fmadd_ps(load_wide(mask, from + d), _mm512_set1_ps(factor),
                                       _mm512_maskz_loadu_ps(mask, to + d));
    _mm512_mask_storeu_ps(to + d, mask, sum);
  }
}

// the gradient of the input, for 16 tokens from `token` on
class InputGradient {
 public:
  InputGradient(const LossChunk& chunk, std::vector<Found>& found, const Factors& factors,
                float* to)
      : chunk_(chunk), found_(found), factors_(factors), to_(to) {}

  AMX_TARGET void rows(int64_t token) const {
    const int64_t size = chunk_.x.columns, count = std::min(kSide, chunk_.x.rows - token);
    for (int64_t d = 0; d < size; d += kSide) {
      __m512i sums[kSide];
      add_tiles(token, d, sums);
      transpose(sums);
      for (int64_t i = 0; i < count; ++i) {
        const __m512 others = _mm512_set1_ps(factors_.others[token + i]);
        _mm512_mask_storeu_ps(to_ + (token + i) * size + d, lanes_from(d, size),
                              _mm512_mul_ps(_mm512_castsi512_ps(sums[i]), others));
      }
    }
    for (int64_t i = token; i < token + count; ++i)
      add_row(to_ + i * size, chunk_.w.at(chunk_.ids[i], 0), factors_.target[i], size);
  }

 private:
  // 16 channels of 16 tokens, from all workers, always in the same order
  AMX_TARGET void add_tiles(int64_t token, int64_t channel, __m512i* sums) const {
    const int64_t block = token / kDeep * chunk_.depth + channel / kDeep;
    const int64_t tile = channel % kDeep / kSide * 2 + token % kDeep / kSide;
    for (int64_t i = 0; i < kSide; ++i) {
      __m512 sum = _mm512_setzero_ps();
      for (const Found& part : found_)
        sum = _mm512_add_ps(sum, _mm512_load_ps(part.grad.floats() + block * kDeep * kDeep +
                                                tile * kSums + i * kSide));
      sums[i] = _mm512_castps_si512(sum);
    }
  }

  const LossChunk& chunk_;
  std::vector<Found>& found_;
  const Factors& factors_;
  float* to_;
};

// the gradient of the weight: exponentials times tokens, which the factors normalise
class WeightGradient {
 public:
  WeightGradient(const LossChunk& chunk, const Factors& factors, const Floats& to, bool add)
      : chunk_(chunk),
        factors_(factors),
        to_(to),
        add_(add),
        tokens_(chunk.blocks * chunk.block_size()) {}

  // packs a block of tokens, normalised
  AMX_TARGET void prepare(int64_t block) const {
    Soon nothing;
    const int64_t first = block * kDeep, size = chunk_.x.columns;
    const int64_t count = std::min(kDeep, chunk_.x.rows - first);
    const Scratch scratch(chunk_.block_size());
    const Halves rows{scratch.data(), size, count, size};
    for (int64_t i = 0; i < count; ++i)
      scale_row(chunk_.x.at(first + i, 0), factors_.others[first + i], scratch.data() + i * size,
                size);
    pack_pairs<false>(part(rows, 0, kDeep, 0, size), right(0, block), nothing);
  }

  AMX_TARGET void run(Range panels) const {
    alignas(64) float sums[2][kDeep * kDeep];
    const int64_t pace = (kDeep + chunk_.blocks - 1) / chunk_.blocks;
    auto place = chunk_.first_place(panels.begin);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      Soon ahead = next(p);
      LateSums before;
      for (int64_t d = 0; d < chunk_.depth; ++d) {
        const auto beside = [&]() AMX_TARGET {
          ahead.step();
          before.step(pace);
        };
        multiply_beside(left(p), right(d, 0), chunk_.blocks, {}, rows_of(sums[d % 2]), beside);
        before.finish();
        before = LateSums(sums[d % 2], to_, p * kDeep, d * kDeep, add_);
      }
      before.finish();
      for (; place != chunk_.places.end() && place->panel == p; ++place)
        add_row(to_.at(chunk_.ids[place->token], 0), chunk_.x.at(place->token, 0),
                factors_.target[place->token], to_.columns);
    }
  }

 private:
  AMX_TARGET static void scale_row(const uint16_t* from, float factor, uint16_t* to, int64_t size) {
    for (int64_t d = 0; d < size; d += kSide) {
      const __mmask16 mask = lanes_from(d, size);
      const __m512 row = _mm512_mul_ps(load_wide(mask, from + d), _mm512_set1_ps(factor));
      _mm256_mask_storeu_epi16(to + d, mask, (__m256i)_mm512_cvtneps_pbh(row));
    }
  }

  uint16_t* exps(int64_t panel) const { return chunk_.exps + 2 * panel * chunk_.blocks * kTile; }

  LeftOperand left(int64_t panel) const { return {exps(panel), chunk_.blocks * kTile, kTile}; }

  Operand right(int64_t channels, int64_t block) const {
    return tiles(tokens_.data(), chunk_.blocks).at(2 * channels, block);
  }

  // the exponentials of the panel after this one, line by line
  Soon next(int64_t panel) const {
    const int64_t lines = panel + 1 < chunk_.panels ? 2 * chunk_.blocks * kSide : 0;
    return {exps(panel + 1), 64, lines, 64, chunk_.blocks * chunk_.depth};
  }

  const LossChunk& chunk_;
  const Factors& factors_;
  Floats to_;
  bool add_;
  Scratch tokens_;
};

}  // namespace apical::amx
