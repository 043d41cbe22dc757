// The kernels as plain functions on float32 arrays, one table of them for each instruction set.
//
// Arrays are row-major and contiguous; `tokens` counts over the whole batch. Results must not overlap inputs. Every
// function runs on several threads (threads.h), and throws std::bad_alloc where there is no memory for what lies
// between.
#pragma once

namespace mlx_esm {

constexpr float HIDDEN = -3e38f;  // the score of a hidden key: finite, so that a difference of two is not NaN

enum class Activation { none, gelu, relu };

// softmax(scale · rotate(query) · rotate(key)ᵀ + bias) · value, for each head of each sequence. Query and key may be
// normalised first, over all heads, by layer norms without a bias.
struct Attention {
  const float *query, *key, *value;  // [tokens, heads * head_dim]
  float* out;                        // [tokens, heads * head_dim]
  const int* offsets;                // [sequences + 1]: sequence s is the tokens [offsets[s], offsets[s + 1])
  long sequences, heads, head_dim;
  float scale;
  const bool* mask;              // [tokens], false hides a key; or null
  const float *cos, *sin;        // [tokens, head_dim / 2] rotary angles; or null
  const float *bias_k, *bias_v;  // [heads * head_dim], a key and a value behind each sequence's own; or null
  const float* bias;             // [biases, heads, length, length], rows are queries, where all sequences are of one
                                 // length; without bias_k and bias_v; or null
  long biases;                   // one for each sequence, or one for all of them
  float *maximum, *total;        // [tokens, heads]: softmax's maximum and denominator, for the gradients; or null
  const float *query_norm, *key_norm;  // [heads * head_dim], the weights of the layer norms; or null
  float eps;
};

struct AttentionGradients {
  Attention forward;  // with its results: out, maximum and total; query and key as they are, without layer norms
  const float* dout;
  float *dquery, *dkey, *dvalue;
  float *dbias_k, *dbias_v;  // [sequences, heads * head_dim], to be added up; or null
  float* dbias;              // of the shape of bias, added up if it is one for all sequences; or null
};

// A step of AdamW (Loshchilov & Hutter 2019, algorithm 2) with Adam's correction of the bias, as torch has it. The
// results may be the inputs themselves.
struct AdamW {
  const float *weight, *gradient, *mean, *square;
  float *new_weight, *new_mean, *new_square;
  float scale;  // of the gradient
  float learning_rate, beta1, beta2, epsilon, decay;
  long step;  // from 1 on
};

// The parameters of a linear layer (weight [outputs, width], bias [outputs]) or of a layer norm (both [width]). The bias
// may be null.
struct Affine {
  const float *weight, *bias;
};

// y = (z' · layerᵀ) · sigmoid(z' · gateᵀ) · mask + residual with z' = norm(z), of tokens that are pairs of residues; where
// there is an x, x_norm(x) · layerᵀ instead of z' · layerᵀ.
struct GatedLinear {
  const float* z;         // [tokens, width]
  const float* x;         // [width, tokens]; or null
  const float* mask;      // [tokens]; or null
  const float* residual;  // [tokens, outputs]; or null
  float* y;               // [tokens, outputs]; [outputs, tokens] if y_first, without a residual
  Affine norm, x_norm, gate, layer;
  float eps;  // of both norms
  long tokens, width, outputs;
  bool y_first;
};

// In each row of the pairs z of a protein, gated attention with a bias that all rows share (Jumper et al. 2021,
// Supplement, algorithms 13 and 14): y = output(sigmoid(gate(z')) · attention(z')) + residual with z' = norm(z).
struct TriangleAttention {
  const float* z;         // [proteins, length, length, width]
  const float* mask;      // [proteins, length], 0 hides a key
  const float* residual;  // of the shape of z; or null
  float* y;               // of the shape of z
  Affine norm;
  float eps;
  const float* bias;                 // [heads, width], from z' to the bias
  const float *query, *key, *value;  // [width, width]
  Affine gate, output;
  long proteins, length, width, heads;
  bool ending;  // rows and columns are exchanged
};

// y = shrink(ReLU(expand(norm(x)))) + residual
struct Transition {
  const float *x, *residual;  // [tokens, width]; the residual may be null
  float* y;                   // [tokens, width]
  Affine norm;
  float eps;
  Affine expand, shrink;  // [inner, width] and [width, inner]
  long tokens, width, inner;
};

enum class Dtype { float32, float16, bfloat16 };

// A weight [outputs, inputs] of fewer bits than float32: the numbers of half precision themselves, or, if there are
// scales, MLX's affine quantization: q · scale + bias, q of 2, 3, 4, 6 or 8 bits, one behind the other from the lowest
// bit of a row on, with a scale and a bias for each `group` of a row.
struct LowBitWeight {
  const void* data;
  Dtype dtype;                  // of the data, or of scales and biases
  const void *scales, *biases;  // [outputs, inputs / group]; or null
  int bits;
  long group;  // a power of two, 32 at least, of which inputs are a multiple
};

struct Kernels {
  const char* name;  // of the instruction set

  // y[tokens, outputs] = x[tokens, inputs] · weightᵀ + bias, then the activation, then · output_scale, then + residual. weight
  // is [outputs, inputs]; bias [outputs] and residual [tokens, outputs] may be null.
  void (*linear)(const float* x, const float* weight, const float* bias, const float* residual, float* y, long tokens,
                 long outputs, long inputs, Activation activation, float output_scale);

  // The same with a weight of fewer bits.
  void (*low_bit_linear)(const float* x, const LowBitWeight& weight, const float* bias, const float* residual, float* y,
                        long tokens, long outputs, long inputs, Activation activation, float output_scale);

  // The same with a weight of 4 or 8 bits, and x rounded to 8 bits, with a scale for each token and group: products
  // are those of integers.
  void (*int8_linear)(const float* x, const LowBitWeight& weight, const float* bias, const float* residual, float* y,
                         long tokens, long outputs, long inputs, Activation activation, float output_scale);

  // x Φ(x), and dy times its derivative.
  void (*gelu)(const float* x, float* y, long size);
  void (*gelu_gradient)(const float* x, const float* dy, float* dx, long size);

  // silu(gate) · up, where silu(x) = x / (1 + e^-x), and dy times its derivatives.
  void (*swiglu)(const float* gate, const float* up, float* y, long size);
  void (*swiglu_gradient)(const float* gate, const float* up, const float* dy, float* dgate, float* dup, long size);

  // Rows of `width` to mean 0 and variance 1, then times weight plus bias, which may be null.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float* y, long rows, long width,
                     float eps);
  void (*layer_norm_gradient)(const float* x, const float* weight, const float* dy, float* dx, float* dweight,
                              float* dbias, long rows, long width, float eps);

  // Rows of `width`; the gradient is taken from y = softmax(x).
  void (*softmax)(const float* x, float* y, long rows, long width);
  void (*softmax_gradient)(const float* y, const float* dy, float* dx, long rows, long width);

  double (*sum_of_squares)(const float* x, long size);
  void (*adamw)(const AdamW&, long size);

  void (*attention)(const Attention&);
  void (*attention_gradients)(const AttentionGradients&);

  void (*gated_linear)(const GatedLinear&);
  void (*triangle_attention)(const TriangleAttention&);
  void (*transition)(const Transition&);

  // So many floating-point operations at least, multiplications and additions, on registers alone and on all threads:
  // the time tells the peak of the machine. Returns 1/2, to which they converge.
  float (*multiply_adds)(double operations);
};

// The tables that were compiled; those of another architecture than this machine's do not exist.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();  // AVX2 and products of bytes
const Kernels* avx512_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* neondotprod_kernels();  // NEON, which is the portable one of Arm, and products of bytes

}  // namespace mlx_esm
