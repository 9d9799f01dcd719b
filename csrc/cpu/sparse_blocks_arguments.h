// what products with blocks require of their arguments
#pragma once

#include "sparse_arguments.h"
#include "sparse_blocks_job.h"

namespace apical {

struct BlockIndex {
  const Tensor &starts, &chunks;
  int64_t rows, columns;
};

inline void check_starts(const Blocks& blocks, int64_t chunks) {
  int64_t last = 0;
  for (int64_t g = 0; g <= blocks.groups; ++g) {
    STD_TORCH_CHECK(blocks.starts[g] >= last, "group_starts[", g, "] is ", blocks.starts[g],
                    ", expected at least ", last, "; it must ascend from 0");
    last = blocks.starts[g];
  }
  STD_TORCH_CHECK(blocks.starts[0] == 0 && last == chunks,
                  "group_starts must go from 0 to the number of chunks (", chunks, "), not from ",
                  blocks.starts[0], " to ", last);
}

inline void check_chunks(const Blocks& blocks, int64_t count, int64_t in_features) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(blocks.chunks[i] >= 0 && blocks.chunks[i] < in_features / blocks.width,
                    "chunks[", i, "] is ", blocks.chunks[i], ", expected 0 <= chunk < ",
                    in_features / blocks.width, ", the whole blocks of ", blocks.width,
                    " columns in ", in_features);
}

inline Blocks blocks_of(const BlockIndex& index, int64_t out_features, int64_t in_features) {
  STD_TORCH_CHECK(index.rows > 0 && index.columns > 0,
                  "a block must have at least 1 x 1 entries, got ", index.rows, " x ",
                  index.columns);
  Blocks blocks{integers(index.starts, "group_starts"),
                integers(index.chunks, "chunks"),
                (out_features + index.rows - 1) / index.rows, index.rows, index.columns,
                out_features};
  STD_TORCH_CHECK(index.starts.size(0) == blocks.groups + 1, "group_starts must have ",
                  blocks.groups + 1, " entries, for ", out_features, " features in groups of ",
                  index.rows, "; got ", index.starts.size(0));
  check_starts(blocks, index.chunks.size(0));
  check_chunks(blocks, index.chunks.size(0), in_features);
  return blocks;
}

inline void check_same_type(const Tensor& tensor, const char* name, const Tensor& as,
                            const char* other) {
  STD_TORCH_CHECK(tensor.scalar_type() == as.scalar_type(), name, " must be of the dtype of ",
                  other);
}

inline BlockRows block_rows(const Tensor& tensor, const char* name) {
  const int64_t size = element_size(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) <= 1), name,
                  " must be a (tokens, features) matrix with contiguous rows");
  return {static_cast<char*>(tensor.data_ptr()), tensor.stride(0) * size};
}

inline void check_tokens(const Tensor& tensor, const char* name, const Tensor& as,
                         const char* other) {
  STD_TORCH_CHECK(tensor.size(0) == as.size(0), name, " has ", tensor.size(0), " tokens and ",
                  other, " ", as.size(0), "; they must be the same");
}

inline char* block_values(const Tensor& values, const Blocks& blocks) {
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous() &&
                      values.size(0) == blocks.values(),
                  "values must be a contiguous vector of ", blocks.values(), " entries");
  return static_cast<char*>(values.data_ptr());
}

}  // namespace apical
