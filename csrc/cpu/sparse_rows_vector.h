// the loops over the stored entries of a sparse matrix: included once per instruction set
#include "vector.h"

#include "sparse_rows_pack.h"

namespace apical::ISA {
namespace {

template <int64_t kTokens>
ISA_TARGET inline void add_entry(Floats* sum, const float* column, float value) {
  for (int64_t q = 0; q < kTokens / kLanes; ++q) sum[q] += load(column + q * kLanes) * value;
}

// sums += value * column of the tile, for every entry of a block; sums by rows of the matrix
template <int64_t kTokens>
ISA_TARGET void add_block(const Plan& plan, const Block& block, const float* value,
                          const float* tile, float* sums, Ahead* soon, Ahead* later) {
  constexpr int64_t kVectors = kTokens / kLanes, kUnroll = 4;
  const int32_t* row = plan.rows.data() + block.first_row;
  const uint16_t* offset = plan.offsets.data() + block.first_entry;
  value += block.first_entry;
  for (int64_t r = block.first_run; r < block.end_run; ++r) {
    const Run run = plan.runs[r];
    for (const int32_t* end = row + run.rows; row < end; ++row) {
      soon->next(), later->next();
      float* to = sums + *row * kTokens;
      Floats sum[kVectors];
      for (int64_t q = 0; q < kVectors; ++q) sum[q] = load(to + q * kLanes);
      int64_t k = 0;
      for (; k + kUnroll <= run.count; k += kUnroll)
        for (int64_t j = k; j < k + kUnroll; ++j)
          add_entry<kTokens>(sum, tile + offset[j], value[j]);
      for (; k < run.count; ++k) add_entry<kTokens>(sum, tile + offset[k], value[k]);
      offset += run.count, value += run.count;
      for (int64_t q = 0; q < kVectors; ++q) store(to + q * kLanes, sum[q]);
    }
  }
}

// half the sums of the lanes of two vectors: those of b in the lanes whose number has S
template <int S>
ISA_TARGET inline Floats fold(Floats a, Floats b) {
  Ints own, other;
  for (int j = 0; j < kLanes; ++j) {
    own[j] = j & S ? static_cast<int>(kLanes) + j : j;
    other[j] = own[j] ^ S;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

template <int S>
ISA_TARGET inline void fold_all(Floats* x) {
  for (int i = 0; i < S; ++i) x[i] = fold<S>(x[i], x[i + S]);
}

// the sums of the lanes of as many vectors as there are lanes
ISA_TARGET inline Floats sums_of_lanes(const float* from) {
  Floats x[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) x[i] = load(from + i * kLanes);
  if (kLanes > 8) fold_all<kLanes / 2>(x);
  if (kLanes > 4) fold_all<4>(x);
  fold_all<2>(x);
  fold_all<1>(x);
  return x[0];
}

// products of vectors, of which the lanes are summed when there are enough of them
struct Products {
  float waiting[(Plan::kLongest + kLanes) * kLanes];
  float* next = waiting;

  // adds whole vectors of sums, returns where the following belong
  ISA_TARGET inline float* add_to(float* to) {
    const float* done = waiting;
    for (; next - done >= kLanes * kLanes; done += kLanes * kLanes, to += kLanes)
      store(to, load(to) + sums_of_lanes(done));
    if (done == waiting) return to;
    float* keep = waiting;
    for (; done < next; done += kLanes, keep += kLanes) store(keep, load(done));
    next = keep;
    return to;
  }

  ISA_TARGET inline void add_rest(float* to) {
    for (const float* done = waiting; done < next; done += kLanes, ++to)
      *to += static_cast<float>(sum_lanes(load(done)));
  }
};

// to += column of the tile . packed row of the matrix, for every entry of a block
template <int64_t kTokens>
ISA_TARGET void sample_block(const Plan& plan, const Block& block, const float* tile,
                             const float* packed, float* to, Ahead* soon, Ahead* later) {
  constexpr int64_t kVectors = kTokens / kLanes;
  Products products;
  const int32_t* row = plan.rows.data() + block.first_row;
  const uint16_t* offset = plan.offsets.data() + block.first_entry;
  to += block.first_entry;
  for (int64_t r = block.first_run; r < block.end_run; ++r) {
    const Run run = plan.runs[r];
    for (const int32_t* end = row + run.rows; row < end; ++row) {
      soon->next(), later->next();
      Floats own[kVectors];
      for (int64_t q = 0; q < kVectors; ++q) own[q] = load(packed + *row * kTokens + q * kLanes);
      for (int64_t k = 0; k < run.count; ++k, products.next += kLanes) {
        const float* column = tile + offset[k];
        Floats sum = load(column) * own[0];
        for (int64_t q = 1; q < kVectors; ++q) sum += load(column + q * kLanes) * own[q];
        store(products.next, sum);
      }
      offset += run.count;
      to = products.add_to(to);
    }
  }
  products.add_rest(to);
}

// the rows of one pack of tokens, from `first` on
template <class T>
Rows<T> rows_of(const Matrix& matrix, int64_t first, int64_t tokens) {
  return {static_cast<T*>(matrix.data) + first * matrix.stride, matrix.stride,
          std::max<int64_t>(0, std::min(tokens, matrix.rows - first)), matrix.size};
}

// runs step(block, ahead) for each block, with its columns of the input packed in `tile`
template <class T, int64_t kTokens, class Step>
ISA_TARGET inline void each_tile(const Plan& plan, const Matrix& input, int64_t first, float* tile,
                                 const Step& step) {
  const Rows<T> now = rows_of<T>(input, first, kTokens);
  const Rows<T> then = rows_of<T>(input, first + kTokens, kTokens);
  int64_t column = 0;
  for (const Block& block : plan.blocks) {
    pack<T, kTokens>(now.part(column), tile);
    column += Plan::kWidth;
    Ahead soon = (column < now.size ? now.part(column) : then.part(0)).ahead();
    step(block, &soon);
  }
}

// out += input S^T, for one pack of tokens
template <class T>
ISA_TARGET void add_tokens(const SparseJob& job, int64_t first, float* scratch) {
  constexpr int64_t kTokens = kAddTokens;
  float* sums = scratch + Plan::kWidth * kTokens;
  const Rows<T> out = rows_of<T>(job.left, first, kTokens);
  std::fill(sums, sums + out.size * kTokens, 0.0f);
  Ahead later = out.ahead();
  each_tile<T, kTokens>(*job.plan, job.input, first, scratch,
                        [&](const Block& block, Ahead* soon) {
                          add_block<kTokens>(*job.plan, block, job.values, scratch, sums, soon,
                                             &later);
                        });
  add_back<T, kTokens>(sums, out);
}

// to += grad^T input at the entries, in the order of the plan, for one pack of tokens
template <class T>
ISA_TARGET void sample_tokens(const SparseJob& job, int64_t first, float* scratch, float* to) {
  constexpr int64_t kTokens = kSampleTokens;
  float* packed = scratch + Plan::kWidth * kTokens;
  pack<T, kTokens>(rows_of<T>(job.left, first, kTokens), packed);
  Ahead later = rows_of<T>(job.left, first + kTokens, kTokens).ahead();
  each_tile<T, kTokens>(*job.plan, job.input, first, scratch,
                        [&](const Block& block, Ahead* soon) {
                          sample_block<kTokens>(*job.plan, block, scratch, packed, to, soon,
                                                &later);
                        });
}

}  // namespace
}  // namespace apical::ISA

#undef ISA
#undef ISA_TARGET
#undef ISA_BYTES
