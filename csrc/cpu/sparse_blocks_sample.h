// output^T input at the entries of blocks: included once per instruction set

namespace apical::ISA::blocks {

constexpr int64_t kSampledTokens = 48;
// groups whose sums together stay in the second cache: about so many floats
constexpr int64_t kSums = 1 << 16;

struct Sampled {
  int64_t group, depth, sums;  // where its sums begin
  Span rows;
  Spans columns;
};

struct SampleScratch {
  Lines left, right, sums;
};

template <class T>
static void sample_group(const BlockJob& job, const Sampled& g, int64_t t,
                         const SampleScratch& scratch) {
  const int64_t width = round_up(g.rows.count), count = std::min(kSampledTokens, job.tokens - t);
  gather<T>(job.input, t, count, g.columns, scratch.left.data());
  pad<T>(job.output, t, count, g.rows, scratch.right.data());
  float* sums = scratch.sums.data() + g.sums;
  for (int64_t j = 0; j < width; j += kPanel)
    each_tile(g.depth, [&](int64_t r, int64_t rows) {
      tile_of<Add>(rows, std::min(kVectors, (width - j) / kLanes))(
          {scratch.left.data() + r, 1, g.depth}, {scratch.right.data() + j, width}, count,
          {sums + r * width + j, width});
    });
}

template <class T>
ISA_TARGET static void write_group(const BlockJob& job, const Sampled& g, const float* sums) {
  T* to = reinterpret_cast<T*>(job.values) + job.blocks.first_value(g.group);
  const int64_t rows = g.rows.count;
  for (int64_t k = 0; k < g.depth; ++k, to += rows)
    for (int64_t r = 0; r < rows; r += kLanes, sums += kLanes)
      narrow(to + r, load(sums), rows - r);
}

// takes groups from `begin` on until they have enough sums
static std::vector<Sampled> some_groups(const Blocks& blocks, int64_t& begin, int64_t end,
                                        int64_t& size) {
  std::vector<Sampled> groups;
  for (size = 0; begin < end && size < kSums; ++begin) {
    if (!blocks.count(begin)) continue;
    const Span rows{begin * blocks.height, blocks.rows(begin)};
    Sampled g{begin, blocks.depth(begin), size, rows, {}};
    for (int64_t b = 0; b < blocks.count(begin); ++b)
      put_spans(g.columns, blocks.column(begin, b), blocks.width, blocks.width);
    size += g.depth * round_up(rows.count);
    groups.push_back(std::move(g));
  }
  return groups;
}

template <class T>
static void sample(const BlockJob& job, int64_t begin, int64_t end) {
  while (begin < end) {
    int64_t size = 0, deepest = 0;
    const std::vector<Sampled> groups = some_groups(job.blocks, begin, end, size);
    for (const Sampled& g : groups) deepest = std::max(deepest, g.depth);
    const int64_t height = round_up(job.blocks.height);
    const SampleScratch scratch{Lines(kSampledTokens * deepest), Lines(kSampledTokens * height),
                                Lines(size)};
    std::fill_n(scratch.sums.data(), size, 0.0f);
    for (int64_t t = 0; t < job.tokens; t += kSampledTokens)
      for (const Sampled& g : groups) sample_group<T>(job, g, t, scratch);
    for (const Sampled& g : groups) write_group<T>(job, g, scratch.sums.data() + g.sums);
  }
}

}  // namespace apical::ISA::blocks
