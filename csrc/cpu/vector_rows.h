// the loops over one row of logits: included once per instruction set, as vector.h says
#include "vector.h"

namespace apical::ISA {

typedef uint16_t Halves __attribute__((vector_size(ISA_BYTES / 2)));

// float sums of one block have at most kBlock / (2 * kLanes) terms per lane; blocks add in double
constexpr int64_t kBlock = 4096;
// how far in front of a loop that reads from memory
constexpr int64_t kAhead = 2048;

// tanh(x), within 2 units in the last place (polynomial of Cephes)
ISA_TARGET static inline Floats tanh_of(Floats x) {
  const Ints sign = (Ints)x & (Ints{} + INT32_MIN);
  const Floats size = (Floats)((Ints)x ^ sign), square = x * x;
  Floats p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  // where the result is small, this has lost its digits
  const Floats t = exp_nonpositive(size * -2.0f), large = (1.0f - t) / (1.0f + t);
  const Floats result = size < 0.625f ? p * square * size + size : large;
  return (Floats)((Ints)result | sign);
}

// rounded to nearest, ties to even; NaN stays NaN
ISA_TARGET static inline Halves to_bfloat16(Floats x) {
  const Ints bits = (Ints)x;
  const Ints rounded = x == x ? bits + 0x7fff + ((bits >> 16) & 1) : Ints{} + 0x7fc00000;
  return __builtin_convertvector(rounded >> 16, Halves);
}

// past the caches, which would first have to read the line, where a vector is half a line
ISA_TARGET static inline void store_halves(uint16_t* to, Halves halves) {
#if ISA_BYTES == 64
  typedef long long Words __attribute__((vector_size(32)));
  if (reinterpret_cast<uintptr_t>(to) % sizeof(halves) == 0)
    return __builtin_ia32_movntdq256(reinterpret_cast<Words*>(to), (Words)halves);
#endif
  std::memcpy(to, &halves, sizeof(halves));
}

// before other threads read what store_halves has written
static inline void finish_halves() {
#if ISA_BYTES == 64
  __builtin_ia32_sfence();
#endif
}

ISA_TARGET static float row_max(const float* row, int64_t size) {
  Floats a = load_tail(row, 0), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    a = larger(a, load(row + i));
    b = larger(b, load(row + i + kLanes));
    c = larger(c, load(row + i + 2 * kLanes));
    d = larger(d, load(row + i + 3 * kLanes));
  }
  for (; i + kLanes <= size; i += kLanes) a = larger(a, load(row + i));
  a = larger(larger(a, load_tail(row + i, size - i)), larger(b, larger(c, d)));
  float result = a[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) result = a[lane] > result ? a[lane] : result;
  return result;
}

// scale * (raw + bias), capped
template <bool kBias, bool kCap>
ISA_TARGET static inline Floats logits_of(Floats raw, Floats bias, float scale, float cap,
                                          float per_cap) {
  const Floats s = (kBias ? raw + bias : raw) * scale;
  return kCap ? tanh_of(s * per_cap) * cap : s;
}

// replaces raw products by logits
template <bool kBias, bool kCap>
ISA_TARGET static void make_logits(float* row, int64_t size, const float* bias, float scale,
                                   float cap) {
  const float per_cap = 1.0f / cap;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats add = kBias ? load(bias + i) : Floats{};
    store(row + i, logits_of<kBias, kCap>(load(row + i), add, scale, cap, per_cap));
  }
  const Floats raw = load_tail(row + i, size - i);
  const Floats add = kBias ? load_tail(bias + i, size - i) : Floats{};
  const Floats tail = logits_of<kBias, kCap>(raw, add, scale, cap, per_cap);
  std::memcpy(row + i, &tail, (size - i) * sizeof(float));
}

// the sum of the row, or of its product with weight
template <bool kWeighted>
ISA_TARGET static double row_sum(const float* row, int64_t size, const float* weight) {
  double sum = 0;
  int64_t i = 0;
  while (i + kLanes <= size) {
    Floats a{};
    for (const int64_t end = std::min(size, i + kBlock); i + kLanes <= end; i += kLanes)
      a += kWeighted ? load(row + i) * load(weight + i) : load(row + i);
    sum += sum_lanes(a);
  }
  for (; i < size; ++i) sum += kWeighted ? row[i] * weight[i] : row[i];
  return sum;
}

// sums of exp(x) and of x exp(x)
struct ExpSums {
  Floats exps, products;

  ISA_TARGET inline Floats add(Floats x) {
    // where the exponential is 0: 0 times -inf would not be; in this order NaN stays NaN
    x = larger(Floats{} - 88.03f, x);
    const Floats y = exp_in_range(x);
    exps += y;
    products += y * x;
    return y;
  }
};

// writes exp(row - max) to `to` when asked to keep it; returns its sum, and that of its product
// with row - max. Fetches the row `ahead` in passing: this loop computes, those before it only read
template <bool kKeep>
ISA_TARGET static std::pair<double, double> exp_sums(const float* row, int64_t size, float max,
                                                     const float* ahead, float* to) {
  double exps = 0, products = 0;
  int64_t i = 0;
  while (i + kLanes <= size) {
    ExpSums a{}, b{};
    const int64_t end = std::min(size, i + kBlock);
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      for (int64_t j = 0; j < 2 * kLanes; j += 16) __builtin_prefetch(ahead + i + j, 0, 2);
      const Floats x = a.add(load(row + i) - max);
      const Floats y = b.add(load(row + i + kLanes) - max);
      if (kKeep) store(to + i, x), store(to + i + kLanes, y);
    }
    for (; i + kLanes <= end; i += kLanes) {
      const Floats x = a.add(load(row + i) - max);
      if (kKeep) store(to + i, x);
    }
    exps += sum_lanes(a.exps + b.exps);
    products += sum_lanes(a.products + b.products);
  }
  ExpSums last{};
  const Floats tail = last.add(load_tail(row + i, size - i) - max);
  if (kKeep) std::memcpy(to + i, &tail, (size - i) * sizeof(float));
  return {exps + sum_lanes(last.exps), products + sum_lanes(last.products)};
}

// of each entry: (factor * exp(z - shift) - offset * weight) times the slope of the cap at z; the
// entries are z, or without kExp the exponentials, whose sum it adds up
template <bool kExp, bool kCap>
ISA_TARGET static inline Floats slope_of(Floats entry, Floats offset, const Slopes& s,
                                         Floats& sum) {
  const Floats exps = kExp ? exp_nonpositive(entry - s.shift) : entry;
  if (kExp) sum += exps;
  const Floats value = exps * s.factor - offset, share = entry * s.per_cap;
  return kCap ? value * (1.0f - share * share) : value;
}

// the result replaces the row, or goes to half; returns the sum of the exponentials, with kExp
template <bool kExp, bool kCap, bool kWeighted, bool kHalf>
ISA_TARGET static double gradient(float* row, int64_t size, const Slopes& slopes,
                                  uint16_t* half) {
  const Slopes s = slopes;
  const float* weight = s.weight;
  double total = 0;
  int64_t i = 0;
  while (i + kLanes <= size) {
    Floats sum{};
    for (const int64_t end = std::min(size, i + kBlock); i + kLanes <= end; i += kLanes) {
      if (kExp) __builtin_prefetch(row + i + kAhead, 1, 2);
      const Floats offset = (kWeighted ? load(weight + i) : Floats{} + 1.0f) * s.offset;
      const Floats value = slope_of<kExp, kCap>(load(row + i), offset, s, sum);
      kHalf ? store_halves(half + i, to_bfloat16(value)) : store(row + i, value);
    }
    total += sum_lanes(sum);
  }
  const int64_t left = size - i;
  Floats sum{}, offset = (kWeighted ? load_tail(weight + i, left) : Floats{} + 1.0f) * s.offset;
  const Floats value = slope_of<kExp, kCap>(load_tail(row + i, left), offset, s, sum);
  const Halves rounded = to_bfloat16(value);
  if (kHalf) std::memcpy(half + i, &rounded, left * sizeof(*half)), finish_halves();
  if (!kHalf) std::memcpy(row + i, &value, left * sizeof(*row));
  return kExp ? total + sum_lanes(sum) : 0.0;
}

}  // namespace apical::ISA

#undef ISA
#undef ISA_TARGET
#undef ISA_BYTES
