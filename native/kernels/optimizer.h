// The parameter updates of a training step.
#pragma once

#include <cmath>

#include "elementwise.h"
#include "kernels.h"

namespace {

using mlx_esm::AdamW;

inline vec square_root(vec x) {
  vec y;
  for (int i = 0; i < W; i++) y[i] = __builtin_sqrtf(x[i]);  // compiled to one vector instruction
  return y;
}

inline float sum_of_squares_range(const float* x, long begin, long end) {
  return sum_row(end - begin, [&](long i, long n) {
    const vec v = load_columns(x + begin + i, n);
    return v * v;
  });
}

// The factors that are the same for all elements.
struct AdamWRates {
  float kept;      // 1 - learning rate · decay
  float step;      // learning rate / bias correction of the mean
  float unbiased;  // 1 / sqrt(bias correction of the square)
};

inline AdamWRates rates_of(const AdamW& p) {
  const double mean = 1 - std::pow(double(p.beta1), double(p.step));
  const double square = 1 - std::pow(double(p.beta2), double(p.step));
  return {float(1 - double(p.learning_rate) * p.decay), float(p.learning_rate / mean), float(1 / std::sqrt(square))};
}

inline void adamw_range(const AdamW& p, const AdamWRates& rates, long begin, long end) {
  for (long i = begin; i < end; i += W) {
    const long n = least(W, end - i);
    const vec g = load_columns(p.gradient + i, n) * p.scale;
    vec mean = load_columns(p.mean + i, n), square = load_columns(p.square + i, n);
    mean = mean * p.beta1 + g * (1 - p.beta1);
    square = square * p.beta2 + g * g * (1 - p.beta2);
    const vec weight = load_columns(p.weight + i, n) * rates.kept;
    const vec moved = weight - mean * rates.step / (square_root(square) * rates.unbiased + p.epsilon);
    store_columns(p.new_mean + i, mean, n);
    store_columns(p.new_square + i, square, n);
    store_columns(p.new_weight + i, moved, n);
  }
}

}  // namespace
