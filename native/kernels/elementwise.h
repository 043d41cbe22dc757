// GELU, SwiGLU, layer norm and softmax, with their gradients.
#pragma once

#include "vec.h"

namespace {

inline void gelu_range(const float* x, float* y, long begin, long end) {
  for (long i = begin; i < end; i += W) {
    const long n = least(W, end - i);
    store_columns(y + i, gelu(load_columns(x + i, n)), n);
  }
}

inline void gelu_gradient_range(const float* x, const float* dy, float* dx, long begin, long end) {
  for (long i = begin; i < end; i += W) {
    const long n = least(W, end - i);
    store_columns(dx + i, load_columns(dy + i, n) * gelu_derivative(load_columns(x + i, n)), n);
  }
}

inline void swiglu_range(const float* gate, const float* up, float* y, long begin, long end) {
  for (long i = begin; i < end; i += W) {
    const long n = least(W, end - i);
    store_columns(y + i, silu(load_columns(gate + i, n)) * load_columns(up + i, n), n);
  }
}

inline void sigmoid_gate_range(const float* x, const float* gate, float* y, long begin, long end) {
  for (long i = begin; i < end; i += W) {
    const long n = least(W, end - i);
    const vec s = sigmoid(load_columns(gate + i, n));
    store_columns(y + i, x ? load_columns(x + i, n) * s : s, n);
  }
}

inline void swiglu_gradient_range(const float* gate, const float* up, const float* dy, float* dgate, float* dup,
                                  long begin, long end) {
  for (long i = begin; i < end; i += W) {
    const long n = least(W, end - i);
    const vec g = load_columns(gate + i, n), d = load_columns(dy + i, n);
    store_columns(dgate + i, d * load_columns(up + i, n) * silu_derivative(g), n);
    store_columns(dup + i, d * silu(g), n);
  }
}

// Sum a row: f(i, n) returns a vector whose first n lanes are terms i to i + n - 1; the other lanes must be zero. Four
// accumulators are faster than one and round less.
template <class F>
inline float sum_row(long width, F f) {
  vec s[4] = {};
  long i = 0;
  for (; i + 4 * W <= width; i += 4 * W)
    for (int j = 0; j < 4; j++) s[j] += f(i + j * W, long(W));
  for (; i < width; i += W) s[0] += f(i, least(W, width - i));
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// Keep the first n lanes and clear the others.
inline vec first(vec v, long n) {
  float kept[W] = {};
  __builtin_memcpy(kept, &v, n * sizeof(float));
  return load(kept);
}

struct Moments {
  float mean, scale;  // scale is 1 / sqrt(variance + eps)
};

inline Moments moments(const float* x, long width, float eps) {
  const float mean = sum_row(width, [&](long i, long n) { return load_columns(x + i, n); }) / width;
  const float variance = sum_row(width,
                                 [&](long i, long n) {
                                   vec d = load_columns(x + i, n) - mean;
                                   return n == W ? d * d : first(d * d, n);
                                 }) /
                         width;
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

inline void layer_norm_row(const float* x, const float* weight, const float* bias, float* y, long width, float eps) {
  const Moments m = moments(x, width, eps);
  auto normalise = [=](long i, long n) {
    vec v = (load_columns(x + i, n) - m.mean) * m.scale * load_columns(weight + i, n);
    if (bias) v += load_columns(bias + i, n);
    store_columns(y + i, v, n);
  };
  long i = 0;
#pragma GCC unroll 4
  for (; i + W <= width; i += W) normalise(i, W);
  if (i < width) normalise(i, width - i);
}

// dx = (g - mean(g) - h · mean(g · h)) · scale, where h is the normalised row and g = dy · weight. The gradients of the
// parameters are added to dweight and dbias.
inline void layer_norm_gradient_row(const float* x, const float* weight, const float* dy, float* dx, float* dweight,
                                    float* dbias, long width, float eps) {
  const Moments m = moments(x, width, eps);
  const float mean =
      sum_row(width, [&](long i, long n) { return load_columns(dy + i, n) * load_columns(weight + i, n); }) / width;
  const float along = sum_row(width,
                              [&](long i, long n) {
                                const vec g = load_columns(dy + i, n) * load_columns(weight + i, n);
                                return g * (load_columns(x + i, n) - m.mean);
                              }) *
                      m.scale / width;
  for (long i = 0; i < width; i++) {
    const float h = (x[i] - m.mean) * m.scale;
    dx[i] = (dy[i] * weight[i] - mean - h * along) * m.scale;
    dweight[i] += dy[i] * h;
    dbias[i] += dy[i];
  }
}

inline void softmax_row(const float* x, float* y, long width) {
  vec high = splat(x[0]);
  long i = 0;
  for (; i + W <= width; i += W) high = max(high, load(x + i));
  float maximum = x[0];
  for (; i < width; i++) maximum = x[i] > maximum ? x[i] : maximum;
  float lanes[W];
  store(lanes, high);
  for (float lane : lanes) maximum = lane > maximum ? lane : maximum;

  const float total = sum_row(width, [&](long i, long n) {
    vec e = exp_nonpositive(load_columns(x + i, n) - maximum);
    store_columns(y + i, e, n);
    return n == W ? e : first(e, n);
  });
  const float scale = 1.0f / total;
  for (i = 0; i < width; i++) y[i] *= scale;
}

// dx = y · (dy - sum(dy · y)), where y = softmax(x).
inline void softmax_gradient_row(const float* y, const float* dy, float* dx, long width) {
  const float along = sum_row(width, [&](long i, long n) { return load_columns(y + i, n) * load_columns(dy + i, n); });
  for (long i = 0; i < width; i++) dx[i] = y[i] * (dy[i] - along);
}

}  // namespace
