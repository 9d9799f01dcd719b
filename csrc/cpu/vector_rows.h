// the loops over one row of logits: included once per instruction set, as vector.h says
#include "vector.h"

namespace apical::ISA {

// float sums of one block have at most kBlock / (2 * kLanes) terms per lane; blocks add in double
constexpr int64_t kBlock = 4096;

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

// replaces row by exp(row - max) when asked to keep it; returns the sum
template <bool kKeep>
ISA_TARGET static double exp_sum(float* row, int64_t size, float max) {
  double sum = 0;
  int64_t i = 0;
  while (i + kLanes <= size) {
    Floats a{}, b{};
    const int64_t end = std::min(size, i + kBlock);
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const Floats x = exp_nonpositive(load(row + i) - max);
      const Floats y = exp_nonpositive(load(row + i + kLanes) - max);
      if (kKeep) store(row + i, x), store(row + i + kLanes, y);
      a += x;
      b += y;
    }
    for (; i + kLanes <= end; i += kLanes) {
      const Floats x = exp_nonpositive(load(row + i) - max);
      if (kKeep) store(row + i, x);
      a += x;
    }
    sum += sum_lanes(a + b);
  }
  const Floats tail = exp_nonpositive(load_tail(row + i, size - i) - max);
  if (kKeep) std::memcpy(row + i, &tail, (size - i) * sizeof(float));
  return sum + sum_lanes(tail);
}

ISA_TARGET static void scale_row(float* row, int64_t size, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(row + i, load(row + i) * factor);
  for (; i < size; ++i) row[i] *= factor;
}

}  // namespace apical::ISA

#undef ISA
#undef ISA_TARGET
#undef ISA_BYTES
