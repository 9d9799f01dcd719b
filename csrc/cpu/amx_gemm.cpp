// products of bfloat16 matrices with float32 sums on the matrix unit (AMX), in the three forms that
// a projection and its gradients have: the wide matrices have a row or a column per vocabulary
// entry, are read once and packed in passing; what they are multiplied with stays in the caches
#include "amx.h"
#include "pages.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef APICAL_AMX
#include "amx_beside.h"
#include "amx_workers.h"
#endif

namespace apical {
namespace {

#ifdef APICAL_AMX
using amx::each_worker;
using amx::kDeep;
using amx::kSide;
using amx::Range;
using amx::round_up;
using amx::Scratch;
using amx::workers_for;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// columns of a panel, so that it stays in the second cache beside what it is multiplied with;
// kDepth: so that two strips of 32 stay in the first
constexpr int64_t kPanel = 256, kTall = 128, kDepth = 256, kWide = 640;

// out = a b^T: a (M, K), b (N, K)
struct RowsByRows {
  amx::Halves a, b;
  amx::Floats out;
  int64_t depth;
  uint16_t* packed_a;

  RowsByRows(const amx::Halves& a, const amx::Halves& b, const amx::Floats& out)
      : a(a), b(b), out(out), depth(round_up(a.columns, kDeep) / kDeep), packed_a(nullptr) {}

  AMX_TARGET void pack(int64_t row) const {
    amx::Soon nothing;
    amx::pack_rows<false>(amx::part(a, row, kDeep, 0, a.columns), kDeep, _mm512_setzero_si512(),
                          packed_a + row * depth * kDeep, nothing);
  }

  AMX_TARGET void panel(Range columns, uint16_t* to) const {
    amx::Soon nothing;
    const int64_t size = columns.end - columns.begin;
    amx::pack_rows<true>(amx::part(b, columns.begin, size, 0, b.columns), round_up(size, kDeep),
                         _mm512_setzero_si512(), to, nothing);
    const amx::Operand left = amx::tiles(packed_a, depth), right = amx::tiles(to, depth);
    for (int64_t m = 0; m < a.rows; m += kDeep)
      for (int64_t n = 0; n < size; n += kDeep)
        amx::block_past_caches(left.at(m / kSide, 0), right.at(n / kSide, 0), depth, out, m,
                               columns.begin + n);
  }

  void run() {
    const Scratch shared(round_up(a.rows, kDeep) * depth * kDeep);
    packed_a = shared.data();
    const int64_t blocks = (a.rows + kDeep - 1) / kDeep;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(i * kDeep);
    });
    const int64_t workers = workers_for((b.rows + kPanel - 1) / kPanel);
    each_worker(workers, [&](int64_t i) {
      const Scratch own(kPanel * depth * kDeep);
      const Range mine = Range{0, b.rows}.part(i, workers, kPanel);
      for (int64_t n = mine.begin; n < mine.end; n += kPanel)
        panel({n, std::min(n + kPanel, mine.end)}, own.data());
    });
  }
};

// out = a b: a (M, K), b (K, N), with K large
struct RowsByColumns {
  amx::Halves a, b;
  amx::Floats out;

  AMX_TARGET void panel(int64_t k, Range rows, Range columns, uint16_t* to_a,
                        uint16_t* to_b) const {
    constexpr int64_t depth = kDepth / kDeep;
    const int64_t size = columns.end - columns.begin, used = std::min(kDepth, b.rows - k);
    const int64_t blocks = (size + kDeep - 1) / kDeep, steps = (used + kDeep - 1) / kDeep;
    const amx::Operand left = amx::tiles(to_a, steps), right = amx::tiles(to_b, depth);
    amx::Soon nothing;
    amx::pack_pairs<false>(amx::part(b, k, kDepth, columns.begin, size), right, nothing);
    for (int64_t m = rows.begin; m < rows.end; m += kDeep) {
      amx::pack_rows<false>(amx::part(a, m, kDeep, k, used), kDeep, _mm512_setzero_si512(), to_a,
                            nothing);
      const int64_t next = std::min(m + kDeep, a.rows);
      amx::Soon ahead(a.at(next, k), a.stride * 2, std::min(kDeep, a.rows - next), used * 2,
                      blocks);
      for (int64_t n = 0; n < size; n += kDeep) {
        ahead.step();
        amx::block(left, right.at(n / kSide, 0), steps, out, m, columns.begin + n, k > 0);
      }
    }
  }

  void run() const {
    // each column panel packs b, each row range packs a
    const int64_t wide = std::max<int64_t>((out.columns + kWide - 1) / kWide, 1);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t across =
        std::max<int64_t>(wide, std::min(threads, (out.columns + kDeep - 1) / kDeep));
    const int64_t down = std::max<int64_t>(
        1, std::min((threads + across - 1) / across, (out.rows + kDeep - 1) / kDeep));
    each_worker(across * down, [&](int64_t i) {
      const Range rows = Range{0, out.rows}.part(i / across, down, kDeep);
      const Range columns = Range{0, out.columns}.part(i % across, across, kDeep);
      const Scratch own_a(kDeep * kDepth);
      const Scratch own_b(round_up(columns.end - columns.begin, kDeep) * kDepth);
      for (int64_t k = 0; k < b.rows; k += kDepth)
        panel(k, rows, columns, own_a.data(), own_b.data());
    });
  }
};

// out = or += a^T b: a (K, M), b (K, N)
struct ColumnsByColumns {
  amx::Halves a, b;
  amx::Floats out;
  bool add;
  int64_t depth;
  uint16_t* packed_b;

  ColumnsByColumns(const amx::Halves& a, const amx::Halves& b, const amx::Floats& out, bool add)
      : a(a), b(b), out(out), add(add), depth(round_up(a.rows, kDeep) / kDeep), packed_b(nullptr) {}

  AMX_TARGET void pack(int64_t column) const {
    amx::Soon nothing;
    amx::pack_pairs<false>(amx::part(b, 0, b.rows, column, kDeep),
                           amx::tiles(packed_b + column * depth * kDeep, depth), nothing);
  }

  AMX_TARGET void panel(Range rows, uint16_t* to) const {
    const int64_t size = rows.end - rows.begin;
    const amx::Operand left = amx::tiles(to, depth), right = amx::tiles(packed_b, depth);
    amx::Soon nothing;
    amx::pack_pairs<true>(amx::part(a, 0, a.rows, rows.begin, size), left, nothing);
    const int64_t next = rows.begin + kTall, after = std::min(kTall, out.rows - next);
    const int64_t blocks = (size + kDeep - 1) / kDeep * ((out.columns + kDeep - 1) / kDeep);
    amx::Soon ahead(a.at(0, after > 0 ? next : 0), a.stride * 2, after > 0 ? a.rows : 0, after * 2,
                    blocks * depth);
    alignas(64) float sums[2][kDeep * kDeep];
    const int64_t pace = (kDeep + depth - 1) / depth;
    amx::LateSums before;
    int turn = 0;
    for (int64_t m = 0; m < size; m += kDeep)
      for (int64_t n = 0; n < out.columns; n += kDeep, turn ^= 1) {
        const auto beside = [&]() AMX_TARGET {
          ahead.step();
          before.step(pace);
        };
        const amx::Operand rows_of_a = left.at(m / kSide, 0);
        amx::multiply_beside({rows_of_a.data, rows_of_a.tile, rows_of_a.step},
                             right.at(n / kSide, 0), depth, {}, amx::rows_of(sums[turn]), beside);
        before.finish();
        before = amx::LateSums(sums[turn], out, rows.begin + m, n, add);
      }
    before.finish();
  }

  void run() {
    const Scratch shared(round_up(b.columns, kDeep) * depth * kDeep);
    packed_b = shared.data();
    const int64_t blocks = (b.columns + kDeep - 1) / kDeep;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(i * kDeep);
    });
    const int64_t workers = workers_for((out.rows + kTall - 1) / kTall);
    each_worker(workers, [&](int64_t i) {
      const Scratch own(kTall * depth * kDeep);
      const Range mine = Range{0, out.rows}.part(i, workers, kTall);
      for (int64_t m = mine.begin; m < mine.end; m += kTall)
        panel({m, std::min(m + kTall, mine.end)}, own.data());
    });
  }
};

void check(const Tensor& tensor, const char* name, ScalarType type) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), name,
                  " must be a contiguous matrix");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ",
                  type == ScalarType::Float ? "float32" : "bfloat16");
}

amx::Halves operand(const Tensor& tensor, const char* name) {
  check(tensor, name, ScalarType::BFloat16);
  return {static_cast<const uint16_t*>(tensor.const_data_ptr()), tensor.size(1), tensor.size(0),
          tensor.size(1)};
}

amx::Floats result(const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(amx_supported(), "this processor has no matrix unit for bfloat16 (AMX)");
  check(tensor, "out", ScalarType::Float);
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == columns, "out must be (", rows, ", ",
                  columns, ")");
  auto* data = static_cast<float*>(tensor.mutable_data_ptr());
  bring_in(data, rows * columns * 4);
  return {data, columns, rows, columns};
}

// sums of nothing, which the blocks do not write
bool clear_if_empty(const amx::Floats& out, int64_t depth, bool add) {
  if (depth == 0 && !add) std::fill_n(out.data, out.rows * out.columns, 0.0f);
  return depth == 0 || out.rows == 0 || out.columns == 0;
}

void check_depth(int64_t a, int64_t b) {
  STD_TORCH_CHECK(a == b, "a and b must have one size to sum over, got ", a, " and ", b);
}

void product_nt(const Tensor& a, const Tensor& b, Tensor out) {
  const amx::Halves left = operand(a, "a"), right = operand(b, "b");
  check_depth(left.columns, right.columns);
  const amx::Floats to = result(out, left.rows, right.rows);
  if (!clear_if_empty(to, left.columns, false)) RowsByRows(left, right, to).run();
}

void product_nn(const Tensor& a, const Tensor& b, Tensor out) {
  const amx::Halves left = operand(a, "a"), right = operand(b, "b");
  check_depth(left.columns, right.rows);
  const amx::Floats to = result(out, left.rows, right.columns);
  if (!clear_if_empty(to, right.rows, false)) RowsByColumns{left, right, to}.run();
}

void product_tn(const Tensor& a, const Tensor& b, Tensor out, bool add) {
  const amx::Halves left = operand(a, "a"), right = operand(b, "b");
  check_depth(left.rows, right.rows);
  const amx::Floats to = result(out, left.columns, right.columns);
  if (!clear_if_empty(to, left.rows, add)) ColumnsByColumns(left, right, to, add).run();
}
#endif

}  // namespace
}  // namespace apical

STABLE_TORCH_LIBRARY_FRAGMENT(apical, m) {
  // bfloat16 operands, float32 out: a b^T, a b, and a^T b, which may be added to out
  m.def("amx_product_nt(Tensor a, Tensor b, Tensor(a!) out) -> ()");
  m.def("amx_product_nn(Tensor a, Tensor b, Tensor(a!) out) -> ()");
  m.def("amx_product_tn(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()");
  m.def("amx_supported() -> bool");
}

#ifdef APICAL_AMX
STABLE_TORCH_LIBRARY_IMPL(apical, CPU, m) {
  m.impl("amx_product_nt", TORCH_BOX(&apical::product_nt));
  m.impl("amx_product_nn", TORCH_BOX(&apical::product_nn));
  m.impl("amx_product_tn", TORCH_BOX(&apical::product_tn));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(apical, CompositeExplicitAutograd, m) {
  m.impl("amx_supported", TORCH_BOX(&apical::amx_supported));
}
