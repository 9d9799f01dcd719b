// scores of a block of rows and keys under masks and rules: included once per instruction set

namespace apical::ISA {

// some rows of a document and some of its keys; `start` and `stop` count from its first key
struct Block {
  int64_t row, rows, key, keys;
  int32_t start[kRows], stop[kRows];

  Block(const Sight& sight, int64_t row, int64_t rows, int64_t key, int64_t keys)
      : row(row), rows(rows), key(key), keys(keys) {
    for (int64_t r = 0; r < rows; ++r) {
      start[r] = clip(sight.lo(row + r));
      stop[r] = std::max(start[r], clip(sight.end(row + r)));
    }
  }

  int32_t clip(int64_t at) const {
    return static_cast<int32_t>(std::min(std::max<int64_t>(at - key, 0), keys));
  }
  int64_t tall(int64_t r, int64_t most) const { return std::min(most, rows - r); }
  bool full() const { return start[rows - 1] == 0 && stop[0] == keys; }
  bool empty() const { return start[0] >= stop[rows - 1]; }
  // whole vectors of the keys that kTall rows from r on see
  int64_t from(int64_t r) const { return round_down(start[r]); }
  int64_t to(int64_t r) const {
    const int64_t end = stop[r + tall(r, kTall) - 1];
    return std::max(from(r), round_up(end));
  }
};

// the lanes of the keys from `column` on that row r sees
ISA_TARGET static inline Ints seen(const Block& block, int64_t r, int64_t column) {
  Ints lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = j;
  const Ints key = lane + static_cast<int32_t>(column);
  return (key >= block.start[r]) & (key < block.stop[r]);
}

// where tiles of a block go: scores or probabilities, and what their rows need
struct Square {
  const Block& block;
  int64_t stride;  // of the rows of p and d
  float* p;
  float* d;     // of gradients
  float* tops;  // (rows, kLanes), the largest score of each lane
  const float *lse, *delta;
  Ahead& ahead;
};

// scores as they are
template <bool kMasked>
struct Raw {
  const Square& x;
  float* to;
  int64_t row, column;

  template <int J>
  ISA_TARGET void take(int64_t r, const Floats (&sum)[J]) const {
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) store(to + (row + r) * x.stride + column + j * kLanes, sum[j]);
  }
};

// scores, and the largest of each row; -inf where a key is not seen
template <bool kMasked>
struct Scores {
  const Square& x;
  float* to;
  int64_t row, column;

  template <int J>
  ISA_TARGET void take(int64_t r, const Floats (&sum)[J]) const {
    float *at = to + (row + r) * x.stride + column, *tops = x.tops + (row + r) * kLanes;
    Floats top = load(tops);
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) {
      Floats value = sum[j];
      if (kMasked)
        value = seen(x.block, row + r, column + j * kLanes) ? value : Floats{} - kInfinity;
      top = larger(top, value);
      store(at + j * kLanes, value);
    }
    store(tops, top);
  }
};

// probabilities from scores and lse, both in powers of 2; 0 where a key is not seen
template <bool kMasked>
struct Probabilities {
  const Square& x;
  float* to;
  int64_t row, column;

  template <int J>
  ISA_TARGET void take(int64_t r, const Floats (&sum)[J]) const {
    float* at = to + (row + r) * x.stride + column;
    const float lse = x.lse[row + r];
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) {
      Floats value = exp2_nonpositive(sum[j] - lse);
      if (kMasked) value = seen(x.block, row + r, column + j * kLanes) ? value : Floats{};
      store(at + j * kLanes, value);
    }
  }
};

// gradients of scores from those of probabilities; 0 where a key is not seen
template <bool kMasked>
struct Gradients {
  const Square& x;
  float* to;
  int64_t row, column;

  template <int J>
  ISA_TARGET void take(int64_t r, const Floats (&sum)[J]) const {
    float* at = to + (row + r) * x.stride + column;
    const float *p = x.p + (at - to), delta = x.delta[row + r];
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) {
      Floats value = load(p + j * kLanes) * (sum[j] - delta);
      if (kMasked) value = seen(x.block, row + r, column + j * kLanes) ? value : Floats{};
      store(at + j * kLanes, value);
    }
  }
};

// products of packed rows with keys packed as columns, in the tiles where a key is seen
template <template <bool> class End>
static void each_tile(const Square& x, float* to, const float* rows, int64_t size,
                      const float* columns) {
  const Block& block = x.block;
  const int64_t width = round_up(size), end = block.stop[block.rows - 1];
  for (int64_t c = block.start[0] / kPanel * kPanel; c < end; c += kPanel) {
    for (int64_t r = 0; r < block.rows; r += kTall) {
      const int64_t tall = block.tall(r, kTall), last = r + tall - 1;
      const int64_t from = std::max(block.from(r), c), stop = std::min(block.to(r), c + kPanel);
      if (from >= stop) continue;
      x.ahead.step();
      const Left left{rows + r * width, width, 1};
      const Right right{columns + c * width + (from - c), kPanel};
      const int64_t vectors = (stop - from) / kLanes;
      if (block.start[last] <= from && block.stop[r] >= stop) {
        tile_of<End<false>>(tall, vectors)(left, right, size, {x, to, r, from});
      } else {
        tile_of<End<true>>(tall, vectors)(left, right, size, {x, to, r, from});
      }
    }
  }
}

template <int S>
ISA_TARGET static inline Floats swap_lanes(Floats x) {
  Ints from;
  for (int j = 0; j < kLanes; ++j) from[j] = j ^ S;
  return __builtin_shuffle(x, from);
}

ISA_TARGET static inline float largest_lane(Floats x) {
  if (kLanes > 8) x = larger(x, swap_lanes<kLanes / 2>(x));
  if (kLanes > 4) x = larger(x, swap_lanes<4 % kLanes>(x));
  x = larger(x, swap_lanes<2>(x));
  return larger(x, swap_lanes<1>(x))[0];
}

ISA_TARGET static inline float add_lanes(Floats x) {
  if (kLanes > 8) x += swap_lanes<kLanes / 2>(x);
  if (kLanes > 4) x += swap_lanes<4 % kLanes>(x);
  x += swap_lanes<2>(x);
  return (x + swap_lanes<1>(x))[0];
}

// what the rules need to know of one row
struct Row {
  float gain, slope;
  int64_t position;  // among the keys of the document
  int64_t token, head;

  Row(const Job& job, const Document& doc, const Block& block, int64_t head, int64_t r)
      : gain(1.0f), slope(0.0f), position(block.row + r + doc.keys() - doc.rows()),
        token(doc.q + block.row + r), head(head) {
    if (job.gain.data) gain = *job.gain.number(token, head);
    if (job.slopes) slope = job.slopes[doc.index * job.slopes_of_document + head];
  }
};

// ALiBi: the slope times the distance to the keys from `key` on
ISA_TARGET static inline Floats distance(const Row& row, int64_t key) {
  Ints lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = j;
  const Ints apart = lane + static_cast<int32_t>(key - row.position);
  return absolute(__builtin_convertvector(apart, Floats)) * row.slope;
}

// scores to what the rules make of them, in powers of 2; returns the largest of each lane
ISA_TARGET static Floats apply_rules(const Job& job, const Block& block, const Row& row, int64_t r,
                                     int64_t from, int64_t to, float* p) {
  Floats top = Floats{} - kInfinity;
  for (int64_t c = from; c < to; c += kLanes) {
    const Score score = transformed(job, load(p + c), row.gain);
    const Floats value = (score.value - distance(row, block.key + c)) * kLog2e;
    store(p + c, seen(block, r, c) ? value : Floats{} - kInfinity);
    top = larger(top, load(p + c));
  }
  return top;
}

// p from scores to weights, d from gradients of weights to those of scores; returns the gradient
// of the row's gain. `keep` is what dropout multiplies by, or null
ISA_TARGET static float apply_rules_backward(const Job& job, const Square& x, const Row& row,
                                             int64_t r, int64_t from, int64_t to,
                                             const float* keep) {
  float *p = x.p + r * x.stride, *d = x.d + r * x.stride;
  Floats gain{};
  for (int64_t c = from; c < to; c += kLanes) {
    const Score score = transformed(job, load(p + c), row.gain);
    const Floats value = (score.value - distance(row, x.block.key + c)) * kLog2e;
    const Floats weight = exp2_nonpositive(value - x.lse[r]);
    const Floats factor = keep ? load(keep + c) : Floats{} + 1.0f;
    const Floats grad = weight * (load(d + c) * factor - x.delta[r]);
    const Ints visible = seen(x.block, r, c);
    store(p + c, visible ? weight * factor : Floats{});
    store(d + c, visible ? grad * score.slope : Floats{});
    gain += visible ? grad * score.by_gain : Floats{};
  }
  return add_lanes(gain);
}

}  // namespace apical::ISA
