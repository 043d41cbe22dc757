// Linear layers: all threads pack tokens into panels, then multiply the panels by blocks of the weight.
#pragma once

#include <type_traits>

#include "arena.h"
#include "gemm.h"
#include "kernels.h"
#include "threads.h"

namespace {

using mlx_esm::Activation;
using mlx_esm::Arena;

constexpr long TOKENS = 256;       // in a block
constexpr long OUTPUTS = 16 * MR;  // weight rows whose products with a block of tokens fit in the L2 cache
constexpr long DEPTH = 320;        // inputs of a panel that fits in the L1 cache: 40 KB with AVX-512, 20 KB with AVX2

struct Linear {
  const float *x, *bias, *residual;
  float* y;
  long tokens, outputs, inputs;
  Activation activation;
  float output_scale;
  bool converts = false;                   // low-bit weight rows to float32, in a buffer
  long token_block = 0, output_block = 0;  // the size of a task
  long round = 0;                          // tokens that all threads together work on at a time

  long panels() const { return ceil_div(tokens, NR); }
  long token_blocks() const { return ceil_div(tokens, token_block); }
  long output_blocks() const { return ceil_div(outputs, output_block); }
};

// Choose the size of tasks: equal blocks of tokens, a multiple of the number of threads, cut along the outputs into
// about four tasks per thread, so that no thread waits long for the last task.
inline void cut(Linear& p) {
  const long threads = mlx_esm::threads();
  const long blocks = ceil_div(p.tokens, TOKENS) > 1 ? threads * ceil_div(p.tokens, threads * TOKENS) : 1;
  p.token_block = round_up(ceil_div(p.tokens, blocks), NR);
  const long pieces = ceil_div(4 * threads, least(threads, p.token_blocks()));
  p.output_block = round_up(ceil_div(p.outputs, pieces), MR);
  p.round = least(threads, p.token_blocks()) * p.token_block;
}

inline vec activated(vec v, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return gelu(v);
    case Activation::relu:
      return v < 0.0f ? vec{} : v;  // NaN stays NaN
    default:
      return v;
  }
}

// The tokens [t0, t1) and outputs [first, last) of a task.
struct Block {
  long t0, t1, first, last;

  Block(const Linear& p, long task)
      : t0(task / p.output_blocks() * p.token_block),
        t1(least(t0 + p.token_block, p.tokens)),
        first(task % p.output_blocks() * p.output_block),
        last(least(first + p.output_block, p.outputs)) {}
};

// Rows of a float32 weight, `stride` elements apart.
struct Rows {
  const float* first;
  long stride;
};

// Finish a tile of V * W tokens from t on and N outputs from n0 on: add the bias to the products [N, V * W], apply
// activation, output_scale and residual, and store y.
template <int V = NV>
inline void finish(const Linear& p, const Block& block, long t, long n0, long N, const float* product) {
  unpack<V>(product, least(V * W, block.t1 - t), N, [=](long token, long column, vec v, long columns) {
    const long n = n0 + column, at = (t + token) * p.outputs + n;
    if (p.bias) v += load_columns(p.bias + n, columns);
    v = activated(v, p.activation) * p.output_scale;
    if (p.residual) v += load_columns(p.residual + at, columns);
    store_columns(p.y + at, v, columns);
  });
}

// Call f with the number of vectors in the next panel: 1 if the remaining tokens fit in one vector, else NV.
template <class F>
inline void for_panel(long tokens, F f) {
  if (tokens <= W)
    f(std::integral_constant<int, 1>());
  else
    f(std::integral_constant<int, NV>());
}

// Multiply a block of tokens, whose panels are in `packed`, by a block of outputs. rows(n, N, k, depth) returns N rows
// of the weight, from row n and column k on.
template <class Weight>
inline void linear_block(const Linear& p, const Block& block, const float* packed, Weight rows) {
  static thread_local Arena arena;
  const long K = p.inputs, t0 = block.t0, t1 = block.t1;
  arena.clear();
  float* product = arena.take(p.token_block * OUTPUTS);
  // For few tokens, convert only MR rows of the weight at a time, so that they stay in the L1 cache. The blocks along K,
  // and hence the rounding, do not depend on the batch: a token's result is the same whatever tokens are next to it.
  const long together = p.converts && t1 - t0 <= 3 * NR ? MR : OUTPUTS, most = p.converts ? 2 * DEPTH : DEPTH;
  const long depth = round_up(ceil_div(K, ceil_div(K, most)), 32);  // a multiple of the smallest group
  for (long n = block.first; n < block.last; n += together) {
    const long N = least(together, block.last - n);
    for (long k = 0; k < K; k += depth) {
      const long columns = least(depth, K - k);
      const Rows weight = rows(n, N, k, columns);
      for (long t = t0; t < t1; t += NR)
        for_panel(t1 - t, [&](auto V) {
          float* c = product + (t - t0) * N;
          multiply<true, V>(N, weight.first, weight.stride, packed + t * K + k * V * W, columns, c, k > 0);
          if (k + columns == K) finish<V>(p, block, t, n, N, c);
        });
    }
  }
}

// For each round of tokens: call pack(p, panel) for each panel, then body(p, block) for each block. p is the layer
// restricted to these tokens.
template <class Pack, class Body>
void in_rounds(Linear p, Pack pack, Body body) {
  const long all = p.tokens;
  for (long t = 0; t < all; t += p.round) {
    p.tokens = least(p.round, all - t);
    mlx_esm::parallel_for(p.panels(), [&](long panel) { pack(p, panel); });
    mlx_esm::parallel_for(p.token_blocks() * p.output_blocks(), [&](long task) { body(p, Block(p, task)); });
    p.x += p.round * p.inputs;
    p.y += p.round * p.outputs;
    if (p.residual) p.residual += p.round * p.outputs;
  }
}

// Compute the layer. `rows` gives the weight as in linear_block.
template <class Weight>
void linear_layer(Linear p, Weight rows) {
  if (!p.tokens || !p.outputs) return;
  static thread_local Arena arena;
  arena.clear();
  cut(p);
  float* packed = arena.take(p.round * p.inputs);
  auto pack_panel = [=](const Linear& p, long panel) {
    const long t = panel * NR;
    for_panel(p.tokens - t, [&](auto V) {
      pack<V>(p.x + t * p.inputs, p.inputs, least(NR, p.tokens - t), p.inputs, packed + t * p.inputs);
    });
  };
  in_rounds(p, pack_panel, [&](const Linear& p, const Block& block) { linear_block(p, block, packed, rows); });
}

}  // namespace
