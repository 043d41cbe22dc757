// Numbers that know how far float32 arithmetic may be from them.
//
// A Real carries its value in double and the variance of the error that computing it in float32 has. Each operation
// on float32 rounds its result by at most UNIT times its size. Rounding errors are modelled as independent and uniform,
// so their variances add up, and a sum of them exceeds BOUND standard deviations with a probability of at most
// 2 exp(-BOUND² / 2), which is 3e-14 for BOUND = 8 (the uniform distribution is sub-Gaussian with its own variance). This is
// the probabilistic error analysis of Higham and Mary 2019 (doi:10.1137/18M1226312) and of Connolly, Higham and Mary
// 2021 (doi:10.1137/20M1334796), carried along with the computation. The error of a sum is thus compared with what was
// summed, never with the result, which may happen to cancel.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

constexpr double UNIT = 0x1p-24;  // the unit roundoff of float32
constexpr double BOUND = 8;       // standard deviations
constexpr double TINY = 1e-34;    // near underflow: e^x stops at x = -87, silu at -88 · e^-87 = -1.5e-36

inline double square(double x) { return x * x; }

// The variance of an error that is uniform in [-size, size].
inline double variance_of(double size) { return square(size) / 3; }

struct Real {
  double value = 0, variance = 0;

  Real() = default;
  Real(double exact) : value(exact) {}
  Real(double value, double variance) : value(value), variance(variance) {}

  double bound() const { return BOUND * std::sqrt(variance) + TINY; }
};

using Reals = std::vector<Real>;

// A result whose operands had errors of this variance, rounded to float32.
inline Real rounded(double value, double variance = 0) { return {value, variance + variance_of(UNIT * value)}; }

inline Real operator-(Real a) { return {-a.value, a.variance}; }
inline Real operator+(Real a, Real b) { return rounded(a.value + b.value, a.variance + b.variance); }
inline Real operator-(Real a, Real b) { return a + -b; }
inline Real operator*(Real a, Real b) {
  return rounded(a.value * b.value, a.variance * (square(b.value) + b.variance) + b.variance * square(a.value));
}
inline Real operator/(Real a, Real b) {
  const double value = a.value / b.value;
  return rounded(value, (a.variance + square(value) * b.variance) / square(b.value));
}
inline Real squared(Real a) { return rounded(square(a.value), a.variance * (4 * square(a.value) + a.variance)); }
inline Real square_root(Real a) {
  const double root = std::sqrt(a.value);
  return rounded(root, root ? a.variance / (4 * a.value) : 0);
}

// A sum of n terms. Each addition rounds a partial sum, so the squares of the partial sums add up to the variance. The
// kernel may add in another order: in a random one that is (n + 1) (squares / 6 + total² / 3) on average, where
// `squares` is the sum of the terms' squares. The larger of the two counts.
struct Sum {
  long n = 0;
  double total = 0, squares = 0, partial_squares = 0, variance = 0;

  void operator+=(Real term) {
    n++;
    total += term.value;
    squares += square(term.value);
    partial_squares += square(total);
    variance += term.variance;
  }

  operator Real() const {
    const double random_order = (n + 1) * (squares / 6 + square(total) / 3);
    return {total, variance + variance_of(UNIT) * std::max(partial_squares, random_order)};
  }
};

// The sum of term(i) for i < n, which the kernel keeps in this many accumulators.
template <class Term>
Real sum_in_lanes(long n, long lanes, Term term) {
  std::vector<Sum> partial(lanes);
  for (long i = 0; i < n; i++) partial[i % lanes] += term(i);
  Sum total;
  for (const Sum& sum : partial)
    if (sum.n) total += sum;
  return total;
}

// f(x), from f at the exact x, the derivative there and an upper bound of |f''|. The second order counts where the
// derivative vanishes.
inline Real with_error_of(Real x, double derivative, double curvature, Real f) {
  return {f.value, f.variance + square(derivative) * x.variance + square(curvature / 2 * BOUND * x.variance)};
}

// e^x for x <= 0. The kernel's own error is 1 ulp, and UNIT · |x| without fused multiply-adds.
inline Real exponential(Real x) {
  const double value = std::exp(x.value), own = variance_of(2 * UNIT) + variance_of(UNIT * x.value);
  return value == 0 ? Real() : with_error_of(x, value, value, {value, square(value) * own});
}

inline Real relu(Real x) {
  if (x.value > 0) return x;
  return {0, -x.value > x.bound() ? 0 : x.variance};  // float32 may be on the other side of zero
}

inline Real sigmoid(Real x) {
  const Real e = exponential(-std::abs(x.value)), larger = Real(1) / (Real(1) + e);
  const Real y = x.value < 0 ? e * larger : larger;
  return with_error_of(x, y.value * (1 - y.value), 0.1, y);
}

inline Real silu(Real x) {
  const Real s = sigmoid(x.value);
  return with_error_of(x, s.value * (1 + x.value * (1 - s.value)), 0.5, Real(x.value) * s);
}

inline Real silu_derivative(double x) {
  const Real s = sigmoid(x);
  return s + silu(x) * (Real(1) - s);
}

// The density e^(-a²/2) of the normal distribution, without its factor, and its upper tail at a >= 0.
struct NormalTail {
  Real bell, tail;

  explicit NormalTail(double a) : bell(exponential(Real(a) * a * -0.5)) {
    const double ratio = bell.value ? std::erfc(a / std::sqrt(2.0)) / 2 / bell.value : 0;
    const double fit = std::min(4.4e-7, 6.9e-9 / a);  // vec.h: the error of the fit, and of a times the fit
    tail = bell * Real(ratio, 5 * variance_of(UNIT * ratio));
    tail.variance += variance_of(fit);
  }
};

inline Real gelu_derivative(double x) {
  const double a = std::abs(x);
  const NormalTail normal(a);
  const Real slope = Real(x) * normal.bell * (1 / std::sqrt(2 * M_PI));
  return (x > 0 ? Real(1) - normal.tail : normal.tail) + slope;
}

// x Φ(x)
inline Real gelu(Real x) {
  const double a = std::abs(x.value);
  const Real y = Real(std::max(x.value, 0.0)) - Real(a) * NormalTail(a).tail;
  return x.variance ? with_error_of(x, gelu_derivative(x.value).value, 0.8, y) : y;
}
