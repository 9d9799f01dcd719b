// the order in which the stored entries of a sparse matrix are visited
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace apical {
namespace {

// a compressed sparse matrix: the entries of row r are columns[starts[r]] and following
struct Support {
  const int32_t *starts, *columns;
  int64_t rows, size;  // size: how many columns there are
};

// pieces of rows that have the same number of entries: a loop whose length does not change is one
// that the processor foresees
struct Run {
  int64_t count, rows;
};

// a block of columns: its runs, and where its pieces of rows and its entries begin
struct Block {
  int64_t first_run, end_run, first_row, first_entry;
};

// columns in blocks whose packed activations stay near; in each block, pieces of rows sorted by how
// many entries they have
class Plan {
 public:
  static constexpr int64_t kLongest = 32, kWidth = 512;  // entries of a piece, columns of a block

  // tokens: how many of each column are packed together
  Plan(const Support& support, int64_t tokens)
      : support_(support), tokens_(tokens),
        cursors_(support.starts, support.starts + support.rows) {
    const int64_t stored = support.starts[support.rows];
    entries.reserve(stored), offsets.reserve(stored);
    for (int64_t first = 0; first < support.size; first += kWidth) add_block(first);
    for (int64_t row = 0; row < support.rows; ++row)
      STD_TORCH_CHECK(cursors_[row] == support.starts[row + 1], "columns of row ", row,
                      " must ascend, from 0 to at most ", support.size - 1, "; got ",
                      support.columns[cursors_[row]], " at entry ", cursors_[row]);
  }

  std::vector<Block> blocks;
  std::vector<Run> runs;
  std::vector<int32_t> rows;      // of each piece
  std::vector<int32_t> entries;   // which one of the matrix each is
  std::vector<uint16_t> offsets;  // where in the packed block the column of each entry is

 private:
  struct Piece {
    int32_t row, first, count;
  };

  void add_block(int64_t first) {
    const auto width = static_cast<uint64_t>(std::min(kWidth, support_.size - first));
    const auto inside = [&](int32_t entry) {
      return static_cast<uint64_t>(support_.columns[entry] - first) < width;
    };
    int64_t counts[kLongest + 1] = {};
    pieces_.clear();
    for (int32_t row = 0; row < support_.rows; ++row) {
      int32_t from = cursors_[row], at = from;
      const int32_t end = support_.starts[row + 1];
      for (; at < end && inside(at); from = at) {
        const int32_t stop = std::min<int32_t>(from + kLongest, end);
        // repeated columns are two entries of the same place
        while (at < stop && inside(at)) ++at;
        pieces_.push_back({row, from, at - from});
        ++counts[at - from];
      }
      cursors_[row] = at;
    }
    write_block(first, counts);
  }

  // pieces by count; those of one count by row
  void write_block(int64_t first, const int64_t* counts) {
    int64_t row_at[kLongest + 1], entry_at[kLongest + 1];
    int64_t row = static_cast<int64_t>(rows.size()), entry = static_cast<int64_t>(entries.size());
    Block block{static_cast<int64_t>(runs.size()), 0, row, entry};
    for (int64_t count = 1; count <= kLongest; ++count) {
      row_at[count] = row, entry_at[count] = entry;
      row += counts[count], entry += count * counts[count];
      if (counts[count]) runs.push_back({count, counts[count]});
    }
    block.end_run = static_cast<int64_t>(runs.size());
    blocks.push_back(block);
    rows.resize(row), entries.resize(entry), offsets.resize(entry);
    for (const Piece& piece : pieces_) {
      rows[row_at[piece.count]++] = piece.row;
      int64_t& to = entry_at[piece.count];
      for (int32_t from = piece.first; from < piece.first + piece.count; ++from, ++to) {
        entries[to] = from;
        offsets[to] = static_cast<uint16_t>((support_.columns[from] - first) * tokens_);
      }
    }
  }

  const Support support_;
  const int64_t tokens_;
  std::vector<int32_t> cursors_;  // the first entry of each row that no block has yet
  std::vector<Piece> pieces_;
};

}  // namespace
}  // namespace apical
