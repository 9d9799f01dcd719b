// rows of tensors to and from scratch, in float32: included once per instruction set
#include "vector_types.h"

namespace apical::ISA {

// rows of one head are far apart: the processor does not guess the next ones by itself
template <int kWrite>
static inline void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t d = 0; d < bytes; d += 64) __builtin_prefetch(row + d, kWrite);
}
constexpr int64_t kAhead = 6;

// whether everything seen so far is finite: x * 0 is 0, or NaN
ISA_TARGET static inline bool all_zero(Floats sum) {
  for (int64_t lane = 0; lane < kLanes; ++lane)
    if (sum[lane] != 0.0f) return false;
  return true;
}

template <class T>
ISA_TARGET static bool pack_rows_of(const View& from, int64_t token, int64_t head, int64_t rows,
                                    int64_t size, float factor, float* to) {
  Floats zero{};
  for (int64_t r = 0; r < rows; ++r, ++token) {
    prefetch_row<0>(from.at(token + kAhead, head), size * sizeof(T));
    const T* row = reinterpret_cast<const T*>(from.at(token, head));
    for (int64_t d = 0; d < size; d += kLanes, to += kLanes) {
      const Floats value = widen(row + d, size - d);
      zero += value * 0.0f;
      store(to, value * factor);
    }
  }
  return all_zero(zero);
}

// rows, times factor, one after the other, with zeros up to a whole number of vectors; returns
// whether all of them are finite
static bool pack_rows(const View& from, int64_t token, int64_t head, int64_t rows, int64_t size,
                      float factor, float* to) {
  if (from.kind == Kind::kFloat)
    return pack_rows_of<float>(from, token, head, rows, size, factor, to);
  if (from.kind == Kind::kBfloat16)
    return pack_rows_of<Bfloat16>(from, token, head, rows, size, factor, to);
  return pack_rows_of<Half>(from, token, head, rows, size, factor, to);
}

template <class T>
ISA_TARGET static bool pack_columns_of(const View& from, int64_t token, int64_t head,
                                       int64_t rows, int64_t size, float* columns, float* packed) {
  const int64_t width = round_up(size);
  Floats zero{};
  for (int64_t r = 0; r < rows; r += kLanes) {
    float* panel = columns + r / kPanel * kPanel * width + r % kPanel;
    for (int64_t i = 0; i < kLanes; ++i)
      prefetch_row<0>(from.at(token + r + i + kLanes, head), size * sizeof(T));
    for (int64_t d = 0; d < size; d += kLanes) {
      Floats x[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const T* row = reinterpret_cast<const T*>(from.at(token + r + i, head));
        x[i] = r + i < rows ? widen(row + d, size - d) : Floats{};
        zero += x[i] * 0.0f;
        if (packed) store(packed + (r + i) * width + d, x[i]);
      }
      transpose(x);
      for (int64_t i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel, x[i]);
    }
  }
  return all_zero(zero);
}

// rows as columns, in panels of kPanel columns; panel p begins at p * kPanel * round_up(size); to
// `packed`, if given, also as rows, up to a whole number of vectors of them
static bool pack_columns(const View& from, int64_t token, int64_t head, int64_t rows, int64_t size,
                         float* columns, float* packed) {
  if (from.kind == Kind::kFloat)
    return pack_columns_of<float>(from, token, head, rows, size, columns, packed);
  if (from.kind == Kind::kBfloat16)
    return pack_columns_of<Bfloat16>(from, token, head, rows, size, columns, packed);
  return pack_columns_of<Half>(from, token, head, rows, size, columns, packed);
}

// to = from * factor, plus what is in `before`, if given
template <class T>
ISA_TARGET static void write_row_of(char* to, const float* from, int64_t size, float factor,
                                    const float* before) {
  T* row = reinterpret_cast<T*>(to);
  for (int64_t d = 0; d < size; d += kLanes) {
    Floats value = load(from + d) * factor;
    if (before) value += widen(before + d, size - d);
    narrow(row + d, value, size - d);
  }
}

static void write_row(const View& to, int64_t token, int64_t head, const float* from, int64_t size,
                      float factor, const float* before = nullptr) {
  char* row = to.at(token, head);
  if (to.kind == Kind::kFloat) return write_row_of<float>(row, from, size, factor, before);
  if (to.kind == Kind::kBfloat16) return write_row_of<Bfloat16>(row, from, size, factor, before);
  write_row_of<Half>(row, from, size, factor, before);
}

}  // namespace apical::ISA
