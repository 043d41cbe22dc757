// The kernels against references.h, without Python and MLX, so that sanitizers see nothing else.
//
//   test_kernels [--seed S] [--seeds N]   N rounds of all tests, with the seeds S, S + 1, ... (0 and 1 by default)
//   test_kernels --faults                 tests of kernels with a fault (faults.h), each of which must fail
//
// Arrays have exactly the size that kernels.h gives, so the address sanitizer finds every access past their ends.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "arena.h"
#include "faults.h"
#include "instruction_sets.h"
#include "references.h"
#include "threads.h"

using namespace mlx_esm;

// The sanitizers stop the process at an allocation that cannot succeed, unless these options let it fail.
#define DEFAULT_OPTIONS extern "C" __attribute__((visibility("default"), used)) const char*
DEFAULT_OPTIONS __asan_default_options() { return "allocator_may_return_null=1"; }
DEFAULT_OPTIONS __tsan_default_options() { return "allocator_may_return_null=1"; }

namespace {

std::atomic<long> checks{0}, failures{0};  // atomic: tasks on other threads check, too
std::map<std::string, double> largest;     // the largest error, in bounds, of each result
unsigned long seed = 0;
Kernels tested;      // the chosen instruction set's, or the same with a fault
bool quiet = false;  // failures are expected: do not print them

void expect(bool condition, const std::string& what) {
  checks++;
  if (condition) return;
  failures++;
  if (quiet) return;
  std::printf("FAILED: %s (%s, seed %lu)\n", what.c_str(), kernels().name, seed);
  std::fflush(stdout);
}

// Each element is within its bound (real.h).
void compare(const std::string& what, const Floats& found, const Reals& exact) {
  double ratio = 0;
  for (size_t i = 0; i < exact.size(); i++) {
    const double error = std::abs(found[i] - exact[i].value) / exact[i].bound();
    ratio = error <= ratio ? ratio : std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
  }
  expect(found.size() == exact.size() && ratio <= 1, what + ": an error is " + std::to_string(ratio) + " bounds");
  largest[what] = std::max(largest[what], ratio);
}

// Random numbers that depend only on the seed, the instruction set, the test and its shape.
class Inputs {
 public:
  Inputs(const std::string& test, std::initializer_list<long> shape) {
    std::string text = std::to_string(seed);
    text.append(" ").append(kernels().name).append(" ").append(test);
    for (long n : shape) text.append(" ").append(std::to_string(n));
    unsigned long hash = 14695981039346656037ul;  // FNV-1a
    for (unsigned char c : text) hash = (hash ^ c) * 1099511628211ul;
    generator_.seed(hash);
  }

  Floats numbers(long n, double scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    Floats x(n);
    for (float& v : x) v = normal(generator_);
    return x;
  }

  std::vector<unsigned> integers(long n, int bits) {
    std::vector<unsigned> q(n);
    for (unsigned& v : q) v = generator_() >> (64 - bits);
    return q;
  }

 private:
  std::mt19937_64 generator_;
};

void test_linear() {
  for (long tokens : {0, 1, 17, 70, 300})
    for (long outputs : {1, 5, 33, 200})
      for (long inputs : {1, 7, 130})
        for (auto activation : {Activation::none, Activation::gelu, Activation::relu}) {
          Inputs in("linear", {tokens, outputs, inputs, long(activation)});
          const Floats x = in.numbers(tokens * inputs), weight = in.numbers(outputs * inputs, 1 / std::sqrt(inputs));
          const Floats bias = in.numbers(outputs), residual = in.numbers(tokens * outputs);
          const bool plain = activation == Activation::none;
          const LinearEnd end{plain ? nullptr : bias.data(), plain ? nullptr : residual.data(), activation,
                              plain ? 1 : 0.7f};
          Floats y(tokens * outputs);
          tested.linear(x.data(), weight.data(), end.bias, end.residual, y.data(), tokens, outputs, inputs, activation,
                        end.output_scale);
          compare("linear", y, exact_linear(x, exactly(weight), tokens, outputs, inputs, end));
        }
  Inputs in("linear", {20, 7, 1500});  // more inputs than a panel in the L1 cache holds
  const Floats x = in.numbers(20 * 1500), weight = in.numbers(7 * 1500);
  Floats y(20 * 7);
  tested.linear(x.data(), weight.data(), nullptr, nullptr, y.data(), 20, 7, 1500, Activation::none, 1);
  compare("linear, deep", y, exact_linear(x, exactly(weight), 20, 7, 1500, {nullptr, nullptr, Activation::none, 1}));
}

// A quantized weight of random integers, scales and biases, and what a linear layer needs beside it.
struct QuantizedLayer {
  long tokens, outputs, inputs;
  Floats x, scales, biases, bias, residual, y;
  std::vector<unsigned> integers;
  std::vector<unsigned char> bytes;
  LowBitWeight weight;
  LinearEnd end;

  QuantizedLayer(const std::string& test, int bits, long group, long tokens, long outputs)
      : tokens(tokens), outputs(outputs), inputs(3 * group) {
    Inputs in(test, {bits, group, tokens, outputs});
    x = in.numbers(tokens * inputs);
    scales = in.numbers(outputs * 3);
    biases = in.numbers(outputs * 3);
    bias = in.numbers(outputs);
    residual = in.numbers(tokens * outputs);
    y.resize(tokens * outputs);
    integers = in.integers(outputs * inputs, bits);
    bytes = to_bytes(integers, bits);
    weight = {bytes.data(), Dtype::float32, scales.data(), biases.data(), bits, group};
    end = {bias.data(), residual.data(), Activation::gelu, 0.7f};
  }

  template <class Kernel>
  const Floats& run(Kernel kernel) {
    kernel(x.data(), weight, end.bias, end.residual, y.data(), tokens, outputs, inputs, end.activation,
           end.output_scale);
    return y;
  }
};

void test_quantized_linear() {
  for (int bits : {2, 3, 4, 6, 8})
    for (long group : {32, 64, 128})
      for (long tokens : {0, 1, 17, 300})
        for (long outputs : {1, 33, 200}) {
          QuantizedLayer layer("quantized linear", bits, group, tokens, outputs);
          Reals weight;
          for (size_t i = 0; i < layer.integers.size(); i++)
            weight.push_back(Real(layer.integers[i]) * Real(layer.scales[i / group]) + Real(layer.biases[i / group]));
          compare("quantized linear", layer.run(tested.low_bit_linear),
                  exact_linear(layer.x, weight, tokens, outputs, layer.inputs, layer.end));
        }
}

void test_int8_linear() {
  for (int bits : {4, 8})
    for (long group : {32, 64, 128})
      for (long tokens : {0, 1, 17, 300})
        for (long outputs : {1, 33, 200}) {
          QuantizedLayer layer("int8 linear", bits, group, tokens, outputs);
          compare("int8 linear", layer.run(tested.int8_linear),
                  exact_int8_linear(layer.x, layer.integers, layer.scales, layer.biases, tokens, outputs, layer.inputs,
                                    group, layer.end));
        }
}

// Exact equality: x holds integers and the largest of each group is 127, so all scales are 1. All elements of the first
// token and of the first output are as large as possible, to test for overflow.
void test_products_of_integers() {
  for (int bits : {4, 8})
    for (long group : {32, 64, 128})
      for (long tokens : {1, 17, 70})
        for (long outputs : {1, 33}) {
          const int most = (1 << bits) - 1, middle = most / 2;
          const long inputs = 3 * group;
          Inputs in("products of integers", {bits, group, tokens, outputs});
          const Floats scales(outputs * 3, 1), biases(outputs * 3, -middle);
          const auto random = in.integers(tokens * inputs, 7);
          Floats x(tokens * inputs, 127), y(tokens * outputs), exact;
          for (size_t i = inputs; i < x.size(); i++)
            if (i % group) x[i] = 2 * int(random[i]) - 127;
          auto integers = in.integers(outputs * inputs, bits);
          std::fill_n(integers.begin(), inputs, most);
          for (long t = 0; t < tokens; t++)
            for (long n = 0; n < outputs; n++) {
              int sum = 0;
              for (long k = 0; k < inputs; k++)
                sum += int(x[t * inputs + k]) * (int(integers[n * inputs + k]) - middle);
              exact.push_back(sum);
            }
          const auto bytes = to_bytes(integers, bits);
          const LowBitWeight p{bytes.data(), Dtype::float32, scales.data(), biases.data(), bits, group};
          tested.int8_linear(x.data(), p, nullptr, nullptr, y.data(), tokens, outputs, inputs, Activation::none, 1);
          expect(y == exact, "products of integers of " + std::to_string(bits) + " bits");
        }
}

void test_half_linear() {
  for (long tokens : {0, 1, 17, 300})
    for (long outputs : {1, 33, 200})
      for (long inputs : {1, 7, 130, 1500}) {
        Inputs in("linear of bfloat16", {tokens, outputs, inputs});
        const Floats x = in.numbers(tokens * inputs);
        Floats weight = in.numbers(outputs * inputs), y(tokens * outputs);
        std::vector<unsigned short> halves;
        for (float& w : weight) {
          unsigned word;
          std::memcpy(&word, &w, sizeof word);
          halves.push_back(word >> 16);
          word = word >> 16 << 16;
          std::memcpy(&w, &word, sizeof word);
        }
        const LowBitWeight p{halves.data(), Dtype::bfloat16, nullptr, nullptr, 16, 1};
        tested.low_bit_linear(x.data(), p, nullptr, nullptr, y.data(), tokens, outputs, inputs, Activation::none, 1);
        compare("linear of bfloat16", y,
                exact_linear(x, exactly(weight), tokens, outputs, inputs, {nullptr, nullptr, Activation::none, 1}));
      }
}

void test_gelu() {
  for (long size : {0, 1, 15, 33, 40000})
    for (double scale : {0.1, 3.0, 1e4}) {
      Inputs in("gelu", {size, long(10 * scale)});
      const Floats x = in.numbers(size, scale), dy = in.numbers(size);
      Floats y(size), dx(size);
      Reals exact, derivative;
      for (long i = 0; i < size; i++) {
        exact.push_back(gelu(x[i]));
        derivative.push_back(Real(dy[i]) * gelu_derivative(x[i]));
      }
      tested.gelu(x.data(), y.data(), size);
      tested.gelu_gradient(x.data(), dy.data(), dx.data(), size);
      compare("gelu", y, exact);
      compare("gelu's gradient", dx, derivative);
    }
}

void test_swiglu() {
  for (long size : {0, 1, 15, 33, 40000})
    for (double scale : {0.1, 3.0, 1e4}) {
      Inputs in("swiglu", {size, long(10 * scale)});
      const Floats gate = in.numbers(size, scale), up = in.numbers(size), dy = in.numbers(size);
      Floats y(size), dgate(size), dup(size);
      Reals exact, by_gate, by_up, gated, sigmoids;
      for (long i = 0; i < size; i++) {
        sigmoids.push_back(sigmoid(gate[i]));
        gated.push_back(Real(up[i]) * sigmoids.back());
        exact.push_back(silu(gate[i]) * Real(up[i]));
        by_gate.push_back(Real(dy[i]) * Real(up[i]) * silu_derivative(gate[i]));
        by_up.push_back(Real(dy[i]) * silu(gate[i]));
      }
      tested.swiglu(gate.data(), up.data(), y.data(), size);
      tested.swiglu_gradient(gate.data(), up.data(), dy.data(), dgate.data(), dup.data(), size);
      compare("swiglu", y, exact);
      compare("swiglu's gradient by gate", dgate, by_gate);
      compare("swiglu's gradient by up", dup, by_up);
      tested.sigmoid_gate(up.data(), gate.data(), y.data(), size);
      compare("sigmoid gate", y, gated);
      tested.sigmoid_gate(nullptr, gate.data(), y.data(), size);
      compare("sigmoid", y, sigmoids);
    }
}

void test_layer_norm() {
  constexpr float eps = 1e-5;
  for (long rows : {0, 1, 5, 70, 130})
    for (long width : {1, 3, 33, 100, 321})
      for (bool with_bias : {false, true}) {
        Inputs in("layer norm", {rows, width, with_bias});
        const Floats x = in.numbers(rows * width, 3), weight = in.numbers(width), bias = in.numbers(width);
        const Floats dy = in.numbers(rows * width);
        const float* b = with_bias ? bias.data() : nullptr;
        Floats y(rows * width), dx(rows * width), dweight(width), dbias(width);
        tested.layer_norm(x.data(), weight.data(), b, y.data(), rows, width, eps);
        tested.layer_norm_gradient(x.data(), weight.data(), dy.data(), dx.data(), dweight.data(), dbias.data(), rows,
                                   width, eps);
        const ExactLayerNorm exact(x, weight, b, dy, rows, width, eps);
        compare("layer norm", y, exact.y);
        compare("layer norm's gradient by x", dx, exact.dx);
        compare("layer norm's gradient by weight", dweight, exact.dweight);
        compare("layer norm's gradient by bias", dbias, exact.dbias);
      }
}

void test_softmax() {
  for (long rows : {0, 1, 5, 130})
    for (long width : {1, 3, 33, 100, 321})
      for (double scale : {1.0, 1e4}) {
        Inputs in("softmax", {rows, width, long(scale)});
        const Floats x = in.numbers(rows * width, scale), dy = in.numbers(rows * width);
        Floats y(rows * width), dx(rows * width);
        tested.softmax(x.data(), y.data(), rows, width);
        tested.softmax_gradient(y.data(), dy.data(), dx.data(), rows, width);
        compare("softmax", y, exact_softmax(x, rows, width));
        compare("softmax's gradient", dx, exact_softmax_gradient(y, dy, rows, width));
      }
}

void test_adamw() {
  for (long size : {0, 1, 15, 33, 40000})
    for (long step : {1, 1000}) {
      Inputs in("AdamW", {size, step});
      const Floats gradient = in.numbers(size);
      Floats weight = in.numbers(size), mean = in.numbers(size), square = in.numbers(size);
      for (float& x : square) x = std::abs(x);
      AdamW p{weight.data(), gradient.data(), mean.data(), square.data(), weight.data(), mean.data(), square.data(),
              0.5f,          1e-2f,           0.9f,        0.99f,         1e-8f,         0.1f,        step};
      const ExactAdamW exact(p, size);
      tested.adamw(p, size);  // in place
      compare("AdamW's weight", weight, exact.weight);
      compare("AdamW's mean", mean, exact.mean);
      compare("AdamW's square", square, exact.square);
    }
}

void test_sum_of_squares() {
  constexpr long PIECE = 1 << 14;  // of kernels.cpp, which adds up the pieces in double
  for (long size : {0, 1, 15, 33, 40000}) {
    const Floats x = Inputs("sum of squares", {size}).numbers(size);
    Real exact;
    for (long i = 0; i < size; i += PIECE) {
      const Real piece =
          sum_in_lanes(std::min(PIECE, size - i), ROW_LANES, [&](long j) { return Real(x[i + j]) * Real(x[i + j]); });
      exact = {exact.value + piece.value, exact.variance + piece.variance};
    }
    compare("sum of squares", {float(tested.sum_of_squares(x.data(), size))}, {rounded(exact.value, exact.variance)});
  }
}

// NaN stays NaN whatever its payload and sign, in a whole vector and in the last one.
void test_nan() {
  for (unsigned bits : {0x7fc00000u, 0x7fc00001u, 0x7fffffffu, 0xffffffffu})
    for (long place : {5, 36}) {
      const long width = 37;
      float nan;
      std::memcpy(&nan, &bits, sizeof nan);
      Floats x = Inputs("NaN", {place}).numbers(width), y(width), ones(width, 1);
      x[place] = nan;
      auto spoilt = [&] { return std::count_if(y.begin(), y.end(), [](float v) { return std::isnan(v); }); };
      tested.gelu(x.data(), y.data(), width);
      expect(spoilt() == 1 && std::isnan(y[place]), "gelu keeps NaN");
      tested.swiglu(x.data(), ones.data(), y.data(), width);
      expect(spoilt() == 1 && std::isnan(y[place]), "swiglu keeps NaN");
      tested.softmax(x.data(), y.data(), 1, width);
      expect(spoilt() == width, "softmax keeps NaN");
      tested.layer_norm(x.data(), ones.data(), nullptr, y.data(), 1, width, 1e-5f);
      expect(spoilt() == width, "layer norm keeps NaN");
    }
}

struct Options {
  bool mask, rotary, learned;
  int bias;  // 0: none, 1: one for all sequences, 2: one per sequence
  bool norms = false;
  long window = 0;
};

void test_attention(long heads, long d, const std::vector<int>& offsets, Options options) {
  const long sequences = offsets.size() - 1, tokens = offsets.back(), D = heads * d;
  const long length = options.bias && sequences ? offsets[1] : 0, biases = options.bias == 1 ? 1 : sequences;
  Inputs in("attention",
            {heads, d, sequences, tokens, options.mask, options.rotary, options.learned, options.bias, options.norms,
             options.window});
  const Floats query = in.numbers(tokens * D), key = in.numbers(tokens * D), value = in.numbers(tokens * D);
  const Floats bias_k = in.numbers(D), bias_v = in.numbers(D), bias = in.numbers(biases * heads * length * length);
  const Floats dout = in.numbers(tokens * D), angles = in.numbers(tokens * (d / 2), 3), seen = in.numbers(tokens);
  Floats cos, sin;
  for (float angle : angles) {
    cos.push_back(std::cos(angle));
    sin.push_back(std::sin(angle));
  }
  const std::unique_ptr<bool[]> mask(new bool[tokens]);
  for (long i = 0; i < tokens; i++) mask[i] = seen[i] < 1;
  Floats out(tokens * D), maximum(tokens * heads), total(tokens * heads);
  Floats dquery(tokens * D), dkey(tokens * D), dvalue(tokens * D), dbias(bias.size());
  Floats dbias_k(options.learned ? sequences * D : 0), dbias_v(dbias_k.size());

  Attention p{};
  p.query = query.data();
  p.key = key.data();
  p.value = value.data();
  p.out = out.data();
  p.offsets = offsets.data();
  p.sequences = sequences;
  p.heads = heads;
  p.head_dim = d;
  p.scale = 1 / std::sqrt(d);
  if (options.mask) p.mask = mask.get();
  if (options.rotary) {
    p.cos = cos.data();
    p.sin = sin.data();
  }
  if (options.learned) {
    p.bias_k = bias_k.data();
    p.bias_v = bias_v.data();
  }
  if (options.bias) {
    p.bias = bias.data();
    p.biases = biases;
  }
  const Floats query_norm = in.numbers(D), key_norm = in.numbers(D);
  if (options.norms) {
    p.query_norm = query_norm.data();
    p.key_norm = key_norm.data();
    p.eps = 1e-5;
  }
  p.window = options.window;
  const ExactAttention exact(p, dout);
  tested.attention(p);  // without what the gradients need
  compare("attention", out, exact.out);
  if (options.window) return;
  p.maximum = maximum.data();
  p.total = total.data();
  tested.attention(p);
  Floats normed_query(tokens * D), normed_key(tokens * D);  // the gradients take query and key after their layer norms
  if (options.norms) {
    tested.layer_norm(p.query, p.query_norm, nullptr, normed_query.data(), tokens, D, p.eps);
    tested.layer_norm(p.key, p.key_norm, nullptr, normed_key.data(), tokens, D, p.eps);
    p.query = normed_query.data();
    p.key = normed_key.data();
    p.query_norm = p.key_norm = nullptr;
  }
  AttentionGradients g{};
  g.forward = p;
  g.dout = dout.data();
  g.dquery = dquery.data();
  g.dkey = dkey.data();
  g.dvalue = dvalue.data();
  if (options.learned) {
    g.dbias_k = dbias_k.data();
    g.dbias_v = dbias_v.data();
  }
  if (options.bias) g.dbias = dbias.data();
  tested.attention_gradients(g);
  compare("attention's gradient by query", dquery, exact.dquery);
  compare("attention's gradient by key", dkey, exact.dkey);
  compare("attention's gradient by value", dvalue, exact.dvalue);
  compare("attention's gradient by bias_k", dbias_k, exact.dbias_k);
  compare("attention's gradient by bias_v", dbias_v, exact.dbias_v);
  if (options.bias) compare("attention's gradient by bias", dbias, exact.dbias);
}

void test_attentions() {
  for (long d : {1, 7, 16, 20, 40})
    for (bool mask : {false, true})
      for (bool learned : {false, true}) test_attention(2, d, {0, 1, 1, 18, 150}, {mask, false, learned, 0});
  for (long d : {2, 20, 40})
    for (int bias : {0, 1, 2}) test_attention(3, d, {0, 37, 74, 111}, {true, true, false, bias});
  for (int length : {1, 2, 31, 33, 150})
    for (int bias : {1, 2}) test_attention(2, 7, {0, length, 2 * length}, {false, false, false, bias});
  for (long d : {1, 7, 20, 40})
    for (bool mask : {false, true}) test_attention(3, d, {0, 1, 1, 18, 150}, {mask, d % 2 == 0, false, 0, true});
  test_attention(2, 8, {0, 700}, {false, true, false, 0, true});
  test_attention(1, 8, {0, 700}, {true, true, false, 1});  // more keys and queries than one task takes
  for (long window : {1, 5, 64, 200})
    for (bool mask : {false, true}) {
      test_attention(2, 8, {0, 1, 1, 34, 150}, {mask, mask, false, 0, false, window});
      test_attention(1, 8, {0, 700}, {mask, false, false, 0, false, window});
    }
  for (int bias : {0, 1, 2}) {
    test_attention(2, 8, {0}, {true, true, false, bias});
    test_attention(2, 8, {0, 0, 0}, {true, true, false, bias});
  }
}

// A weight and a bias that keep activations at their size.
struct Parameters {
  Floats weight, bias;

  Parameters(Inputs& in, long outputs, long inputs)
      : weight(in.numbers(outputs * inputs, 1 / std::sqrt(inputs))), bias(in.numbers(outputs)) {}

  Affine affine(bool with_bias = true) const { return {weight.data(), with_bias ? bias.data() : nullptr}; }
};

void test_gated_linear() {
  for (long tokens : {0, 1, 31, 70})
    for (long width : {4, 33, 128})
      for (long outputs : {1, 20, 128})
        for (int options = 0; options < 8; options++) {
          Inputs in("gated linear", {tokens, width, outputs, options});
          const Parameters norm(in, width, 1), x_norm(in, width, 1), gate(in, outputs, width),
              layer(in, outputs, width);
          const Floats z = in.numbers(tokens * width), x = in.numbers(tokens * width), mask = in.numbers(tokens);
          const Floats residual = in.numbers(tokens * outputs);
          const bool with_x = options & 1, with_mask = options & 2, y_first = options & 4;
          Floats y(tokens * outputs);
          const GatedLinear p{z.data(),
                              with_x ? x.data() : nullptr,
                              with_mask ? mask.data() : nullptr,
                              y_first ? nullptr : residual.data(),
                              y.data(),
                              norm.affine(),
                              x_norm.affine(with_mask),
                              gate.affine(with_mask),
                              layer.affine(),
                              1e-5f,
                              tokens,
                              width,
                              outputs,
                              y_first};
          tested.gated_linear(p);
          compare("gated linear", y, exact_gated_linear(p));
        }
}

void test_transition() {
  for (long tokens : {0, 1, 31, 70})
    for (long width : {4, 33, 128})
      for (long inner : {1, 130, 512})
        for (int options = 0; options < 4; options++) {
          const bool with_residual = options & 1, gated = options & 2;
          Inputs in("transition", {tokens, width, inner, options});
          const Parameters norm(in, width, 1), expand(in, gated ? 2 * inner : inner, width), shrink(in, width, inner);
          const Floats x = in.numbers(tokens * width), residual = in.numbers(tokens * width);
          Floats y(tokens * width);
          const Transition p{x.data(),
                             with_residual ? residual.data() : nullptr,
                             y.data(),
                             norm.affine(),
                             1e-5f,
                             expand.affine(),
                             shrink.affine(with_residual),
                             tokens,
                             width,
                             inner,
                             gated};
          tested.transition(p);
          compare("transition", y, exact_transition(p));
        }
}

void test_triangle_attention() {
  for (long length : {1, 2, 17, 34})
    for (long heads : {1, 3})
      for (bool ending : {false, true})
        for (bool with_residual : {false, true}) {
          const long proteins = 2, width = heads * 11, size = proteins * length * length * width;
          Inputs in("triangle attention", {length, heads, ending, with_residual});
          const Parameters norm(in, width, 1), bias(in, heads, width), query(in, width, width), key(in, width, width);
          const Parameters value(in, width, width), gate(in, width, width), output(in, width, width);
          const Floats z = in.numbers(size), residual = in.numbers(size);
          Floats mask(proteins * length, 1.0f), y(size);
          for (long i = length / 2 + 1; i < length; i++) mask[length + i] = 0;  // in the second protein
          const TriangleAttention p{z.data(),
                                    mask.data(),
                                    with_residual ? residual.data() : nullptr,
                                    y.data(),
                                    norm.affine(),
                                    1e-5f,
                                    bias.weight.data(),
                                    query.weight.data(),
                                    key.weight.data(),
                                    value.weight.data(),
                                    gate.affine(),
                                    output.affine(with_residual),
                                    proteins,
                                    length,
                                    width,
                                    heads,
                                    ending};
          tested.triangle_attention(p);
          compare("triangle attention", y, exact_triangle_attention(p));
        }
}

void test_instruction_sets() {
  try {
    choose("nonsense");
    expect(false, "choose refuses an unknown instruction set");
  } catch (const std::invalid_argument&) {
    expect(true, "");
  }
}

void test_multiply_adds() { expect(tested.multiply_adds(1e7) == 0.5f, "multiply_adds converges to 1/2"); }

void test_arena() {
  Arena arena;
  for (int round = 0; round < 3; round++) {
    arena.clear();
    std::vector<float*> pieces;
    for (long n : {0, 1, 17, 1000, 100000, 3}) {
      float* piece = arena.take(n);
      expect(reinterpret_cast<size_t>(piece) % 64 == 0, "a piece is aligned");
      for (long i = 0; i < n; i++) piece[i] = pieces.size();
      pieces.push_back(piece);
    }
    expect(pieces[1][0] == 1 && pieces[2][16] == 2 && pieces[3][999] == 3 && pieces[4][99999] == 4 && pieces[5][2] == 5,
           "pieces do not overlap");
  }
  try {
    arena.take(1L << 58);
    expect(false, "take throws if there is not enough memory");
  } catch (const std::bad_alloc&) {
    expect(arena.take(10) != nullptr, "the arena still works after a failure");
  }
}

// Run a loop and check that it does each task once.
void loop(long tasks, const std::string& what) {
  std::vector<std::atomic<int>> times(tasks);
  parallel_for(tasks, [&](long i) { times[i]++; });
  for (auto& n : times) expect(n == 1, what);
}

void test_threads() {
  use_threads(3);
  expect(threads() == 3, "there are as many threads as requested");
  for (int round = 0; round < 200; round++)
    for (long tasks : {0, 1, 2, 3, 50}) loop(tasks, "a loop does each task once");
  parallel_for(20, [&](long) { loop(30, "a loop inside a loop does each task once"); });
  std::vector<std::thread> threads;
  std::atomic<long> sum{0};
  for (int t = 0; t < 4; t++)
    threads.emplace_back([&] {
      for (int round = 0; round < 200; round++) parallel_for(10, [&](long i) { sum += i; });
    });
  for (auto& thread : threads) thread.join();
  expect(sum == 4 * 200 * 45, "loops of several threads at once do each task once");
}

void test_exceptions() {
  for (int round = 0; round < 100; round++) {
    std::atomic<int> done{0};
    bool caught = false;
    try {
      parallel_for(50, [&](long i) {
        if (i == round % 50) throw std::runtime_error("task " + std::to_string(i));
        done++;
      });
    } catch (const std::runtime_error& error) {
      caught = error.what() == "task " + std::to_string(round % 50);
    }
    expect(caught && done < 50, "the exception of a task reaches the caller of the loop");
    loop(50, "a loop after an exception does each task once");
  }
  bool caught = false;
  try {
    parallel_for(4, [](long) { parallel_for(4, [](long) { throw 1; }); });
  } catch (int) {
    caught = true;
  }
  expect(caught, "an exception leaves nested loops");
  loop(50, "a loop after nested loops does each task once");
}

struct Test {
  const char* kernel;
  void (*run)();
};

constexpr Test TESTS[] = {
    {"linear", test_linear},
    {"quantized linear", test_quantized_linear},
    {"int8 linear", test_int8_linear},
    {"int8 linear", test_products_of_integers},
    {"half linear", test_half_linear},
    {"gelu", test_gelu},
    {"swiglu", test_swiglu},
    {"layer norm", test_layer_norm},
    {"softmax", test_softmax},
    {"softmax", test_nan},
    {"AdamW", test_adamw},
    {"sum of squares", test_sum_of_squares},
    {"attention", test_attentions},
    {"gated linear", test_gated_linear},
    {"transition", test_transition},
    {"triangle attention", test_triangle_attention},
    {"multiply-adds", test_multiply_adds},
};

// The checks of one instruction set with these seeds, and the largest errors they have seen.
void test_instruction_set(const std::string& set, unsigned long first, unsigned long seeds) {
  choose(set);
  tested = kernels();
  largest.clear();
  const long checks_before = checks, failures_before = failures;
  for (seed = first; seed < first + seeds; seed++)
    for (const Test& test : TESTS) test.run();
  for (auto& [what, ratio] : largest) std::printf("  %s: largest error %.2f bounds\n", what.c_str(), ratio);
  std::printf("%s: %ld checks of %lu seeds, %ld failed\n", set.c_str(), checks - checks_before, seeds,
              failures - failures_before);
  std::fflush(stdout);
}

// How many faults are not found in the kernels of one instruction set. A fault is found if a test of its kernel fails.
int test_faults(const std::string& set) {
  choose(set);
  quiet = true;
  int missed = 0;
  for (const Fault& fault : faults::all()) {
    tested = kernels();
    fault.insert(tested);
    const long checks_before = checks, failures_before = failures;
    for (const Test& test : TESTS)
      if (fault.kernel == test.kernel) test.run();
    const long found = failures - failures_before;
    std::printf("  %s, %s: %ld of %ld checks fail\n", fault.kernel.c_str(), fault.what.c_str(), found,
                checks - checks_before);
    missed += !found;
  }
  std::printf("%s: %zu faults, %d not found\n", set.c_str(), faults::all().size(), missed);
  return missed;
}

}  // namespace

int main(int count, char** arguments) {
  unsigned long first = 0, seeds = 1;
  int missed = 0;
  for (int i = 1; i < count; i++) {
    const std::string option = arguments[i];
    if (option == "--seed" && i + 1 < count) {
      first = std::strtoul(arguments[++i], nullptr, 10);
    } else if (option == "--seeds" && i + 1 < count) {
      seeds = std::strtoul(arguments[++i], nullptr, 10);
    } else if (option == "--faults" && count == 2) {
      for (const auto& set : instruction_sets()) missed += test_faults(set);
      return missed ? 1 : 0;
    } else {
      std::fprintf(stderr, "usage: %s [--seed S] [--seeds N] | --faults\n", arguments[0]);
      return 2;
    }
  }
  test_arena();
  test_threads();
  test_exceptions();
  test_instruction_sets();
  for (const auto& set : instruction_sets()) test_instruction_set(set, first, seeds);
  return failures ? 1 : 0;
}
