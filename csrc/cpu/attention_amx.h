// what forward and backward on the matrix unit share: the job, its masks, exponentials
#pragma once

#include "attention_amx_tiles.h"

#include <algorithm>
#include <limits>

namespace apical::amx {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// (tokens, heads, size), the last dimension contiguous
template <typename T>
struct View {
  T* data;
  int64_t token, head;

  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

struct Document {
  int64_t q, q_end, k, k_end;

  int64_t rows() const { return q_end - q; }
  int64_t keys() const { return k_end - k; }
};

struct Job {
  View<uint16_t> q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  View<float> lse, grad_lse;
  const float* sinks;
  int64_t size, value_size, kv_heads, group;  // sizes of q and k, and of v
  float scale;
  int64_t left, right, limit;

  // scores are compared before they are scaled, so a negative scale moves into q
  float log2_scale() const { return std::abs(scale) * kLog2E; }
  AMX_TARGET __m512i flip() const { return _mm512_set1_epi16(scale < 0 ? -0x8000 : 0); }
};

// which keys the rows of a document see; both ends never decrease from row to row
struct Band {
  int64_t shift, left, right, last, keys;

  Band(const Job& job, const Document& doc)
      : shift(doc.keys() - doc.rows()),
        left(job.left),
        right(job.right),
        last(std::min(doc.keys(), job.limit) - 1),
        keys(doc.keys()) {}

  int64_t low(int64_t row) const {
    return std::min(std::max<int64_t>(row + shift - left, 0), keys);
  }
  int64_t high(int64_t row) const {
    return std::max<int64_t>(std::min(row + shift + right, last), -1);
  }
  // whether any, and whether each, of these rows sees any, and each, of kDeep keys
  bool any(int64_t first, int64_t end, int64_t key) const {
    return key + kDeep > low(first) && key <= high(end - 1);
  }
  bool all(int64_t first, int64_t end, int64_t key) const {
    return key >= low(end - 1) && key + kDeep - 1 <= high(first);
  }
  // squares of kDeep rows and keys in which a row sees a key
  int64_t squares(int64_t rows) const {
    int64_t sum = 0;
    for (int64_t first = 0; first < rows; first += kDeep) {
      const int64_t seen = high(std::min(first + kDeep, rows) - 1) + 1 - low(first) / kDeep * kDeep;
      sum += std::max<int64_t>(seen + kDeep - 1, 0) / kDeep;
    }
    return sum;
  }
};

// the task that this thread takes next: its rows are fetched in passing, a few at a time, because
// those of one head are far apart and the processor does not guess them by itself
class Ahead {
 public:
  // of the job's tasks, the one of doc and kv_head, while the one of `now` is computed
  Ahead(const Job& job, const Document& doc, int64_t kv_head, const Document& now)
      : of_query_{&job.q, &job.grad_out, &job.out},
        of_key_{&job.k, &job.v},
        doc_(doc),
        kv_head_(kv_head),
        head_(kv_head * job.group),
        count_(job.grad_out.data ? 3 : 1),
        rows_(std::max(doc.rows(), doc.keys())),
        bytes_(2 * std::max(job.size, job.value_size)) {
    // as often as `step` is called: twice per square, and when rows or keys are packed
    const int64_t calls =
        2 * Band(job, now).squares(now.rows()) + (now.rows() + now.keys()) / (kDeep / 4) + 1;
    pace_ = (rows_ + calls - 1) / calls;
  }

  AMX_TARGET void step() {
    for (const int64_t end = std::min(row_ + pace_, rows_); row_ < end; ++row_) {
      for (int i = 0; i < count_ && row_ < doc_.rows(); ++i)
        fetch(of_query_[i]->at(doc_.q + row_, head_));
      for (int i = 0; i < 2 && row_ < doc_.keys(); ++i)
        fetch(of_key_[i]->at(doc_.k + row_, kv_head_));
    }
  }

 private:
  void fetch(const uint16_t* row) const {
    const char* from = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(from + i, 0, 2);
  }

  const View<uint16_t>*of_query_[3], *of_key_[2];
  Document doc_;
  int64_t kv_head_, head_, count_, rows_, bytes_, pace_ = 1, row_ = 0;
};

// hands out the memory of a thread, in whole cache lines; from 0 it counts
struct Arena {
  uintptr_t next;

  template <typename T>
  T* take(int64_t count) {
    const uintptr_t from = next;
    next += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return reinterpret_cast<T*>(from);
  }
};

// 2^x for x <= 0, within 4e-6, and 2^-100 where it is less: far below any weight that counts, and
// not so small that products with it become denormal, which are slow
AMX_TARGET static inline __m512 exp2_nonpositive(__m512 x) {
  // in this order NaN stays NaN
  x = _mm512_max_ps(_mm512_set1_ps(-100.0f), x);
  // adding 1.5 * 2^23 rounds to an integer, which is left in the low bits
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __m512 shifted = _mm512_add_ps(x, magic);
  const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(9.5828548e-3f), _mm512_set1_ps(5.5906430e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24024099f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69312418f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
}

// natural logarithm of x >= 1
AMX_TARGET static inline __m512 log_of(__m512 x) {
  // x = m 2^e with m in [0.75, 1.5)
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  const __m512 e = _mm512_getexp_ps(_mm512_div_ps(x, m));
  const __m512 one = _mm512_set1_ps(1.0f);
  // ln m = 2 artanh s
  const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
  const __m512 square = _mm512_mul_ps(s, s);
  __m512 p = _mm512_fmadd_ps(square, _mm512_set1_ps(2.0f / 9), _mm512_set1_ps(2.0f / 7));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f / 5));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f / 3));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f));
  return _mm512_fmadd_ps(p, s, _mm512_mul_ps(e, _mm512_set1_ps(kLn2)));
}

}  // namespace apical::amx
