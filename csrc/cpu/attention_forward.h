// the forward pass of some rows of a document: included once per instruction set

namespace apical::ISA {

// what a row knows of its softmax, in powers of 2, after the blocks of keys so far
struct Statistics {
  float max;
  double sum;
};

static Statistics at_the_start(const Job& job, int64_t head) {
  if (!job.sinks || job.sinks[head] == -kInfinity) return {-kInfinity, 0.0};
  // what the power of 2 loses as a float would be off in every row alike
  const double sink = job.sinks[head] * 1.4426950408889634;
  const float max = static_cast<float>(sink);
  return {max, std::exp2(sink - max)};
}

// where the forward pass of a task keeps what
struct ForwardBuffers {
  float *keys, *values, *query, *p, *tops, *keep, *result;
  Statistics* statistics;
  int64_t width;  // of a row of values and results
  Ahead* ahead;

  ForwardBuffers(const Job& job, Scratch& scratch) : width(round_up(job.value_size)) {
    const int64_t rows = most_rows(job) * job.group;
    keys = scratch.take<float>(kKeys * round_up(job.size));
    values = scratch.take<float>(kKeys * width);
    query = scratch.take<float>(kRows * round_up(job.size));
    p = scratch.take<float>(kRows * kStride);
    tops = scratch.take<float>(kRows * kLanes);
    keep = scratch.take<float>(kStride);
    result = scratch.take<float>(rows * width);
    statistics = scratch.take<Statistics>(rows);
  }
};

// scores to exponentials relative to the largest so far, which is updated; returns what the
// result so far must be multiplied by
ISA_TARGET static float softmax_row(float* row, int64_t from, int64_t to, Floats top,
                                    Statistics* s) {
  const float before = s->max, largest = largest_lane(top);
  if (largest > before) s->max = largest;
  // where all are -inf, inf - inf must not spoil the finite ones that may follow
  const float base = s->max == -kInfinity ? 0.0f : s->max;
  Floats sum{}, other{};
  int64_t c = from;
  for (; c + 2 * kLanes <= to; c += 2 * kLanes) {
    const Floats a = exp2_nonpositive(load(row + c) - base);
    const Floats b = exp2_nonpositive(load(row + c + kLanes) - base);
    store(row + c, a), store(row + c + kLanes, b);
    sum += a, other += b;
  }
  if (c < to) {
    const Floats a = exp2_nonpositive(load(row + c) - base);
    store(row + c, a);
    sum += a;
  }
  const float keep = s->max == before ? 1.0f : std::exp2(before - s->max);
  s->sum = s->sum * keep + add_lanes(sum + other);
  return keep;
}

ISA_TARGET static void scale_row(float* row, int64_t width, float factor) {
  for (int64_t d = 0; d < width; d += kLanes) store(row + d, load(row + d) * factor);
}

ISA_TARGET static void apply_dropout(const Job& job, const Row& row, int64_t key, int64_t from,
                                     int64_t to, float* keep, float* p) {
  keep_factors(job, row.token, row.head, key + from, to - from, keep + from);
  for (int64_t c = from; c < to; c += kLanes) store(p + c, load(p + c) * load(keep + c));
}

// scores of up to kTall rows to exponentials, and the result so far to their scale
ISA_TARGET static void exponentials(const Job& job, const Document& doc, int64_t head,
                                    const Block& block, int64_t strip, bool first,
                                    const ForwardBuffers& x, float* result, Statistics* of_row) {
  const int64_t from = block.from(strip), to = block.to(strip);
  for (int64_t r = strip; r < strip + block.tall(strip, kTall); ++r) {
    float* p = x.p + r * kStride;
    Floats top = load(x.tops + r * kLanes);
    const Row row(job, doc, block, head, r);
    if (job.has_rules()) top = apply_rules(job, block, row, r, from, to, p);
    const float keep = softmax_row(p, from, to, top, of_row + r);
    if (keep != 1.0f && !first) scale_row(result + r * x.width, x.width, keep);
    if (job.drops()) apply_dropout(job, row, block.key, from, to, x.keep, p);
  }
}

// the products of exponentials and values are added to the result of a block's rows
static void add_block(const Job& job, const Document& doc, int64_t head, const Block& block,
                      bool first, bool finite, const ForwardBuffers& x, float* result,
                      Statistics* of_row) {
  const bool rules = job.has_rules();
  const Square square{block, kStride, x.p, nullptr, x.tops, nullptr, nullptr, *x.ahead};
  std::fill_n(x.tops, block.rows * kLanes, -kInfinity);
  if (rules) {
    each_tile<Raw>(square, x.p, x.query, job.size, x.keys);
  } else {
    each_tile<Scores>(square, x.p, x.query, job.size, x.keys);
  }
  for (int64_t strip = 0; strip < block.rows; strip += kTall) {
    exponentials(job, doc, head, block, strip, first, x, result, of_row);
    const int64_t rows = block.tall(strip, kTall), step = finite ? rows : 1;
    for (int64_t r = strip; r < strip + rows; r += step) {
      const int64_t start = block.start[r], depth = block.stop[r + step - 1] - start;
      const Left left{x.p + r * kStride + start, kStride, 1};
      const Right right{x.values + start * x.width, x.width};
      float* to = result + r * x.width;
      x.ahead->step();
      if (first) {
        multiply(step, x.width, depth, left, right, Store{to, x.width});
      } else if (depth > 0) {
        multiply(step, x.width, depth, left, right, Add{to, x.width});
      }
    }
  }
}

// results and lse of rows that have seen all their keys
static void finish(const Job& job, int64_t token, int64_t head, int64_t rows, const float* result,
                   int64_t width, const Statistics* of_row) {
  for (int64_t r = 0; r < rows; ++r, ++token) {
    const Statistics& s = of_row[r];
    const float factor = s.sum == 0 ? 0.0f : static_cast<float>(1.0 / s.sum);
    write_row(job.out, token, head, result + r * width, job.value_size, factor);
    const double lse = (s.max + std::log2(s.sum)) * 0.6931471805599453;
    *job.lse.number(token, head) = s.sum == 0 ? -kInfinity : static_cast<float>(lse);
  }
}

static void fetch_rows(const Job& job, int64_t token, int64_t head, int64_t rows, Fetch& fetch) {
  fetch = {};
  fetch.add(job.q, token, head, rows, job.size, false);
  fetch.add(job.out, token, head, rows, job.value_size, true);
}

// the rows of one head against a packed block of all the keys that they see
static void add_keys(const Job& job, const Document& doc, const Sight& sight, int64_t head,
                     Range rows, Range keys, Range all, bool finite, const ForwardBuffers& x,
                     float* result, Statistics* of_row) {
  const float factor = job.scale * (job.has_rules() ? 1.0f : kLog2e);
  const int64_t step = part_size(rows.size(), kRows, kTall);
  for (int64_t row = rows.begin; row < rows.end; row += step) {
    const int64_t count = std::min(step, rows.end - row), token = doc.q + row;
    const Block block(sight, row, count, keys.begin, keys.size());
    float* to = result + (row - rows.begin) * x.width;
    Statistics* s = of_row + (row - rows.begin);
    const bool first = keys.begin == all.begin;
    fetch_rows(job, token + count, head, std::min(step, rows.end - row - count), x.ahead->rows);
    x.ahead->rows.spread(divide_up(count, kTall) * divide_up(keys.size(), kPanel));
    if (first || !block.empty()) {
      pack_rows(job.q, token, head, count, job.size, factor, x.query);
      add_block(job, doc, head, block, first, finite, x, to, s);
    }
    if (keys.end == all.end) finish(job, token, head, count, to, x.width, s);
  }
}

// the rows of a task and the keys that they see
struct ForwardRanges {
  Range rows, keys;

  ForwardRanges(const Job& job, const Document& doc, const Sight& sight, const Task& task)
      : rows(part_of(task.part, task_rows(job, doc), doc.rows())),
        keys{sight.lo(rows.begin), sight.end(rows.end - 1)} {}
};

static void look_ahead_forward(const Job& job, const Document& doc, const Task& task,
                               Ahead& ahead) {
  const ForwardRanges x(job, doc, Sight(job, doc), task);
  const int64_t row = doc.q + x.rows.begin, rows = part_size(x.rows.size(), kRows, kTall);
  const int64_t key = doc.k + x.keys.begin, keys = part_size(x.keys.size(), kKeys, 16);
  fetch_rows(job, row, task.kv_head * job.group, rows, ahead.task);
  ahead.task.add(job.k, key, task.kv_head, keys, job.size, false);
  ahead.task.add(job.v, key, task.kv_head, keys, job.value_size, false);
}

static void forward(const Job& job, const Document& doc, const Task& task, Ahead& ahead,
                    Scratch scratch) {
  ForwardBuffers x(job, scratch);
  x.ahead = &ahead;
  const Sight sight(job, doc);
  const ForwardRanges ranges(job, doc, sight, task);
  const Range rows = ranges.rows, all = ranges.keys;
  ahead.task.spread(2 * divide_up(rows.size(), kTall) * divide_up(all.size(), 2 * kPanel));
  const int64_t step = part_size(all.size(), kKeys, 16), kv_head = task.kv_head;
  for (int64_t key = all.begin; key < all.end; key += step) {
    const Range keys{key, std::min(key + step, all.end)};
    pack_columns(job.k, doc.k + key, kv_head, keys.size(), job.size, x.keys, nullptr);
    const bool finite =
        pack_rows(job.v, doc.k + key, kv_head, keys.size(), job.value_size, 1.0f, x.values);
    for (int64_t g = 0; g < job.group; ++g) {
      const int64_t head = kv_head * job.group + g;
      Statistics* of_row = x.statistics + g * rows.size();
      if (key == all.begin) std::fill_n(of_row, rows.size(), at_the_start(job, head));
      add_keys(job, doc, sight, head, rows, keys, all, finite, x,
               x.result + g * rows.size() * x.width, of_row);
    }
  }
}

}  // namespace apical::ISA
