// matrix products of small tiles: included once per instruction set
#include "vector.h"

namespace apical::ISA {

// a tile of kTall rows and kVectors vectors of sums fills the registers: 24 of 32, 12 of 16
constexpr int64_t kTall = 6;
constexpr int64_t kVectors = ISA_BYTES == 64 ? 4 : 2;
constexpr int64_t kPanel = kVectors * kLanes;

static inline int64_t round_down(int64_t size) { return size / kLanes * kLanes; }
static inline int64_t round_up(int64_t size) { return round_down(size + kLanes - 1); }

// the left matrix: elements of a row and of a column are so many floats apart
struct Left {
  const float* data;
  int64_t row, step;
};

// the right matrix: rows of whole vectors
struct Right {
  const float* data;
  int64_t row;
};

// what becomes of a tile: it is stored
struct Store {
  float* to;
  int64_t row;

  template <int J>
  ISA_TARGET void take(int64_t r, const Floats (&sum)[J]) const {
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) store(to + r * row + j * kLanes, sum[j]);
  }
};

// or added: many short sums are more exact than a long one
struct Add {
  float* to;
  int64_t row;

  template <int J>
  ISA_TARGET void take(int64_t r, const Floats (&sum)[J]) const {
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) {
      float* at = to + r * row + j * kLanes;
      store(at, load(at) + sum[j]);
    }
  }
};

// left (R, depth) times right (depth, J vectors), which `end` takes row by row
template <int R, int J, class End>
ISA_TARGET static void tile(Left left, Right right, int64_t depth, const End& end) {
  Floats sum[R][J];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) sum[r][j] = Floats{};
  const float *a = left.data, *b = right.data;
  for (int64_t k = 0; k < depth; ++k, a += left.step, b += right.row) {
    Floats row[J];
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) row[j] = load(b + j * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      // one load to all lanes; adding 0 would be computed, for the sake of -0
      const Floats one = a[r * left.row] - Floats{};
#pragma GCC unroll 6
      for (int j = 0; j < J; ++j) sum[r][j] += one * row[j];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) end.take(r, sum[r]);
}

template <class End>
using Tile = void (*)(Left, Right, int64_t, const End&);

template <int J, class End>
static Tile<End> tile_of_height(int64_t rows) {
  static constexpr Tile<End> tiles[kTall] = {tile<1, J, End>, tile<2, J, End>, tile<3, J, End>,
                                             tile<4, J, End>, tile<5, J, End>, tile<6, J, End>};
  return tiles[rows - 1];
}

template <class End>
static Tile<End> tile_of(int64_t rows, int64_t vectors) {
  if (vectors == 1) return tile_of_height<1, End>(rows);
  if (kVectors == 2 || vectors == 2) return tile_of_height<2, End>(rows);
  if (vectors == 3) return tile_of_height<3, End>(rows);
  return tile_of_height<kVectors, End>(rows);
}

// c (rows <= kTall, columns, whole vectors) = or += left right
template <class End>
static void multiply(int64_t rows, int64_t columns, int64_t depth, Left left, Right right,
                     End end) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t vectors = std::min(kVectors, (columns - j) / kLanes);
    tile_of<End>(rows, vectors)(left, {right.data + j, right.row}, depth, {end.to + j, end.row});
  }
}

}  // namespace apical::ISA
