// output += input times blocks: included once per instruction set

namespace apical::ISA::blocks {

// measured on an AVX-512 core at 2048 features: 24 tokens take 15 % longer, 48 a little more
constexpr int64_t kTokens = 12;

// what becomes of a tile: its vectors are added to spans of rows
template <bool kWhole>
struct AddSpans {
  BlockRows to;
  const Span* spans;

  template <int J>
  ISA_TARGET void take(int64_t r, const Floats (&sum)[J]) const {
    float* row = to.at<float>(r);
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j) {
      const int64_t count = kWhole ? kLanes : spans[j].count;
      narrow(row + spans[j].at, widen(row + spans[j].at, count) + sum[j], count);
    }
  }
};

// a few tokens that pass together
struct Pass {
  int64_t first, count;
  BlockRows sums;  // from the first token's row on, in float32
  float* scratch;
};

template <bool kWhole>
static void add_tiles(const BlockProduct& p, Left left, const float* right, const Pass& pass) {
  using End = AddSpans<kWhole>;
  const int64_t vectors = p.to.size();
  for (int64_t j = 0; j < vectors; j += kVectors) {
    const int64_t width = std::min(kVectors, vectors - j);
    each_tile(pass.count, [&](int64_t r, int64_t rows) {
      const End end{{pass.sums.at<char>(r), pass.sums.stride}, &p.to[j]};
      tile_of<End>(rows, width)({left.data + r * left.row, left.row, left.step},
                                {right + j * kLanes, vectors * kLanes}, p.depth, end);
    });
  }
}

template <class T>
static void add_product(const BlockJob& job, const BlockPlan& plan, const BlockProduct& p,
                        const Pass& pass) {
  Left left{pass.scratch, p.depth, 1};
  if (sizeof(T) == sizeof(float) && p.from.size() == 1) {
    left = {job.input.at<float>(pass.first, p.from[0].at), job.input.stride / 4, 1};
  } else {
    gather<T>(job.input, pass.first, pass.count, p.from, pass.scratch);
  }
  const float* right = plan.packed.data() + p.right;
  p.whole ? add_tiles<true>(p, left, right, pass) : add_tiles<false>(p, left, right, pass);
}

// the order in which an element is summed does not depend on the range of tokens
template <class T>
static void add(const BlockJob& job, const BlockPlan& plan, int64_t begin, int64_t end) {
  constexpr bool kHalf = sizeof(T) < sizeof(float);
  const Lines scratch(kTokens * plan.deepest), wide(kHalf ? kTokens * job.columns : 0);
  const int64_t bytes = job.columns * static_cast<int64_t>(sizeof(float));
  const Span all{0, job.columns};
  for (int64_t t = begin; t < end; t += kTokens) {
    const int64_t count = std::min(kTokens, end - t);
    const BlockRows sums = kHalf ? BlockRows{reinterpret_cast<char*>(wide.data()), bytes}
                                 : BlockRows{job.output.at<char>(t), job.output.stride};
    if (kHalf) gather<T>(job.output, t, count, {all}, wide.data());
    for (const BlockProduct& p : plan.products)
      add_product<T>(job, plan, p, {t, count, sums, scratch.data()});
    if (kHalf) scatter<T>(wide.data(), job.output, t, count, all);
  }
}

}  // namespace apical::ISA::blocks
