// activations from rows in memory to columns in scratch, and back: once per instruction set
#include "vector_types.h"

namespace apical::ISA {
namespace {

// lines of a matrix to fetch, one by one, while there is something to compute: rows are far apart,
// the processor does not guess the next ones by itself
struct Ahead {
  const char* row;
  int64_t rows, bytes, stride, at;

  template <class T>
  static Ahead of(const T* from, int64_t stride, int64_t rows, int64_t size) {
    constexpr int64_t kBytes = sizeof(T);
    return {reinterpret_cast<const char*>(from), size > 0 ? rows : 0, size * kBytes,
            stride * kBytes, 0};
  }

  inline void next() {
    if (rows <= 0) return;
    __builtin_prefetch(row + at, 0, 2);
    at += 64;
    if (at >= bytes) at = 0, row += stride, --rows;
  }
};

// a matrix in memory, from the token on that is looked at
template <class T>
struct Rows {
  T* data;
  int64_t stride, there, size;  // `there` rows exist, at most those of one pack

  Rows part(int64_t column) const {
    return {data + column, stride, there, std::min(Plan::kWidth, size - column)};
  }
  Ahead ahead() const { return Ahead::of(data, stride, there, size); }
};

// every column as kTokens floats, 0 where there is no row
template <class T, int64_t kTokens>
ISA_TARGET void pack(const Rows<T>& from, float* to) {
  std::remove_const_t<T> edge[kLanes * kLanes];
  for (int64_t t = 0; t < kTokens; t += kLanes) {
    const int64_t rows = std::min(from.there - t, kLanes);
    for (int64_t c = 0; c < from.size; c += kLanes) {
      const int64_t columns = std::min(from.size - c, kLanes);
      const T* source = from.data + t * from.stride + c;
      int64_t stride = from.stride;
      if (rows < kLanes || columns < kLanes) {
        std::memset(edge, 0, sizeof(edge));
        for (int64_t i = 0; i < rows; ++i)
          std::memcpy(edge + i * kLanes, source + i * stride, columns * sizeof(T));
        source = edge, stride = kLanes;
      }
      Floats x[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) x[i] = widen(source + i * stride, kLanes);
      transpose(x);
      for (int64_t i = 0; i < columns; ++i) store(to + (c + i) * kTokens + t, x[i]);
    }
  }
}

// to += from
template <class T>
ISA_TARGET inline void add_row(T* to, const float* from, int64_t size) {
  for (int64_t c = 0; c < size; c += kLanes)
    narrow(to + c, widen(to + c, size - c) + load(from + c), size - c);
}

// adds packed columns to rows, one row after the other: where rows are a power of two apart, a
// column of them does not fit the first cache (1.1 to 0.5 ms, 2048 x 1024, Xeon with AMX)
template <class T, int64_t kTokens>
ISA_TARGET void add_back(const float* from, const Rows<T>& to) {
  constexpr int64_t kWide = 256;
  alignas(64) float rows[kLanes * kWide];
  for (int64_t t = 0; t < to.there; t += kLanes) {
    for (int64_t c = 0; c < to.size; c += kWide) {
      const int64_t columns = std::min(to.size - c, kWide);
      for (int64_t d = 0; d < columns; d += kLanes) {
        Floats x[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          x[i] = d + i < columns ? load(from + (c + d + i) * kTokens + t) : Floats{};
        transpose(x);
        for (int64_t i = 0; i < kLanes; ++i) store(rows + i * kWide + d, x[i]);
      }
      for (int64_t i = 0; i < std::min(to.there - t, kLanes); ++i)
        add_row(to.data + (t + i) * to.stride + c, rows + i * kWide, columns);
    }
  }
}

}  // namespace
}  // namespace apical::ISA
