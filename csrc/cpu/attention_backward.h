// the backward pass of some keys of a document: included once per instruction set

namespace apical::ISA {

// where the backward pass of a task keeps what
struct BackwardBuffers {
  float *key_columns, *value_columns, *keys, *values, *grad_keys, *grad_values;
  float *query, *grad, *grad_query, *p, *d, *lse, *delta, *gain, *keep;
  int64_t width, value_width;  // of a row of keys, and of values
  Ahead* ahead;

  BackwardBuffers(const Job& job, Scratch& scratch)
      : width(round_up(job.size)), value_width(round_up(job.value_size)) {
    for (float** of_keys : {&key_columns, &keys, &grad_keys})
      *of_keys = scratch.take<float>(kKeys * width);
    for (float** of_keys : {&value_columns, &grad_values})
      *of_keys = scratch.take<float>(kKeys * value_width);
    for (float** of_rows : {&query, &grad_query}) *of_rows = scratch.take<float>(kRows * width);
    grad = scratch.take<float>(kRows * value_width);
    for (float** square : {&p, &d}) *square = scratch.take<float>(kRows * kChunkStride);
    for (float** column : {&lse, &delta, &gain}) *column = scratch.take<float>(kRows);
    keep = scratch.take<float>(kChunkStride);
  }
};

// packed rows of one head, and where they are
struct Rows {
  const Job& job;
  const Document& doc;
  int64_t head, first, count;
  const BackwardBuffers& x;
  // whether 0 times any of their numbers is 0
  bool finite_query, finite_grad;

  int64_t token() const { return doc.q + first; }
};

ISA_TARGET static float dot_row(const float* a, const View& b, int64_t token, int64_t head,
                                int64_t size) {
  Floats sum{};
  const char* row = b.at(token, head);
  for (int64_t d = 0; d < size; d += kLanes) {
    Floats other;
    if (b.kind == Kind::kFloat) {
      other = widen(reinterpret_cast<const float*>(row) + d, size - d);
    } else if (b.kind == Kind::kBfloat16) {
      other = widen(reinterpret_cast<const Bfloat16*>(row) + d, size - d);
    } else {
      other = widen(reinterpret_cast<const Half*>(row) + d, size - d);
    }
    sum += load(a + d) * other;
  }
  return add_lanes(sum);
}

// lse in powers of 2, and what gradients of probabilities are compared to
static void pack_statistics(const Rows& rows) {
  const Job& job = rows.job;
  const BackwardBuffers& x = rows.x;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t token = rows.token() + r, head = rows.head;
    const float lse = *job.lse.number(token, head);
    // a row without scores has no probabilities: 2^(-inf - inf) is 0
    x.lse[r] = lse == -kInfinity ? kInfinity : lse * kLog2e;
    x.delta[r] = dot_row(x.grad + r * x.value_width, job.out, token, head, job.value_size);
    if (job.grad_lse.data) x.delta[r] -= *job.grad_lse.number(token, head);
    x.gain[r] = 0.0f;
  }
}

static Rows pack(const Job& job, const Document& doc, int64_t head, Range rows,
                 const BackwardBuffers& x) {
  const int64_t token = doc.q + rows.begin, count = rows.size();
  const float factor = job.scale * (job.has_rules() || job.drops() ? 1.0f : kLog2e);
  const bool query = pack_rows(job.q, token, head, count, job.size, factor, x.query);
  const bool grad = pack_rows(job.grad_out, token, head, count, job.value_size, 1.0f, x.grad);
  const Rows packed{job, doc, head, rows.begin, count, x, query, grad};
  pack_statistics(packed);
  std::fill_n(x.grad_query, count * x.width, 0.0f);
  return packed;
}

// zeros beside what the tiles of kTall rows write: products with kTall keys read that far
ISA_TARGET static void clear_sides(const Square& x) {
  const Block& block = x.block;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t strip = r / kTall * kTall, from = block.from(strip), to = block.to(strip);
    float *p = x.p + r * x.stride, *d = x.d + r * x.stride;
    for (int64_t side = 0; side < kTall - 1; side += kLanes) {
      const int64_t before = from - kLanes - side;
      if (before >= 0) store(p + before, Floats{}), store(d + before, Floats{});
      store(p + to + side, Floats{}), store(d + to + side, Floats{});
    }
  }
}

static void apply_rules_to_rows(const Rows& rows, const Square& x) {
  const Block& block = x.block;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t strip = r / kTall * kTall, from = block.from(strip), to = block.to(strip);
    const Row row(rows.job, rows.doc, block, rows.head, r);
    const float* keep = nullptr;
    if (rows.job.drops()) {
      keep = rows.x.keep;
      keep_factors(rows.job, row.token, row.head, block.key + from, to - from, rows.x.keep + from);
    }
    rows.x.gain[r] += apply_rules_backward(rows.job, x, row, r, from, to, keep);
  }
}

// probabilities and the gradients of scores, from rows and keys packed as columns
static void squares(const Rows& rows, const Square& x, const float* keys, const float* values) {
  const Job& job = rows.job;
  if (job.has_rules() || job.drops()) {
    each_tile<Raw>(x, x.p, rows.x.query, job.size, keys);
    each_tile<Raw>(x, x.d, rows.x.grad, job.value_size, values);
    apply_rules_to_rows(rows, x);
  } else {
    each_tile<Probabilities>(x, x.p, rows.x.query, job.size, keys);
    each_tile<Gradients>(x, x.d, rows.x.grad, job.value_size, values);
  }
  if (!x.block.full()) clear_sides(x);
}

// square^T rows is added to the gradient of the keys
static void add_to_keys(const Square& x, const float* square, const float* rows, int64_t width,
                        bool finite, float* to) {
  const Block& block = x.block;
  const int64_t most = finite ? kTall : 1, end = block.stop[block.rows - 1];
  int64_t first = 0, last = 0;
  for (int64_t c = block.start[0]; c < end; c += most) {
    const int64_t tall = std::min(most, end - c);
    // the rows that see one of these keys
    x.ahead.step();
    while (block.stop[first] <= c) ++first;
    while (last < block.rows && block.start[last] < c + tall) ++last;
    multiply(tall, width, last - first, {square + first * x.stride + c, 1, x.stride},
             {rows + first * width, width}, Add{to + c * width, width});
  }
}

static void add_to_rows(const Square& x, const float* keys, int64_t width, bool finite,
                        float* to) {
  const Block& block = x.block;
  const int64_t most = finite ? kTall : 1;
  for (int64_t r = 0; r < block.rows; r += most) {
    const int64_t tall = block.tall(r, most), start = block.start[r];
    const int64_t depth = block.stop[r + tall - 1] - start;
    if (depth <= 0) continue;
    x.ahead.step();
    multiply(tall, width, depth, {x.d + r * x.stride + start, x.stride, 1},
             {keys + start * width, width}, Add{to + r * width, width});
  }
}

// packed rows against a packed block of keys
static void add_block(const Rows& rows, const Sight& sight, Range keys, bool finite_keys) {
  const BackwardBuffers& b = rows.x;
  for (int64_t c = 0; c < keys.size(); c += kChunk) {
    const Block block(sight, rows.first, rows.count, keys.begin + c,
                      std::min(kChunk, keys.size() - c));
    if (block.empty()) continue;
    const Square x{block, kChunkStride, b.p, b.d, nullptr, b.lse, b.delta, *b.ahead};
    squares(rows, x, b.key_columns + c * b.width, b.value_columns + c * b.value_width);
    add_to_keys(x, x.p, b.grad, b.value_width, rows.finite_grad,
                b.grad_values + c * b.value_width);
    add_to_keys(x, x.d, b.query, b.width, rows.finite_query, b.grad_keys + c * b.width);
    add_to_rows(x, b.keys + c * b.width, b.width, finite_keys, b.grad_query);
  }
}

// the gradient of q, and of the gain, in the order of the blocks of keys
static void write_rows(const Rows& rows, bool first, bool last) {
  const Job& job = rows.job;
  const View& to = last ? job.grad_q : job.sum_q;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t token = rows.token() + r, head = rows.head;
    const float* before = first ? nullptr : job.sum_q.number(token, head);
    write_row(to, token, head, rows.x.grad_query + r * rows.x.width, job.size, job.scale, before);
    if (!job.grad_gain.data) continue;
    float* gain = job.grad_gain.number(token, head);
    *gain = first ? rows.x.gain[r] : *gain + rows.x.gain[r];
  }
}

// waits until the blocks of keys before this one have added to these rows
static void write_in_turn(const Rows& rows, int64_t part, int64_t first, int64_t last,
                          int64_t counter) {
  if (first == last) return write_rows(rows, true, true);
  std::atomic<int32_t>& turn = rows.job.turns[counter];
  while (turn.load(std::memory_order_acquire) != part - first) std::this_thread::yield();
  write_rows(rows, part == first, part == last);
  turn.store(static_cast<int32_t>(part - first + 1), std::memory_order_release);
}

static void write_keys(const Job& job, const Document& doc, int64_t kv_head, Range keys,
                       const BackwardBuffers& x) {
  const float factor = job.has_rules() || job.drops() ? 1.0f : kLn2;
  for (int64_t c = 0; c < keys.size(); ++c) {
    const int64_t token = doc.k + keys.begin + c;
    write_row(job.grad_k, token, kv_head, x.grad_keys + c * x.width, job.size, factor);
    write_row(job.grad_v, token, kv_head, x.grad_values + c * x.value_width, job.value_size, 1.0f);
  }
}

static void fetch_rows_backward(const Job& job, int64_t token, int64_t head, int64_t rows,
                                Fetch& fetch) {
  fetch = {};
  fetch.add(job.q, token, head, rows, job.size, false);
  fetch.add(job.grad_out, token, head, rows, job.value_size, false);
  fetch.add(job.out, token, head, rows, job.value_size, false);
  fetch.add(job.grad_q, token, head, rows, job.size, true);
}

static void look_ahead_backward(const Job& job, const Document& doc, const Task& task,
                                Ahead& ahead) {
  const Sight sight(job, doc);
  const Range keys = part_of(task.part, task_keys(doc), doc.keys());
  const int64_t first = sight.first_row(keys.begin), end = sight.end_row(keys.end, doc.rows());
  const int64_t token = doc.k + keys.begin, kv_head = task.kv_head, row = doc.q + first;
  const int64_t head = kv_head * job.group, rows = std::max<int64_t>(0, end - first);
  fetch_rows_backward(job, row, head, std::min(kRows, rows), ahead.task);
  ahead.task.add(job.k, token, kv_head, keys.size(), job.size, false);
  ahead.task.add(job.v, token, kv_head, keys.size(), job.value_size, false);
}

static void backward(const Job& job, const Document& doc, const Task& task, Ahead& ahead,
                     Scratch scratch) {
  BackwardBuffers x(job, scratch);
  x.ahead = &ahead;
  const Sight sight(job, doc);
  const int64_t key_step = task_keys(doc), row_step = part_size(doc.rows(), kRows, kTall);
  const Range keys = part_of(task.part, key_step, doc.keys());
  ahead.task.spread(5 * divide_up(doc.rows(), kTall) * divide_up(keys.size(), 2 * kPanel));
  const int64_t token = doc.k + keys.begin, count = keys.size(), kv_head = task.kv_head;
  const bool finite =
      pack_columns(job.k, token, kv_head, count, job.size, x.key_columns, x.keys);
  pack_columns(job.v, token, kv_head, count, job.value_size, x.value_columns, nullptr);
  std::fill_n(x.grad_keys, count * x.width, 0.0f);
  std::fill_n(x.grad_values, count * x.value_width, 0.0f);
  const int64_t end = sight.end_row(keys.end, doc.rows()), parts = divide_up(doc.rows(), row_step);
  for (int64_t head = kv_head * job.group; head < (kv_head + 1) * job.group; ++head) {
    for (int64_t i = sight.first_row(keys.begin) / row_step; i * row_step < end; ++i) {
      const Range rows = part_of(i, row_step, doc.rows());
      // the blocks of keys that these rows see
      const int64_t first = sight.lo(rows.begin) / key_step;
      const int64_t last = (sight.end(rows.end - 1) - 1) / key_step;
      if (task.part < first || task.part > last) continue;
      fetch_rows_backward(job, doc.q + rows.end, head, std::min(row_step, doc.rows() - rows.end),
                          ahead.rows);
      if (rows.end == doc.rows() && head == (kv_head + 1) * job.group - 1) {
        ahead.rows.add(job.grad_k, token, kv_head, count, job.size, true);
        ahead.rows.add(job.grad_v, token, kv_head, count, job.value_size, true);
      }
      ahead.rows.spread(4 * divide_up(rows.size(), kTall) * divide_up(count, kPanel));
      const Rows packed = pack(job, doc, head, rows, x);
      add_block(packed, sight, keys, finite);
      write_in_turn(packed, task.part, first, last, doc.turns + head * parts + i);
    }
  }
  write_keys(job, doc, kv_head, keys, x);
}

}  // namespace apical::ISA
