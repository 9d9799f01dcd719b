// rows of tensors, fetched while others are worked on: those of a head lie apart, and no processor
// expects the next ones
#pragma once

#include "attention_job.h"

namespace apical {

class Fetch {
 public:
  // rows that will be read, or written whole
  void add(const View& view, int64_t token, int64_t head, int64_t rows, int64_t size, bool write) {
    const int64_t bytes = size * (view.kind == Kind::kFloat ? 4 : 2);
    if (bytes == 0 || rows <= 0) return;
    pieces_[count_++] = {view.at(token, head), view.token, rows, bytes, write};
    total_ += rows;
  }

  // spread over this many steps
  void spread(int64_t steps) {
    constexpr int64_t kBurst = 12;
    per_step_ = std::min(kBurst, divide_up(total_, std::max<int64_t>(1, steps)));
  }

  void step() {
    for (int64_t i = 0; i < per_step_ && at_ < count_; ++i) fetch();
  }

 private:
  struct Piece {
    const char* data;
    int64_t stride, rows, bytes;
    bool write;
  };

  void fetch() {
    const Piece& piece = pieces_[at_];
    const char* row = piece.data + row_ * piece.stride;
    for (int64_t d = 0; d < piece.bytes; d += 64) {
      if (piece.write) {
        __builtin_prefetch(row + d, 1, 2);
      } else {
        __builtin_prefetch(row + d, 0, 2);
      }
    }
    if (++row_ < piece.rows) return;
    row_ = 0;
    ++at_;
  }

  Piece pieces_[8];
  int64_t count_ = 0, at_ = 0, row_ = 0, total_ = 0, per_step_ = 0;
};

// of the next task, and of the next rows of this one
struct Ahead {
  Fetch task, rows;

  void step() {
    task.step();
    rows.step();
  }
};

}  // namespace apical
