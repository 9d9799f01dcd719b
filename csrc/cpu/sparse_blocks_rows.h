// parts of rows of float32 or bfloat16 to and from vectors: included once per instruction set

namespace apical::ISA::blocks {

typedef uint16_t Shorts __attribute__((vector_size(ISA_BYTES / 2)));
typedef uint32_t Bits __attribute__((vector_size(ISA_BYTES)));

struct Bfloat16 {
  uint16_t bits;
};

ISA_TARGET static inline Floats widen(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Floats value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

ISA_TARGET static inline Floats widen(const Bfloat16* from, int64_t count) {
  Shorts value{};
  if (count >= kLanes) {
    std::memcpy(&value, from, sizeof(value));
  } else {
    std::memcpy(&value, from, count * sizeof(*from));
  }
  return (Floats)(__builtin_convertvector(value, Bits) << 16);
}

ISA_TARGET static inline void narrow(float* to, Floats value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
}

// to the nearest, halfway to even
ISA_TARGET static inline void narrow(Bfloat16* to, Floats value, int64_t count) {
  const Bits bits = (Bits)value, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits kept = value == value ? rounded : Bits{} + 0x7fc0;
  const Shorts halves = __builtin_convertvector(kept, Shorts);
  if (count >= kLanes) {
    std::memcpy(to, &halves, sizeof(halves));
  } else {
    std::memcpy(to, &halves, count * sizeof(*to));
  }
}

template <int S>
ISA_TARGET static inline void exchange(Floats* x) {
  Ints low, high;
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j & S ? static_cast<int>(kLanes) + j - S : j;
    high[j] = j & S ? static_cast<int>(kLanes) + j : j + S;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Floats a = x[i], b = x[i + S];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + S] = __builtin_shuffle(a, b, high);
  }
}

// a square of one vector per row
ISA_TARGET static inline void transpose(Floats* x) {
  exchange<1>(x);
  exchange<2>(x);
  if (kLanes > 4) exchange<kLanes / 2>(x);
  if (kLanes > 8) exchange<kLanes / 4>(x);
}

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
