// Vectors of W floats, in the vector extensions of GCC and Clang: one source for every instruction set.
//
// Each instruction set is its own translation unit (kernels.cpp, compiled with its flags and its W). Everything here
// has internal linkage, so that the linker never replaces a portable inline function with its AVX-512 version.
#pragma once

#include <utility>

namespace {

constexpr int W = VECTOR_WIDTH;
using vec = float __attribute__((vector_size(4 * W)));
using uvec = unsigned __attribute__((vector_size(4 * W)));
using ivec = int __attribute__((vector_size(4 * W)));

inline vec splat(float x) { return x - vec{}; }

inline vec load(const float* p) {
  vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vec v) { __builtin_memcpy(p, &v, sizeof v); }

// Load the first `columns` <= W floats; the other lanes are zero.
inline vec load_columns(const float* p, long columns) {
  if (columns == W) return load(p);
  vec v{};
  __builtin_memcpy(&v, p, columns * sizeof(float));
  return v;
}

inline void store_columns(float* p, vec v, long columns) {
  if (columns == W)
    store(p, v);
  else
    __builtin_memcpy(p, &v, columns * sizeof(float));
}

inline vec max(vec a, vec b) { return a > b ? a : b; }  // b if either is NaN: one x86 instruction

inline float sum(vec v) {
  float total[W];
  store(total, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) total[i] += total[i + half];
  return total[0];
}

inline long least(long a, long b) { return a < b ? a : b; }
inline long clamp(long x, long low, long high) { return x < low ? low : least(x, high); }
inline long clamp(long columns) { return columns < 0 ? 0 : least(columns, W); }  // to the size of a vector
inline long ceil_div(long a, long b) { return (a + b - 1) / b; }
inline long round_up(long a, long b) { return ceil_div(a, b) * b; }

// Select lanes: L < W is lane L of a, L >= W is lane L - W of b.
template <int... L>
inline vec lanes(vec a, vec b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, L...);
#else  // GCC 11
  return __builtin_shuffle(a, b, ivec{L...});
#endif
}

// Exchange the off-diagonal S x S blocks of a 2S x 2S block: one stage of a transpose.
template <int S, int... L>
inline void exchange(vec& a, vec& b, std::integer_sequence<int, L...>) {
  const vec low = lanes<((L & S) ? W + L - S : L)...>(a, b);
  b = lanes<((L & S) ? W + L : L + S)...>(a, b);
  a = low;
}

template <int S = 1>
inline void transpose(vec (&r)[W]) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & S)) exchange<S>(r[i], r[i + S], std::make_integer_sequence<int, W>{});
    transpose<2 * S>(r);
  }
}

// 2^f for |f| <= 1/2: minimax polynomial of degree 6 with float32 coefficients, relative error 1.6e-8.
constexpr float EXP2[] = {
    1.0f, 0.69314718246f, 0.24022646248f, 0.055503286421f, 0.0096184890717f, 0.0013399930904f, 0.00015345812426f};

// e^x for x <= 0, within 1 ulp if the machine has fused multiply-adds. Below x = -87 it stays at 1.6e-38.
//
// NaN stays NaN, whatever its payload, because 2^n is a factor. With MAY_BE_NAN = false, n is added to the bits of the
// exponent, which would turn some NaN into numbers, but takes 4% less time in GELU, which clamps x before.
template <bool MAY_BE_NAN = true>
inline vec exp_nonpositive(vec x) {
  constexpr float log2e = 1.4426950216293335f, log2e_rest = 1.925963033500011e-08f;
  // Adding it leaves the nearest integer in the low bits, plus the bias of an exponent for a factor.
  constexpr float round = 1.5f * (1 << 23) + (MAY_BE_NAN ? 127 : 0);
  x = max(splat(-87.0f), x);
  vec shifted = x * log2e + round;
  vec n = shifted - round;
  vec f = (x * log2e - n) + x * log2e_rest;
  vec p = splat(EXP2[6]);
#pragma GCC unroll 6
  for (int i = 5; i >= 0; i--) p = p * f + EXP2[i];
  const uvec exponent = (uvec)shifted << 23;
  return MAY_BE_NAN ? p * (vec)exponent : (vec)((uvec)p + exponent);
}

// The upper tail of the normal distribution at a >= 0, divided by e^(-a²/2), as P(a) / Q(a). Fitted by weighted least
// squares on [0, 6]: the error of a · tail is at most 6.9e-9 (same coefficients as mlx_esm_hf/ops/cpu.py).
inline vec normal_tail_ratio(vec a) {
  vec p = ((a * -0.00010750251376181039f + 0.03707046742248422f) * a + 0.19536151675441155f) * a + 0.5000004313331821f;
  vec q = ((a * 0.088594318123727f + 0.5224212044247064f) * a + 1.1886239477562983f) * a + 1.0f;
  return p / q;
}

// min(|x|, 12), and 12 for NaN. The tail at 12 is 2e-33. Beyond it come denormal numbers, which are slow, and an overflow.
inline vec size(vec x) {
  vec a = max(x, -x);
  return a < 12.0f ? a : splat(12.0f);
}

// x Φ(x), computed as max(x, 0) - |x| Φ(-|x|), which has no cancellation.
inline vec gelu(vec x) {
  vec a = size(x);
  vec tail = exp_nonpositive<false>(a * a * -0.5f) * normal_tail_ratio(a);
  return (x > 0.0f ? x : x * 0.0f) - a * tail;
}

// 1 / (1 + e^-x)
inline vec sigmoid(vec x) {
  const vec e = exp_nonpositive(-max(x, -x)), larger = 1.0f / (1.0f + e);
  return x < 0.0f ? e * larger : larger;
}

// x / (1 + e^-x). x is clamped at -88 because exp_nonpositive stops at -87; the result there is about -1e-36. Negative
// infinity becomes NaN, as in torch.
inline vec silu(vec x) { return (x < -88.0f ? x * 0.0f - 88.0f : x) * sigmoid(x); }

inline vec silu_derivative(vec x) {
  const vec s = sigmoid(x);
  return s + silu(x) * (1.0f - s);
}

// The derivative Φ(x) + x φ(x), where φ is the normal density.
inline vec gelu_derivative(vec x) {
  vec a = size(x);
  vec bell = exp_nonpositive<false>(a * a * -0.5f);
  vec tail = bell * normal_tail_ratio(a);
  vec near = x > 12.0f ? a : x < -12.0f ? -a : x;
  return (x > 0.0f ? 1.0f - tail : tail) + near * bell * 0.3989422804014327f;
}

}  // namespace
