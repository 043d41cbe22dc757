// The kernels against plain loops over doubles, without Python and MLX, so that sanitizers see nothing else.
//
// Arrays have exactly the size that kernels.h names, so the address sanitizer finds whoever reads or writes past one.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "arena.h"
#include "instruction_sets.h"
#include "references.h"
#include "threads.h"

using namespace mlx_esm;

// The sanitizers stop the process at an allocation that cannot be, unless they are told to let it fail.
#define DEFAULT_OPTIONS extern "C" __attribute__((visibility("default"), used)) const char*
DEFAULT_OPTIONS __asan_default_options() { return "allocator_may_return_null=1"; }
DEFAULT_OPTIONS __tsan_default_options() { return "allocator_may_return_null=1"; }

namespace {

std::atomic<int> checks{0}, failures{0};  // tasks check, too

void expect(bool condition, const std::string& what) {
  checks++;
  if (condition) return;
  failures++;
  std::printf("FAILED: %s (%s)\n", what.c_str(), kernels().name);
  std::fflush(stdout);
}

// The largest error is at most `tolerance` times the largest number, or times `terms`, the size of what was added up to
// a result that may be as small as it likes.
void compare(const std::string& what, const Floats& found, const Doubles& exact, double tolerance = 2e-6,
             double terms = 1e-30) {
  double error = 0, norm = terms;
  for (size_t i = 0; i < exact.size(); i++) {
    const double difference = std::abs(found[i] - exact[i]);
    error = difference <= error ? error : difference;  // NaN is an error, too
    norm = std::max(norm, std::abs(exact[i]));
  }
  expect(found.size() == exact.size() && error <= tolerance * norm,
         what + ": error " + std::to_string(error / norm) + " of " + std::to_string(norm));
}

Floats numbers(long n, double scale = 1) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> normal(0, scale);
  Floats x(n);
  for (float& v : x) v = normal(generator);
  return x;
}

void test_linear() {
  for (long tokens : {0, 1, 17, 70, 300})
    for (long outputs : {1, 5, 33, 200})
      for (long inputs : {1, 7, 130})
        for (auto activation : {Activation::none, Activation::gelu, Activation::relu}) {
          const Floats x = numbers(tokens * inputs), weight = numbers(outputs * inputs, 1 / std::sqrt(inputs));
          const Floats bias = numbers(outputs), residual = numbers(tokens * outputs);
          const bool plain = activation == Activation::none;
          const float *b = plain ? nullptr : bias.data(), *r = plain ? nullptr : residual.data();
          const float scale = plain ? 1 : 0.7f;
          Floats y(tokens * outputs);
          kernels().linear(x.data(), weight.data(), b, r, y.data(), tokens, outputs, inputs, activation, scale);
          compare("linear", y, exact_linear(x, weight, b, r, tokens, outputs, inputs, activation, scale));
        }
  const Floats x = numbers(20 * 1500), weight = numbers(7 * 1500);  // deeper than a panel that stays in the cache
  Floats y(20 * 7);
  kernels().linear(x.data(), weight.data(), nullptr, nullptr, y.data(), 20, 7, 1500, Activation::none, 1);
  compare("deep linear", y, exact_linear(x, weight, nullptr, nullptr, 20, 7, 1500, Activation::none, 1));
}

void test_quantized_linear() {
  std::mt19937 generator(1);
  for (int bits : {2, 3, 4, 6, 8})
    for (long group : {32, 64, 128})
      for (long tokens : {0, 1, 17, 300})
        for (long outputs : {1, 33, 200}) {
          const long inputs = 3 * group, groups = outputs * 3;
          const Floats x = numbers(tokens * inputs), scales = numbers(groups), biases = numbers(groups);
          const Floats bias = numbers(outputs), residual = numbers(tokens * outputs);
          std::vector<unsigned> integers(outputs * inputs);
          for (unsigned& q : integers) q = generator() >> (32 - bits);
          Floats weight(outputs * inputs), y(tokens * outputs);
          for (size_t i = 0; i < weight.size(); i++) weight[i] = integers[i] * scales[i / group] + biases[i / group];
          const auto bytes = packed(integers, bits);
          const PackedWeight p{bytes.data(), Number::float32, scales.data(), biases.data(), bits, group};
          auto check = [&](auto kernel, const Floats& x_of_exact, const std::string& what) {
            kernel(x.data(), p, bias.data(), residual.data(), y.data(), tokens, outputs, inputs, Activation::gelu,
                   0.7f);
            compare(what, y, exact_linear(x_of_exact, weight, bias.data(), residual.data(), tokens, outputs, inputs,
                                          Activation::gelu, 0.7f), 2e-6, std::sqrt(inputs));
          };
          check(kernels().packed_linear, x, "quantized linear");
          if (bits == 4 || bits == 8) check(kernels().integer_linear, rounded(x, group), "linear of integers");
        }
}

// To the last bit: x are whole numbers, each group's largest is 127, and so all scales are 1. The first token's are all
// as large as they can be, and so are the first output's.
void test_products_of_integers() {
  std::mt19937 generator(2);
  for (int bits : {4, 8})
    for (long group : {32, 64, 128})
      for (long tokens : {1, 17, 70})
        for (long outputs : {1, 33}) {
          const int largest = (1 << bits) - 1, middle = largest / 2;
          const long inputs = 3 * group;
          const Floats scales(outputs * 3, 1), biases(outputs * 3, -middle);
          Floats x(tokens * inputs, 127), y(tokens * outputs), exact;
          std::vector<unsigned> integers(outputs * inputs, largest);
          for (size_t i = inputs; i < x.size(); i++)
            if (i % group) x[i] = int(generator() % 255) - 127;
          for (size_t i = inputs; i < integers.size(); i++) integers[i] = generator() & largest;
          for (long t = 0; t < tokens; t++)
            for (long n = 0; n < outputs; n++) {
              int sum = 0;
              for (long k = 0; k < inputs; k++)
                sum += int(x[t * inputs + k]) * (int(integers[n * inputs + k]) - middle);
              exact.push_back(sum);
            }
          const auto bytes = packed(integers, bits);
          const PackedWeight p{bytes.data(), Number::float32, scales.data(), biases.data(), bits, group};
          kernels().integer_linear(x.data(), p, nullptr, nullptr, y.data(), tokens, outputs, inputs, Activation::none,
                                   1);
          expect(y == exact, "products of integers of " + std::to_string(bits) + " bits");
        }
}

void test_half_linear() {
  for (long tokens : {0, 1, 17, 300})
    for (long outputs : {1, 33, 200})
      for (long inputs : {1, 7, 130, 1500}) {
        const Floats x = numbers(tokens * inputs), exact = numbers(outputs * inputs);
        Floats weight(exact.size()), y(tokens * outputs);
        std::vector<unsigned short> halves;
        for (size_t i = 0; i < exact.size(); i++) {
          unsigned word;
          std::memcpy(&word, &exact[i], sizeof word);
          halves.push_back(word >> 16);
          word = word >> 16 << 16;
          std::memcpy(&weight[i], &word, sizeof word);
        }
        const PackedWeight p{halves.data(), Number::bfloat16, nullptr, nullptr, 16, 1};
        kernels().packed_linear(x.data(), p, nullptr, nullptr, y.data(), tokens, outputs, inputs, Activation::none, 1);
        compare("linear of bfloat16", y,
                exact_linear(x, weight, nullptr, nullptr, tokens, outputs, inputs, Activation::none, 1), 2e-6,
                std::sqrt(inputs));
      }
}

void test_gelu() {
  for (long size : {0, 1, 15, 33, 40000})
    for (double scale : {0.1, 3.0, 1e4}) {
      const Floats x = numbers(size, scale), dy = numbers(size);
      Floats y(size), dx(size);
      Doubles exact, derivative;
      for (long i = 0; i < size; i++) {
        exact.push_back(exact_gelu(x[i]));
        derivative.push_back(dy[i] * exact_gelu_derivative(x[i]));
      }
      kernels().gelu(x.data(), y.data(), size);
      kernels().gelu_gradient(x.data(), dy.data(), dx.data(), size);
      compare("gelu", y, exact, 2e-6, 0.1);
      compare("gelu's gradient", dx, derivative, 2e-6, 0.1);
    }
}

void test_swiglu() {
  for (long size : {0, 1, 15, 33, 40000})
    for (double scale : {0.1, 3.0, 1e4}) {
      const Floats gate = numbers(size, scale), up = numbers(size), dy = numbers(size);
      Floats y(size), dgate(size), dup(size);
      Doubles exact, by_gate, by_up;
      for (long i = 0; i < size; i++) {
        const double s = exact_sigmoid(gate[i]), silu = gate[i] * s;
        exact.push_back(silu * up[i]);
        by_gate.push_back(double(dy[i]) * up[i] * (s + silu * (1 - s)));
        by_up.push_back(dy[i] * silu);
      }
      kernels().swiglu(gate.data(), up.data(), y.data(), size);
      kernels().swiglu_gradient(gate.data(), up.data(), dy.data(), dgate.data(), dup.data(), size);
      compare("swiglu", y, exact, 2e-6, 0.1);
      compare("swiglu's gradient by gate", dgate, by_gate, 2e-6, 0.1);
      compare("swiglu's gradient by up", dup, by_up, 2e-6, 0.1);
    }
}

void test_layer_norm() {
  constexpr float eps = 1e-5;
  for (long rows : {0, 1, 5, 70, 130})
    for (long width : {1, 3, 33, 100, 321})
      for (bool with_bias : {false, true}) {
        const Floats x = numbers(rows * width, 3), weight = numbers(width), bias = numbers(width);
        const Floats dy = numbers(rows * width);
        const float* b = with_bias ? bias.data() : nullptr;
        Floats y(rows * width), dx(rows * width), dweight(width), dbias(width);
        kernels().layer_norm(x.data(), weight.data(), b, y.data(), rows, width, eps);
        kernels().layer_norm_gradient(x.data(), weight.data(), dy.data(), dx.data(), dweight.data(), dbias.data(), rows,
                                      width, eps);
        const ExactLayerNorm exact(x, weight, b, dy, rows, width, eps);
        const double tolerance = width == 3 ? 1e-4 : 5e-6;  // three numbers may lie close together
        compare("layer norm", y, exact.y, tolerance);
        compare("layer norm's gradient by x", dx, exact.dx, tolerance, 1 / std::sqrt(eps));
        compare("layer norm's gradient by weight", dweight, exact.dweight, tolerance, 1);
        compare("layer norm's gradient by bias", dbias, exact.dbias, 5e-6, 1);
      }
}

void test_softmax() {
  for (long rows : {0, 1, 5, 130})
    for (long width : {1, 3, 33, 100, 321})
      for (double scale : {1.0, 1e4}) {
        const Floats x = numbers(rows * width, scale), dy = numbers(rows * width);
        const ExactSoftmax exact(x, dy, rows, width);
        Floats y(rows * width), dx(rows * width);
        kernels().softmax(x.data(), y.data(), rows, width);
        kernels().softmax_gradient(y.data(), dy.data(), dx.data(), rows, width);
        compare("softmax", y, exact.y);
        if (scale == 1) compare("softmax's gradient", dx, exact.dx);
      }
}

void test_adamw() {
  for (long size : {0, 1, 15, 33, 40000})
    for (long step : {1, 1000}) {
      const Floats gradient = numbers(size);
      Floats weight = numbers(size), mean = numbers(size), square = numbers(size);
      for (float& x : square) x = std::abs(x);
      double squares = 0;
      for (float x : gradient) squares += double(x) * x;
      const double found = kernels().sum_of_squares(gradient.data(), size);
      expect(std::abs(found - squares) <= 1e-6 * squares, "sum of squares of " + std::to_string(size));

      AdamW p{weight.data(), gradient.data(), mean.data(), square.data(), weight.data(), mean.data(), square.data(),
              0.5f, 1e-2f, 0.9f, 0.99f, 1e-8f, 0.1f, step};
      const ExactAdamW exact(p, size);
      kernels().adamw(p, size);  // in place
      compare("AdamW's weight", weight, exact.weight);
      compare("AdamW's mean", mean, exact.mean);
      compare("AdamW's square", square, exact.square);
    }
}

struct Options {
  bool mask, rotary, learned;
  int bias;  // 0, none; 1, one for all sequences; 2, one for each
  bool norms = false;
};

void test_attention(long heads, long d, const std::vector<int>& offsets, Options options) {
  const long sequences = offsets.size() - 1, tokens = offsets.back(), D = heads * d;
  const long length = options.bias && sequences ? offsets[1] : 0, biases = options.bias == 1 ? 1 : sequences;
  const Floats query = numbers(tokens * D), key = numbers(tokens * D), value = numbers(tokens * D);
  const Floats bias_k = numbers(D), bias_v = numbers(D), bias = numbers(biases * heads * length * length);
  const Floats dout = numbers(tokens * D), angles = numbers(tokens * (d / 2), 3), seen = numbers(tokens);
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
  Attention with_norms = p;
  const Floats query_norm = numbers(D), key_norm = numbers(D);
  Floats normed_query, normed_key;
  if (options.norms) {
    with_norms.query_norm = query_norm.data();
    with_norms.key_norm = key_norm.data();
    with_norms.eps = 1e-5;
    auto normed = [&](const Floats& x, const Floats& weight) {
      const ExactLayerNorm exact(x, weight, nullptr, x, tokens, D, 1e-5);
      return Floats(exact.y.begin(), exact.y.end());
    };
    normed_query = normed(query, query_norm);
    normed_key = normed(key, key_norm);
    p.query = normed_query.data();
    p.key = normed_key.data();
  }
  const ExactAttention exact(p, dout);
  kernels().attention(with_norms);  // without what gradients need
  compare("attention", out, exact.out);
  p.maximum = with_norms.maximum = maximum.data();
  p.total = with_norms.total = total.data();
  kernels().attention(with_norms);
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
  kernels().attention_gradients(g);
  compare("attention's gradient by query", dquery, exact.dquery, 5e-6, 1);
  compare("attention's gradient by key", dkey, exact.dkey, 5e-6, 1);
  compare("attention's gradient by value", dvalue, exact.dvalue, 5e-6, 1);
  compare("attention's gradient by bias_k", dbias_k, exact.dbias_k, 5e-6, 1);
  compare("attention's gradient by bias_v", dbias_v, exact.dbias_v, 5e-6, 1);
  if (options.bias) compare("attention's gradient by bias", dbias, exact.dbias, 5e-6, 1);
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
  test_attention(1, 8, {0, 700}, {true, true, false, 1});  // more than the keys, and the queries, of a task
  for (int bias : {0, 1, 2}) {
    test_attention(2, 8, {0}, {true, true, false, bias});
    test_attention(2, 8, {0, 0, 0}, {true, true, false, bias});
  }
}

// Weights and a bias, which keep numbers at their size.
struct Parameters {
  Floats weight, bias;

  Parameters(long outputs, long inputs) : weight(numbers(outputs * inputs, 1 / std::sqrt(inputs))), bias(numbers(outputs)) {}

  Layer layer(bool with_bias = true) const { return {weight.data(), with_bias ? bias.data() : nullptr}; }
  Norm norm(bool with_bias = true) const { return {weight.data(), with_bias ? bias.data() : nullptr, 1e-5f}; }
};

void test_gated_linear() {
  for (long tokens : {0, 1, 31, 70})
    for (long width : {4, 33, 128})
      for (long outputs : {1, 20, 128})
        for (int options = 0; options < 8; options++) {
          const Parameters norm(width, 1), x_norm(width, 1), gate(outputs, width), layer(outputs, width);
          const Floats z = numbers(tokens * width), x = numbers(tokens * width), mask = numbers(tokens);
          const Floats residual = numbers(tokens * outputs);
          const bool with_x = options & 1, with_mask = options & 2, y_first = options & 4;
          Floats y(tokens * outputs);
          const GatedLinear p{z.data(),      with_x ? x.data() : nullptr, with_mask ? mask.data() : nullptr,
                              y_first ? nullptr : residual.data(),        y.data(),
                              norm.norm(),   x_norm.norm(with_mask),      gate.layer(with_mask),
                              layer.layer(), tokens,                      width,
                              outputs,       y_first};
          kernels().gated_linear(p);
          compare("gated linear", y, exact_gated_linear(p), width == 4 ? 1e-4 : 5e-6, 1);
        }
}

void test_transition() {
  for (long tokens : {0, 1, 31, 70})
    for (long width : {4, 33, 128})
      for (long inner : {1, 130, 512})
        for (bool with_residual : {false, true}) {
          const Parameters norm(width, 1), expand(inner, width), shrink(width, inner);
          const Floats x = numbers(tokens * width), residual = numbers(tokens * width);
          Floats y(tokens * width);
          const Transition p{x.data(),     with_residual ? residual.data() : nullptr, y.data(), norm.norm(),
                             expand.layer(), shrink.layer(with_residual),             tokens,   width,
                             inner};
          kernels().transition(p);
          compare("transition", y, exact_transition(p), width == 4 ? 1e-4 : 5e-6);
        }
}

void test_triangle_attention() {
  for (long length : {1, 2, 17, 34})
    for (long heads : {1, 3})
      for (bool ending : {false, true})
        for (bool with_residual : {false, true}) {
          const long proteins = 2, width = heads * 11, size = proteins * length * length * width;
          const Parameters norm(width, 1), bias(heads, width), query(width, width), key(width, width);
          const Parameters value(width, width), gate(width, width), output(width, width);
          const Floats z = numbers(size), residual = numbers(size);
          Floats mask(proteins * length, 1.0f), y(size);
          for (long i = length / 2 + 1; i < length; i++) mask[length + i] = 0;  // of the second protein
          const TriangleAttention p{z.data(),
                                    mask.data(),
                                    with_residual ? residual.data() : nullptr,
                                    y.data(),
                                    norm.norm(),
                                    bias.weight.data(),
                                    query.weight.data(),
                                    key.weight.data(),
                                    value.weight.data(),
                                    gate.layer(),
                                    output.layer(with_residual),
                                    proteins,
                                    length,
                                    width,
                                    heads,
                                    ending};
          kernels().triangle_attention(p);
          compare("triangle attention", y, exact_triangle_attention(p), 5e-6);
        }
}

void test_instruction_sets() {
  try {
    choose("nonsense");
    expect(false, "nonsense is no instruction set");
  } catch (const std::invalid_argument&) {
    expect(true, "");
  }
}

void test_multiply_adds() {
  expect(kernels().multiply_adds(1e7) == 0.5f, "sums of multiply-adds converge");
}

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
    expect(false, "there is not that much memory");
  } catch (const std::bad_alloc&) {
    expect(arena.take(10) != nullptr, "the arena goes on");
  }
}

// Each task of `tasks` once.
void loop(long tasks, const std::string& what) {
  std::vector<std::atomic<int>> times(tasks);
  parallel_for(tasks, [&](long i) { times[i]++; });
  for (auto& n : times) expect(n == 1, what);
}

void test_threads() {
  use_threads(3);
  expect(threads() == 3, "as many threads as are asked for");
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
    expect(caught && done < 50, "a task's exception reaches whoever started the loop");
    loop(50, "and the next loop is not disturbed");
  }
  bool caught = false;
  try {
    parallel_for(4, [](long) { parallel_for(4, [](long) { throw 1; }); });
  } catch (int) {
    caught = true;
  }
  expect(caught, "an exception leaves a loop inside a loop");
  loop(50, "and the next loop runs on all threads again");
}

}  // namespace

int main() {
  test_arena();
  test_threads();
  test_exceptions();
  test_instruction_sets();
  for (const auto& set : instruction_sets()) {
    choose(set);
    test_linear();
    test_quantized_linear();
    test_products_of_integers();
    test_half_linear();
    test_gelu();
    test_swiglu();
    test_layer_norm();
    test_softmax();
    test_adamw();
    test_attentions();
    test_gated_linear();
    test_transition();
    test_triangle_attention();
    test_multiply_adds();
    std::printf("%s: %d checks so far, %d failed\n", set.c_str(), checks.load(), failures.load());
  }
  return failures ? 1 : 0;
}
