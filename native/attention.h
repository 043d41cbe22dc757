// Attention over sequences that lie one behind the other, without padding and without a matrix of scores in memory.
//
// For a panel of NR queries, keys are taken KEYS at a time: scores, their maximum, e^(score - maximum), and their
// product with the values are added up under a running maximum, which gives the exact softmax (Milakov and Gimelshein
// 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
#pragma once

#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace {

using mlx_esm::Attention;
using mlx_esm::AttentionGradients;
using mlx_esm::HIDDEN;

constexpr long KEYS = 3840 / NR / MR * MR;  // scores held at a time: KEYS x NR floats, half of a first-level cache
constexpr long QUERIES = 512;                // of one task; the keys of its head are gathered once for all of them

// A head of a sequence: where it lies, and its keys and values gathered into rows of head_dim.
struct Head {
  const Attention& p;
  long start, length, keys;  // tokens [start, start + length), and one key more if there is a learned one
  long offset;               // of the head within a token's features

  Head(const Attention& p, long sequence, long head)
      : p(p),
        start(p.offsets[sequence]),
        length(p.offsets[sequence + 1] - start),
        keys(length + (p.bias_k != nullptr)),
        offset(head * p.head_dim) {}

  long at(long token) const { return (start + token) * p.heads * p.head_dim + offset; }
  bool hidden(long key) const { return p.mask && key < length && !p.mask[start + key]; }

  void gather_keys(float* out) const {
    const long d = p.head_dim, half = d / 2;
    for (long i = 0; i < length; i++, out += d) {
      const float* k = p.key + at(i);
      if (p.cos) {
        const float *c = p.cos + (start + i) * half, *s = p.sin + (start + i) * half;
        for (long e = 0; e < half; e++) out[e] = k[e] * c[e] - k[e + half] * s[e];
        for (long e = 0; e < half; e++) out[e + half] = k[e + half] * c[e] + k[e] * s[e];
      } else {
        __builtin_memcpy(out, k, d * sizeof(float));
      }
    }
    if (p.bias_k) __builtin_memcpy(out, p.bias_k + offset, d * sizeof(float));
  }

  void gather_values(float* out) const {
    const long d = p.head_dim;
    for (long i = 0; i < length; i++, out += d) __builtin_memcpy(out, p.value + at(i), d * sizeof(float));
    if (p.bias_v) __builtin_memcpy(out, p.bias_v + offset, d * sizeof(float));
  }

  // The panel [head_dim, NR] of queries from `first` on, scaled, then rotated. `angles` is memory for such a panel.
  void pack_queries(long first, float* panel, float* angles) const {
    const long d = p.head_dim, half = d / 2, count = least(NR, length - first);
    pack(p.query + at(first), d * p.heads, count, d, panel);
    for (long i = 0; i < d * NR; i += W) store(panel + i, load(panel + i) * p.scale);
    if (p.cos) rotate(first, panel, angles, 1.0f);
  }

  // Rotate a panel by its tokens' angles, or (direction -1) back.
  void rotate(long first, float* panel, float* angles, float direction) const {
    const long half = p.head_dim / 2, count = least(NR, length - first);
    float *cosines = angles, *sines = angles + half * NR;
    pack(p.cos + (start + first) * half, half, count, half, cosines);
    pack(p.sin + (start + first) * half, half, count, half, sines);
    for (long i = 0; i < half * NR; i += W) {
      vec x = load(panel + i), y = load(panel + half * NR + i), c = load(cosines + i), s = load(sines + i) * direction;
      store(panel + i, x * c - y * s);
      store(panel + half * NR + i, y * c + x * s);
    }
  }
};

// Tasks are (sequence, head, block of queries), the blocks of one head side by side.
struct Task {
  long sequence, head, first;
};

inline std::vector<Task> tasks(const Attention& p, long queries) {
  std::vector<Task> all;
  for (long s = 0; s < p.sequences; s++)
    for (long h = 0; h < p.heads; h++)
      for (long first = 0; first < p.offsets[s + 1] - p.offsets[s]; first += queries) all.push_back({s, h, first});
  return all;
}

inline void attention_task(const Attention& p, const Task& task) {
  static thread_local Scratch memory;
  const Head head(p, task.sequence, task.head);
  const long d = p.head_dim;
  float* keys = memory.get(2 * round_up(head.keys * d, NR) + (3 * d + KEYS) * NR);
  float* values = keys + round_up(head.keys * d, NR);
  float* queries = values + round_up(head.keys * d, NR);
  float* context = queries + d * NR;
  float* angles = context + d * NR;
  float* scores = angles + d * NR;
  head.gather_keys(keys);
  head.gather_values(values);

  for (long q = task.first, end = least(task.first + QUERIES, head.length); q < end; q += NR) {
    head.pack_queries(q, queries, angles);
    vec maximum[NV], total[NV];
    for (int j = 0; j < NV; j++) {
      maximum[j] = splat(HIDDEN);
      total[j] = vec{};
    }
    for (long k = 0; k < head.keys; k += KEYS) {
      const long n = least(KEYS, head.keys - k);
      multiply<true>(n, keys + k * d, d, queries, d, scores, false);
      if (p.mask)
        for (long i = 0; i < n; i++)
          if (head.hidden(k + i))
            for (int j = 0; j < NV; j++) store(scores + i * NR + j * W, splat(HIDDEN));
      for (int j = 0; j < NV; j++) {
        vec high = maximum[j];
        for (long i = 0; i < n; i++) high = max(high, load(scores + i * NR + j * W));
        vec factor = exp_nonpositive(maximum[j] - high);
        maximum[j] = high;
        vec sums{};
        for (long i = 0; i < n; i++) {
          vec e = exp_nonpositive(load(scores + i * NR + j * W) - high);
          store(scores + i * NR + j * W, e);
          sums += e;
        }
        total[j] = total[j] * factor + sums;
        if (k)
          for (long i = 0; i < d; i++) store(context + i * NR + j * W, load(context + i * NR + j * W) * factor);
      }
      multiply<false>(d, values + k * d, d, scores, n, context, k > 0);
    }
    for (int j = 0; j < NV; j++)
      for (long i = 0; i < d; i++) store(context + i * NR + j * W, load(context + i * NR + j * W) / total[j]);
    const long count = least(NR, end - q);
    unpack(context, count, d, [&](long token, long column, vec v, long columns) {
      store_columns(p.out + head.at(q + token) + column, v, columns);
    });
    if (p.maximum) {
      float maxima[NR], totals[NR];
      for (int j = 0; j < NV; j++) {
        store(maxima + j * W, maximum[j]);
        store(totals + j * W, total[j]);
      }
      for (long i = 0; i < count; i++) {
        const long at = (head.start + q + i) * p.heads + task.head;
        p.maximum[at] = maxima[i];
        p.total[at] = totals[i];
      }
    }
  }
}

// Gradients of one head of one sequence, with the probabilities computed once more (Dao et al. 2022, algorithm 4).
inline void attention_gradients_task(const AttentionGradients& g, const Task& task) {
  static thread_local Scratch memory;
  const Attention& p = g.forward;
  const Head head(p, task.sequence, task.head);
  const long d = p.head_dim, lanes = ceil_div(d, NR), padded = lanes * NR, K = head.keys;
  const long gathered = round_up(K * d, NR);
  float* keys = memory.get(2 * gathered + 2 * K * padded + (6 * d + 2 * KEYS) * NR + 2 * padded * NR);
  float* values = keys + gathered;
  float* dk = values + gathered;  // [lanes, K, NR], of the rotated keys
  float* dv = dk + K * padded;
  float* queries = dv + K * padded;
  float* angles = queries + d * NR;
  float* dout = angles + d * NR;
  float* out = dout + d * NR;
  float* dq = out + d * NR;
  float* scores = dq + 2 * d * NR;
  float* dscores = scores + KEYS * NR;
  float* query_rows = dscores + KEYS * NR;  // [lanes, NR queries, NR]
  float* dout_rows = query_rows + padded * NR;
  head.gather_keys(keys);
  head.gather_values(values);

  for (long q = 0; q < head.length; q += NR) {
    const long count = least(NR, head.length - q), stride = d * p.heads;
    head.pack_queries(q, queries, angles);
    pack(g.dout + head.at(q), stride, count, d, dout);
    pack(p.out + head.at(q), stride, count, d, out);
    for (long i = 0; i < 2 * padded * NR; i += W) store(query_rows + i, vec{});
    auto rows = [&](float* to) {
      return [to](long token, long column, vec v, long columns) {
        float piece[W];
        store(piece, v);
        for (long i = 0; i < columns; i++) to[((column + i) / NR * NR + token) * NR + (column + i) % NR] = piece[i];
      };
    };
    unpack(queries, count, d, rows(query_rows));
    unpack(dout, count, d, rows(dout_rows));

    vec maximum[NV], inverse[NV], delta[NV];
    float maxima[NR], totals[NR];
    for (long i = 0; i < NR; i++) {
      const long at = (head.start + q + i) * p.heads + task.head;
      maxima[i] = i < count ? p.maximum[at] : -HIDDEN;  // the probabilities of a missing query are zero
      totals[i] = i < count ? p.total[at] : 1.0f;
    }
    for (int j = 0; j < NV; j++) {
      maximum[j] = load(maxima + j * W);
      inverse[j] = 1.0f / load(totals + j * W);
      delta[j] = vec{};
      for (long i = 0; i < d; i++) delta[j] += load(dout + i * NR + j * W) * load(out + i * NR + j * W);
    }
    for (long k = 0; k < K; k += KEYS) {
      const long n = least(KEYS, K - k);
      multiply<true>(n, keys + k * d, d, queries, d, scores, false);
      multiply<true>(n, values + k * d, d, dout, d, dscores, false);
      for (long i = 0; i < n; i++) {
        const bool hidden = head.hidden(k + i);
        for (int j = 0; j < NV; j++) {
          float *s = scores + i * NR + j * W, *ds = dscores + i * NR + j * W;
          // In a sequence with no key to see all keys count alike, as in the forward pass.
          vec probability = exp_nonpositive((hidden ? splat(HIDDEN) : load(s)) - maximum[j]) * inverse[j];
          store(s, probability);
          store(ds, hidden ? vec{} : probability * (load(ds) - delta[j]));
        }
      }
      multiply<false>(d, keys + k * d, d, dscores, n, dq, k > 0);
      for (long l = 0; l < lanes; l++) {
        multiply<true>(n, scores, NR, dout_rows + l * NR * NR, NR, dv + (l * K + k) * NR, q > 0);
        multiply<true>(n, dscores, NR, query_rows + l * NR * NR, NR, dk + (l * K + k) * NR, q > 0);
      }
    }
    if (p.cos) head.rotate(q, dq, angles, -1.0f);
    for (long i = 0; i < d * NR; i += W) store(dq + i, load(dq + i) * p.scale);
    unpack(dq, count, d, [&](long token, long column, vec v, long columns) {
      store_columns(g.dquery + head.at(q + token) + column, v, columns);
    });
  }

  const long half = d / 2;
  auto of = [&](const float* gradient, long key, long i) { return gradient[(i / NR * K + key) * NR + i % NR]; };
  for (long t = 0; t < head.length; t++)
    for (long i = 0; i < d; i++) {
      g.dvalue[head.at(t) + i] = of(dv, t, i);
      float value = of(dk, t, i);
      if (p.cos) {
        const float c = p.cos[(head.start + t) * half + i % half], s = p.sin[(head.start + t) * half + i % half];
        value = i < half ? value * c + of(dk, t, i + half) * s : value * c - of(dk, t, i - half) * s;
      }
      g.dkey[head.at(t) + i] = value;
    }
  if (p.bias_k)
    for (long i = 0; i < d; i++) {
      g.dbias_k[task.sequence * p.heads * d + head.offset + i] = of(dk, head.length, i);
      g.dbias_v[task.sequence * p.heads * d + head.offset + i] = of(dv, head.length, i);
    }
}

}  // namespace
