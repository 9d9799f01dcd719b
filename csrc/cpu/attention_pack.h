// rows of tensors to and from scratch, in float32: included once per instruction set

namespace apical::ISA {

typedef uint16_t Shorts __attribute__((vector_size(ISA_BYTES / 2)));
typedef uint32_t Bits __attribute__((vector_size(ISA_BYTES)));

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

ISA_TARGET static inline Floats widen(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Floats value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

ISA_TARGET static inline Bits widen_bits(const void* from, int64_t count) {
  Shorts value{};
  if (count >= kLanes) {
    std::memcpy(&value, from, sizeof(value));
  } else {
    std::memcpy(&value, from, count * sizeof(uint16_t));
  }
  return __builtin_convertvector(value, Bits);
}

ISA_TARGET static inline Floats widen(const Bfloat16* from, int64_t count) {
  return (Floats)(widen_bits(from, count) << 16);
}

// the exponent is moved by a product, which also makes subnormal numbers normal
ISA_TARGET static inline Floats widen(const Half* from, int64_t count) {
  const Bits bits = widen_bits(from, count), size = bits & 0x7fff;
  const Bits value = (Bits)((Floats)(size << 13) * 0x1p112f);
  const Bits infinite = size >= 0x7c00 ? Bits{} + 0x7f800000 : Bits{};
  return (Floats)(value | infinite | (bits & 0x8000) << 16);
}

ISA_TARGET static inline void narrow(float* to, Floats value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
}

ISA_TARGET static inline void narrow_bits(void* to, Bits bits, int64_t count) {
  const Shorts value = __builtin_convertvector(bits, Shorts);
  std::memcpy(to, &value, std::min(count, kLanes) * sizeof(uint16_t));
}

// to the nearest, halfway to even
ISA_TARGET static inline void narrow(Bfloat16* to, Floats value, int64_t count) {
  const Bits bits = (Bits)value, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  narrow_bits(to, value == value ? rounded : Bits{} + 0x7fc0, count);
}

ISA_TARGET static inline void narrow(Half* to, Floats value, int64_t count) {
  const Bits bits = (Bits)value, size = bits & 0x7fffffff;
  const Bits normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  // adding 0.5 leaves the digits that a subnormal number keeps at the end
  const Bits small = (Bits)((Floats)size + 0.5f) - 0x3f000000;
  const Bits large = size > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
  const Bits finite = size < (113u << 23) ? small : normal;
  narrow_bits(to, (size >= (143u << 23) ? large : finite) | (bits >> 16 & 0x8000), count);
}

// rows of one head are far apart: the processor does not guess the next ones by itself
template <int kWrite>
static inline void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t d = 0; d < bytes; d += 64) __builtin_prefetch(row + d, kWrite);
}
constexpr int64_t kAhead = 6;

// whether everything seen so far is finite: x * 0 is 0, or NaN
ISA_TARGET static inline bool all_zero(Floats sum) {
  for (int64_t lane = 0; lane < kLanes; ++lane)
    if (sum[lane] != 0.0f) return false;
  return true;
}

template <class T>
ISA_TARGET static bool pack_rows_of(const View& from, int64_t token, int64_t head, int64_t rows,
                                    int64_t size, float factor, float* to) {
  Floats zero{};
  for (int64_t r = 0; r < rows; ++r, ++token) {
    prefetch_row<0>(from.at(token + kAhead, head), size * sizeof(T));
    const T* row = reinterpret_cast<const T*>(from.at(token, head));
    for (int64_t d = 0; d < size; d += kLanes, to += kLanes) {
      const Floats value = widen(row + d, size - d);
      zero += value * 0.0f;
      store(to, value * factor);
    }
  }
  return all_zero(zero);
}

// rows, times factor, one after the other, with zeros up to a whole number of vectors; returns
// whether all of them are finite
static bool pack_rows(const View& from, int64_t token, int64_t head, int64_t rows, int64_t size,
                      float factor, float* to) {
  if (from.kind == Kind::kFloat)
    return pack_rows_of<float>(from, token, head, rows, size, factor, to);
  if (from.kind == Kind::kBfloat16)
    return pack_rows_of<Bfloat16>(from, token, head, rows, size, factor, to);
  return pack_rows_of<Half>(from, token, head, rows, size, factor, to);
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

template <class T>
ISA_TARGET static bool pack_columns_of(const View& from, int64_t token, int64_t head,
                                       int64_t rows, int64_t size, float* columns, float* packed) {
  const int64_t width = round_up(size);
  Floats zero{};
  for (int64_t r = 0; r < rows; r += kLanes) {
    float* panel = columns + r / kPanel * kPanel * width + r % kPanel;
    for (int64_t i = 0; i < kLanes; ++i)
      prefetch_row<0>(from.at(token + r + i + kLanes, head), size * sizeof(T));
    for (int64_t d = 0; d < size; d += kLanes) {
      Floats x[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const T* row = reinterpret_cast<const T*>(from.at(token + r + i, head));
        x[i] = r + i < rows ? widen(row + d, size - d) : Floats{};
        zero += x[i] * 0.0f;
        if (packed) store(packed + (r + i) * width + d, x[i]);
      }
      transpose(x);
      for (int64_t i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel, x[i]);
    }
  }
  return all_zero(zero);
}

// rows as columns, in panels of kPanel columns; panel p begins at p * kPanel * round_up(size); to
// `packed`, if given, also as rows, up to a whole number of vectors of them
static bool pack_columns(const View& from, int64_t token, int64_t head, int64_t rows, int64_t size,
                         float* columns, float* packed) {
  if (from.kind == Kind::kFloat)
    return pack_columns_of<float>(from, token, head, rows, size, columns, packed);
  if (from.kind == Kind::kBfloat16)
    return pack_columns_of<Bfloat16>(from, token, head, rows, size, columns, packed);
  return pack_columns_of<Half>(from, token, head, rows, size, columns, packed);
}

// to = from * factor, plus what is in `before`, if given
template <class T>
ISA_TARGET static void write_row_of(char* to, const float* from, int64_t size, float factor,
                                    const float* before) {
  T* row = reinterpret_cast<T*>(to);
  for (int64_t d = 0; d < size; d += kLanes) {
    Floats value = load(from + d) * factor;
    if (before) value += widen(before + d, size - d);
    narrow(row + d, value, size - d);
  }
}

static void write_row(const View& to, int64_t token, int64_t head, const float* from, int64_t size,
                      float factor, const float* before = nullptr) {
  char* row = to.at(token, head);
  if (to.kind == Kind::kFloat) return write_row_of<float>(row, from, size, factor, before);
  if (to.kind == Kind::kBfloat16) return write_row_of<Bfloat16>(row, from, size, factor, before);
  write_row_of<Half>(row, from, size, factor, before);
}

}  // namespace apical::ISA
