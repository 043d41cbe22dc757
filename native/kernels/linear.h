// The linear layer: a block of tokens is packed once and multiplied by block after block of the weight's rows.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "kernels.h"
#include "threads.h"

namespace {

using mlx_esm::Activation;
using mlx_esm::Arena;

// Tokens that are packed at once, weight rows whose products with them stay in the second-level cache, and the depth
// at which a panel of tokens stays in the first.
constexpr long TOKENS = 256, OUTPUTS = 16 * MR, DEPTH = 6144 / NR;

struct Linear {
  const float *x, *bias, *residual;
  float* y;
  long tokens, outputs, inputs;
  Activation activation;
  float scale;
  long token_block, output_block;  // the size of a task

  long token_blocks() const { return ceil_div(tokens, token_block); }
  long output_blocks() const { return ceil_div(outputs, output_block); }
};

// Blocks of equal size, a multiple of the threads, then cut along the outputs so that nobody waits long for the last.
inline void cut(Linear& p, long threads) {
  const long blocks = ceil_div(p.tokens, TOKENS) > 1 ? threads * ceil_div(p.tokens, threads * TOKENS) : 1;
  p.token_block = round_up(ceil_div(p.tokens, blocks), NR);
  const long pieces = ceil_div(4 * threads, p.token_blocks());
  p.output_block = round_up(ceil_div(p.outputs, pieces), MR);
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

// The tokens and outputs of a task.
struct Block {
  long t0, t1, first, last;

  Block(const Linear& p, long task)
      : t0(task / p.output_blocks() * p.token_block),
        t1(least(t0 + p.token_block, p.tokens)),
        first(task % p.output_blocks() * p.output_block),
        last(least(first + p.output_block, p.outputs)) {}
};

// Rows of a weight, `stride` numbers apart.
struct Rows {
  const float* first;
  long stride;
};

// The products of the tokens from t0 on and the N outputs from n0 on, then bias, activation and residual.
inline void finish(const Linear& p, const Block& block, long n0, long N, const float* product) {
  for (long t = block.t0; t < block.t1; t += NR) {
    unpack(product + (t - block.t0) * N, least(NR, block.t1 - t), N, [=](long token, long column, vec v, long columns) {
      const long n = n0 + column, at = (t + token) * p.outputs + n;
      if (p.bias) v += load_columns(p.bias + n, columns);
      v = activated(v, p.activation) * p.scale;
      if (p.residual) v += load_columns(p.residual + at, columns);
      store_columns(p.y + at, v, columns);
    });
  }
}

// One block of tokens times one block of outputs. `rows(n, N, k, depth)` are N rows of the weight from row n and column
// k on.
template <class Weight>
inline void linear_block(const Linear p, long task, Weight rows) {
  static thread_local Arena arena;
  const long K = p.inputs;
  const Block block(p, task);
  const long t0 = block.t0, t1 = block.t1;
  arena.clear();
  float* packed = arena.take(p.token_block * K);
  float* product = arena.take(p.token_block * OUTPUTS);
  for (long t = t0; t < t1; t += NR) pack(p.x + t * K, K, least(NR, t1 - t), K, packed + (t - t0) * K);

  const long depth = round_up(ceil_div(K, ceil_div(K, DEPTH)), 32);  // which is a group of a quantized row
  for (long n0 = block.first; n0 < block.last; n0 += OUTPUTS) {
    const long N = least(OUTPUTS, block.last - n0);
    for (long k = 0; k < K; k += depth) {
      const Rows weight = rows(n0, N, k, least(depth, K - k));
      for (long t = 0; t < t1 - t0; t += NR)
        multiply<true>(N, weight.first, weight.stride, packed + t * K + k * NR, least(depth, K - k), product + t * N,
                       k > 0);
    }
    finish(p, block, n0, N, product);
  }
}

// body(p, task) for each block of tokens and outputs.
template <class F>
void in_blocks(Linear p, F body) {
  if (!p.tokens || !p.outputs) return;
  cut(p, mlx_esm::threads());
  mlx_esm::parallel_for(p.token_blocks() * p.output_blocks(), [&](long task) { body(p, task); });
}

}  // namespace
