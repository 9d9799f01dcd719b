// the functions of scores, and the numbers of dropout: included once per instruction set

namespace apical::ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// 2^x for x <= 0, within 2 units in the last place; 0 where the result is not a normal number
ISA_TARGET static inline Floats exp2_nonpositive(Floats x) {
  // 1.5 * 2^23, which rounds to an integer in the low bits, and the bias of the exponent
  const Floats shifted = x + 12583039.0f;
  const Floats r = x - (shifted - 12583039.0f);
  Floats p = r * 1.326472731e-3f + 9.671512991e-3f;
  p = p * r + 5.550733581e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
  return x < -126.0f ? Floats{} : p * (Floats)((Ints)shifted << 23);
}

// ln(x) of a positive normal number, the series of Cephes' logf
ISA_TARGET static inline Floats log_positive(Floats x) {
  const Ints exponent = ((Ints)x - 0x3f3504f3) >> 23;
  const Floats m = (Floats)((Ints)x - (exponent << 23)) - 1.0f;
  Floats p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Floats e = __builtin_convertvector(exponent, Floats), square = m * m;
  const Floats small = p * m * square + e * -2.12194440e-4f - square * 0.5f;
  return small + m + e * 0.693359375f;
}

ISA_TARGET static inline Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

ISA_TARGET static inline Floats hyperbolic_tangent(Floats x) {
  const Floats size = absolute(x), square = x * x;
  Floats p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Floats near = p * square * x + x, e = exp_nonpositive(size * -2.0f);
  const Floats far = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

struct Softplus {
  Floats value, log, sigmoid, log_slope;
};

// softplus, its logarithm and the slopes of both
ISA_TARGET static inline Softplus softplus(Floats x) {
  const Floats e = exp_nonpositive(-absolute(x)), u = e + 1.0f;
  // the digits of e that 1 + e rounds away are put back
  const Floats low = log_positive(u) + (e - (u - 1.0f)) / u;
  const Floats value = (x > 0.0f ? x : Floats{}) + low;
  const Floats sigmoid = (x > 0.0f ? Floats{} + 1.0f : e) / u;
  // where softplus is nearly the exponential, and may be less than a normal number
  const auto far = x < -15.0f;
  return {value, far ? x - 0.5f * e : log_positive(value), sigmoid,
          far ? 1.0f - 0.5f * e : sigmoid / value};
}

// a transformed score, in natural units, and what it changes by with the score and the gain
struct Score {
  Floats value, slope, by_gain;
};

ISA_TARGET static inline Score transformed(const Job& job, Floats x, float gain) {
  const Floats zero{};
  if (job.transform == Transform::kSoftcap) {
    const Floats t = hyperbolic_tangent(x * (1.0f / job.a));
    return {t * job.a, 1.0f - t * t, zero};
  }
  if (job.transform == Transform::kSoftplus) {
    const Softplus s = softplus(x);
    return {s.log, s.log_slope, zero};
  }
  if (job.transform == Transform::kPower) {
    const Softplus s = softplus(x);
    const Floats z = s.value * gain - job.b;
    const auto none = z < std::numeric_limits<float>::min();
    return {none ? zero - kInfinity : log_positive(z) * job.a,
            none ? zero : s.sigmoid * (job.a * gain) / z, none ? zero : s.value * job.a / z};
  }
  return {x, zero + 1.0f, zero};
}

// one word of Philox4x32-10 (Salmon et al. 2011) for the counter (c0, c1, c2, 0)
static inline uint32_t philox(const uint32_t* seed, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t c3 = 0, k0 = seed[0], k1 = seed[1];
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
  }
  return c0;
}

// what dropout multiplies the probabilities of a row and of the keys from `key` on by
ISA_TARGET static void keep_factors(const Job& job, int64_t token, int64_t head, int64_t key,
                                    int64_t count, float* to) {
  const uint32_t row = static_cast<uint32_t>(token), h = static_cast<uint32_t>(head);
  for (int64_t c = 0; c < count; ++c)
    to[c] = philox(job.seed, static_cast<uint32_t>(key + c), row, h) >= job.threshold ? job.keep
                                                                                     : 0.0f;
}

}  // namespace apical::ISA
