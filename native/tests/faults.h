// Kernels with the faults that real bugs have, to show that the checks of test_kernels.cpp find them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "instruction_sets.h"
#include "references.h"

struct Fault {
  std::string kernel, what;
  void (*insert)(mlx_esm::Kernels& table);
};

namespace faults {

using namespace mlx_esm;

// A copy of an input in which change(copy) has been made.
template <class Change>
Floats changed(const float* x, long size, Change change) {
  Floats copy(x, x + size);
  if (size) change(copy);
  return copy;
}

inline void swap_rows(float* x, long rows, long width) {
  if (rows > 1) std::swap_ranges(x, x + width, x + width);
}

inline Floats in_bfloat16(const float* x, long size) {
  return changed(x, size, [](Floats& copy) {
    for (float& v : copy) {
      unsigned word;
      std::memcpy(&word, &v, sizeof word);
      word &= 0xffff0000u;
      std::memcpy(&v, &word, sizeof word);
    }
  });
}

// A faulty linear layer, on float32 or low-bit weights: `body` sees the kernel's arguments and calls run, the kernel
// itself, with some of them changed.
#define UNUSED [[maybe_unused]]
#define LINEAR(body)                                                                                               \
  [](UNUSED const float* x, UNUSED const float* weight, UNUSED const float* bias, UNUSED const float* residual,    \
     UNUSED float* y, UNUSED long tokens, UNUSED long outputs, UNUSED long inputs, UNUSED Activation activation,   \
     UNUSED float output_scale) {                                                                                  \
    auto run = [&](const float* x, const float* weight, const float* bias, const float* residual, auto activation, \
                   float output_scale) {                                                                           \
      kernels().linear(x, weight, bias, residual, y, tokens, outputs, inputs, activation, output_scale);           \
    };                                                                                                             \
    body                                                                                                           \
  }
#define LOW_BIT(kernel, body)                                                                                          \
  [](UNUSED const float* x, UNUSED const LowBitWeight& weight, UNUSED const float* bias, UNUSED const float* residual, \
     UNUSED float* y, UNUSED long tokens, UNUSED long outputs, UNUSED long inputs, UNUSED Activation activation,       \
     UNUSED float output_scale) {                                                                                      \
    auto run = [&](const float* x, const LowBitWeight& weight, const float* bias, const float* residual) {             \
      kernels().kernel(x, weight, bias, residual, y, tokens, outputs, inputs, activation, output_scale);               \
    };                                                                                                                 \
    body                                                                                                               \
  }

// One row's second group takes the scale of its first.
template <class Run>
void with_wrong_scale(const LowBitWeight& weight, long outputs, long inputs, Run run) {
  if (!weight.scales) return run(weight);
  const auto scales = changed(static_cast<const float*>(weight.scales), outputs * inputs / weight.group,
                              [](Floats& copy) { copy[1] = copy[0]; });
  LowBitWeight wrong = weight;
  wrong.scales = scales.data();
  run(wrong);
}

// The first byte's halves, which are integers of 4 bits, are exchanged.
template <class Run>
void with_swapped_nibbles(const LowBitWeight& weight, long outputs, long inputs, Run run) {
  std::vector<unsigned char> bytes(outputs * inputs * weight.bits / 8);
  std::memcpy(bytes.data(), weight.data, bytes.size());
  bytes[0] = bytes[0] << 4 | bytes[0] >> 4;
  LowBitWeight wrong = weight;
  wrong.data = bytes.data();
  run(wrong);
}

inline const std::vector<Fault>& all() {
  static const std::vector<Fault> faults{
      {"linear", "the last term of each sum is missing",
       [](Kernels& k) {
         k.linear = LINEAR({
           const Floats w = changed(weight, outputs * inputs, [&](Floats& copy) {
             for (long n = 0; n < outputs; n++) copy[n * inputs + inputs - 1] = 0;
           });
           run(x, w.data(), bias, residual, activation, output_scale);
         });
       }},
      {"linear", "one term of one sum is counted twice",
       [](Kernels& k) {
         k.linear = LINEAR({
           const Floats w = changed(weight, outputs * inputs, [&](Floats& copy) { copy.back() *= 2; });
           run(x, w.data(), bias, residual, activation, output_scale);
         });
       }},
      {"linear", "the bias is missing",
       [](Kernels& k) { k.linear = LINEAR({ run(x, weight, nullptr, residual, activation, output_scale); }); }},
      {"linear", "the residual is missing",
       [](Kernels& k) { k.linear = LINEAR({ run(x, weight, bias, nullptr, activation, output_scale); }); }},
      {"linear", "output_scale is missing",
       [](Kernels& k) { k.linear = LINEAR({ run(x, weight, bias, residual, activation, 1); }); }},
      {"linear", "the activation is missing",
       [](Kernels& k) { k.linear = LINEAR({ run(x, weight, bias, residual, Activation::none, output_scale); }); }},
      {"linear", "two lanes of a panel, which are tokens, are exchanged",
       [](Kernels& k) {
         k.linear = LINEAR({
           run(x, weight, bias, residual, activation, output_scale);
           swap_rows(y, tokens, outputs);
         });
       }},
      {"linear", "x is rounded to bfloat16",
       [](Kernels& k) {
         k.linear =
             LINEAR({ run(in_bfloat16(x, tokens * inputs).data(), weight, bias, residual, activation, output_scale); });
       }},
      {"quantized linear", "a group takes its neighbour's scale",
       [](Kernels& k) {
         k.low_bit_linear = LOW_BIT(low_bit_linear, {
           with_wrong_scale(weight, outputs, inputs, [&](auto& wrong) { run(x, wrong, bias, residual); });
         });
       }},
      {"quantized linear", "two integers are exchanged",
       [](Kernels& k) {
         k.low_bit_linear = LOW_BIT(low_bit_linear, {
           with_swapped_nibbles(weight, outputs, inputs, [&](auto& wrong) { run(x, wrong, bias, residual); });
         });
       }},
      {"quantized linear", "the bias is missing",
       [](Kernels& k) { k.low_bit_linear = LOW_BIT(low_bit_linear, { run(x, weight, nullptr, residual); }); }},
      {"quantized linear", "x is rounded to int8",
       [](Kernels& k) {
         k.low_bit_linear = LOW_BIT(low_bit_linear, {
           if (weight.bits == 4 || weight.bits == 8)
             kernels().int8_linear(x, weight, bias, residual, y, tokens, outputs, inputs, activation, output_scale);
           else
             run(x, weight, bias, residual);
         });
       }},
      {"int8 linear", "a group takes its neighbour's scale",
       [](Kernels& k) {
         k.int8_linear = LOW_BIT(int8_linear, {
           with_wrong_scale(weight, outputs, inputs, [&](auto& wrong) { run(x, wrong, bias, residual); });
         });
       }},
      {"int8 linear", "two integers are exchanged",
       [](Kernels& k) {
         k.int8_linear = LOW_BIT(int8_linear, {
           with_swapped_nibbles(weight, outputs, inputs, [&](auto& wrong) { run(x, wrong, bias, residual); });
         });
       }},
      {"int8 linear", "x is not rounded", [](Kernels& k) { k.int8_linear = kernels().low_bit_linear; }},
      {"int8 linear", "two tokens are exchanged",
       [](Kernels& k) {
         k.int8_linear = LOW_BIT(int8_linear, {
           run(x, weight, bias, residual);
           swap_rows(y, tokens, outputs);
         });
       }},
      {"half linear", "the lowest bit of a weight is lost",
       [](Kernels& k) {
         k.low_bit_linear = LOW_BIT(low_bit_linear, {
           auto halves = static_cast<const unsigned short*>(weight.data);
           std::vector<unsigned short> copy(halves, halves + outputs * inputs);
           for (auto& half : copy) half &= 0xfffe;
           LowBitWeight wrong = weight;
           wrong.data = copy.data();
           run(x, wrong, bias, residual);
         });
       }},
      {"gelu", "the approximation with tanh",
       [](Kernels& k) {
         k.gelu = [](const float* x, float* y, long size) {
           for (long i = 0; i < size; i++)
             y[i] = 0.5 * x[i] * (1 + std::tanh(std::sqrt(2 / M_PI) * (x[i] + 0.044715 * std::pow(x[i], 3))));
         };
       }},
      {"gelu", "the gradient of ReLU",
       [](Kernels& k) {
         k.gelu_gradient = [](const float* x, const float* dy, float* dx, long size) {
           for (long i = 0; i < size; i++) dx[i] = x[i] > 0 ? dy[i] : 0;
         };
       }},
      {"swiglu", "gate and up are exchanged",
       [](Kernels& k) {
         k.swiglu = [](const float* gate, const float* up, float* y, long size) {
           kernels().swiglu(up, gate, y, size);
         };
       }},
      {"swiglu", "the gradients are exchanged",
       [](Kernels& k) {
         k.swiglu_gradient = [](const float* gate, const float* up, const float* dy, float* dgate, float* dup, long n) {
           kernels().swiglu_gradient(gate, up, dy, dup, dgate, n);
         };
       }},
      {"layer norm", "eps is missing",
       [](Kernels& k) {
         k.layer_norm = [](const float* x, const float* weight, const float* bias, float* y, long rows, long width,
                           float) { kernels().layer_norm(x, weight, bias, y, rows, width, 1e-12f); };
       }},
      {"layer norm", "the variance is of a sample, over width - 1",
       [](Kernels& k) {
         k.layer_norm = [](const float* x, const float* weight, const float* bias, float* y, long rows, long width,
                           float eps) {
           const Floats w = changed(weight, width, [&](Floats& copy) {
             for (float& v : copy) v *= std::sqrt((width - 1.0f) / width);
           });
           kernels().layer_norm(x, w.data(), bias, y, rows, width, eps);
         };
       }},
      {"layer norm", "the bias is missing",
       [](Kernels& k) {
         k.layer_norm = [](const float* x, const float* weight, const float*, float* y, long rows, long width,
                           float eps) { kernels().layer_norm(x, weight, nullptr, y, rows, width, eps); };
       }},
      {"layer norm", "the last row is missing in the gradients of the parameters",
       [](Kernels& k) {
         k.layer_norm_gradient = [](const float* x, const float* weight, const float* dy, float* dx, float* dweight,
                                    float* dbias, long rows, long width, float eps) {
           kernels().layer_norm_gradient(x, weight, dy, dx, dweight, dbias, rows, width, eps);
           const Floats all(dx, dx + rows * width);
           if (rows) kernels().layer_norm_gradient(x, weight, dy, dx, dweight, dbias, rows - 1, width, eps);
           std::copy(all.begin(), all.end(), dx);
         };
       }},
      {"softmax", "the last element is missing in the sum",
       [](Kernels& k) {
         k.softmax = [](const float* x, float* y, long rows, long width) {
           kernels().softmax(x, y, rows, width);
           for (long r = 0; r < rows && width > 1; r++)
             for (long i = 0; i < width - 1; i++) y[r * width + i] /= 1 - y[r * width + width - 1];
         };
       }},
      {"softmax", "the gradient does not subtract the mean",
       [](Kernels& k) {
         k.softmax_gradient = [](const float* y, const float* dy, float* dx, long rows, long width) {
           for (long i = 0; i < rows * width; i++) dx[i] = y[i] * dy[i];
         };
       }},
      {"AdamW", "the correction of the bias is missing",
       [](Kernels& k) {
         k.adamw = [](const AdamW& p, long size) {
           AdamW wrong = p;
           wrong.step = 1L << 40;
           kernels().adamw(wrong, size);
         };
       }},
      {"AdamW", "the weight does not decay",
       [](Kernels& k) {
         k.adamw = [](const AdamW& p, long size) {
           AdamW wrong = p;
           wrong.decay = 0;
           kernels().adamw(wrong, size);
         };
       }},
      {"sum of squares", "the last element is missing",
       [](Kernels& k) {
         k.sum_of_squares = [](const float* x, long n) { return kernels().sum_of_squares(x, n - 1); };
       }},
      {"attention", "the last sequence's last key is hidden",
       [](Kernels& k) {
         k.attention = [](const Attention& p) {
           const long tokens = p.offsets[p.sequences];
           std::vector<char> mask(tokens + 1, true);
           for (long t = 0; t < tokens; t++) mask[t] = !p.mask || p.mask[t];
           if (tokens) mask[tokens - 1] = false;
           Attention wrong = p;
           wrong.mask = reinterpret_cast<const bool*>(mask.data());
           kernels().attention(wrong);
         };
       }},
      {"attention", "the mask is missing",
       [](Kernels& k) {
         k.attention = [](const Attention& p) {
           Attention wrong = p;
           wrong.mask = nullptr;
           kernels().attention(wrong);
         };
       }},
      {"attention", "queries and keys rotate the other way",
       [](Kernels& k) {
         k.attention = [](const Attention& p) {
           Attention wrong = p;
           Floats sin;
           for (long i = 0; p.sin && i < p.offsets[p.sequences] * (p.head_dim / 2); i++) sin.push_back(-p.sin[i]);
           wrong.sin = p.sin ? sin.data() : nullptr;
           kernels().attention(wrong);
         };
       }},
      {"attention", "two tokens are exchanged",
       [](Kernels& k) {
         k.attention = [](const Attention& p) {
           kernels().attention(p);
           swap_rows(p.out, p.offsets[p.sequences], p.heads * p.head_dim);
         };
       }},
      {"attention", "the scores have no scale",
       [](Kernels& k) {
         k.attention = [](const Attention& p) {
           Attention wrong = p;
           wrong.scale = 1;
           kernels().attention(wrong);
         };
       }},
      {"attention", "all sequences take the first one's bias",
       [](Kernels& k) {
         k.attention = [](const Attention& p) {
           Attention wrong = p;
           wrong.biases = std::min(p.biases, 1L);
           kernels().attention(wrong);
         };
       }},
      {"attention", "the gradients have no scale",
       [](Kernels& k) {
         k.attention_gradients = [](const AttentionGradients& g) {
           kernels().attention_gradients(g);
           for (long i = 0; i < g.forward.offsets[g.forward.sequences] * g.forward.heads * g.forward.head_dim; i++)
             g.dquery[i] /= g.forward.scale;
         };
       }},
      {"attention", "the gradient by value lacks the last token",
       [](Kernels& k) {
         k.attention_gradients = [](const AttentionGradients& g) {
           const long features = g.forward.heads * g.forward.head_dim;
           const long size = g.forward.offsets[g.forward.sequences] * features;
           auto clear_last = [&](Floats& copy) { std::fill(copy.end() - features, copy.end(), 0); };
           const Floats dout = changed(g.dout, size, clear_last);
           AttentionGradients wrong = g;
           wrong.dout = dout.data();
           kernels().attention_gradients(wrong);
         };
       }},
      {"gated linear", "the mask is missing",
       [](Kernels& k) {
         k.gated_linear = [](const GatedLinear& p) {
           GatedLinear wrong = p;
           wrong.mask = nullptr;
           kernels().gated_linear(wrong);
         };
       }},
      {"gated linear", "the gate has no bias",
       [](Kernels& k) {
         k.gated_linear = [](const GatedLinear& p) {
           GatedLinear wrong = p;
           wrong.gate.bias = nullptr;
           kernels().gated_linear(wrong);
         };
       }},
      {"gated linear", "gate and layer are exchanged",
       [](Kernels& k) {
         k.gated_linear = [](const GatedLinear& p) {
           GatedLinear wrong = p;
           std::swap(wrong.gate, wrong.layer);
           kernels().gated_linear(wrong);
         };
       }},
      {"transition", "the last inner element is missing",
       [](Kernels& k) {
         k.transition = [](const Transition& p) {
           const Floats shrink = changed(p.shrink.weight, p.width * p.inner, [&](Floats& copy) {
             for (long n = 0; n < p.width; n++) copy[(n + 1) * p.inner - 1] = 0;
           });
           Transition wrong = p;
           wrong.shrink.weight = shrink.data();
           kernels().transition(wrong);
         };
       }},
      {"transition", "the halves are exchanged",
       [](Kernels& k) {
         k.transition = [](const Transition& p) {
           if (!p.gated) return kernels().transition(p);
           Floats exchanged(p.expand.weight + p.inner * p.width, p.expand.weight + 2 * p.inner * p.width);
           exchanged.insert(exchanged.end(), p.expand.weight, p.expand.weight + p.inner * p.width);
           Transition wrong = p;
           wrong.expand.weight = exchanged.data();
           kernels().transition(wrong);
         };
       }},
      {"attention", "the window is wider",
       [](Kernels& k) {
         k.attention = [](const Attention& p) {
           Attention wrong = p;
           wrong.window = p.window ? p.window + 1 : 0;
           kernels().attention(wrong);
         };
       }},
      {"swiglu", "the sigmoid gates nothing",
       [](Kernels& k) {
         k.sigmoid_gate = [](const float* x, const float*, float* y, long size) {
           for (long i = 0; i < size; i++) y[i] = x ? x[i] : 1;
         };
       }},
      {"transition", "the residual is missing",
       [](Kernels& k) {
         k.transition = [](const Transition& p) {
           Transition wrong = p;
           wrong.residual = nullptr;
           kernels().transition(wrong);
         };
       }},
      {"triangle attention", "rows and columns are exchanged",
       [](Kernels& k) {
         k.triangle_attention = [](const TriangleAttention& p) {
           TriangleAttention wrong = p;
           wrong.ending = !p.ending;
           kernels().triangle_attention(wrong);
         };
       }},
      {"triangle attention", "the mask is missing",
       [](Kernels& k) {
         k.triangle_attention = [](const TriangleAttention& p) {
           const Floats ones(p.proteins * p.length, 1.0f);
           TriangleAttention wrong = p;
           wrong.mask = ones.data();
           kernels().triangle_attention(wrong);
         };
       }},
      {"triangle attention", "the output has no bias",
       [](Kernels& k) {
         k.triangle_attention = [](const TriangleAttention& p) {
           TriangleAttention wrong = p;
           wrong.output.bias = nullptr;
           kernels().triangle_attention(wrong);
         };
       }},
  };
  return faults;
}

#undef UNUSED
#undef LINEAR
#undef LOW_BIT

}  // namespace faults
