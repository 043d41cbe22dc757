// The linear layer: a block of tokens is packed once and multiplied by block after block of the weight's rows.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "kernels.h"

namespace {

using mlx_esm::Activation;
using mlx_esm::Arena;

// Tokens that are packed at once, weight rows whose products with them stay in the second-level cache, and the depth
// at which a panel of tokens stays in the first.
constexpr long TOKENS = 256, OUTPUTS = 16 * MR, DEPTH = 6144 / NR;

struct Linear {
  const float *x, *weight, *bias, *residual;
  float* y;
  long tokens, outputs, inputs;
  Activation activation;
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

// One block of tokens times one block of outputs.
inline void linear_block(const Linear p, long task) {
  static thread_local Arena arena;
  const long K = p.inputs;
  const long t0 = task / p.output_blocks() * p.token_block, t1 = least(t0 + p.token_block, p.tokens);
  const long first = task % p.output_blocks() * p.output_block, last = least(first + p.output_block, p.outputs);
  arena.clear();
  float* packed = arena.take(p.token_block * K);
  float* product = arena.take(p.token_block * OUTPUTS);
  for (long t = t0; t < t1; t += NR) pack(p.x + t * K, K, least(NR, t1 - t), K, packed + (t - t0) * K);

  const long depth = round_up(ceil_div(K, ceil_div(K, DEPTH)), 8);
  for (long n0 = first; n0 < last; n0 += OUTPUTS) {
    const long N = least(OUTPUTS, last - n0);
    for (long k = 0; k < K; k += depth)
      for (long t = 0; t < t1 - t0; t += NR)
        multiply<true>(N, p.weight + n0 * K + k, K, packed + t * K + k * NR, least(depth, K - k), product + t * N,
                       k > 0);
    for (long t = 0; t < t1 - t0; t += NR) {
      unpack(product + t * N, least(NR, t1 - t0 - t), N, [=](long token, long column, vec v, long columns) {
        const long n = n0 + column, at = (t0 + t + token) * p.outputs + n;
        if (p.bias) v += load_columns(p.bias + n, columns);
        v = activated(v, p.activation);
        if (p.residual) v += load_columns(p.residual + at, columns);
        store_columns(p.y + at, v, columns);
      });
    }
  }
}

}  // namespace
