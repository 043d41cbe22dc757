// What the kernels compute, as plain loops over doubles.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline double exact_gelu(double x) { return x * 0.5 * std::erfc(-x / std::sqrt(2.0)); }

inline double exact_gelu_derivative(double x) {
  return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
}

inline double activated(double x, mlx_esm::Activation activation) {
  switch (activation) {
    case mlx_esm::Activation::gelu:
      return exact_gelu(x);
    case mlx_esm::Activation::relu:
      return x > 0 ? x : 0;
    default:
      return x;
  }
}

inline Doubles exact_linear(const Floats& x, const Floats& weight, const float* bias, const float* residual,
                            long tokens, long outputs, long inputs, mlx_esm::Activation activation, double scale) {
  Doubles y(tokens * outputs);
  for (long t = 0; t < tokens; t++)
    for (long n = 0; n < outputs; n++) {
      double sum = bias ? bias[n] : 0;
      for (long k = 0; k < inputs; k++) sum += double(x[t * inputs + k]) * weight[n * inputs + k];
      y[t * outputs + n] = scale * activated(sum, activation) + (residual ? residual[t * outputs + n] : 0);
    }
  return y;
}

// Integers of `bits` bits, one behind the other.
inline std::vector<unsigned char> packed(const std::vector<unsigned>& integers, int bits) {
  std::vector<unsigned char> bytes(integers.size() * bits / 8);
  for (size_t i = 0; i < integers.size(); i++)
    for (int b = 0; b < bits; b++)
      if (integers[i] >> b & 1) bytes[(i * bits + b) / 8] |= 1 << (i * bits + b) % 8;
  return bytes;
}

// Numbers, each group of them rounded to 127 steps on either side of zero.
inline Floats rounded(Floats x, long group) {
  for (size_t first = 0; first < x.size(); first += group) {
    float largest = 0;
    for (long i = 0; i < group; i++) largest = std::max(largest, std::abs(x[first + i]));
    for (long i = 0; i < group; i++) {
      const float steps = x[first + i] * (127 / largest);
      x[first + i] = std::nearbyint(steps) * (largest / 127);
    }
  }
  return x;
}

struct ExactAdamW {
  Doubles weight, mean, square;

  ExactAdamW(const mlx_esm::AdamW& p, long size) : weight(size), mean(size), square(size) {
    const double beta1 = p.beta1, beta2 = p.beta2, rate = p.learning_rate;
    for (long i = 0; i < size; i++) {
      const double g = double(p.gradient[i]) * p.scale;
      mean[i] = beta1 * p.mean[i] + (1 - beta1) * g;
      square[i] = beta2 * p.square[i] + (1 - beta2) * g * g;
      const double first = mean[i] / (1 - std::pow(beta1, p.step)), second = square[i] / (1 - std::pow(beta2, p.step));
      weight[i] = p.weight[i] * (1 - rate * p.decay) - rate * first / (std::sqrt(second) + p.epsilon);
    }
  }
};

struct ExactLayerNorm {
  Doubles y, dx, dweight, dbias;

  ExactLayerNorm(const Floats& x, const Floats& weight, const float* bias, const Floats& dy, long rows, long width,
                 double eps)
      : y(rows * width), dx(rows * width), dweight(width), dbias(width) {
    for (long r = 0; r < rows; r++) {
      double mean = 0, variance = 0, mean_g = 0, mean_gh = 0;
      for (long i = 0; i < width; i++) mean += x[r * width + i] / double(width);
      for (long i = 0; i < width; i++) variance += std::pow(x[r * width + i] - mean, 2) / width;
      const double scale = 1 / std::sqrt(variance + eps);
      auto h = [&](long i) { return (x[r * width + i] - mean) * scale; };
      auto g = [&](long i) { return double(dy[r * width + i]) * weight[i]; };
      for (long i = 0; i < width; i++) {
        mean_g += g(i) / width;
        mean_gh += g(i) * h(i) / width;
      }
      for (long i = 0; i < width; i++) {
        y[r * width + i] = h(i) * weight[i] + (bias ? bias[i] : 0);
        dx[r * width + i] = (g(i) - mean_g - h(i) * mean_gh) * scale;
        dweight[i] += dy[r * width + i] * h(i);
        dbias[i] += dy[r * width + i];
      }
    }
  }
};

struct ExactSoftmax {
  Doubles y, dx;

  ExactSoftmax(const Floats& x, const Floats& dy, long rows, long width) : y(rows * width), dx(rows * width) {
    for (long r = 0; r < rows; r++) {
      double maximum = x[r * width], total = 0, along = 0;
      for (long i = 0; i < width; i++) maximum = std::max(maximum, double(x[r * width + i]));
      for (long i = 0; i < width; i++) total += std::exp(x[r * width + i] - maximum);
      for (long i = 0; i < width; i++) {
        y[r * width + i] = std::exp(x[r * width + i] - maximum) / total;
        along += y[r * width + i] * dy[r * width + i];
      }
      for (long i = 0; i < width; i++) dx[r * width + i] = y[r * width + i] * (dy[r * width + i] - along);
    }
  }
};

// Attention and its gradients, head by head and query by query.
struct ExactAttention {
  Doubles out, dquery, dkey, dvalue, dbias_k, dbias_v, dbias;

  ExactAttention(const mlx_esm::Attention& p, const Floats& dout) : p(p), d(p.head_dim), D(p.heads * p.head_dim) {
    const long tokens = p.offsets[p.sequences];
    out.resize(tokens * D);
    dquery.resize(tokens * D);
    dkey.resize(tokens * D);
    dvalue.resize(tokens * D);
    dbias_k.resize(p.bias_k ? p.sequences * D : 0);
    dbias_v.resize(p.bias_k ? p.sequences * D : 0);
    const long length = p.sequences ? p.offsets[1] : 0;
    dbias.resize(p.bias ? p.biases * p.heads * length * length : 0);
    for (long s = 0; s < p.sequences; s++)
      for (long h = 0; h < p.heads; h++)
        for (long t = p.offsets[s]; t < p.offsets[s + 1]; t++) attend(s, h, t, dout);
  }

 private:
  // The query of token t, with the keys of sequence s.
  void attend(long s, long h, long t, const Floats& dout) {
    const long start = p.offsets[s], length = p.offsets[s + 1] - start, keys = length + (p.bias_k ? 1 : 0);
    const Doubles q = rotated(p.query + t * D + h * d, t, 1);
    std::vector<Doubles> k(keys), v(keys);
    Doubles probability(keys);
    double maximum = -INFINITY, total = 0, along = 0;
    for (long i = 0; i < keys; i++) {
      const bool learned = i == length;
      const long at = (start + i) * D + h * d;
      k[i] = learned ? Doubles(p.bias_k + h * d, p.bias_k + (h + 1) * d) : rotated(p.key + at, start + i, 1);
      const float* value = learned ? p.bias_v + h * d : p.value + at;
      v[i].assign(value, value + d);
      for (long e = 0; e < d; e++) probability[i] += p.scale * q[e] * k[i][e];
      if (p.bias) probability[i] += p.bias[bias_at(s, h, t - start, i, length)];
      if (hidden(start, length, i)) probability[i] = mlx_esm::HIDDEN;
      maximum = std::max(maximum, probability[i]);
    }
    for (double& x : probability) total += x = std::exp(x - maximum);
    for (double& x : probability) x /= total;
    for (long i = 0; i < keys; i++)
      for (long e = 0; e < d; e++) {
        out[t * D + h * d + e] += probability[i] * v[i][e];
        along += probability[i] * v[i][e] * dout[t * D + h * d + e];
      }

    Doubles dq(d);
    for (long i = 0; i < keys; i++) {
      double dp = -along;
      for (long e = 0; e < d; e++) dp += v[i][e] * dout[t * D + h * d + e];
      const double ds = hidden(start, length, i) ? 0 : probability[i] * dp;
      if (p.bias) dbias[bias_at(s, h, t - start, i, length)] += ds;
      Doubles dk(d);
      for (long e = 0; e < d; e++) {
        dq[e] += ds * p.scale * k[i][e];
        dk[e] = ds * p.scale * q[e];
      }
      if (i < length) dk = rotated(dk.data(), start + i, -1);
      double* to_key = i < length ? &dkey[(start + i) * D + h * d] : &dbias_k[s * D + h * d];
      double* to_value = i < length ? &dvalue[(start + i) * D + h * d] : &dbias_v[s * D + h * d];
      for (long e = 0; e < d; e++) {
        to_key[e] += dk[e];
        to_value[e] += probability[i] * dout[t * D + h * d + e];
      }
    }
    dq = rotated(dq.data(), t, -1);
    for (long e = 0; e < d; e++) dquery[t * D + h * d + e] = dq[e];
  }

  bool hidden(long start, long length, long key) const { return p.mask && key < length && !p.mask[start + key]; }

  long bias_at(long s, long h, long query, long key, long length) const {
    return (((p.biases == 1 ? 0 : s) * p.heads + h) * length + query) * length + key;
  }

  template <class T>
  Doubles rotated(const T* x, long token, int direction) const {
    Doubles y(x, x + d);
    const long half = d / 2;
    for (long e = 0; p.cos && e < half; e++) {
      const double c = p.cos[token * half + e], s = direction * double(p.sin[token * half + e]);
      y[e] = x[e] * c - x[e + half] * s;
      y[e + half] = x[e + half] * c + x[e] * s;
    }
    return y;
  }

  const mlx_esm::Attention& p;
  const long d, D;
};

inline Doubles exact_norm(const float* x, const mlx_esm::Norm& norm, long width) {
  double mean = 0, variance = 0;
  for (long i = 0; i < width; i++) mean += x[i] / double(width);
  for (long i = 0; i < width; i++) variance += std::pow(x[i] - mean, 2) / width;
  Doubles y(width);
  for (long i = 0; i < width; i++)
    y[i] = (x[i] - mean) / std::sqrt(variance + norm.eps) * norm.weight[i] + (norm.bias ? norm.bias[i] : 0);
  return y;
}

inline double exact_output(const Doubles& x, const mlx_esm::Layer& layer, long n) {
  double sum = layer.bias ? layer.bias[n] : 0;
  for (size_t k = 0; k < x.size(); k++) sum += x[k] * layer.weight[n * x.size() + k];
  return sum;
}

inline double exact_sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

inline Doubles exact_gated_linear(const mlx_esm::GatedLinear& p) {
  Doubles y(p.tokens * p.outputs);
  for (long t = 0; t < p.tokens; t++) {
    const Doubles z = exact_norm(p.z + t * p.width, p.norm, p.width);
    Doubles x = z;
    if (p.x) {
      Floats column(p.width);
      for (long k = 0; k < p.width; k++) column[k] = p.x[k * p.tokens + t];
      x = exact_norm(column.data(), p.x_norm, p.width);
    }
    for (long n = 0; n < p.outputs; n++) {
      const double value = exact_output(x, p.layer, n) * exact_sigmoid(exact_output(z, p.gate, n));
      y[p.y_first ? n * p.tokens + t : t * p.outputs + n] =
          value * (p.mask ? p.mask[t] : 1) + (p.residual ? p.residual[t * p.outputs + n] : 0);
    }
  }
  return y;
}

inline Doubles exact_transition(const mlx_esm::Transition& p) {
  Doubles y(p.tokens * p.width);
  for (long t = 0; t < p.tokens; t++) {
    const Doubles x = exact_norm(p.x + t * p.width, p.norm, p.width);
    Doubles inner(p.inner);
    for (long n = 0; n < p.inner; n++) inner[n] = std::max(0.0, exact_output(x, p.expand, n));
    for (long n = 0; n < p.width; n++)
      y[t * p.width + n] = exact_output(inner, p.shrink, n) + (p.residual ? p.residual[t * p.width + n] : 0);
  }
  return y;
}

inline Doubles exact_triangle_attention(const mlx_esm::TriangleAttention& p) {
  const long L = p.length, C = p.width, d = C / p.heads;
  Doubles y(p.proteins * L * L * C);
  for (long b = 0; b < p.proteins; b++) {
    auto place = [&](long row, long column) {
      return ((b * L + (p.ending ? column : row)) * L + (p.ending ? row : column)) * C;
    };
    auto outputs = [&](const Doubles& z, const float* weight) {
      Doubles all(C);
      for (long n = 0; n < C; n++) all[n] = exact_output(z, {weight, nullptr}, n);
      return all;
    };
    std::vector<std::vector<Doubles>> z(L, std::vector<Doubles>(L));
    for (long i = 0; i < L; i++)
      for (long j = 0; j < L; j++) z[i][j] = exact_norm(p.z + place(i, j), p.norm, C);
    for (long i = 0; i < L; i++) {
      std::vector<Doubles> keys, values;
      for (long k = 0; k < L; k++) {
        keys.push_back(outputs(z[i][k], p.key));
        values.push_back(outputs(z[i][k], p.value));
      }
      for (long j = 0; j < L; j++) {
        const Doubles query = outputs(z[i][j], p.query);
        Doubles gated(C);
        for (long h = 0; h < p.heads; h++) {
          double total = 0;
          Doubles context(d);
          for (long k = 0; k < L; k++) {
            if (!p.mask[b * L + k]) continue;
            double score = exact_output(z[j][k], {p.bias, nullptr}, h);
            for (long e = h * d; e < (h + 1) * d; e++) score += query[e] * keys[k][e] / std::sqrt(d);
            total += std::exp(score);
            for (long e = 0; e < d; e++) context[e] += std::exp(score) * values[k][h * d + e];
          }
          for (long e = 0; e < d; e++)
            gated[h * d + e] = context[e] / total * exact_sigmoid(exact_output(z[i][j], p.gate, h * d + e));
        }
        for (long n = 0; n < C; n++)
          y[place(i, j) + n] = exact_output(gated, p.output, n) + (p.residual ? p.residual[place(i, j) + n] : 0);
      }
    }
  }
  return y;
}
