// Matrix products.
//
// The lanes of a vector are tokens. A panel holds NR tokens, packed feature by feature: [K, NR]. With few tokens it has
// V vectors instead of NV. `multiply` multiplies a panel by a few rows of the other operand and broadcasts their
// elements straight from memory: weights are neither copied nor packed, and are read once for a batch of any size. The
// same code computes linear layers, attention scores (keys times a panel of queries) and contexts (values times a panel
// of probabilities), so softmax needs no sums across lanes.
//
// Loop nest: Goto and van de Geijn 2008 (doi:10.1145/1356052.1356053).
#pragma once

#include "vec.h"

namespace {

constexpr int MR = ROWS, NV = 2, NR = NV * W;  // MR x NV accumulators fill the register file

// c[R, V * W] = a · panel, or += if `add`. Element (row, k) of `a` is at row * stride + k if ALONG_K, else at
// k * stride + row.
template <int R, bool ALONG_K, int V>
__attribute__((always_inline)) inline void multiply_rows(const float* __restrict a, long stride,
                                                         const float* __restrict panel, long depth, float* __restrict c,
                                                         bool add) {
  vec acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) acc[i][j] = vec{};
  for (long k = 0; k < depth; k++) {
    vec b[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) b[j] = load(panel + k * V * W + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      vec x = splat(ALONG_K ? a[i * stride + k] : a[k * stride + i]);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) acc[i][j] += x * b[j];
    }
  }
  if (add)
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) acc[i][j] += load(c + i * V * W + j * W);
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) store(c + i * V * W + j * W, acc[i][j]);
}

template <bool ALONG_K, int V, int R = MR>
inline void multiply_rest(long rows, const float* a, long stride, const float* panel, long depth, float* c, bool add) {
  if constexpr (R > 0) {
    if (rows == R) return multiply_rows<R, ALONG_K, V>(a, stride, panel, depth, c, add);
    multiply_rest<ALONG_K, V, R - 1>(rows, a, stride, panel, depth, c, add);
  }
}

// The same for any number of rows.
template <bool ALONG_K, int V = NV>
__attribute__((noinline)) void multiply(long rows, const float* a, long stride, const float* panel, long depth,
                                        float* c, bool add) {
  long step = ALONG_K ? stride : 1;
  long i = 0;
  for (; i + MR <= rows; i += MR) multiply_rows<MR, ALONG_K, V>(a + i * step, stride, panel, depth, c + i * V * W, add);
  multiply_rest<ALONG_K, V>(rows - i, a + i * step, stride, panel, depth, c + i * V * W, add);
}

// Pack `count` <= V * W rows of `width` elements, which start at row(i), into a panel. Missing rows become zero.
template <int V = NV, class Row>
inline void pack_rows(Row row, long count, long width, float* panel) {
  for (int j = 0; j < V; j++) {
    const long present = count - j * W;
    const float* rows[W];
    for (int i = 0; i < W; i++) rows[i] = i < present ? row(j * W + i) : nullptr;
    for (long k = 0; k < width; k += W) {
      long columns = least(W, width - k);
      vec r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) r[i] = i >= present ? vec{} : load_columns(rows[i] + k, columns);
      transpose(r);
      float* out = panel + k * V * W + j * W;
      if (columns == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(out + i * V * W, r[i]);
      } else {
        for (int i = 0; i < columns; i++) store(out + i * V * W, r[i]);
      }
    }
  }
}

// Pack `count` rows of x, which are `stride` apart.
template <int V = NV>
inline void pack(const float* x, long stride, long count, long width, float* panel) {
  pack_rows<V>([=](long i) { return x + i * stride; }, count, width, panel);
}

// Unpack a panel: call write(row, column, values, columns) for pieces of up to W columns of each of `count` rows.
template <int V = NV, class Write>
inline void unpack(const float* panel, long count, long width, Write write) {
  for (int j = 0; j < V && j * W < count; j++) {
    long rows = least(W, count - j * W);
    for (long k = 0; k < width; k += W) {
      long columns = least(W, width - k);
      vec r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) r[i] = i < columns ? load(panel + (k + i) * V * W + j * W) : vec{};
      transpose(r);
      for (int i = 0; i < rows; i++) write(j * W + i, k, r[i], columns);
    }
  }
}

}  // namespace
