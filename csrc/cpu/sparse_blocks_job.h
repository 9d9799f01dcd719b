// what a call with a matrix of blocks works on: the same for every instruction set
#pragma once

#include "lines.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace apical {

// rows of float32 or bfloat16 whose elements are contiguous
struct BlockRows {
  char* data;
  int64_t stride;  // in bytes

  template <class T>
  T* at(int64_t row, int64_t column = 0) const {
    return reinterpret_cast<T*>(data + row * stride) + column;
  }
};

// rows of blocks, called groups: each has its own blocks, and only the last may have fewer rows.
// The values of a group are a (depth, rows) matrix: for each column of each of its blocks, the rows
struct Blocks {
  const int32_t *starts, *chunks;
  int64_t groups, height, width, out_features;

  int64_t rows(int64_t g) const { return std::min(height, out_features - g * height); }
  int64_t count(int64_t g) const { return starts[g + 1] - starts[g]; }
  int64_t depth(int64_t g) const { return count(g) * width; }
  int64_t first_value(int64_t g) const { return starts[g] * height * width; }
  int64_t column(int64_t g, int64_t block) const { return chunks[starts[g] + block] * width; }
  int64_t values() const {
    return groups ? first_value(groups - 1) + depth(groups - 1) * rows(groups - 1) : 0;
  }
};

struct BlockJob {
  Blocks blocks;
  int64_t tokens;
  BlockRows input, output;
  char* values;
  int64_t columns;  // of output
};

// neighbouring columns
struct Span {
  int64_t at, count;
};

using Spans = std::vector<Span>;

// what one group does: columns `from` of the input, times right (depth, one vector for each span of
// `to`), are added to columns `to` of the output
struct BlockProduct {
  int64_t group, depth, right;  // where right begins in the packed values
  bool whole;                   // no span of `to` is shorter than a vector
  Spans from, to;
};

struct BlockPlan {
  bool transposed;
  int64_t deepest = 0;
  std::vector<BlockProduct> products;
  Lines packed;
};

}  // namespace apical
