// vectors of float in plain C++: included once per instruction set, which sets
//   ISA        the namespace to put them in
//   ISA_TARGET the function attribute that allows its instructions
//   ISA_BYTES  the size of its vector registers
// so that the library needs no -march and runs on any processor of the architecture

namespace apical::ISA {

constexpr int64_t kLanes = ISA_BYTES / sizeof(float);

typedef float Floats __attribute__((vector_size(ISA_BYTES)));
typedef int32_t Ints __attribute__((vector_size(ISA_BYTES)));

ISA_TARGET static inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

ISA_TARGET static inline void store(float* to, Floats value) {
  std::memcpy(to, &value, sizeof(value));
}

// the last, incomplete vector of a row; what lies beyond it is -inf: no maximum, no exponential
ISA_TARGET static inline Floats load_tail(const float* from, int64_t count) {
  Floats value = Floats{} - std::numeric_limits<float>::infinity();
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

// keeps b where either is NaN, as the x86 instruction does
ISA_TARGET static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// exp(x) for -88.03 <= x <= 0, within 2 units in the last place; 0 at the lower end
ISA_TARGET static inline Floats exp_in_range(Floats x) {
  // adding 1.5 * 2^23 rounds to an integer; 127 more, and its low bits are the power's exponent
  const float magic = 12582912.0f + 127.0f;
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  // ln 2 in two parts, of which n times the first is exact
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Floats)((Ints)shifted << 23);
}

// exp(x) for x <= 0; 0 where the result is not a normal number
ISA_TARGET static inline Floats exp_nonpositive(Floats x) {
  return x < -87.33654f ? Floats{} : exp_in_range(x);
}

ISA_TARGET static inline double sum_lanes(Floats values) {
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += values[lane];
  return sum;
}

}  // namespace apical::ISA
