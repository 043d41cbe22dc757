#include <cmath>
#include <stdexcept>

#include "instruction_sets.h"
#include "layer_norm.h"
#include "ops.h"

namespace mlx_esm {
namespace {

struct AttentionInputs {
  int heads;
  std::vector<int> offsets;
  float eps;
  // Indices among the inputs, after query, key and value; -1 if absent.
  int mask = -1, cos = -1, sin = -1, bias_k = -1, bias_v = -1, bias = -1, query_norm = -1, key_norm = -1;

  Attention fill(const Arrays& in) const {
    const int features = in[0].shape(-1);
    Attention p{};
    p.query = data(in, 0);
    p.key = data(in, 1);
    p.value = data(in, 2);
    p.offsets = offsets.data();
    p.sequences = offsets.size() - 1;
    p.heads = heads;
    p.head_dim = features / heads;
    p.scale = scale(features);
    p.mask = mask < 0 ? nullptr : in[mask].data<bool>();
    p.cos = data(in, cos);
    p.sin = data(in, sin);
    p.bias_k = data(in, bias_k);
    p.bias_v = data(in, bias_v);
    p.bias = data(in, bias);
    p.biases = bias < 0 ? 0 : in[bias].shape(0);
    p.query_norm = data(in, query_norm);
    p.key_norm = data(in, key_norm);
    p.eps = eps;
    return p;
  }

  float scale(int features) const { return std::pow(double(features / heads), -0.5); }

  // Apply the layer norms to query and key. Returns the attention without norms that is left, and its inputs.
  std::pair<AttentionInputs, Arrays> after_norms(const Arrays& in, mx::Stream s) const {
    if (query_norm < 0) return {*this, in};
    AttentionInputs rest = *this;
    rest.query_norm = rest.key_norm = -1;
    Arrays inputs(in.begin(), in.end() - 2);  // query_norm and key_norm are the last inputs
    inputs[0] = layer_norm(in[0], in[query_norm], std::nullopt, eps, s);
    inputs[1] = layer_norm(in[1], in[key_norm], std::nullopt, eps, s);
    return {rest, inputs};
  }
};

array rotate(const array& x, const array& cos, const array& sin, mx::Stream s) {
  auto halves = mx::split(x, 2, -1, s);
  const array &x1 = halves[0], &x2 = halves[1];
  return mx::concatenate({mx::subtract(mx::multiply(x1, cos, s), mx::multiply(x2, sin, s), s),
                          mx::add(mx::multiply(x2, cos, s), mx::multiply(x1, sin, s), s)},
                         -1, s);
}

// The attention of one non-empty sequence in MLX's own operations.
class PlainSequence {
 public:
  PlainSequence(const Arrays& in, const AttentionInputs& at, int sequence, mx::Stream s)
      : in(in),
        at(at),
        sequence(sequence),
        start(at.offsets[sequence]),
        end(at.offsets[sequence + 1]),
        features(in[0].shape(-1)),
        s(s) {}

  // Returns context [length, features], and maximum and denominator of the softmax [length, heads].
  Arrays attend() const {
    array query = mx::multiply(heads(tokens(0)), array(at.scale(features)), s);
    array key = heads(and_learned(tokens(1), at.bias_k)), value = heads(and_learned(tokens(2), at.bias_v));
    if (at.cos >= 0) {
      query = rotate(query, tokens(at.cos), tokens(at.sin), s);
      key = rotate(key, tokens(at.cos), tokens(at.sin), s);
    }
    const array scores = biased_and_masked(mx::matmul(query, mx::transpose(key, {0, 2, 1}, s), s));
    const array maximum = mx::max(scores, -1, true, s);
    const array terms = mx::exp(mx::subtract(scores, maximum, s), s), total = mx::sum(terms, -1, true, s);
    const array context = mx::matmul(mx::divide(terms, total, s), value, s);
    return {mx::reshape(mx::transpose(context, {1, 0, 2}, s), {end - start, features}, s),
            mx::transpose(mx::squeeze(maximum, -1, s), s), mx::transpose(mx::squeeze(total, -1, s), s)};
  }

 private:
  // The rows of an input that belong to the sequence, [length, n].
  array tokens(int input) const {
    const array x = input < 3 ? rows_of(in[input], s) : in[input];
    return mx::slice(x, {start, 0}, {end, x.shape(1)}, s);
  }

  array heads(const array& x) const {
    return mx::transpose(mx::reshape(x, {x.shape(0), at.heads, features / at.heads}, s), {1, 0, 2}, s);
  }

  array and_learned(const array& x, int bias) const {
    return bias < 0 ? x : mx::concatenate({x, mx::reshape(in[bias], {1, features}, s)}, 0, s);
  }

  array biased_and_masked(array scores) const {
    if (at.bias >= 0) {
      const int first = in[at.bias].shape(0) == 1 ? 0 : sequence, length = end - start;
      const array one = mx::slice(in[at.bias], {first, 0, 0, 0}, {first + 1, at.heads, length, length}, s);
      scores = mx::add(scores, mx::squeeze(one, 0, s), s);
    }
    if (at.mask < 0) return scores;
    array seen = mx::slice(in[at.mask], {start}, {end}, s);
    if (at.bias_k >= 0) seen = mx::concatenate({seen, array({true})}, 0, s);
    return mx::where(seen, scores, array(HIDDEN), s);
  }

  const Arrays& in;
  const AttentionInputs& at;
  int sequence, start, end, features;
  mx::Stream s;
};

// Returns what the kernel returns: context, and maximum and denominator of the softmax.
Arrays plain_attention(const Arrays& inputs, const AttentionInputs& with_norms, mx::Stream s) {
  const auto [at, in] = with_norms.after_norms(inputs, s);
  Arrays contexts, maxima, totals;
  for (size_t i = 0; i + 1 < at.offsets.size(); i++) {
    if (at.offsets[i] == at.offsets[i + 1]) continue;
    auto results = PlainSequence(in, at, i, s).attend();
    contexts.push_back(results[0]);
    maxima.push_back(results[1]);
    totals.push_back(results[2]);
  }
  return {mx::reshape(mx::concatenate(contexts, 0, s), in[0].shape(), s), mx::concatenate(maxima, 0, s),
          mx::concatenate(totals, 0, s)};
}

// Inputs: those of attention without layer norms, then its outputs and dout. Outputs: the gradients by query, key and
// value, then those by bias_k and bias_v for each sequence, or that by the bias.
class AttentionGradient : public Operation {
 public:
  AttentionGradient(mx::Stream s, AttentionInputs at)
      : Operation(s,
                  [](const Arrays&) -> Arrays {
                    throw std::runtime_error(
                        "Attention's kernel has no second derivatives, nor gradients under vmap: "
                        "set MLX_ESM_KERNELS=0");
                  }),
        at_(std::move(at)) {}

  const char* name() const override { return "AttentionGradient"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      AttentionGradients g{};
      g.forward = at_.fill(in);
      const int results = in.size() - 4;
      g.forward.out = const_cast<float*>(data(in, results));
      g.forward.maximum = const_cast<float*>(data(in, results + 1));
      g.forward.total = const_cast<float*>(data(in, results + 2));
      g.dout = data(in, results + 3);
      g.dquery = out[0].data<float>();
      g.dkey = out[1].data<float>();
      g.dvalue = out[2].data<float>();
      if (at_.bias_k >= 0) {
        g.dbias_k = out[3].data<float>();
        g.dbias_v = out[4].data<float>();
      }
      if (at_.bias >= 0) g.dbias = out[3].data<float>();
      return [g, offsets = at_.offsets]() mutable {
        g.forward.offsets = offsets.data();
        kernels().attention_gradients(g);
      };
    });
  }

 private:
  AttentionInputs at_;
};

class AttentionOperation : public Operation {
 public:
  AttentionOperation(mx::Stream s, AttentionInputs at)
      : Operation(s, [s, at](const Arrays& in) { return plain_attention(in, at, s); }), at_(std::move(at)) {}

  const char* name() const override { return "Attention"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      Attention p = at_.fill(in);
      p.out = out[0].data<float>();
      p.maximum = out[1].data<float>();
      p.total = out[2].data<float>();
      return [p, offsets = at_.offsets]() mutable {
        p.offsets = offsets.data();
        kernels().attention(p);
      };
    });
  }

  Arrays vjp(const Arrays& in, const Arrays& dout, const std::vector<int>& argnums, const Arrays& out) override {
    for (int i : argnums)
      // Angles are not trained: the slow way is good enough.
      if (i == at_.cos || i == at_.sin) return Operation::vjp(in, dout, argnums, out);
    auto s = stream();
    const auto gradients = all_gradients(in, dout[0], out);
    Arrays asked;
    for (int i : argnums) {
      if (i < 3)
        asked.push_back(gradients[i]);
      else if (i == at_.query_norm || i == at_.key_norm)
        asked.push_back(gradients[gradients.size() - (i == at_.query_norm ? 2 : 1)]);
      else if (i == at_.mask)  // mx.checkpoint asks for the gradients of all arguments
        asked.push_back(mx::zeros_like(in[i], s));
      else if (i == at_.bias)
        asked.push_back(gradients[3]);
      else
        asked.push_back(mx::sum(gradients[i == at_.bias_k ? 3 : 4], 0, false, s));
    }
    return asked;
  }

 private:
  // The outputs of AttentionGradient, followed by the gradients of the weights of the layer norms, if any.
  Arrays all_gradients(const Arrays& in, const array& dout, const Arrays& out) {
    auto [at, inputs] = at_.after_norms(in, stream());
    std::vector<mx::Shape> shapes(3, in[0].shape());
    if (at_.bias_k >= 0) shapes.resize(5, {int(at_.offsets.size()) - 1, in[0].shape(-1)});
    if (at_.bias >= 0) shapes.push_back(in[at_.bias].shape());
    for (auto& x : {out[0], out[1], out[2], contiguous(dout, stream())}) inputs.push_back(x);
    auto gradients = array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32),
                                        std::make_shared<AttentionGradient>(stream(), at), inputs);
    if (at_.query_norm < 0) return gradients;
    const int norms[] = {at_.query_norm, at_.key_norm};
    for (int i : {0, 1}) {
      const auto of_norm = layer_norm_gradient(in[i], in[norms[i]], gradients[i], at_.eps, stream());
      gradients[i] = of_norm[0];
      gradients.push_back(of_norm[1]);
    }
    return gradients;
  }

  AttentionInputs at_;
};

// Has no vjp: Python differentiates its version of plain MLX operations.
class WindowedAttention : public Operation {
 public:
  WindowedAttention(mx::Stream s, AttentionInputs at, int window)
      : Operation(s,
                  [](const Arrays&) -> Arrays {
                    throw std::runtime_error("windowed_attention: the kernel has no derivative and no vmap");
                  }),
        at_(std::move(at)),
        window_(window) {}

  const char* name() const override { return "WindowedAttention"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      Attention p = at_.fill(in);
      p.out = out[0].data<float>();
      p.window = window_;
      return [p, offsets = at_.offsets]() mutable {
        p.offsets = offsets.data();
        kernels().attention(p);
      };
    });
  }

 private:
  AttentionInputs at_;
  int window_;
};

void check_bias(const array& bias, const std::vector<int>& offsets, int heads) {
  const int sequences = offsets.size() - 1, length = sequences ? offsets[1] : 0;
  for (int i = 0; i < sequences; i++)
    require(offsets[i + 1] - offsets[i] == length, "attention: with a bias, all sequences must have the same length");
  require(bias.ndim() == 4 && (bias.shape(0) == 1 || bias.shape(0) == sequences) &&
              bias.shape() == mx::Shape{bias.shape(0), heads, length, length},
          "attention: bias does not fit");
}

void check_tokens(const array& query, const array& key, const array& value, int heads, const std::vector<int>& offsets,
                  const Optional& mask) {
  require(query.ndim() > 1 && key.shape() == query.shape() && value.shape() == query.shape(),
          "attention: query, key and value do not fit");
  const int features = query.shape(-1), tokens = features ? query.size() / features : 0;
  require(heads > 0 && features > 0 && features % heads == 0, "attention: heads do not fit");
  require(!offsets.empty() && offsets.front() == 0 && offsets.back() == tokens, "attention: offsets do not fit");
  for (size_t i = 1; i < offsets.size(); i++) require(offsets[i - 1] <= offsets[i], "attention: offsets descend");
  require(!mask || (mask->dtype() == mx::bool_ && mask->shape() == mx::Shape{tokens}), "attention: mask does not fit");
}

}  // namespace

array windowed_attention(const array& query, const array& key, const array& value, int heads,
                         const std::vector<int>& offsets, int window, const Optional& mask,
                         mx::StreamOrDevice device) {
  auto s = checked_stream(device, {query, key, value});
  AttentionInputs at{heads, offsets, 0.0f};
  check_tokens(query, key, value, heads, offsets, mask);
  require(window > 0, "windowed_attention: window must be positive");
  Arrays inputs{contiguous(query, s), contiguous(key, s), contiguous(value, s)};
  at.mask = append(inputs, mask, s);
  return array(query.shape(), mx::float32, std::make_shared<WindowedAttention>(s, at, window), inputs);
}

array attention(const array& query, const array& key, const array& value, int heads, const std::vector<int>& offsets,
                const Optional& mask, const Optional& cos, const Optional& sin, const Optional& bias_k,
                const Optional& bias_v, const Optional& bias, const Optional& query_norm, const Optional& key_norm,
                float eps, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {query, key, value, cos, sin, bias_k, bias_v, bias, query_norm, key_norm});
  check_tokens(query, key, value, heads, offsets, mask);
  const int features = query.shape(-1), tokens = query.size() / features;
  require(!cos == !sin && !bias_k == !bias_v && !query_norm == !key_norm,
          "attention: cos and sin, bias_k and bias_v, query_norm and key_norm come in pairs");
  for (auto angles : {&cos, &sin})
    require(!*angles || (features / heads % 2 == 0 && (*angles)->shape() == mx::Shape{tokens, features / heads / 2}),
            "attention: cos and sin do not fit");
  for (auto learned : {&bias_k, &bias_v})
    require(!*learned || (!cos && !bias && (*learned)->shape() == mx::Shape{features}),
            "attention: bias_k and bias_v do not fit");
  for (auto weight : {&query_norm, &key_norm})
    require(!*weight || (*weight)->shape() == mx::Shape{features}, "attention: query_norm and key_norm do not fit");
  if (bias) check_bias(*bias, offsets, heads);

  Arrays inputs{contiguous(query, s), contiguous(key, s), contiguous(value, s)};
  AttentionInputs at{heads, offsets, eps};
  at.mask = append(inputs, mask, s);
  at.cos = append(inputs, cos, s);
  at.sin = append(inputs, sin, s);
  at.bias_k = append(inputs, bias_k, s);
  at.bias_v = append(inputs, bias_v, s);
  at.bias = append(inputs, bias, s);
  at.query_norm = append(inputs, query_norm, s);
  at.key_norm = append(inputs, key_norm, s);
  return array::make_arrays({query.shape(), {tokens, heads}, {tokens, heads}}, {mx::float32, mx::float32, mx::float32},
                            std::make_shared<AttentionOperation>(s, at), inputs)[0];
}

}  // namespace mlx_esm
