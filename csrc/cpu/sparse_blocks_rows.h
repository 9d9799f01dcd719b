// parts of rows of float32 or bfloat16 to and from vectors: included once per instruction set
#include "vector_types.h"

namespace apical::ISA::blocks {

// columns from `at`, in spans no longer than `most`
static inline void put_spans(Spans& spans, int64_t at, int64_t count, int64_t most) {
  for (int64_t i = 0; i < count; i += most) spans.push_back({at + i, std::min(most, count - i)});
}

// the spans of rows as floats, one after the other
template <class T>
ISA_TARGET static void gather(const BlockRows& rows, int64_t first, int64_t count,
                              const Spans& spans, float* to) {
  for (int64_t r = first; r < first + count; ++r)
    for (const Span& span : spans) {
      const T* from = rows.at<T>(r, span.at);
      for (int64_t i = 0; i < span.count; i += kLanes)
        narrow(to + i, widen(from + i, span.count - i), span.count - i);
      to += span.count;
    }
}

// the reverse, of one span
template <class T>
ISA_TARGET static void scatter(const float* from, const BlockRows& rows, int64_t first,
                               int64_t count, const Span& span) {
  for (int64_t r = first; r < first + count; ++r, from += span.count) {
    T* to = rows.at<T>(r, span.at);
    for (int64_t i = 0; i < span.count; i += kLanes)
      narrow(to + i, widen(from + i, span.count - i), span.count - i);
  }
}

// one span of rows as floats, each with whole vectors
template <class T>
ISA_TARGET static void pad(const BlockRows& rows, int64_t first, int64_t count, const Span& span,
                           float* to) {
  for (int64_t r = first; r < first + count; ++r) {
    const T* from = rows.at<T>(r, span.at);
    for (int64_t i = 0; i < span.count; i += kLanes, to += kLanes)
      store(to, widen(from + i, span.count - i));
  }
}

// in as few tiles as there must be, of like heights
template <class Step>
static inline void each_tile(int64_t rows, const Step& step) {
  const int64_t tiles = (rows + kTall - 1) / kTall;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t r = rows * i / tiles;
    step(r, rows * (i + 1) / tiles - r);
  }
}

}  // namespace apical::ISA::blocks
