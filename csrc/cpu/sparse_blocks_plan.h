// the values of blocks as right matrices of products: included once per instruction set

namespace apical::ISA::blocks {

static BlockProduct product_of(const Blocks& blocks, int64_t g, bool transposed) {
  BlockProduct p{g, 0, 0, true, {}, {}};
  Spans &rows = transposed ? p.from : p.to, &columns = transposed ? p.to : p.from;
  put_spans(rows, g * blocks.height, blocks.rows(g), transposed ? blocks.height : kLanes);
  for (int64_t b = 0; b < blocks.count(g); ++b)
    put_spans(columns, blocks.column(g, b), blocks.width, transposed ? kLanes : blocks.width);
  for (const Span& span : p.from) p.depth += span.count;
  for (const Span& span : p.to) p.whole = p.whole && span.count == kLanes;
  return p;
}

// groups without a block have no product
static BlockPlan plan(const Blocks& blocks, bool transposed) {
  BlockPlan plan;
  plan.transposed = transposed;
  int64_t size = 0;
  for (int64_t g = 0; g < blocks.groups; ++g) {
    if (!blocks.count(g)) continue;
    plan.products.push_back(product_of(blocks, g, transposed));
    BlockProduct& p = plan.products.back();
    p.right = size;
    size += p.depth * static_cast<int64_t>(p.to.size()) * kLanes;
    plan.deepest = std::max(plan.deepest, p.depth);
  }
  plan.packed = Lines(size);
  return plan;
}

template <class T>
static const T* values_of(const BlockJob& job, int64_t g) {
  return reinterpret_cast<const T*>(job.values) + job.blocks.first_value(g);
}

template <class T>
static void pack_values(const BlockJob& job, int64_t g, float* to) {
  const int64_t rows = job.blocks.rows(g), bytes = rows * static_cast<int64_t>(sizeof(T));
  const char* from = reinterpret_cast<const char*>(values_of<T>(job, g));
  pad<T>({const_cast<char*>(from), bytes}, 0, job.blocks.depth(g), {0, rows}, to);
}

// one row for each row of the group; in it the columns of each block are whole vectors
template <class T>
ISA_TARGET static void pack_transposed(const BlockJob& job, int64_t g, float* to) {
  const int64_t rows = job.blocks.rows(g), width = job.blocks.width, padded = round_up(width);
  const int64_t blocks = job.blocks.count(g);
  const T* from = values_of<T>(job, g);
  for (int64_t b = 0; b < blocks; ++b, from += rows * width)
    for (int64_t c = 0; c < width; c += kLanes)
      for (int64_t r = 0; r < rows; r += kLanes) {
        Floats x[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          x[i] = c + i < width ? widen(from + (c + i) * rows + r, rows - r) : Floats{};
        transpose(x);
        for (int64_t i = 0; i < std::min(kLanes, rows - r); ++i)
          store(to + ((r + i) * blocks + b) * padded + c, x[i]);
      }
}

template <class T>
static void pack(const BlockJob& job, const BlockPlan& plan, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const BlockProduct& p = plan.products[i];
    float* to = plan.packed.data() + p.right;
    plan.transposed ? pack_transposed<T>(job, p.group, to) : pack_values<T>(job, p.group, to);
  }
}

}  // namespace apical::ISA::blocks
