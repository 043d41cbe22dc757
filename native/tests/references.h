// What the kernels compute, as plain loops over Reals.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "real.h"

using Floats = std::vector<float>;

inline Real activated(Real x, mlx_esm::Activation activation) {
  switch (activation) {
    case mlx_esm::Activation::gelu:
      return gelu(x);
    case mlx_esm::Activation::relu:
      return relu(x);
    default:
      return x;
  }
}

inline Reals exactly(const Floats& x) { return Reals(x.begin(), x.end()); }

// What every linear layer does with the product of a token and a row of the weight.
struct LinearEnd {
  const float *bias, *residual;
  mlx_esm::Activation activation;
  float output_scale;

  Real operator()(Real product, long token, long output, long outputs) const {
    if (bias) product = product + Real(bias[output]);
    Real y = activated(product, activation) * Real(output_scale);
    return residual ? y + Real(residual[token * outputs + output]) : y;
  }
};

inline Reals exact_linear(const Floats& x, const Reals& weight, long tokens, long outputs, long inputs, LinearEnd end) {
  Reals y(tokens * outputs);
  for (long t = 0; t < tokens; t++)
    for (long n = 0; n < outputs; n++) {
      // The sum of Real(x[k]) * weight[k], with the variances of its terms gathered first: it is the largest loop here.
      double total = 0, squares = 0, partial_squares = 0, of_weight = 0;
      for (long k = 0; k < inputs; k++) {
        const double a = x[t * inputs + k], term = a * weight[n * inputs + k].value;
        total += term;
        squares += term * term;
        partial_squares += total * total;
        of_weight += a * a * weight[n * inputs + k].variance;
      }
      const Sum sum{inputs, total, squares, partial_squares, of_weight + variance_of(UNIT) * squares};
      y[t * outputs + n] = end(sum, t, n, outputs);
    }
  return y;
}

// Integers of `bits` bits each, without gaps from the lowest bit on.
inline std::vector<unsigned char> to_bytes(const std::vector<unsigned>& integers, int bits) {
  std::vector<unsigned char> bytes(integers.size() * bits / 8);
  for (size_t i = 0; i < integers.size(); i++)
    for (int b = 0; b < bits; b++)
      if (integers[i] >> b & 1) bytes[(i * bits + b) / 8] |= 1 << (i * bits + b) % 8;
  return bytes;
}

// A linear layer that rounds each group of a token to integers in [-127, 127] with a scale. The kernel adds two large
// terms for each group, which may cancel: integers · q, times both scales, and integers · 1, times scale and bias.
inline Reals exact_int8_linear(const Floats& x, const std::vector<unsigned>& q, const Floats& scales,
                               const Floats& biases, long tokens, long outputs, long inputs, long group,
                               LinearEnd end) {
  const long groups = inputs / group;
  std::vector<int> integers(x.size());
  Floats steps(tokens * groups);
  for (long g = 0; g < tokens * groups; g++) {
    float largest = 0;
    for (long i = g * group; i < (g + 1) * group; i++) largest = std::max(largest, std::abs(x[i]));
    for (long i = g * group; i < (g + 1) * group; i++) integers[i] = std::nearbyint(x[i] * (127 / largest));
    steps[g] = largest / 127;
  }
  Reals y(tokens * outputs);
  for (long t = 0; t < tokens; t++)
    for (long n = 0; n < outputs; n++) {
      Sum sum;
      for (long g = 0; g < groups; g++) {
        int product = 0, total = 0;
        for (long i = 0; i < group; i++) {
          const int integer = integers[t * inputs + g * group + i];
          product += integer * int(q[n * inputs + g * group + i]);
          total += integer;
        }
        const Real step = rounded(steps[t * groups + g]);
        sum += rounded(product) * (step * Real(scales[n * groups + g])) +
               Real(total) * step * Real(biases[n * groups + g]);
      }
      y[t * outputs + n] = end(sum, t, n, outputs);
    }
  return y;
}

struct ExactAdamW {
  Reals weight, mean, square;

  ExactAdamW(const mlx_esm::AdamW& p, long size) : weight(size), mean(size), square(size) {
    const double beta1 = p.beta1, beta2 = p.beta2, rate = p.learning_rate;
    const Real kept = rounded(1 - rate * p.decay), step = rounded(rate / (1 - std::pow(beta1, p.step)));
    const Real unbiased = rounded(1 / std::sqrt(1 - std::pow(beta2, p.step)));
    for (long i = 0; i < size; i++) {
      const Real g = Real(p.gradient[i]) * Real(p.scale);
      mean[i] = Real(beta1) * Real(p.mean[i]) + Real(1 - beta1) * g;
      square[i] = Real(beta2) * Real(p.square[i]) + g * g * Real(1 - beta2);
      weight[i] = Real(p.weight[i]) * kept - mean[i] * step / (square_root(square[i]) * unbiased + Real(p.epsilon));
    }
  }
};

// A row less its mean, and 1 / sqrt(variance + eps). The kernel adds up in this many accumulators.
struct Normalised {
  Reals centred;
  Real scale;

  template <class Row>
  Normalised(Row x, long width, double eps, long lanes) : centred(width) {
    const Real mean = sum_in_lanes(width, lanes, [&](long i) { return Real(x(i)); }) / Real(width);
    for (long i = 0; i < width; i++) centred[i] = Real(x(i)) - mean;
    const Real variance = sum_in_lanes(width, lanes, [&](long i) { return squared(centred[i]); }) / Real(width);
    scale = Real(1) / square_root(variance + Real(eps));
  }
};

constexpr long ROW_LANES = 16, PANEL_LANES = 4;  // accumulators of elementwise.h with the shortest vectors; of pairs.h

struct ExactLayerNorm {
  Reals y, dx, dweight, dbias;

  ExactLayerNorm(const Floats& x, const Floats& weight, const float* bias, const Floats& dy, long rows, long width,
                 double eps)
      : y(rows * width), dx(rows * width) {
    std::vector<Sum> dweights(width), dbiases(width);
    for (long r = 0; r < rows; r++) {
      const Normalised row([&](long i) { return x[r * width + i]; }, width, eps, ROW_LANES);
      auto g = [&](long i) { return Real(dy[r * width + i]) * Real(weight[i]); };
      const Real mean = sum_in_lanes(width, ROW_LANES, g) / Real(width);
      const Real along =
          sum_in_lanes(width, ROW_LANES, [&](long i) { return g(i) * row.centred[i]; }) * row.scale / Real(width);
      for (long i = 0; i < width; i++) {
        const Real h = row.centred[i] * row.scale;
        y[r * width + i] = h * Real(weight[i]);
        if (bias) y[r * width + i] = y[r * width + i] + Real(bias[i]);
        dx[r * width + i] = (g(i) - mean - h * along) * row.scale;
        dweights[i] += Real(dy[r * width + i]) * h;
        dbiases[i] += Real(dy[r * width + i]);
      }
    }
    dweight.assign(dweights.begin(), dweights.end());
    dbias.assign(dbiases.begin(), dbiases.end());
  }
};

inline Reals exact_softmax(const Floats& x, long rows, long width) {
  Reals y(rows * width);
  for (long r = 0; r < rows; r++) {
    const float* row = &x[r * width];
    const double maximum = *std::max_element(row, row + width);
    auto term = [&](long i) { return exponential(Real(row[i]) - Real(maximum)); };
    const Real scale = Real(1) / sum_in_lanes(width, ROW_LANES, term);
    for (long i = 0; i < width; i++) y[r * width + i] = term(i) * scale;
  }
  return y;
}

// From y = softmax(x).
inline Reals exact_softmax_gradient(const Floats& y, const Floats& dy, long rows, long width) {
  Reals dx(rows * width);
  for (long r = 0; r < rows; r++) {
    auto at = [&](const Floats& x, long i) { return Real(x[r * width + i]); };
    const Real along = sum_in_lanes(width, ROW_LANES, [&](long i) { return at(y, i) * at(dy, i); });
    for (long i = 0; i < width; i++) dx[r * width + i] = at(y, i) * (at(dy, i) - along);
  }
  return dx;
}

// Attention and its gradients, head by head and query by query. Those of query and key are by what the layer norms
// return, if there are any.
class ExactAttention {
 public:
  Reals out, dquery, dkey, dvalue, dbias_k, dbias_v, dbias;

  ExactAttention(const mlx_esm::Attention& p, const Floats& dout)
      : p(p), d(p.head_dim), D(p.heads * p.head_dim), tokens(p.offsets[p.sequences]) {
    const long length = p.sequences ? p.offsets[1] : 0, learned = p.bias_k ? p.sequences * D : 0;
    query = rotated(normalised(p.query, p.query_norm, p.scale), 1);
    key = rotated(normalised(p.key, p.key_norm, 1), 1);
    out.resize(tokens * D);
    dquery.resize(tokens * D);
    std::vector<Sum> dkeys(tokens * D), dvalues(tokens * D), dbiases_k(learned), dbiases_v(learned);
    std::vector<Sum> dbiases(p.bias ? p.biases * p.heads * length * length : 0);
    for (long s = 0; s < p.sequences; s++)
      for (long h = 0; h < p.heads; h++)
        for (long t = p.offsets[s]; t < p.offsets[s + 1]; t++)
          attend(s, h, t, dout, dkeys, dvalues, dbiases_k, dbiases_v, dbiases);
    dquery = rotated(std::move(dquery), -1);
    for (Real& x : dquery) x = x * Real(p.scale);
    dkey = rotated(Reals(dkeys.begin(), dkeys.end()), -1);
    dvalue.assign(dvalues.begin(), dvalues.end());
    dbias_k.assign(dbiases_k.begin(), dbiases_k.end());
    dbias_v.assign(dbiases_v.begin(), dbiases_v.end());
    dbias.assign(dbiases.begin(), dbiases.end());
  }

 private:
  // The query of token t, with the keys of sequence s.
  void attend(long s, long h, long t, const Floats& dout, std::vector<Sum>& dkeys, std::vector<Sum>& dvalues,
              std::vector<Sum>& dbiases_k, std::vector<Sum>& dbiases_v, std::vector<Sum>& dbiases) {
    const long start = p.offsets[s], length = p.offsets[s + 1] - start, keys = length + (p.bias_k ? 1 : 0);
    auto feature = [&](long token) { return token * D + h * d; };
    auto key_at = [&](long i, long e) { return i == length ? Real(p.bias_k[h * d + e]) : key[feature(start + i) + e]; };
    auto value_at = [&](long i, long e) {
      return Real(i == length ? p.bias_v[h * d + e] : p.value[feature(start + i) + e]);
    };
    auto bias_at = [&](long i) { return (((p.biases == 1 ? 0 : s) * p.heads + h) * length + t - start) * length + i; };
    auto hidden = [&](long i) {
      return (p.mask && i < length && !p.mask[start + i]) || (p.window && std::abs(start + i - t) > p.window);
    };
    const Real* q = &query[feature(t)];
    const float* dy = &dout[feature(t)];

    Reals probability(keys);
    double maximum = -INFINITY;
    for (long i = 0; i < keys; i++) {
      Sum score;
      for (long e = 0; e < d; e++) score += q[e] * key_at(i, e);
      probability[i] = score;
      if (p.bias) probability[i] = probability[i] + Real(p.bias[bias_at(i)]);
      if (hidden(i)) probability[i] = Real(mlx_esm::HIDDEN);
      maximum = std::max(maximum, probability[i].value);
    }
    Sum total;
    for (Real& x : probability) total += x = exponential(x - Real(maximum));
    for (long e = 0; e < d; e++) {
      Sum context;
      for (long i = 0; i < keys; i++) context += probability[i] * value_at(i, e);
      out[feature(t) + e] = p.window && maximum <= mlx_esm::HIDDEN ? Real() : Real(context) / total;
    }

    const Real inverse = Real(1) / total;
    Sum along;
    for (long e = 0; e < d; e++) along += out[feature(t) + e] * Real(dy[e]);
    std::vector<Sum> dq(d);
    for (long i = 0; i < keys; i++) {
      const Real chance = probability[i] * inverse;
      Sum by_probability;
      for (long e = 0; e < d; e++) by_probability += value_at(i, e) * Real(dy[e]);
      const Real by_score = hidden(i) ? Real() : chance * (by_probability - Real(along));
      if (p.bias) dbiases[bias_at(i)] += by_score;
      Sum* to_key = i < length ? &dkeys[feature(start + i)] : &dbiases_k[s * D + h * d];
      Sum* to_value = i < length ? &dvalues[feature(start + i)] : &dbiases_v[s * D + h * d];
      for (long e = 0; e < d; e++) {
        dq[e] += by_score * key_at(i, e);
        to_key[e] += by_score * q[e];
        to_value[e] += chance * Real(dy[e]);
      }
    }
    for (long e = 0; e < d; e++) dquery[feature(t) + e] = dq[e];
  }

  // Queries or keys after their layer norm, if they have one, times a scale.
  Reals normalised(const float* x, const float* weight, float scale) const {
    Reals y(x, x + tokens * D);
    for (long t = 0; weight && t < tokens; t++) {
      const Normalised row([&](long i) { return x[t * D + i]; }, D, p.eps, ROW_LANES);
      for (long i = 0; i < D; i++) y[t * D + i] = row.centred[i] * row.scale * Real(weight[i]);
    }
    if (scale != 1)
      for (Real& v : y) v = v * Real(scale);
    return y;
  }

  // Each head of each token by the token's angles, or (direction -1) back.
  Reals rotated(Reals x, int direction) const {
    const long half = d / 2;
    for (long i = 0; p.cos && i < tokens * D; i += d)
      for (long e = 0; e < half; e++) {
        const Real c = p.cos[i / D * half + e], s = direction * double(p.sin[i / D * half + e]);
        const Real first = x[i + e], second = x[i + e + half];
        x[i + e] = first * c - second * s;
        x[i + e + half] = second * c + first * s;
      }
    return x;
  }

  const mlx_esm::Attention& p;
  const long d, D, tokens;
  Reals query, key;
};

template <class Row>
Reals exact_norm(Row x, const mlx_esm::Affine& norm, double eps, long width) {
  const Normalised row(x, width, eps, PANEL_LANES);
  Reals y(width);
  for (long i = 0; i < width; i++) {
    y[i] = row.centred[i] * row.scale * Real(norm.weight[i]);
    if (norm.bias) y[i] = y[i] + Real(norm.bias[i]);
  }
  return y;
}

inline Real exact_output(const Reals& x, const mlx_esm::Affine& layer, long n) {
  Sum sum;
  for (size_t k = 0; k < x.size(); k++) sum += x[k] * Real(layer.weight[n * x.size() + k]);
  return layer.bias ? Real(sum) + Real(layer.bias[n]) : Real(sum);
}

inline Reals exact_gated_linear(const mlx_esm::GatedLinear& p) {
  Reals y(p.tokens * p.outputs);
  for (long t = 0; t < p.tokens; t++) {
    const Reals z = exact_norm([&](long k) { return p.z[t * p.width + k]; }, p.norm, p.eps, p.width);
    const Reals x = p.x ? exact_norm([&](long k) { return p.x[k * p.tokens + t]; }, p.x_norm, p.eps, p.width) : z;
    for (long n = 0; n < p.outputs; n++) {
      Real value = exact_output(x, p.layer, n) * sigmoid(exact_output(z, p.gate, n));
      if (p.mask) value = value * Real(p.mask[t]);
      if (p.residual) value = value + Real(p.residual[t * p.outputs + n]);
      y[p.y_first ? n * p.tokens + t : t * p.outputs + n] = value;
    }
  }
  return y;
}

inline Reals exact_transition(const mlx_esm::Transition& p) {
  Reals y(p.tokens * p.width);
  for (long t = 0; t < p.tokens; t++) {
    const Reals x = exact_norm([&](long k) { return p.x[t * p.width + k]; }, p.norm, p.eps, p.width);
    Reals inner(p.inner);
    for (long n = 0; n < p.inner; n++) {
      const Real first = exact_output(x, p.expand, n);
      inner[n] = p.gated ? silu(first) * exact_output(x, p.expand, p.inner + n) : relu(first);
    }
    for (long n = 0; n < p.width; n++) {
      const Real output = exact_output(inner, p.shrink, n);
      y[t * p.width + n] = p.residual ? output + Real(p.residual[t * p.width + n]) : output;
    }
  }
  return y;
}

inline Reals exact_triangle_attention(const mlx_esm::TriangleAttention& p) {
  const long L = p.length, C = p.width, d = C / p.heads;
  Reals y(p.proteins * L * L * C);
  for (long b = 0; b < p.proteins; b++) {
    auto place = [&](long row, long column) {
      return ((b * L + (p.ending ? column : row)) * L + (p.ending ? row : column)) * C;
    };
    auto outputs = [&](const Reals& z, const float* weight) {
      Reals all(C);
      for (long n = 0; n < C; n++) all[n] = exact_output(z, {weight, nullptr}, n);
      return all;
    };
    std::vector<std::vector<Reals>> z(L, std::vector<Reals>(L));
    for (long i = 0; i < L; i++)
      for (long j = 0; j < L; j++) z[i][j] = exact_norm([&](long k) { return p.z[place(i, j) + k]; }, p.norm, p.eps, C);
    std::vector<std::vector<Reals>> bias(L, std::vector<Reals>(L, Reals(p.heads)));
    for (long j = 0; j < L; j++)
      for (long k = 0; k < L; k++)
        for (long h = 0; h < p.heads; h++) bias[j][k][h] = exact_output(z[j][k], {p.bias, nullptr}, h);
    for (long i = 0; i < L; i++) {
      std::vector<Reals> keys, values;
      for (long k = 0; k < L; k++) {
        keys.push_back(outputs(z[i][k], p.key));
        values.push_back(outputs(z[i][k], p.value));
      }
      for (long j = 0; j < L; j++) {
        Reals query = outputs(z[i][j], p.query), gated(C);
        for (Real& x : query) x = x * rounded(1 / std::sqrt(d));
        for (long h = 0; h < p.heads; h++) {
          Reals terms(L);
          double maximum = -INFINITY;
          for (long k = 0; k < L; k++) {
            Sum score;
            for (long e = h * d; e < (h + 1) * d; e++) score += query[e] * keys[k][e];
            terms[k] = p.mask[b * L + k] ? Real(score) + bias[j][k][h] : Real(mlx_esm::HIDDEN);
            maximum = std::max(maximum, terms[k].value);
          }
          Sum total;
          for (Real& x : terms) total += x = exponential(x - Real(maximum));
          for (long e = h * d; e < (h + 1) * d; e++) {
            Sum context;
            for (long k = 0; k < L; k++) context += terms[k] * values[k][e];
            gated[e] = Real(context) / total * sigmoid(exact_output(z[i][j], p.gate, e));
          }
        }
        for (long n = 0; n < C; n++) {
          const Real output = exact_output(gated, p.output, n);
          y[place(i, j) + n] = p.residual ? output + Real(p.residual[place(i, j) + n]) : output;
        }
      }
    }
  }
  return y;
}
