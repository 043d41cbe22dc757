// Attention over concatenated sequences, without padding and without a score matrix in memory.
//
// For each panel of NR queries, keys are processed KEYS at a time. Scores, e^(score - maximum) and its product with the
// values are accumulated under a running maximum, which gives the exact softmax (Milakov and Gimelshein 2018,
// arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
#pragma once

#include <vector>

#include "arena.h"
#include "elementwise.h"
#include "gemm.h"
#include "kernels.h"

namespace {

using mlx_esm::Arena;
using mlx_esm::Attention;
using mlx_esm::HIDDEN;

constexpr long KEYS = 3840 / NR / MR * MR;  // scores at a time: KEYS x NR floats take half of the L1 cache
constexpr long QUERIES = 512;               // per task, which gathers the keys of its head once

// One head of one sequence: where it is in memory, and how its queries, keys and values are gathered.
struct Head {
  const Attention& p;
  long sequence, head;
  long start, length, keys;  // tokens [start, start + length); keys = length, plus 1 with bias_k
  long offset;               // of the head's first feature within a token
  // [tokens]: the moments for the layer norms of queries and keys; or null
  const Moments *query_moments, *key_moments;

  Head(const Attention& p, long sequence, long head, const Moments* query_moments = nullptr,
       const Moments* key_moments = nullptr)
      : p(p),
        sequence(sequence),
        head(head),
        start(p.offsets[sequence]),
        length(p.offsets[sequence + 1] - start),
        keys(length + (p.bias_k ? 1 : 0)),
        offset(head * p.head_dim),
        query_moments(query_moments),
        key_moments(key_moments) {}

  long features() const { return p.heads * p.head_dim; }                       // per token
  long at(long token) const { return (start + token) * features() + offset; }  // index of the token's first feature
  long statistics_at(long token) const { return (start + token) * p.heads + head; }  // index of its maximum and total
  bool hidden(long key) const { return p.mask && key < length && !p.mask[start + key]; }

  long bias_at(long query, long key) const {
    const long matrix = (p.biases == 1 ? 0 : sequence) * p.heads + head;
    return (matrix * length + query) * length + key;
  }

  // The keys that the queries [first, last) may see: [first_key, last_key).
  long first_key(long first) const { return p.window && first > p.window ? first - p.window : 0; }
  long last_key(long last) const { return p.window ? least(last + p.window, length) : keys; }

  // Gather the keys [begin, end), normalised and rotated, as rows [end - begin, head_dim]. `normed` is scratch for
  // head_dim floats.
  void gather_keys(float* out, float* normed, long begin, long end) const {
    const long d = p.head_dim, half = d / 2;
    for (long i = begin; i < least(end, length); i++, out += d) {
      const float* k = p.key + at(i);
      if (key_moments) k = normalised(i, normed);
      if (p.cos) {
        const float *c = p.cos + (start + i) * half, *s = p.sin + (start + i) * half;
        for (long e = 0; e < half; e++) out[e] = k[e] * c[e] - k[e + half] * s[e];
        for (long e = 0; e < half; e++) out[e + half] = k[e + half] * c[e] + k[e] * s[e];
      } else {
        __builtin_memcpy(out, k, d * sizeof(float));
      }
    }
    if (end > length) __builtin_memcpy(out, p.bias_k + offset, d * sizeof(float));
  }

  // The normalised key of a token, written to `out`.
  const float* normalised(long token, float* out) const {
    const Moments m = key_moments[start + token];
    const float *k = p.key + at(token), *weight = p.key_norm + offset;
    for (long e = 0; e < p.head_dim; e++) out[e] = (k[e] - m.mean) * m.scale * weight[e];
    return out;
  }

  // Gather the values [begin, end) as rows [end - begin, head_dim].
  void gather_values(float* out, long begin, long end) const {
    const long d = p.head_dim;
    for (long i = begin; i < least(end, length); i++, out += d)
      __builtin_memcpy(out, p.value + at(i), d * sizeof(float));
    if (end > length) __builtin_memcpy(out, p.bias_v + offset, d * sizeof(float));
  }

  // Pack the queries from `first` on into a panel [head_dim, NR]; normalise, scale and rotate it. `angles` is scratch
  // of the size of a panel.
  void pack_queries(long first, float* panel, float* angles) const {
    const long d = p.head_dim;
    pack(p.query + at(first), features(), least(NR, length - first), d, panel);
    if (query_moments)
      normalise_queries(first, panel);
    else
      for (long i = 0; i < d * NR; i += W) store(panel + i, load(panel + i) * p.scale);
    if (p.cos) rotate(first, panel, angles, 1.0f);
  }

  // Normalise and scale a panel of queries.
  void normalise_queries(long first, float* panel) const {
    float means[NR] = {}, scales[NR] = {};
    for (long i = 0; i < least(NR, length - first); i++) {
      means[i] = query_moments[start + first + i].mean;
      scales[i] = query_moments[start + first + i].scale * p.scale;
    }
    for (int j = 0; j < NV; j++)
      for (long e = 0; e < p.head_dim; e++) {
        float* at = panel + e * NR + j * W;
        store(at, (load(at) - load(means + j * W)) * load(scales + j * W) * p.query_norm[offset + e]);
      }
  }

  // Rotate a panel by its tokens' angles, forward (direction 1) or back (-1).
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

  // Compute the scores [n, NR] of the keys [k, k + n), whose gathered rows are `rows`, and the queries from `first` on,
  // whose panel is `queries`. The tile of the bias is packed like the queries, and the product is added to it.
  void score(const float* rows, long k, long n, const float* queries, long first, float* scores) const {
    const long d = p.head_dim;
    if (p.bias) pack(p.bias + bias_at(first, k), length, least(NR, length - first), n, scores);
    multiply<true>(n, rows, d, queries, d, scores, p.bias != nullptr);
    for (long i = 0; p.window && i < n; i++) {
      // The lanes of the queries that see the key are [k + i - window - first, k + i + window - first].
      for (long q = 0; q < clamp(k + i - p.window - first, 0, NR); q++) scores[i * NR + q] = HIDDEN;
      for (long q = clamp(k + i + p.window - first + 1, 0, NR); q < NR; q++) scores[i * NR + q] = HIDDEN;
    }
    for (long i = 0; p.mask && i < n; i++)
      if (hidden(k + i))
        for (int j = 0; j < NV; j++) store(scores + i * NR + j * W, splat(HIDDEN));
  }
};

// The running softmax over the keys so far, for a vector of queries.
struct Softmax {
  vec maximum = splat(-__FLT_MAX__), total{};

  // Add n scores, which are NR apart, and replace them with e^(score - maximum). Return the factor that converts sums
  // under the old maximum to the new one.
  vec add(float* scores, long n) {
    vec high = maximum;
    for (long i = 0; i < n; i++) high = max(high, load(scores + i * NR));
    const vec factor = exp_nonpositive(maximum - high);
    vec sums{};
    for (long i = 0; i < n; i++) {
      vec e = exp_nonpositive(load(scores + i * NR) - high);
      store(scores + i * NR, e);
      sums += e;
    }
    maximum = high;
    total = total * factor + sums;
    return factor;
  }

  // The denominator: at least 1, the term of the largest score, unless all scores are negative infinity. Then it is NaN.
  vec denominator() const { return total < 0.5f ? splat(__builtin_nanf("")) : total; }
};

// Compute the context [d, NR] of a panel of queries, not yet divided by the softmax's denominator, which is left in
// `softmax`. score(k, n, scores) computes the scores [n, NR] of the keys [k, k + n). Rows of values are `stride` apart.
// `scores` is scratch for KEYS rows.
template <class Score>
inline void attend(long keys, const float* values, long stride, long d, float* scores, float* context,
                   Softmax (&softmax)[NV], Score score) {
  for (long k = 0; k < keys; k += KEYS) {
    const long n = least(KEYS, keys - k);
    score(k, n, scores);
    for (int j = 0; j < NV; j++) {
      const vec factor = softmax[j].add(scores + j * W, n);
      if (k)
        for (long i = 0; i < d; i++) store(context + i * NR + j * W, load(context + i * NR + j * W) * factor);
    }
    multiply<false>(d, values + k * stride, stride, scores, n, context, k > 0);
  }
}

// A task is a block of queries of one head of one sequence. The blocks of a head are consecutive tasks.
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

// Divide the context [head_dim, NR] of the queries from `first` on by the softmax's denominator and write it to out.
// Write maximum and total, if the gradients need them.
inline void write_context(const Head& head, long first, float* context, const Softmax (&softmax)[NV]) {
  const Attention& p = head.p;
  const long count = least(NR, head.length - first);
  for (int j = 0; j < NV; j++)
    for (long i = 0; i < p.head_dim; i++) {
      float* at = context + i * NR + j * W;
      const vec v = load(at) / softmax[j].denominator();
      store(at, p.window ? (softmax[j].maximum > HIDDEN ? v : vec{}) : v);
    }
  unpack(context, count, p.head_dim, [&](long token, long column, vec v, long columns) {
    store_columns(p.out + head.at(first + token) + column, v, columns);
  });
  if (!p.maximum) return;
  float maxima[NR], totals[NR];
  for (int j = 0; j < NV; j++) {
    store(maxima + j * W, softmax[j].maximum);
    store(totals + j * W, softmax[j].denominator());
  }
  for (long i = 0; i < count; i++) {
    p.maximum[head.statistics_at(first + i)] = maxima[i];
    p.total[head.statistics_at(first + i)] = totals[i];
  }
}

inline void attention_task(const Attention& p, const Task& task, const Moments* query_moments,
                           const Moments* key_moments) {
  static thread_local Arena arena;
  const Head head(p, task.sequence, task.head, query_moments, key_moments);
  const long d = p.head_dim;
  arena.clear();
  const long end = least(task.first + QUERIES, head.length);
  const long begin = head.first_key(task.first), stop = head.last_key(end);
  float* keys = arena.take((stop - begin) * d);
  float* values = arena.take((stop - begin) * d);
  float* queries = arena.take(d * NR);
  float* angles = arena.take(d * NR);
  float* scores = arena.take(KEYS * NR);
  float* context = arena.take(d * NR);
  head.gather_keys(keys, context, begin, stop);
  head.gather_values(values, begin, stop);

  for (long q = task.first; q < end; q += NR) {
    head.pack_queries(q, queries, angles);
    Softmax softmax[NV];
    const long first = head.first_key(q), last = head.last_key(least(q + NR, head.length));
    const long skipped = (first - begin) * d;
    attend(last - first, values + skipped, d, d, scores, context, softmax, [&](long k, long n, float* scores) {
      head.score(keys + skipped + k * d, first + k, n, queries, q, scores);
    });
    write_context(head, q, context, softmax);
  }
}

}  // namespace
