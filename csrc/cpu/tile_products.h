// matrix products of small tiles, and the packing they need: included once per instruction set
#include "vector.h"

namespace apical::ISA {

// a tile of kTall rows and kVectors vectors of sums fills the registers: 24 of 32, 12 of 16
constexpr int64_t kTall = 6;
constexpr int64_t kVectors = ISA_BYTES == 64 ? 4 : 2;
constexpr int64_t kPanel = kVectors * kLanes;

static inline int64_t round_up(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

ISA_TARGET static inline Floats load_part(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Floats value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

ISA_TARGET static inline void store_part(float* to, Floats value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
}

// a (R, depth) with elements row and step apart; b (depth, J vectors); c (R, J vectors)
template <int R, int J, bool kAdd>
ISA_TARGET static void tile(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb,
                            float* c, int64_t ldc, int64_t depth) {
  Floats sum[R][J];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) sum[r][j] = Floats{};
  for (int64_t k = 0; k < depth; ++k, a += step, b += ldb) {
    Floats right[J];
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      // one load to all lanes; adding 0 would be computed, for the sake of -0
      const Floats left = a[r * row] - Floats{};
#pragma GCC unroll 6
      for (int j = 0; j < J; ++j) sum[r][j] += left * right[j];
    }
  }
  // added at the end: many short sums are more exact than a long one
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) {
      float* to = c + r * ldc + j * kLanes;
      store(to, kAdd ? load(to) + sum[r][j] : sum[r][j]);
    }
  }
}

typedef void (*Tile)(const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t,
                     int64_t);

template <int J, bool kAdd>
static Tile tile_of_height(int64_t rows) {
  static const Tile tiles[kTall] = {tile<1, J, kAdd>, tile<2, J, kAdd>, tile<3, J, kAdd>,
                                    tile<4, J, kAdd>, tile<5, J, kAdd>, tile<6, J, kAdd>};
  return tiles[rows - 1];
}

template <bool kAdd>
static Tile tile_of(int64_t rows, int64_t vectors) {
  if (vectors == 1) return tile_of_height<1, kAdd>(rows);
  if (kVectors == 2 || vectors == 2) return tile_of_height<2, kAdd>(rows);
  if (vectors == 3) return tile_of_height<3, kAdd>(rows);
  return tile_of_height<kVectors, kAdd>(rows);
}

// c (rows <= kTall, columns, whole vectors) = or += a b
template <bool kAdd>
static void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row,
                     int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t vectors = std::min(kVectors, (columns - j) / kLanes);
    tile_of<kAdd>(rows, vectors)(a, row, step, b + j, ldb, c + j, ldc, depth);
  }
}

// rows of one head are far apart: the processor does not guess the next ones by itself
static inline void prefetch_row(const float* row, int64_t stride, int64_t size) {
  constexpr int64_t kAhead = 6, kLine = 16;
  for (int64_t d = 0; d < size; d += kLine) __builtin_prefetch(row + kAhead * stride + d);
}

// rows, times factor, one after the other, with zeros up to a whole number of vectors
ISA_TARGET static void pack_rows(const float* from, int64_t stride, int64_t rows, int64_t size,
                                 float factor, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += stride) {
    prefetch_row(from, stride, size);
    for (int64_t d = 0; d < size; d += kLanes, to += kLanes)
      store(to, load_part(from + d, size - d) * factor);
  }
}

template <int S>
ISA_TARGET static inline void exchange(Floats* x) {
  Ints low, high;
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j & S ? static_cast<int>(kLanes) + j - S : j;
    high[j] = j & S ? static_cast<int>(kLanes) + j : j + S;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Floats a = x[i], b = x[i + S];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + S] = __builtin_shuffle(a, b, high);
  }
}

// a square of one vector per row
ISA_TARGET static inline void transpose(Floats* x) {
  exchange<1>(x);
  exchange<2>(x);
  if (kLanes > 4) exchange<kLanes / 2>(x);
  if (kLanes > 8) exchange<kLanes / 4>(x);
}

// rows as columns, in panels of kPanel columns; panel p begins at p * kPanel * round_up(size)
ISA_TARGET static void pack_columns(const float* from, int64_t stride, int64_t rows, int64_t size,
                                    float* to) {
  const int64_t width = round_up(size);
  for (int64_t r = 0; r < rows; r += kLanes) {
    float* panel = to + r / kPanel * kPanel * width + r % kPanel;
    for (int64_t d = 0; d < size; d += kLanes) {
      Floats x[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        x[i] = r + i < rows ? load_part(from + (r + i) * stride + d, size - d) : Floats{};
      transpose(x);
      for (int64_t i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel, x[i]);
    }
  }
}

}  // namespace apical::ISA
