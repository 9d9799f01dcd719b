// attention of one document and one key head: included once per instruction set
#include "tile_products.h"

namespace apical::ISA {

// what the rows of a document see of a block of its keys
struct Band {
  int64_t shift, count;  // row i sees the keys before i + shift, of count
  bool causal, first, last;

  int64_t seen(int64_t row) const {
    return causal ? std::min(std::max<int64_t>(row + shift, 0), count) : count;
  }
  int64_t first_row() const { return causal ? std::max<int64_t>(0, 1 - shift) : 0; }
  bool is_last_of(int64_t row) const { return last || (causal && row + shift <= count); }
};

static Band band_of(const Job& job, const Document& doc, int64_t first_key, int64_t keys) {
  const int64_t shift = doc.keys() - doc.rows() - first_key + 1, left = doc.keys() - first_key;
  return {shift, std::min(keys, left), job.causal, first_key == 0, left <= keys};
}

// scores (rows, kStride) of packed rows and of keys packed as columns, where one is seen
static void scores(const Band& band, int64_t first, int64_t rows, int64_t size, const float* row,
                   const float* columns, float* to) {
  const int64_t width = round_up(size), end = band.seen(first + rows - 1);
  for (int64_t c = 0; c < end; c += kPanel) {
    for (int64_t r = 0; r < rows; r += kTall) {
      const int64_t tall = std::min(kTall, rows - r);
      const int64_t left = std::min(band.seen(first + r + tall - 1) - c, kPanel);
      if (left <= 0) continue;
      tile_of<false>(tall, round_up(left) / kLanes)(row + r * width, width, 1, columns + c * width,
                                                    kPanel, to + r * kStride + c, kStride, size);
    }
  }
}

template <int S>
ISA_TARGET static inline Floats swap_lanes(Floats x) {
  Ints from;
  for (int j = 0; j < kLanes; ++j) from[j] = j ^ S;
  return __builtin_shuffle(x, from);
}

ISA_TARGET static inline float largest_lane(Floats x) {
  if (kLanes > 8) x = larger(x, swap_lanes<kLanes / 2>(x));
  if (kLanes > 4) x = larger(x, swap_lanes<4 % kLanes>(x));
  x = larger(x, swap_lanes<2>(x));
  return larger(x, swap_lanes<1>(x))[0];
}

ISA_TARGET static inline float add_lanes(Floats x) {
  if (kLanes > 8) x += swap_lanes<kLanes / 2>(x);
  if (kLanes > 4) x += swap_lanes<4 % kLanes>(x);
  x += swap_lanes<2>(x);
  return (x + swap_lanes<1>(x))[0];
}

// scores to exponentials relative to the largest so far, which is updated; 0 from seen to end, a
// whole number of vectors; returns their sum
ISA_TARGET static double softmax_row(float* row, int64_t seen, int64_t end, float* max) {
  std::fill(row + seen, row + end, -std::numeric_limits<float>::infinity());
  Floats top = Floats{} + *max, other = top;
  int64_t i = 0;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    top = larger(top, load(row + i));
    other = larger(other, load(row + i + kLanes));
  }
  if (i < end) top = larger(top, load(row + i));
  top = larger(top, other);
  *max = largest_lane(top);
  // where all are -inf, inf - inf must not spoil the finite ones that may follow
  const float from = *max == -std::numeric_limits<float>::infinity() ? 0.0f : *max;
  Floats sum{};
  for (int64_t c = 0; c < end; c += kLanes) {
    const Floats p = exp_nonpositive(load(row + c) - from);
    store(row + c, p);
    sum += p;
  }
  return add_lanes(sum);
}

// to = to * keep + from * factor, where to is not read when keep is 0
ISA_TARGET static void blend_row(float* to, const float* from, int64_t size, float keep,
                                 float factor) {
  for (int64_t d = 0; d < size; d += kLanes) {
    Floats value = load(from + d) * factor;
    if (keep != 0.0f) value += load_part(to + d, size - d) * keep;
    store_part(to + d, value, size - d);
  }
}

// what the rows of a document know of their softmax, after the blocks of keys so far
struct Statistics {
  float max = -std::numeric_limits<float>::infinity();
  double sum = 0;
};

// the product of exponentials and values, into the running result of up to kTall rows
static void weighted_values(const Job& job, const Document& doc, int64_t head, const Band& band,
                            int64_t first, int64_t rows, float* p, const float* values,
                            float* result, Statistics* of_row) {
  const int64_t width = round_up(job.size), depth = band.seen(first + rows - 1);
  float keep[kTall];
  for (int64_t r = 0; r < rows; ++r) {
    Statistics& s = of_row[first + r];
    const float before = s.max;
    const double added = softmax_row(p + r * kStride, band.seen(first + r), round_up(depth), &s.max);
    keep[r] = s.sum > 0 ? std::exp(before - s.max) : 0.0f;
    s.sum = s.sum * keep[r] + added;
  }
  multiply<false>(rows, width, depth, p, kStride, 1, values, width, result, width);
  for (int64_t r = 0; r < rows; ++r) {
    const Statistics& s = of_row[first + r];
    const int64_t token = doc.q + first + r;
    float factor = 1.0f;
    if (band.is_last_of(first + r)) {
      factor = static_cast<float>(1.0 / s.sum);
      *job.lse.at(token, head) = static_cast<float>(s.max + std::log(s.sum));
    }
    blend_row(job.out.at(token, head), result + r * width, job.size, keep[r] * factor, factor);
  }
}

static void forward(const Job& job, const Document& doc, int64_t kv_head, float* scratch) {
  const int64_t width = round_up(job.size);
  float* keys = scratch;
  float* values = keys + kKeys * width;
  float* query = values + kKeys * width;
  float* p = query + kRows * width;
  float* result = p + kRows * kStride;
  std::vector<Statistics> statistics(doc.rows() * job.group);
  for (int64_t key = 0; key < doc.keys(); key += kKeys) {
    const Band band = band_of(job, doc, key, kKeys);
    pack_columns(job.k.at(doc.k + key, kv_head), job.k.token, band.count, job.size, keys);
    pack_rows(job.v.at(doc.k + key, kv_head), job.v.token, band.count, job.size, 1.0f, values);
    for (int64_t g = 0; g < job.group; ++g) {
      const int64_t head = kv_head * job.group + g;
      for (int64_t first = band.first_row(); first < doc.rows(); first += kRows) {
        const int64_t rows = std::min(kRows, doc.rows() - first);
        const float* from = job.q.at(doc.q + first, head);
        pack_rows(from, job.q.token, rows, job.size, job.scale, query);
        scores(band, first, rows, job.size, query, keys, p);
        for (int64_t r = 0; r < rows; r += kTall)
          weighted_values(job, doc, head, band, first + r, std::min(kTall, rows - r),
                          p + r * kStride, values, result, &statistics[g * doc.rows()]);
      }
    }
  }
}

ISA_TARGET static float dot_row(const float* a, const float* b, int64_t size) {
  Floats sum{};
  for (int64_t d = 0; d < size; d += kLanes)
    sum += load_part(a + d, size - d) * load_part(b + d, size - d);
  return add_lanes(sum);
}

// scores to p and g . v to p (g . v - delta), both 0 from seen to end
ISA_TARGET static void gradient_row(float* p, float* d, int64_t seen, int64_t end, float lse,
                                    float delta) {
  for (int64_t c = 0; c < seen; c += kLanes) {
    const Floats value = exp_nonpositive(load(p + c) - lse);
    store(p + c, value);
    store(d + c, value * (load(d + c) - delta));
  }
  std::fill(p + seen, p + end, 0.0f);
  std::fill(d + seen, d + end, 0.0f);
}

// where the backward of one document keeps what; all rows are `width` long
struct Buffers {
  float *key_columns, *value_columns, *keys, *grad_keys, *grad_values, *query, *grad, *grad_query;
  float *p, *d;

  Buffers(float* scratch, int64_t width) {
    for (float** of_keys : {&key_columns, &value_columns, &keys, &grad_keys, &grad_values})
      *of_keys = std::exchange(scratch, scratch + kKeys * width);
    for (float** of_rows : {&query, &grad, &grad_query})
      *of_rows = std::exchange(scratch, scratch + kRows * width);
    for (float** square : {&p, &d}) *square = std::exchange(scratch, scratch + kRows * kStride);
  }
};

// p and d of a block of rows, from packed rows and keys
static void probabilities(const Job& job, const Document& doc, int64_t head, const Band& band,
                          int64_t first, int64_t rows, const float* delta, const Buffers& x) {
  scores(band, first, rows, job.size, x.query, x.key_columns, x.p);
  scores(band, first, rows, job.size, x.grad, x.value_columns, x.d);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t seen = band.seen(first + r), last = std::min(r / kTall * kTall + kTall, rows) - 1;
    // the products read as far as the last row of kTall rows, and kTall keys, reach
    const int64_t end = std::max(band.seen(first + last), seen + kTall);
    gradient_row(x.p + r * kStride, x.d + r * kStride, seen, end,
                 *job.lse.at(doc.q + first + r, head), delta[first + r]);
  }
}

static void backward_rows(const Job& job, const Document& doc, int64_t head, const Band& band,
                          int64_t first, int64_t rows, const float* delta, const Buffers& x) {
  const int64_t width = round_up(job.size), token = doc.q + first;
  pack_rows(job.q.at(token, head), job.q.token, rows, job.size, job.scale, x.query);
  pack_rows(job.grad_out.at(token, head), job.grad_out.token, rows, job.size, 1.0f, x.grad);
  probabilities(job, doc, head, band, first, rows, delta, x);
  const int64_t keys = band.seen(first + rows - 1);
  for (int64_t c = 0; c < keys; c += kTall) {
    const int64_t tall = std::min(kTall, keys - c);
    // the rows before see none of these keys
    const int64_t skip = job.causal ? std::max<int64_t>(0, c + 1 - band.shift - first) : 0;
    const float *p = x.p + skip * kStride + c, *d = x.d + skip * kStride + c;
    multiply<true>(tall, width, rows - skip, p, 1, kStride, x.grad + skip * width, width,
                   x.grad_values + c * width, width);
    multiply<true>(tall, width, rows - skip, d, 1, kStride, x.query + skip * width, width,
                   x.grad_keys + c * width, width);
  }
  for (int64_t r = 0; r < rows; r += kTall) {
    const int64_t tall = std::min(kTall, rows - r);
    multiply<false>(tall, width, band.seen(first + r + tall - 1), x.d + r * kStride, kStride, 1,
                    x.keys, width, x.grad_query + r * width, width);
  }
  const float keep = band.first ? 0.0f : 1.0f;
  for (int64_t r = 0; r < rows; ++r)
    blend_row(job.grad_q.at(token + r, head), x.grad_query + r * width, job.size, keep, 1.0f);
}

static void backward(const Job& job, const Document& doc, int64_t kv_head, float* scratch) {
  const int64_t width = round_up(job.size), rows = doc.rows();
  const Buffers x(scratch, width);
  std::vector<float> delta(rows * job.group);
  for (int64_t g = 0; g < job.group; ++g) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = doc.q + r, head = kv_head * job.group + g;
      prefetch_row(job.grad_out.at(token, head), job.grad_out.token, job.size);
      prefetch_row(job.out.at(token, head), job.out.token, job.size);
      delta[g * rows + r] = dot_row(job.grad_out.at(token, head), job.out.at(token, head), job.size);
    }
  }
  for (int64_t key = 0; key < doc.keys(); key += kKeys) {
    const Band band = band_of(job, doc, key, kKeys);
    const float *k = job.k.at(doc.k + key, kv_head), *v = job.v.at(doc.k + key, kv_head);
    pack_columns(k, job.k.token, band.count, job.size, x.key_columns);
    pack_columns(v, job.v.token, band.count, job.size, x.value_columns);
    pack_rows(k, job.k.token, band.count, job.size, job.scale, x.keys);
    std::fill_n(x.grad_keys, band.count * width, 0.0f);
    std::fill_n(x.grad_values, band.count * width, 0.0f);
    for (int64_t g = 0; g < job.group; ++g)
      for (int64_t first = band.first_row(); first < rows; first += kRows)
        backward_rows(job, doc, kv_head * job.group + g, band, first, std::min(kRows, rows - first),
                      &delta[g * rows], x);
    for (int64_t c = 0; c < band.count; ++c) {
      const int64_t token = doc.k + key + c;
      blend_row(job.grad_k.at(token, kv_head), x.grad_keys + c * width, job.size, 0.0f, 1.0f);
      blend_row(job.grad_v.at(token, kv_head), x.grad_values + c * width, job.size, 0.0f, 1.0f);
    }
  }
}

}  // namespace apical::ISA

#undef ISA
#undef ISA_TARGET
#undef ISA_BYTES
