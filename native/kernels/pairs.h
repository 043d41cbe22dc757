// Operations on the pair states of a folding trunk: gated linear layers, transitions and triangle attention.
//
// A pair has only 128 features, so the weights of a few layers fit in the L2 cache. A panel of NR pairs (gemm.h) is
// packed once and goes through layer norm, products, gates and the residual while it is in the L1 cache. No
// intermediate is as large as the pair tensor.
#pragma once

#include "arena.h"
#include "attention.h"
#include "gemm.h"
#include "kernels.h"

namespace {

using mlx_esm::Affine;
using mlx_esm::GatedLinear;
using mlx_esm::Transition;
using mlx_esm::TriangleAttention;

// Apply a layer norm to a panel [width, NR], in place.
inline void normalize(float* panel, long width, const Affine& norm, float eps) {
  for (int j = 0; j < NV; j++) {
    float* x = panel + j * W;
    // Four accumulators round less than one.
    auto mean_of = [&](auto f) {
      vec s[4] = {};
      for (long k = 0; k < width; k++) s[k % 4] += f(load(x + k * NR));
      return ((s[0] + s[1]) + (s[2] + s[3])) / float(width);
    };
    const vec mean = mean_of([](vec v) { return v; });
    const vec variance = mean_of([&](vec v) { return (v - mean) * (v - mean); });
    float scales[W];
    store(scales, variance + eps);
    for (float& s : scales) s = 1.0f / __builtin_sqrtf(s);
    const vec scale = load(scales);
    for (long k = 0; k < width; k++)
      store(x + k * NR, (load(x + k * NR) - mean) * scale * norm.weight[k] + (norm.bias ? norm.bias[k] : 0.0f));
  }
}

// y[outputs, NR] = weight[outputs, width] · panel[width, NR].
inline void product(const float* weight, const float* panel, long outputs, long width, float* y) {
  multiply<true>(outputs, weight, width, panel, width, y, false);
}

inline float at(const float* bias, long i) { return bias ? bias[i] : 0.0f; }

// y = (y + bias) · sigmoid(gate + gate_bias), for panels [outputs, NR].
inline void apply_gate(float* y, const float* bias, const float* gate, const float* gate_bias, long outputs) {
  for (long n = 0; n < outputs; n++)
    for (int j = 0; j < NV; j++) {
      const long i = n * NR + j * W;
      store(y + i, (load(y + i) + at(bias, n)) * sigmoid(load(gate + i) + at(gate_bias, n)));
    }
}

// Write a panel [width, NR] to y, after adding bias and residual. Token i starts at place(i) of y and of residual.
template <class Place>
inline void write_tokens(const float* panel, const float* bias, const float* residual, float* y, long count, long width,
                         Place place) {
  unpack(panel, count, width, [&](long token, long column, vec v, long columns) {
    const long i = place(token) + column;
    if (bias) v += load_columns(bias + column, columns);
    if (residual) v += load_columns(residual + i, columns);
    store_columns(y + i, v, columns);
  });
}

// Compute the NR tokens from t on.
inline void gated_linear_panel(const GatedLinear& p, long t) {
  static thread_local Arena arena;
  const long count = least(NR, p.tokens - t), K = p.width, N = p.outputs;
  arena.clear();
  float *x = arena.take(K * NR), *gate = arena.take(N * NR), *y = arena.take(N * NR);

  pack(p.z + t * K, K, count, K, x);
  normalize(x, K, p.norm, p.eps);
  product(p.gate.weight, x, N, K, gate);
  if (p.x) {
    for (long k = 0; k < K; k++)
      for (int j = 0; j < NV; j++)
        store(x + k * NR + j * W, load_columns(p.x + k * p.tokens + t + j * W, clamp(count - j * W)));
    normalize(x, K, p.x_norm, p.eps);
  }
  product(p.layer.weight, x, N, K, y);
  apply_gate(y, p.layer.bias, gate, p.gate.bias, N);

  if (p.mask)
    for (int j = 0; j < NV; j++) {
      const vec mask = load_columns(p.mask + t + j * W, clamp(count - j * W));
      for (long n = 0; n < N; n++) store(y + n * NR + j * W, load(y + n * NR + j * W) * mask);
    }
  if (p.y_first)
    for (long n = 0; n < N; n++)
      for (int j = 0; j < NV; j++)
        store_columns(p.y + n * p.tokens + t + j * W, load(y + n * NR + j * W), clamp(count - j * W));
  else
    write_tokens(y, nullptr, p.residual, p.y, count, N, [&](long token) { return (t + token) * N; });
}

constexpr long PANELS = 8;  // that go through a block of weights together, so that the weights are read less often
constexpr long INNER = 8 * MR;  // elements of the inner layer at a time

// Replace the products [N, NR] of the inner layer's block from n on by its hidden state. `up` has those of the second
// half if the layer is gated.
inline void apply_transition(const Transition& p, long n, long N, float* inner, const float* up) {
  for (long i = 0; i < N; i++)
    for (int j = 0; j < NV; j++) {
      float* h = inner + i * NR + j * W;
      const vec v = load(h) + at(p.expand.bias, n + i);
      if (up)
        store(h, silu(v) * (load(up + i * NR + j * W) + at(p.expand.bias, p.inner + n + i)));
      else
        store(h, v < 0.0f ? vec{} : v);  // NaN stays NaN
    }
}

// Compute the tokens of `panels` panels from t on.
inline void transition_panels(const Transition& p, long t, long panels) {
  static thread_local Arena arena;
  const long K = p.width, end = least(p.tokens, t + panels * NR);
  arena.clear();
  float *x = arena.take(panels * K * NR), *y = arena.take(panels * K * NR);
  float *inner = arena.take(INNER * NR), *up = p.gated ? arena.take(INNER * NR) : nullptr;
  for (long from = t; from < end; from += NR) {
    float* panel = x + (from - t) * K;
    pack(p.x + from * K, K, least(NR, end - from), K, panel);
    normalize(panel, K, p.norm, p.eps);
  }
  for (long n = 0; n < p.inner; n += INNER) {
    const long N = least(INNER, p.inner - n);
    for (long from = t; from < end; from += NR) {
      const long panel = (from - t) * K;
      product(p.expand.weight + n * K, x + panel, N, K, inner);
      if (up) product(p.expand.weight + (p.inner + n) * K, x + panel, N, K, up);
      apply_transition(p, n, N, inner, up);
      multiply<true>(K, p.shrink.weight + n, p.inner, inner, N, y + panel, n > 0);
    }
  }
  for (long from = t; from < end; from += NR)
    write_tokens(y + (from - t) * K, p.shrink.bias, p.residual, p.y, least(NR, end - from), K,
                 [&](long token) { return (from + token) * K; });
}

// The pairs of one protein. A row holds the pairs that start at a residue or, if `ending`, that end there.
struct Triangle {
  const TriangleAttention& p;
  long protein;

  long stride() const { return round_up(p.length, NR); }  // of rows of the bias
  long bias_size() const { return p.heads * p.length * stride(); }

  // The index in z of the first feature of a pair.
  long place(long row, long column) const {
    const long first = p.ending ? column : row, second = p.ending ? row : column;
    return ((protein * p.length + first) * p.length + second) * p.width;
  }

  // Pack and normalize the panel of NR pairs of a row, from a column on.
  void pack_row(long row, long column, float* panel) const {
    auto address = [&](long i) { return p.z + place(row, column + i); };
    pack_rows(address, least(NR, p.length - column), p.width, panel);
    normalize(panel, p.width, p.norm, p.eps);
  }

  // Compute the bias [heads, keys, queries] of one key; HIDDEN if the key is hidden. Queries are contiguous, as in
  // panels.
  void bias_of(long key, float* bias) const {
    static thread_local Arena arena;
    arena.clear();
    float *x = arena.take(p.width * NR), *y = arena.take(p.heads * NR);
    for (long q = 0; q < p.length; q += NR) {
      auto address = [&](long i) { return p.z + place(q + i, key); };
      pack_rows(address, least(NR, p.length - q), p.width, x);
      normalize(x, p.width, p.norm, p.eps);
      product(p.bias, x, p.heads, p.width, y);
      for (long h = 0; h < p.heads; h++)
        for (int j = 0; j < NV; j++) {
          const bool hidden = p.mask[protein * p.length + key] == 0;
          store(bias + (h * p.length + key) * stride() + q + j * W, hidden ? splat(HIDDEN) : load(y + h * NR + j * W));
        }
    }
  }

  // Compute y for one row: its keys and values first, then its queries in panels of NR.
  void attend_row(long row, const float* bias) const {
    static thread_local Arena arena;
    const long L = p.length, C = p.width, d = C / p.heads;
    const float scale = 1.0f / __builtin_sqrtf(d);
    arena.clear();
    float *keys = arena.take(L * C), *values = arena.take(L * C);
    float *x = arena.take(C * NR), *y = arena.take(C * NR), *queries = arena.take(C * NR), *gate = arena.take(C * NR);
    float* scores = arena.take(KEYS * NR);
    for (long k = 0; k < L; k += NR) {
      const long count = least(NR, L - k);
      pack_row(row, k, x);
      product(p.key, x, C, C, y);
      write_tokens(y, nullptr, nullptr, keys, count, C, [&](long i) { return (k + i) * C; });
      product(p.value, x, C, C, y);
      write_tokens(y, nullptr, nullptr, values, count, C, [&](long i) { return (k + i) * C; });
    }
    for (long q = 0; q < L; q += NR) {
      pack_row(row, q, x);
      product(p.query, x, C, C, queries);
      for (long i = 0; i < C * NR; i += W) store(queries + i, load(queries + i) * scale);
      product(p.gate.weight, x, C, C, gate);
      float* context = x;  // reuse: x is no longer needed
      for (long h = 0; h < p.heads; h++) {
        Softmax softmax[NV];
        attend(L, values + h * d, C, d, scores, context + h * d * NR, softmax, [&](long k, long n, float* scores) {
          for (long i = 0; i < n; i++)
            __builtin_memcpy(scores + i * NR, bias + (h * L + k + i) * stride() + q, NR * sizeof(float));
          multiply<true>(n, keys + k * C + h * d, C, queries + h * d * NR, d, scores, true);
        });
        for (long i = h * d * NR; i < (h + 1) * d * NR; i += W)
          store(context + i, load(context + i) / softmax[i / W % NV].denominator());
      }
      apply_gate(context, nullptr, gate, p.gate.bias, C);
      product(p.output.weight, context, C, C, y);
      write_tokens(y, p.output.bias, p.residual, p.y, least(NR, L - q), C, [&](long i) { return place(row, q + i); });
    }
  }
};

}  // namespace
