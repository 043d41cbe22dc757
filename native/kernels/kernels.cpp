// The kernels of one instruction set. Compiled once per set, with
//   TABLE          the function that returns the table,
//   NAME           the name of the set,
//   VECTOR_WIDTH   the number of floats in a vector,
//   ROWS           the rows of a tile of accumulators that fills the registers (MR in gemm.h).

#include "kernels.h"

#include "attention.h"
#include "attention_gradients.h"
#include "elementwise.h"
#include "int8_gemm.h"
#include "linear.h"
#include "low_bit.h"
#include "optimizer.h"
#include "pairs.h"
#include "peak.h"
#include "threads.h"

namespace {

using mlx_esm::parallel_for;
using mlx_esm::threads;

void linear(const float* x, const float* weight, const float* bias, const float* residual, float* y, long tokens,
            long outputs, long inputs, Activation activation, float output_scale) {
  auto rows = [=](long n, long, long k, long) { return Rows{weight + n * inputs + k, inputs}; };
  linear_layer({x, bias, residual, y, tokens, outputs, inputs, activation, output_scale}, rows);
}

void low_bit_linear(const float* x, const LowBitWeight& weight, const float* bias, const float* residual, float* y,
                    long tokens, long outputs, long inputs, Activation activation, float output_scale) {
  auto rows = [&](long n, long N, long k, long depth) { return float_rows(weight, inputs, n, N, k, depth); };
  linear_layer({x, bias, residual, y, tokens, outputs, inputs, activation, output_scale, true}, rows);
}

// Call body(begin, end) for pieces of [0, size), each large enough to be worth a task.
template <class F>
void pieces(long size, long piece, F body) {
  parallel_for(ceil_div(size, piece), [&](long i) { body(i * piece, least((i + 1) * piece, size)); });
}

// The moments of each token of x, if there is a layer norm to apply.
std::vector<Moments> moments_of(const Attention& p, const float* x, const float* norm) {
  const long features = p.heads * p.head_dim;
  std::vector<Moments> all(norm ? p.offsets[p.sequences] : 0);
  pieces(all.size(), ceil_div(1 << 14, features), [&](long begin, long end) {
    for (long t = begin; t < end; t++) all[t] = moments(x + t * features, features, p.eps);
  });
  return all;
}

void attention(const Attention& p) {
  const auto of_queries = moments_of(p, p.query, p.query_norm), of_keys = moments_of(p, p.key, p.key_norm);
  const auto all = tasks(p, QUERIES);
  parallel_for(all.size(), [&](long i) {
    attention_task(p, all[i], p.query_norm ? of_queries.data() : nullptr, p.key_norm ? of_keys.data() : nullptr);
  });
}

void attention_gradients(const AttentionGradients& g) {
  const Attention& p = g.forward;
  const long features = p.heads * p.head_dim;
  if (p.bias && p.biases == 1) {
    // All sequences add to one gradient of the bias. Heads are independent, and each adds in a fixed order.
    parallel_for(p.heads, [&](long head) {
      for (long s = 0; s < p.sequences; s++) attention_gradients_task(g, s, head, s > 0);
    });
    return;
  }
  for (long s = 0; p.bias_k && s < p.sequences; s++)
    if (p.offsets[s] == p.offsets[s + 1])  // an empty sequence has no task
      for (float* gradient : {g.dbias_k, g.dbias_v})
        __builtin_memset(gradient + s * features, 0, features * sizeof(float));
  const auto all = tasks(p, 1L << 40);  // one task per head
  parallel_for(all.size(), [&](long i) { attention_gradients_task(g, all[i].sequence, all[i].head, false); });
}

void gelu_of(const float* x, float* y, long size) {
  pieces(size, 1 << 14, [&](long begin, long end) { gelu_range(x, y, begin, end); });
}

void gelu_gradient(const float* x, const float* dy, float* dx, long size) {
  pieces(size, 1 << 14, [&](long begin, long end) { gelu_gradient_range(x, dy, dx, begin, end); });
}

void swiglu(const float* gate, const float* up, float* y, long size) {
  pieces(size, 1 << 14, [&](long begin, long end) { swiglu_range(gate, up, y, begin, end); });
}

void swiglu_gradient(const float* gate, const float* up, const float* dy, float* dgate, float* dup, long size) {
  pieces(size, 1 << 14, [&](long begin, long end) { swiglu_gradient_range(gate, up, dy, dgate, dup, begin, end); });
}

void sigmoid_gate(const float* x, const float* gate, float* y, long size) {
  pieces(size, 1 << 14, [&](long begin, long end) { sigmoid_gate_range(x, gate, y, begin, end); });
}

void layer_norm(const float* x, const float* weight, const float* bias, float* y, long rows, long width, float eps) {
  pieces(rows, ceil_div(1 << 14, width), [&](long begin, long end) {
    for (long r = begin; r < end; r++) layer_norm_row(x + r * width, weight, bias, y + r * width, width, eps);
  });
}

// Rows are summed in blocks of 64, then the blocks: deterministic, and with less rounding than one long sum.
void layer_norm_gradient(const float* x, const float* weight, const float* dy, float* dx, float* dweight, float* dbias,
                         long rows, long width, float eps) {
  constexpr long block = 64;
  const long blocks = ceil_div(rows, block);
  Arena arena;
  float* partial = arena.take(2 * blocks * width);
  __builtin_memset(partial, 0, 2 * blocks * width * sizeof(float));
  pieces(rows, block, [&](long begin, long end) {
    float* sums = partial + begin / block * 2 * width;
    for (long r = begin; r < end; r++)
      layer_norm_gradient_row(x + r * width, weight, dy + r * width, dx + r * width, sums, sums + width, width, eps);
  });
  for (long i = 0; i < width; i++) {
    double w = 0, b = 0;
    for (long n = 0; n < blocks; n++) {
      w += partial[n * 2 * width + i];
      b += partial[(n * 2 + 1) * width + i];
    }
    dweight[i] = w;
    dbias[i] = b;
  }
}

void softmax(const float* x, float* y, long rows, long width) {
  pieces(rows, ceil_div(1 << 14, width), [&](long begin, long end) {
    for (long r = begin; r < end; r++) softmax_row(x + r * width, y + r * width, width);
  });
}

void softmax_gradient(const float* y, const float* dy, float* dx, long rows, long width) {
  pieces(rows, ceil_div(1 << 14, width), [&](long begin, long end) {
    for (long r = begin; r < end; r++) softmax_gradient_row(y + r * width, dy + r * width, dx + r * width, width);
  });
}

// Pieces are summed in a fixed order, so the result does not depend on the threads.
double sum_of_squares(const float* x, long size) {
  constexpr long piece = 1 << 14;
  Arena arena;
  float* sums = arena.take(ceil_div(size, piece));
  pieces(size, piece, [&](long begin, long end) { sums[begin / piece] = sum_of_squares_range(x, begin, end); });
  double total = 0;
  for (long i = 0; i < ceil_div(size, piece); i++) total += sums[i];
  return total;
}

void adamw(const AdamW& p, long size) {
  const AdamWRates rates = rates_of(p);
  pieces(size, 1 << 14, [&](long begin, long end) { adamw_range(p, rates, begin, end); });
}

void gated_linear(const GatedLinear& p) {
  parallel_for(ceil_div(p.tokens, NR), [&](long i) { gated_linear_panel(p, i * NR); });
}

void transition(const Transition& p) {
  // Fewer panels at a time if there are few tokens, so that every thread has some.
  const long panels = clamp(ceil_div(p.tokens, NR * threads()), 1, PANELS);
  parallel_for(ceil_div(p.tokens, NR * panels), [&](long i) { transition_panels(p, i * NR * panels, panels); });
}

void triangle_attention(const TriangleAttention& p) {
  Arena arena;
  for (long protein = 0; protein < p.proteins; protein++) {
    const Triangle triangle{p, protein};
    arena.clear();
    float* bias = arena.take(triangle.bias_size());
    parallel_for(p.length, [&](long key) { triangle.bias_of(key, bias); });
    parallel_for(p.length, [&](long row) { triangle.attend_row(row, bias); });
  }
}

}  // namespace

const mlx_esm::Kernels* mlx_esm::TABLE() {
  static const Kernels table{
      NAME,
      linear,
      low_bit_linear,
      int8_linear,
      gelu_of,
      gelu_gradient,
      swiglu,
      swiglu_gradient,
      sigmoid_gate,
      layer_norm,
      layer_norm_gradient,
      softmax,
      softmax_gradient,
      sum_of_squares,
      adamw,
      attention,
      attention_gradients,
      gated_linear,
      triangle_attention,
      transition,
      multiply_adds};
  return &table;
}
