// vectors from and to memory of every element type, and squares of vectors: included once per
// instruction set, after vector.h

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

}  // namespace apical::ISA
