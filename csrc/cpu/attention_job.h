// what one call of packed attention works on: the same for every instruction set
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace apical {

enum class Kind { kFloat, kBfloat16, kHalf };

// (tokens, heads, size) with contiguous channels, strides in bytes; or (tokens, heads) of float
struct View {
  char* data = nullptr;
  int64_t token = 0, head = 0;
  Kind kind = Kind::kFloat;

  char* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
  float* number(int64_t t, int64_t h) const { return reinterpret_cast<float*>(at(t, h)); }
};

enum class Transform { kNone, kSoftcap, kSoftplus, kPower };

struct Document {
  int64_t q, q_end, k, k_end, index;
  // the first of its counters of finished blocks of keys, where there is more than one block
  int64_t turns;

  int64_t rows() const { return q_end - q; }
  int64_t keys() const { return k_end - k; }
};

struct Job {
  View q, k, v, out, lse, grad_out, grad_lse, grad_q, grad_k, grad_v, grad_gain, gain;
  // where blocks of keys add up the gradient of q: grad_q itself if that is float
  View sum_q;
  int64_t size, value_size, kv_heads, group;
  int64_t left, right, limit;
  float scale, a, b;
  Transform transform;
  const float *sinks, *slopes;
  int64_t slopes_of_document;
  // dropout keeps what is drawn at or above the threshold, times keep
  uint32_t threshold, seed[2];
  float keep;
  std::atomic<int32_t>* turns;

  bool drops() const { return threshold > 0; }
  // whether scores are more than products of queries and keys
  bool has_rules() const { return transform != Transform::kNone || slopes; }
};

// one piece of a document's work for one key head: a range of rows, or a block of keys
struct Task {
  int64_t document, kv_head, part;
};

// row i sees the keys from lo(i) up to, not including, end(i): both grow with i
struct Sight {
  int64_t shift, left, right, most;

  Sight(const Job& job, const Document& doc)
      : shift(doc.keys() - doc.rows()),
        left(job.left),
        right(job.right),
        most(std::min(doc.keys(), job.limit)) {}

  int64_t lo(int64_t row) const { return std::max<int64_t>(0, row + shift - left); }
  int64_t end(int64_t row) const { return std::min(most, row + shift + right + 1); }
  // the rows that see one of the keys from `first` up to `last`
  int64_t first_row(int64_t first) const { return std::max<int64_t>(0, first - shift - right); }
  int64_t end_row(int64_t last, int64_t rows) const {
    return std::min(rows, last - shift + left);
  }
};

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// memory of a task, handed out piece by piece; each begins on a cache line
struct Scratch {
  char* next;

  template <class T>
  T* take(int64_t count) {
    char* at = next;
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// rows of a block: their scores stay in the first and second level of cache
constexpr int64_t kRows = 96;
// keys of a block, forward and backward: packed, they stay in the second level of cache
constexpr int64_t kKeys = 512;
// keys of a block that the backward pass works on at a time: squares of it and of rows stay in the
// first level of cache
constexpr int64_t kChunk = 64;
// not a power of two, which would put every row into the same few sets of the cache
constexpr int64_t kStride = kKeys + 16, kChunkStride = kChunk + 16;
// rows that a task of the forward pass takes, over all heads of a group
constexpr int64_t kTaskRows = 960;

// the size of equal parts, a multiple of `unit`, none larger than `largest`
inline int64_t part_size(int64_t total, int64_t largest, int64_t unit) {
  const int64_t parts = divide_up(total, largest);
  return std::max<int64_t>(1, divide_up(divide_up(total, parts), unit)) * unit;
}

inline Range part_of(int64_t part, int64_t size, int64_t total) {
  return {part * size, std::min(total, part * size + size)};
}

// rows of one task of the forward pass: of each head of the group
inline int64_t most_rows(const Job& job) { return std::max<int64_t>(48, kTaskRows / job.group); }
inline int64_t task_rows(const Job& job, const Document& doc) {
  return part_size(doc.rows(), most_rows(job), 6);
}

// keys of one task of the backward pass
inline int64_t task_keys(const Document& doc) { return part_size(doc.keys(), kKeys, 16); }

}  // namespace apical
