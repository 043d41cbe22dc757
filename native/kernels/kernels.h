// The kernels as plain functions on float32 arrays: one table of functions for each instruction set.
//
// Arrays are row-major and contiguous. `tokens` is the number of tokens in the whole batch. Results must not overlap
// inputs. Every function runs on several threads (threads.h) and throws std::bad_alloc if scratch memory cannot be
// allocated.
#pragma once

namespace mlx_esm {

constexpr float HIDDEN = -3e38f;  // the score of a hidden key; finite, so the difference of two is 0 and not NaN

enum class Activation { none, gelu, relu };

// softmax(scale · rotate(query) · rotate(key)ᵀ + bias) · value, for each head of each sequence. With query_norm and
// key_norm, query and key first go through layer norms without bias, over all heads together.
struct Attention {
  const float *query, *key, *value;  // [tokens, heads * head_dim]
  float* out;                        // [tokens, heads * head_dim]
  const int* offsets;                // [sequences + 1]: sequence s has the tokens [offsets[s], offsets[s + 1])
  long sequences, heads, head_dim;
  float scale;
  const bool* mask;              // [tokens], false hides a key; or null
  const float *cos, *sin;        // [tokens, head_dim / 2], of the rotary angles; or null
  const float *bias_k, *bias_v;  // [heads * head_dim], a learned key and value after those of each sequence; or null
  const float* bias;             // [biases, heads, length, length], rows are queries; or null. All sequences must then
                                 // have the same length, and bias_k and bias_v must be null
  long biases;                   // one per sequence, or 1: all sequences share it
  float *maximum, *total;        // [tokens, heads]: maximum and denominator of the softmax, for the gradients; or null
  const float *query_norm, *key_norm;  // [heads * head_dim], weights of the layer norms; or null
  float eps;                           // of the layer norms
  long window;  // a query sees the keys at most this far away, and gets 0 if it sees none; 0: no limit. A window excludes
                // bias_k, bias_v and gradients
};

struct AttentionGradients {
  Attention forward;  // with its results out, maximum and total. Query and key are those after the layer norms
  const float* dout;
  float *dquery, *dkey, *dvalue;
  float *dbias_k, *dbias_v;  // [sequences, heads * head_dim], one gradient per sequence, to be summed; or null
  float* dbias;              // the shape of bias, summed over sequences that share it; or null
};

// A step of AdamW (Loshchilov & Hutter 2019, algorithm 2) with Adam's bias correction, as in torch. The results may
// share memory with the inputs.
struct AdamW {
  const float *weight, *gradient, *mean, *square;
  float *new_weight, *new_mean, *new_square;
  float scale;  // the gradient is multiplied by it
  float learning_rate, beta1, beta2, epsilon, decay;
  long step;  // starts at 1
};

// The parameters of a linear layer (weight [outputs, width], bias [outputs]) or of a layer norm (both [width]). The
// bias may be null.
struct Affine {
  const float *weight, *bias;
};

// y = (z' · layerᵀ) · sigmoid(z' · gateᵀ) · mask + residual, with z' = norm(z). A token is a pair of residues. If x is
// given, the first factor is x_norm(x) · layerᵀ.
struct GatedLinear {
  const float* z;         // [tokens, width]
  const float* x;         // [width, tokens]; or null
  const float* mask;      // [tokens]; or null
  const float* residual;  // [tokens, outputs]; or null
  float* y;               // [tokens, outputs]; [outputs, tokens] if y_first, which excludes a residual
  Affine norm, x_norm, gate, layer;
  float eps;  // of both norms
  long tokens, width, outputs;
  bool y_first;
};

// Gated attention within each row of a protein's pairs z, with a bias that all rows share (Jumper et al. 2021,
// Supplement, algorithms 13 and 14): y = output(sigmoid(gate(z')) · attention(z')) + residual, with z' = norm(z).
struct TriangleAttention {
  const float* z;         // [proteins, length, length, width]
  const float* mask;      // [proteins, length], 0 hides a key
  const float* residual;  // the shape of z; or null
  float* y;               // the shape of z
  Affine norm;
  float eps;
  const float* bias;                 // [heads, width], maps z' to the bias
  const float *query, *key, *value;  // [width, width]
  Affine gate, output;
  long proteins, length, width, heads;
  bool ending;  // swaps rows and columns (algorithm 14)
};

// y = shrink(hidden) + residual, with hidden = ReLU(expand(norm(x))) or, if gated, silu(first half) · second half of
// expand(norm(x))
struct Transition {
  const float *x, *residual;  // [tokens, width]; the residual may be null
  float* y;                   // [tokens, width]
  Affine norm;
  float eps;
  Affine expand, shrink;  // [inner, width], or [2 inner, width] if gated; and [width, inner]
  long tokens, width, inner;
  bool gated;
};

enum class Dtype { float32, float16, bfloat16 };

// A weight [outputs, inputs] with fewer bits than float32. Without scales: float16 or bfloat16. With scales: MLX's
// affine quantization q · scale + bias, where q has 2, 3, 4, 6 or 8 bits, stored without gaps from the lowest bit of a
// row on, and each `group` of a row has a scale and a bias.
struct LowBitWeight {
  const void* data;
  Dtype dtype;                  // of the data, or of scales and biases
  const void *scales, *biases;  // [outputs, inputs / group]; or null
  int bits;
  long group;  // a power of two, at least 32, that divides inputs
};

struct Kernels {
  const char* name;  // of the instruction set

  // y[tokens, outputs] = output_scale · activation(x[tokens, inputs] · weightᵀ + bias) + residual. weight is
  // [outputs, inputs]. bias [outputs] and residual [tokens, outputs] may be null.
  void (*linear)(const float* x, const float* weight, const float* bias, const float* residual, float* y, long tokens,
                 long outputs, long inputs, Activation activation, float output_scale);

  // The same with a low-bit weight.
  void (*low_bit_linear)(const float* x, const LowBitWeight& weight, const float* bias, const float* residual, float* y,
                         long tokens, long outputs, long inputs, Activation activation, float output_scale);

  // The same with a quantized weight of 4 or 8 bits and x rounded to int8, with a scale for each token and group: an
  // int8 GEMM.
  void (*int8_linear)(const float* x, const LowBitWeight& weight, const float* bias, const float* residual, float* y,
                      long tokens, long outputs, long inputs, Activation activation, float output_scale);

  // y = x Φ(x), and dx = dy · its derivative.
  void (*gelu)(const float* x, float* y, long size);
  void (*gelu_gradient)(const float* x, const float* dy, float* dx, long size);

  // y = silu(gate) · up with silu(x) = x / (1 + e^-x), and dy · its derivatives.
  void (*swiglu)(const float* gate, const float* up, float* y, long size);
  void (*swiglu_gradient)(const float* gate, const float* up, const float* dy, float* dgate, float* dup, long size);

  // y = x · sigmoid(gate); x may be null, for 1.
  void (*sigmoid_gate)(const float* x, const float* gate, float* y, long size);

  // Normalize rows of `width` elements to mean 0 and variance 1, then multiply by weight and add bias, which may be
  // null.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float* y, long rows, long width,
                     float eps);
  void (*layer_norm_gradient)(const float* x, const float* weight, const float* dy, float* dx, float* dweight,
                              float* dbias, long rows, long width, float eps);

  // Over rows of `width` elements. The gradient takes y = softmax(x).
  void (*softmax)(const float* x, float* y, long rows, long width);
  void (*softmax_gradient)(const float* y, const float* dy, float* dx, long rows, long width);

  double (*sum_of_squares)(const float* x, long size);
  void (*adamw)(const AdamW&, long size);

  void (*attention)(const Attention&);
  void (*attention_gradients)(const AttentionGradients&);

  void (*gated_linear)(const GatedLinear&);
  void (*triangle_attention)(const TriangleAttention&);
  void (*transition)(const Transition&);

  // At least this many floating-point operations, multiplications and additions in registers, on all threads: their
  // time gives the machine's peak speed. Returns 1/2, to which the computation converges.
  float (*multiply_adds)(double operations);
};

// The compiled tables. Only those of this machine's architecture exist.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();  // AVX2 with int8 dot products
const Kernels* avx512_kernels();
const Kernels* avx512vnni_kernels();   // AVX-512 with int8 dot products
const Kernels* neondotprod_kernels();  // NEON with int8 dot products; plain NEON is the portable table of Arm

}  // namespace mlx_esm
