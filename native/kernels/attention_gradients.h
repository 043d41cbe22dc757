// The gradients of attention. Probabilities are recomputed, not stored (Dao et al. 2022, algorithm 4).
#pragma once

#include "attention.h"

namespace {

using mlx_esm::AttentionGradients;

// The gradients of one head of one sequence. Each panel of NR queries completes the gradients of its queries and adds
// to those of the keys and values.
class HeadGradients {
 public:
  HeadGradients(const AttentionGradients& g, const Head& head, Arena& arena)
      : g(g), p(g.forward), head(head), d(p.head_dim), lanes(ceil_div(d, NR)), K(head.keys) {
    keys = arena.take(K * d);
    values = arena.take(K * d);
    dkeys = arena.take(lanes * K * NR);
    dvalues = arena.take(lanes * K * NR);
    queries = arena.take(d * NR);
    dqueries = arena.take(d * NR);
    angles = arena.take(d * NR);
    dout = arena.take(d * NR);
    out = arena.take(d * NR);
    query_rows = arena.take(lanes * NR * NR);
    dout_rows = arena.take(lanes * NR * NR);
    scores = arena.take(KEYS * NR);
    dscores = arena.take(KEYS * NR);
    head.gather_keys(keys, nullptr, 0, head.keys);
    head.gather_values(values, 0, head.keys);
  }

  // Process the panel of queries from q on. With add_bias, add to the bias gradient of earlier sequences, which share
  // the bias.
  void add_queries(long q, bool add_bias) {
    const long count = least(NR, head.length - q);
    head.pack_queries(q, queries, angles);
    pack(g.dout + head.at(q), head.features(), count, d, dout);
    pack(p.out + head.at(q), head.features(), count, d, out);
    rows_of(queries, count, query_rows);
    rows_of(dout, count, dout_rows);
    load_statistics(q, count);
    for (long k = 0; k < K; k += KEYS) {
      const long n = least(KEYS, K - k);
      head.score(keys + k * d, k, n, queries, q, scores);
      multiply<true>(n, values + k * d, d, dout, d, dscores, false);
      differentiate_softmax(k, n);
      if (g.dbias) write_bias(q, count, k, n, add_bias);
      multiply<false>(d, keys + k * d, d, dscores, n, dqueries, k > 0);
      for (long l = 0; l < lanes; l++) {
        multiply<true>(n, scores, NR, dout_rows + l * NR * NR, NR, dvalues + (l * K + k) * NR, q > 0);
        multiply<true>(n, dscores, NR, query_rows + l * NR * NR, NR, dkeys + (l * K + k) * NR, q > 0);
      }
    }
    write_queries(q, count);
  }

  // Write the gradients of keys and values, after all queries.
  void write_keys_and_values() const {
    const long half = d / 2;
    for (long t = 0; t < head.length; t++)
      for (long i = 0; i < d; i++) {
        g.dvalue[head.at(t) + i] = of(dvalues, t, i);
        float value = of(dkeys, t, i);
        if (p.cos) {  // rotate it back
          const float c = p.cos[(head.start + t) * half + i % half], s = p.sin[(head.start + t) * half + i % half];
          value = i < half ? value * c + of(dkeys, t, i + half) * s : value * c - of(dkeys, t, i - half) * s;
        }
        g.dkey[head.at(t) + i] = value;
      }
    if (p.bias_k)
      for (long i = 0; i < d; i++) {
        g.dbias_k[head.sequence * head.features() + head.offset + i] = of(dkeys, head.length, i);
        g.dbias_v[head.sequence * head.features() + head.offset + i] = of(dvalues, head.length, i);
      }
  }

 private:
  // Transpose a panel [head_dim, NR] to rows [lanes, NR tokens, NR]. Missing tokens and features become zero.
  void rows_of(const float* panel, long count, float* rows) const {
    for (long i = 0; i < lanes * NR * NR; i += W) store(rows + i, vec{});
    unpack(panel, count, d, [&](long token, long column, vec v, long columns) {
      float piece[W];
      store(piece, v);
      for (long i = 0; i < columns; i++) rows[((column + i) / NR * NR + token) * NR + (column + i) % NR] = piece[i];
    });
  }

  // Load maximum and 1 / denominator of the softmax of each query, and compute delta = sum(out · dout).
  void load_statistics(long q, long count) {
    float maxima[NR], totals[NR];
    for (long i = 0; i < NR; i++) {
      // -HIDDEN is large, so the probabilities of a missing query become 0.
      maxima[i] = i < count ? p.maximum[head.statistics_at(q + i)] : -HIDDEN;
      totals[i] = i < count ? p.total[head.statistics_at(q + i)] : 1.0f;
    }
    for (int j = 0; j < NV; j++) {
      maximum[j] = load(maxima + j * W);
      inverse[j] = 1.0f / load(totals + j * W);
      delta[j] = vec{};
      for (long i = 0; i < d; i++) delta[j] += load(dout + i * NR + j * W) * load(out + i * NR + j * W);
    }
  }

  // Replace the scores [n, NR] with probabilities, and the gradients of the probabilities with those of the scores.
  void differentiate_softmax(long k, long n) {
    for (int j = 0; j < NV; j++) {
      const vec high = maximum[j], scale = inverse[j], mean = delta[j];
      for (long i = 0; i < n; i++) {
        float *s = scores + i * NR + j * W, *ds = dscores + i * NR + j * W;
        const vec probability = exp_nonpositive(load(s) - high) * scale;
        store(s, probability);
        // If all keys of a sequence are hidden, they have equal probabilities, as in the forward pass, but no gradient.
        store(ds, head.hidden(k + i) ? vec{} : probability * (load(ds) - mean));
      }
    }
  }

  void write_bias(long q, long count, long k, long n, bool add) {
    unpack(dscores, count, n, [&](long token, long column, vec v, long columns) {
      float* at = g.dbias + head.bias_at(q + token, k + column);
      store_columns(at, add ? v + load_columns(at, columns) : v, columns);
    });
  }

  void write_queries(long q, long count) {
    if (p.cos) head.rotate(q, dqueries, angles, -1.0f);
    for (long i = 0; i < d * NR; i += W) store(dqueries + i, load(dqueries + i) * p.scale);
    unpack(dqueries, count, d, [&](long token, long column, vec v, long columns) {
      store_columns(g.dquery + head.at(q + token) + column, v, columns);
    });
  }

  float of(const float* gradient, long key, long i) const { return gradient[(i / NR * K + key) * NR + i % NR]; }

  const AttentionGradients& g;
  const Attention& p;
  const Head& head;
  const long d, lanes, K;                           // head_dim; panels of NR that it takes; number of keys
  float *keys, *values;                             // [K, head_dim]
  float *dkeys, *dvalues;                           // [lanes, K, NR]; dkeys by the rotated keys
  float *queries, *dqueries, *angles, *dout, *out;  // panels [head_dim, NR]
  float *query_rows, *dout_rows;                    // [lanes, NR tokens, NR]
  float *scores, *dscores;                          // [KEYS, NR]
  vec maximum[NV], inverse[NV], delta[NV];
};

inline void attention_gradients_task(const AttentionGradients& g, long sequence, long head_index, bool add_bias) {
  static thread_local Arena arena;
  const Head head(g.forward, sequence, head_index);
  arena.clear();
  HeadGradients gradients(g, head, arena);
  for (long q = 0; q < head.length; q += NR) gradients.add_queries(q, add_bias);
  gradients.write_keys_and_values();
}

}  // namespace
