// a block of 32 x 32 products becomes exponentials below the targets' logits: its rows belong to
// the vocabulary, its columns to tokens, so that sums over the vocabulary are sums of vectors
#pragma once

#include "amx_gemm.h"

namespace apical::amx {

// below, an exponential is 0: the powers of two beneath the normal numbers
constexpr float kLowest = -127.0f;

// of the tokens of a block, over the vocabulary: sums of exp(z - target) and of that times
// (z - target) log2 e, and the largest (z - target) log2 e
struct TokenSums {
  double *exps = nullptr, *products = nullptr;
  float* max = nullptr;
};

// where the exponentials go in bfloat16, two tiles each; null: nowhere
struct ExpTiles {
  uint16_t *upper = nullptr, *lower = nullptr;  // 16 vocabulary entries of 32 tokens each
  uint16_t *left = nullptr, *right = nullptr;   // 16 pairs of vocabulary entries of 16 tokens each
};

// sums of 16 tokens
struct LaneSums {
  __m512 exps, products, max;

  AMX_TARGET LaneSums()
      : exps(_mm512_setzero_ps()), products(_mm512_setzero_ps()), max(_mm512_set1_ps(kLowest)) {}

  // returns 2^x for x = (z - target) scale < 128, within 2 units in the last place
  AMX_TARGET inline __m512 add(__m512 z, __m512 target, __m512 scale) {
    // in this order NaN stays NaN
    const __m512 x = _mm512_max_ps(_mm512_set1_ps(kLowest),
                                   _mm512_mul_ps(_mm512_sub_ps(z, target), scale));
    // 1.5 * 2^23, which rounds to an integer in the low bits, and the bias of the exponent
    const __m512 magic = _mm512_set1_ps(12583039.0f), shifted = _mm512_add_ps(x, magic);
    const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
    __m512 p = horner(_mm512_set1_ps(1.326472731e-3f), r, 9.671512991e-3f);
    p = horner(horner(p, r, 5.550733581e-2f), r, 2.402224243e-1f);
    p = horner(horner(p, r, 6.931470037e-1f), r, 1.0f);
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    const __m512 e = _mm512_mul_ps(p, _mm512_castsi512_ps(power));
    exps = _mm512_add_ps(exps, e);
    products = _mm512_fmadd_ps(e, x, products);
    max = _mm512_max_ps(max, x);
    return e;
  }

  AMX_TARGET inline void flush(const TokenSums& to, int64_t at) const {
    add_to(to.exps + at, exps);
    add_to(to.products + at, products);
    _mm512_storeu_ps(to.max + at, _mm512_max_ps(max, _mm512_loadu_ps(to.max + at)));
  }

 private:
  AMX_TARGET static inline __m512 horner(__m512 p, __m512 r, float next) {
    return _mm512_fmadd_ps(p, r, _mm512_set1_ps(next));
  }

  AMX_TARGET static inline void add_to(double* to, __m512 x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m256d upper = _mm512_extractf64x4_pd(_mm512_castps_pd(x), 1);
    const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(upper));
    _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), low));
    _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), high));
  }
};

// the exponentials of one block, a few pairs of vocabulary entries at a time
class Exponentials {
 public:
  AMX_TARGET Exponentials() : Exponentials(nullptr, nullptr, 0.0f, {}, {}) {}

  AMX_TARGET Exponentials(const float* block, const float* targets, float scale,
                          const TokenSums& sums, const ExpTiles& to)
      : z_(block), targets_(targets), scale_(scale), sums_(sums), to_(to) {}

  AMX_TARGET inline void step(int64_t pairs, __m512i first, __m512i last) {
    for (; z_ && pairs > 0 && pair_ < kSide; --pairs, ++pair_) {
      const __m512i even = row(2 * pair_), odd = row(2 * pair_ + 1);
      if (to_.upper) store_rows(even, odd);
      if (to_.left) {
        _mm512_store_si512(to_.left + pair_ * kDeep, _mm512_permutex2var_epi16(even, first, odd));
        _mm512_store_si512(to_.right + pair_ * kDeep, _mm512_permutex2var_epi16(even, last, odd));
      }
    }
  }

  AMX_TARGET inline void finish(__m512i first, __m512i last) {
    step(kSide, first, last);
    if (!z_) return;
    a_.flush(sums_, 0);
    b_.flush(sums_, kSide);
  }

 private:
  AMX_TARGET inline __m512i row(int64_t i) {
    const float* z = z_ + i * kDeep;
    const __m512 scale = _mm512_set1_ps(scale_);
    const __m512 a = a_.add(_mm512_load_ps(z), _mm512_load_ps(targets_), scale);
    const __m512 b = b_.add(_mm512_load_ps(z + kSide), _mm512_load_ps(targets_ + kSide), scale);
    return (__m512i)_mm512_cvtne2ps_pbh(b, a);
  }

  // past the caches: they are read again after the whole vocabulary
  AMX_TARGET inline void store_rows(__m512i even, __m512i odd) const {
    constexpr int64_t half = kSide / 2;
    uint16_t* to = (pair_ < half ? to_.upper : to_.lower) + pair_ % half * 2 * kDeep;
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), even);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + kDeep), odd);
  }

  const float *z_, *targets_;
  float scale_;
  TokenSums sums_;
  ExpTiles to_;
  LaneSums a_, b_;
  int64_t pair_ = 0;
};

}  // namespace apical::amx
