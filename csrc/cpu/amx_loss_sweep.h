// the sweep over the vocabulary that makes the loss of a chunk of tokens and the gradient of the
// input: exponentials are taken below the targets' logits, so that no sum is needed before them
#pragma once

#include "amx_beside.h"
#include "amx_exponentials.h"
#include "amx_workers.h"

#include <vector>

namespace apical::amx {

// panels of 32 vocabulary entries between two sums into the gradient of the input: two strips of
// so many tiles fit the first cache
constexpr int64_t kPanels = 8;

struct Place {
  int64_t panel, token;

  bool operator<(const Place& other) const {
    return panel != other.panel ? panel < other.panel : token < other.token;
  }
};

// a chunk of tokens: what all workers read
struct LossChunk {
  Halves x, w;                    // (C, H), (V, H)
  const int64_t* ids;             // the targets, (C,)
  float scale;                    // from products to powers of two
  uint16_t* exps;                 // tiles, by panel, its half, block of 32 tokens; null: not kept
  bool input_grad;
  int64_t depth, blocks, panels;  // of 32: channels, tokens, vocabulary entries
  Scratch columns, targets;
  std::vector<Place> places;  // of the targets, in the order in which a sweep meets them

  LossChunk(const Halves& x, const Halves& w, const int64_t* ids, float scale, uint16_t* exps,
            bool input_grad)
      : x(x),
        w(w),
        ids(ids),
        scale(scale),
        exps(exps),
        input_grad(input_grad),
        depth(round_up(x.columns, kDeep) / kDeep),
        blocks(round_up(x.rows, kDeep) / kDeep),
        panels(round_up(w.rows, kDeep) / kDeep),
        columns(blocks * block_size()),
        targets(2 * blocks * kDeep) {
    for (int64_t i = 0; i < x.rows; ++i) places.push_back({ids[i] / kDeep, i});
    std::sort(places.begin(), places.end());
  }

  int64_t block_size() const { return depth * kDeep * kDeep; }
  // x as the right operand
  Operand right(int64_t block) const { return tiles(columns.data(), depth).at(2 * block, 0); }
  // products of the tokens with their targets
  float* target(int64_t block) const { return targets.floats() + block * kDeep; }
  std::vector<Place>::const_iterator first_place(int64_t panel) const {
    return std::lower_bound(places.begin(), places.end(), Place{panel, 0});
  }

  // packs a block of tokens and multiplies it with its targets: the bits that the sweep finds, so
  // that a logit that equals the target's is seen to
  AMX_TARGET void prepare(int64_t block) const {
    Soon nothing;
    pack_rows<true>(part(x, block * kDeep, kDeep, 0, x.columns), kDeep, _mm512_setzero_si512(),
                    columns.data() + block * block_size(), nothing);
    const Scratch rows(block_size());
    gather(block, rows.data());
    alignas(64) float sums[kDeep * kDeep];
    multiply_beside({rows.data(), kSide * depth * kDeep, kDeep, depth * kTileRow}, right(block),
                    depth, {}, rows_of(sums), [] {});
    for (int64_t i = 0; i < kDeep; ++i) target(block)[i] = sums[i * kDeep + i];
  }

 private:
  void gather(int64_t block, uint16_t* to) const {
    std::fill_n(to, block_size(), uint16_t{0});
    const int64_t first = block * kDeep, count = std::min(kDeep, x.rows - first);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * depth * kDeep, w.at(ids[first + i], 0), w.columns * 2);
  }
};

// what one worker finds in its part of the vocabulary
struct Found {
  std::vector<double> exps, products;
  std::vector<float> max;
  Scratch grad;  // of x, before it is normalised: blocks of 32 channels and 32 tokens, tile by tile

  explicit Found(const LossChunk& chunk)
      : exps(chunk.blocks * kDeep),
        products(chunk.blocks * kDeep),
        max(chunk.blocks * kDeep, kLowest),
        grad(chunk.input_grad ? 2 * chunk.blocks * chunk.block_size() : 0) {
    if (chunk.input_grad) std::fill_n(grad.floats(), chunk.blocks * chunk.block_size(), 0.0f);
  }

  TokenSums sums(int64_t block) {
    const int64_t at = block * kDeep;
    return {exps.data() + at, products.data() + at, max.data() + at};
  }
};

class LossSweep {
 public:
  AMX_TARGET LossSweep(const LossChunk& chunk, Found& found)
      : chunk_(chunk),
        found_(found),
        first_(pair_index(0)),
        last_(pair_index(kSide)),
        left_(chunk.block_size()),
        pairs_(chunk.input_grad ? chunk.blocks * kPanels * kDeep * kDeep : 0),
        strip_(kPanels * kDeep * kDeep) {}

  AMX_TARGET void run(Range panels) {
    place_ = chunk_.first_place(panels.begin);
    for (int64_t p = panels.begin; p < panels.end; p += kPanels) {
      const Range some{p, std::min(p + kPanels, panels.end)};
      exponentials(some);
      if (chunk_.input_grad) add_grad(some);
    }
  }

 private:
  // rows of w, as they are where they are whole blocks
  AMX_TARGET LeftOperand left(int64_t panel) const {
    const Halves& w = chunk_.w;
    const int64_t row = panel * kDeep;
    if (w.columns % kDeep == 0 && w.rows - row >= kDeep)
      return {w.at(row, 0), kSide * w.stride, kDeep, w.stride * 2};
    Soon nothing;
    pack_rows<false>(part(w, row, kDeep, 0, w.columns), kDeep, _mm512_setzero_si512(),
                     left_.data(), nothing);
    return {left_.data(), chunk_.depth * kTile, kTile};
  }

  // the rows of w after this panel, line by line
  Soon next(int64_t panel) const {
    const Halves& w = chunk_.w;
    const int64_t row = std::min((panel + 1) * kDeep, w.rows);
    const int64_t bytes = std::min(kDeep, w.rows - row) * w.stride * 2;
    return {w.at(row, 0), 64, bytes / 64, 64, chunk_.blocks * chunk_.depth};
  }

  AMX_TARGET void exponentials(Range panels) {
    alignas(64) float sums[2][kDeep * kDeep];
    const int64_t pace = (kSide + chunk_.depth - 1) / chunk_.depth;
    Exponentials before;
    int turn = 0;
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const LeftOperand a = left(p);
      Soon ahead = next(p);
      for (int64_t b = 0; b < chunk_.blocks; ++b, turn ^= 1) {
        const auto beside = [&]() AMX_TARGET {
          ahead.step();
          before.step(pace, first_, last_);
        };
        multiply_beside(a, chunk_.right(b), chunk_.depth, {}, rows_of(sums[turn]), beside);
        before.finish(first_, last_);
        leave_out(p, b, sums[turn]);
        before = Exponentials(sums[turn], chunk_.target(b), chunk_.scale, found_.sums(b),
                              tiles_of(p, p - panels.begin, b));
      }
    }
    before.finish(first_, last_);
  }

  // the targets, and what lies beyond the vocabulary
  void leave_out(int64_t panel, int64_t block, float* sums) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const float none = chunk_.scale > 0 ? -infinity : infinity;
    for (; place_ != chunk_.places.end() && place_->panel == panel; ++place_) {
      if (place_->token / kDeep != block) break;
      sums[chunk_.ids[place_->token] % kDeep * kDeep + place_->token % kDeep] = none;
    }
    for (int64_t i = (chunk_.w.rows - panel * kDeep) * kDeep; i < kDeep * kDeep; ++i)
      sums[i] = none;
  }

  ExpTiles tiles_of(int64_t panel, int64_t index, int64_t block) const {
    ExpTiles to;
    if (chunk_.exps) {
      to.upper = chunk_.exps + (2 * panel * chunk_.blocks + block) * kTile;
      to.lower = to.upper + chunk_.blocks * kTile;
    }
    if (chunk_.input_grad) {
      to.left = pairs(block).data + index * kTile;
      to.right = to.left + kPanels * kTile;
    }
    return to;
  }

  // exponentials as the right operand of the sum over the vocabulary
  Operand pairs(int64_t block) const { return tiles(pairs_.data(), kPanels).at(2 * block, 0); }

  AMX_TARGET void add_grad(Range panels) {
    Soon nothing;
    const int64_t steps = panels.end - panels.begin, row = panels.begin * kDeep;
    const Operand strip = tiles(strip_.data(), kPanels);
    const LeftOperand left{strip.data, strip.tile, strip.step};
    for (int64_t d = 0; d < chunk_.depth; ++d) {
      pack_pairs<true>(part(chunk_.w, row, steps * kDeep, d * kDeep, kDeep), strip, nothing);
      for (int64_t b = 0; b < chunk_.blocks; ++b) {
        float* at = found_.grad.floats() + (b * chunk_.depth + d) * kDeep * kDeep;
        const Sums sums{at, 2 * kSums, kSums, kTileRow};
        const char* soon = reinterpret_cast<const char*>(at + chunk_.block_size());
        multiply_beside(left, pairs(b), steps, sums, sums, [&]() AMX_TARGET {
          for (int64_t i = 0; i < 512; i += 64) __builtin_prefetch(soon + i, 1, 3);
          soon += 512;
        });
      }
    }
  }

  const LossChunk& chunk_;
  Found& found_;
  __m512i first_, last_;
  Scratch left_, pairs_, strip_;
  std::vector<Place>::const_iterator place_;
};

}  // namespace apical::amx
