#include "primitives.h"

#include <atomic>
#include <cmath>
#include <functional>
#include <stdexcept>

#include "mlx/backend/cpu/encoder.h"

namespace mlx_esm {

using mx::array;
using Arrays = std::vector<array>;
using Optional = std::optional<array>;

namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    tables.push_back(avx512_kernels());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(avx2_kernels());
#endif
  tables.push_back(portable_kernels());
  return tables;
}

const Kernels* chosen = supported().front();

}  // namespace

const Kernels& kernels() { return *chosen; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (auto table : supported()) names.push_back(table->name);
  return names;
}

void choose(const std::string& name) {
  for (auto table : supported())
    if (name == table->name) {
      chosen = table;
      return;
    }
  throw std::invalid_argument("This machine has no kernels called " + name);
}

namespace {

// Our operations that may wait with their outputs allocated. MLX itself allocates for a hundred operations ahead of the
// one at work, several layers of a large model; a few suffice for the work never to wait.
constexpr int AHEAD = 4;
std::atomic<int> waiting{0};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

const float* data(const Arrays& inputs, int index) { return index < 0 ? nullptr : inputs[index].data<float>(); }

// Row-major without gaps. A weight that is so already does not become a node of the graph.
array contiguous(const array& x, mx::Stream s) {
  return x.is_available() && x.flags().row_contiguous ? x : mx::contiguous(x, false, s);
}

array rows_of(const array& x, mx::Stream s) { return mx::reshape(x, {-1, x.shape(-1)}, s); }

// The sum over the rows of x [rows, n] as a product with ones: a BLAS adds in blocks, mx::sum one by one.
array column_sums(const array& x, mx::Stream s) {
  return mx::reshape(mx::matmul(mx::ones({1, x.shape(0)}, x.dtype(), s), x, s), {x.shape(1)}, s);
}

// An operation with a kernel, and the same in MLX's own operations for the transformations that have no rule here:
// jvp, vmap, and gradients of gradients.
class Operation : public mx::Primitive {
 public:
  using Function = std::function<Arrays(const Arrays&)>;

  Operation(mx::Stream stream, Function plain) : Primitive(stream), plain_(std::move(plain)) {}

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string(name()) + ": the kernels run on CPU streams only");
  }

  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override {
    return mx::jvp(of(primals, argnums), pick(primals, argnums), tangents).second;
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    return mx::vjp(of(primals, argnums), pick(primals, argnums), cotangents).second;
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    Arrays outputs = mx::vmap(plain_, axes)(inputs);
    return {outputs, std::vector<int>(outputs.size(), 0)};
  }

 protected:
  static Arrays pick(const Arrays& arrays, const std::vector<int>& indices) {
    Arrays picked;
    for (int i : indices) picked.push_back(arrays[i]);
    return picked;
  }

  // Allocate the outputs, then let `make` read the arrays' addresses and return what is to be done when it is time.
  template <class Make>
  void run(Arrays& outputs, Make make) {
    for (int n; (n = waiting.load()) >= AHEAD;) waiting.wait(n);
    for (auto& output : outputs) output.set_data(mx::allocator::malloc(output.nbytes()));
    waiting.fetch_add(1);
    mx::cpu::get_command_encoder(stream()).dispatch([work = make()]() mutable {
      work();
      waiting.fetch_sub(1);
      waiting.notify_one();
    });
  }

 private:
  // The plain function of the arguments `argnums` alone.
  Function of(const Arrays& primals, const std::vector<int>& argnums) const {
    return [plain = plain_, primals, argnums](const Arrays& picked) {
      Arrays arguments = primals;
      for (size_t i = 0; i < argnums.size(); i++) arguments[argnums[i]] = picked[i];
      return plain(arguments);
    };
  }

  Function plain_;
};

// GELU

array plain_gelu(const array& x, mx::Stream s) {
  auto phi = mx::add(mx::erf(mx::multiply(x, array(std::sqrt(0.5f)), s), s), array(1.0f), s);
  return mx::multiply(mx::multiply(x, phi, s), array(0.5f), s);
}

class GeluGradient : public Operation {
 public:
  explicit GeluGradient(mx::Stream s)
      : Operation(s, [s](const Arrays& in) {
          auto f = [s](const Arrays& x) { return Arrays{plain_gelu(x[0], s)}; };
          return mx::vjp(f, {in[0]}, {in[1]}).second;
        }) {}

  const char* name() const override { return "GeluGradient"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [x = data(in, 0), dy = data(in, 1), dx = out[0].data<float>(), n = long(in[0].size())] {
        kernels().gelu_gradient(x, dy, dx, n);
      };
    });
  }
};

array gelu_gradient(const array& x, const array& dy, mx::Stream s) {
  return array(x.shape(), mx::float32, std::make_shared<GeluGradient>(s), {x, contiguous(dy, s)});
}

class Gelu : public Operation {
 public:
  explicit Gelu(mx::Stream s) : Operation(s, [s](const Arrays& in) { return Arrays{plain_gelu(in[0], s)}; }) {}

  const char* name() const override { return "Gelu"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [x = data(in, 0), y = out[0].data<float>(), n = long(in[0].size())] { kernels().gelu(x, y, n); };
    });
  }

  Arrays vjp(const Arrays& in, const Arrays& dout, const std::vector<int>&, const Arrays&) override {
    return {gelu_gradient(in[0], dout[0], stream())};
  }
};

// Linear

struct LinearInputs {
  int bias = -1, residual = -1;  // their places among the inputs, behind x and weight
  bool gelu = false;
};

class LinearOperation : public Operation {
 public:
  LinearOperation(mx::Stream s, LinearInputs at)
      : Operation(s,
                  [s, at](const Arrays& in) {
                    array y = mx::matmul(in[0], mx::transpose(in[1], s), s);
                    if (at.bias > 0) y = mx::add(y, in[at.bias], s);
                    if (at.gelu) y = plain_gelu(y, s);
                    if (at.residual > 0) y = mx::add(y, in[at.residual], s);
                    return Arrays{y};
                  }),
        at_(at) {}

  const char* name() const override { return "Linear"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [x = data(in, 0), w = data(in, 1), bias = data(in, at_.bias), residual = data(in, at_.residual),
              y = out[0].data<float>(), outputs = long(in[1].shape(0)), inputs = long(in[1].shape(1)),
              tokens = long(out[0].size() / in[1].shape(0)), gelu = at_.gelu] {
        kernels().linear(x, w, bias, residual, y, tokens, outputs, inputs, gelu);
      };
    });
  }

  Arrays vjp(const Arrays& in, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    auto s = stream();
    array dy = rows_of(cotangents[0], s);
    if (at_.gelu) {  // what went into it is computed once more: nothing of the size of the output is kept
      auto bias = at_.bias > 0 ? Optional(in[at_.bias]) : std::nullopt;
      dy = gelu_gradient(rows_of(linear(in[0], in[1], bias, std::nullopt, false, s), s), dy, s);
    }
    Arrays gradients;
    for (int i : argnums) {
      if (i == 0)
        gradients.push_back(mx::reshape(mx::matmul(dy, in[1], s), in[0].shape(), s));
      else if (i == 1)
        gradients.push_back(mx::matmul(mx::transpose(dy, s), rows_of(in[0], s), s));
      else if (i == at_.bias)
        gradients.push_back(column_sums(dy, s));
      else
        gradients.push_back(cotangents[0]);
    }
    return gradients;
  }

 private:
  LinearInputs at_;
};

// Layer norm

class LayerNormGradient : public Operation {
 public:
  LayerNormGradient(mx::Stream s, float eps)
      : Operation(s,
                  [s, eps](const Arrays& in) {
                    auto f = [s, eps](const Arrays& x) { return Arrays{mx::fast::layer_norm(x[0], x[1], x[2], eps, s)}; };
                    return mx::vjp(f, {in[0], in[1], mx::zeros_like(in[1], s)}, {in[2]}).second;
                  }),
        eps_(eps) {}

  const char* name() const override { return "LayerNormGradient"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [x = data(in, 0), weight = data(in, 1), dy = data(in, 2), dx = out[0].data<float>(),
              dweight = out[1].data<float>(), dbias = out[2].data<float>(), width = long(in[1].size()),
              rows = long(in[0].size() / in[1].size()), eps = eps_] {
        kernels().layer_norm_gradient(x, weight, dy, dx, dweight, dbias, rows, width, eps);
      };
    });
  }

 private:
  float eps_;
};

class LayerNorm : public Operation {
 public:
  LayerNorm(mx::Stream s, float eps)
      : Operation(
            s, [s, eps](const Arrays& in) { return Arrays{mx::fast::layer_norm(in[0], in[1], in[2], eps, s)}; }),
        eps_(eps) {}

  const char* name() const override { return "LayerNorm"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [x = data(in, 0), weight = data(in, 1), bias = data(in, 2), y = out[0].data<float>(),
              width = long(in[1].size()), rows = long(in[0].size() / in[1].size()), eps = eps_] {
        kernels().layer_norm(x, weight, bias, y, rows, width, eps);
      };
    });
  }

  Arrays vjp(const Arrays& in, const Arrays& dout, const std::vector<int>& argnums, const Arrays&) override {
    auto gradients = array::make_arrays({in[0].shape(), in[1].shape(), in[1].shape()},
                                        {mx::float32, mx::float32, mx::float32},
                                        std::make_shared<LayerNormGradient>(stream(), eps_),
                                        {in[0], in[1], contiguous(dout[0], stream())});
    return pick(gradients, argnums);
  }

 private:
  float eps_;
};

// Softmax

class SoftmaxGradient : public Operation {
 public:
  explicit SoftmaxGradient(mx::Stream s)
      : Operation(s, [s](const Arrays& in) {
          array weighted = mx::multiply(in[0], in[1], s);
          return Arrays{mx::subtract(weighted, mx::multiply(in[0], mx::sum(weighted, -1, true, s), s), s)};
        }) {}

  const char* name() const override { return "SoftmaxGradient"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [y = data(in, 0), dy = data(in, 1), dx = out[0].data<float>(), width = long(in[0].shape(-1)),
              rows = long(in[0].size() / in[0].shape(-1))] { kernels().softmax_gradient(y, dy, dx, rows, width); };
    });
  }
};

class Softmax : public Operation {
 public:
  explicit Softmax(mx::Stream s) : Operation(s, [s](const Arrays& in) { return Arrays{mx::softmax(in[0], -1, true, s)}; }) {}

  const char* name() const override { return "Softmax"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [x = data(in, 0), y = out[0].data<float>(), width = long(in[0].shape(-1)),
              rows = long(in[0].size() / in[0].shape(-1))] { kernels().softmax(x, y, rows, width); };
    });
  }

  Arrays vjp(const Arrays& in, const Arrays& dout, const std::vector<int>&, const Arrays& out) override {
    return {array(in[0].shape(), mx::float32, std::make_shared<SoftmaxGradient>(stream()),
                  {out[0], contiguous(dout[0], stream())})};
  }
};

// Attention

struct AttentionInputs {
  int heads;
  std::vector<int> offsets;
  int mask = -1, cos = -1, sin = -1, bias_k = -1, bias_v = -1;  // their places behind query, key and value

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
    return p;
  }

  float scale(int features) const { return std::pow(double(features / heads), -0.5); }
};

array rotate(const array& x, const array& cos, const array& sin, mx::Stream s) {
  auto halves = mx::split(x, 2, -1, s);
  auto turned = [&](const array& a, const array& b, auto combine) {
    return combine(mx::multiply(a, cos, s), mx::multiply(b, sin, s));
  };
  return mx::concatenate({turned(halves[0], halves[1], [&](auto a, auto b) { return mx::subtract(a, b, s); }),
                          turned(halves[1], halves[0], [&](auto a, auto b) { return mx::add(a, b, s); })},
                         -1, s);
}

// Context, and softmax's maximum and denominator, sequence by sequence.
Arrays plain_attention(const Arrays& in, const AttentionInputs& at, mx::Stream s) {
  const int features = in[0].shape(-1), head_dim = features / at.heads;
  std::vector<Arrays> parts(3);
  for (size_t i = 0; i + 1 < at.offsets.size(); i++) {
    const int start = at.offsets[i], end = at.offsets[i + 1];
    if (start == end) continue;
    auto tokens = [&](int input) {  // [length, n]
      array x = input < 3 ? rows_of(in[input], s) : in[input];
      return mx::slice(x, {start, 0}, {end, x.shape(1)}, s);
    };
    auto heads = [&](const array& x) {
      return mx::transpose(mx::reshape(x, {x.shape(0), at.heads, head_dim}, s), {1, 0, 2}, s);
    };
    auto with = [&](const array& x, int bias) {
      return bias < 0 ? x : mx::concatenate({x, mx::reshape(in[bias], {1, features}, s)}, 0, s);
    };
    array query = mx::multiply(heads(tokens(0)), array(at.scale(features)), s);
    array key = heads(with(tokens(1), at.bias_k)), value = heads(with(tokens(2), at.bias_v));
    if (at.cos >= 0) {
      query = rotate(query, tokens(at.cos), tokens(at.sin), s);
      key = rotate(key, tokens(at.cos), tokens(at.sin), s);
    }
    array scores = mx::matmul(query, mx::transpose(key, {0, 2, 1}, s), s);
    if (at.mask >= 0) {
      array seen = mx::slice(in[at.mask], {start}, {end}, s);
      if (at.bias_k >= 0) seen = mx::concatenate({seen, array({true})}, 0, s);
      scores = mx::where(seen, scores, array(HIDDEN), s);
    }
    array maximum = mx::max(scores, -1, true, s);
    array terms = mx::exp(mx::subtract(scores, maximum, s), s), total = mx::sum(terms, -1, true, s);
    array context = mx::matmul(mx::divide(terms, total, s), value, s);
    parts[0].push_back(mx::reshape(mx::transpose(context, {1, 0, 2}, s), {end - start, features}, s));
    parts[1].push_back(mx::transpose(mx::squeeze(maximum, -1, s), s));
    parts[2].push_back(mx::transpose(mx::squeeze(total, -1, s), s));
  }
  return {mx::reshape(mx::concatenate(parts[0], 0, s), in[0].shape(), s), mx::concatenate(parts[1], 0, s),
          mx::concatenate(parts[2], 0, s)};
}

// Behind the inputs of attention come its outputs and dout.
class AttentionGradient : public Operation {
 public:
  AttentionGradient(mx::Stream s, AttentionInputs at)
      : Operation(s,
                  [](const Arrays&) -> Arrays {
                    throw std::runtime_error(
                        "Attention's kernel has no second derivatives, nor gradients under vmap: set MLX_ESM_KERNELS=0");
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
      if (i == at_.cos || i == at_.sin) return Operation::vjp(in, dout, argnums, out);  // nobody trains the angles
    auto s = stream();
    std::vector<mx::Shape> shapes(3, in[0].shape());
    if (at_.bias_k >= 0) shapes.resize(5, {int(at_.offsets.size()) - 1, in[0].shape(-1)});
    Arrays inputs = in;
    for (auto& x : {out[0], out[1], out[2], contiguous(dout[0], s)}) inputs.push_back(x);
    auto gradients = array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32),
                                        std::make_shared<AttentionGradient>(s, at_), inputs);
    Arrays asked;
    for (int i : argnums) {
      if (i == at_.mask)  // under mx.checkpoint every argument is asked for
        asked.push_back(mx::zeros_like(in[i], s));
      else
        asked.push_back(i < 3 ? gradients[i] : mx::sum(gradients[i == at_.bias_k ? 3 : 4], 0, false, s));
    }
    return asked;
  }

 private:
  AttentionInputs at_;
};

mx::Stream checked_stream(mx::StreamOrDevice s, const std::vector<Optional>& arrays) {
  for (auto& x : arrays) require(!x || x->dtype() == mx::float32, "the kernels take float32");
  auto stream = mx::to_stream(s);
  require(stream.device == mx::Device::cpu, "the kernels run on CPU streams only");
  return stream;
}

}  // namespace

array linear(const array& x, const array& weight, const Optional& bias, const Optional& residual, bool gelu,
             mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x, weight, bias, residual});
  require(weight.ndim() == 2 && x.ndim() > 0 && x.shape(-1) == weight.shape(1), "linear: x and weight do not fit");
  require(weight.size() > 0, "linear: weight is empty");
  require(!bias || bias->shape() == mx::Shape{weight.shape(0)}, "linear: bias does not fit");
  auto shape = x.shape();
  shape.back() = weight.shape(0);
  require(!residual || residual->shape() == shape, "linear: residual does not fit");

  LinearInputs at;
  at.gelu = gelu;
  Arrays inputs{contiguous(x, s), contiguous(weight, s)};
  for (auto [optional, place] : {std::pair{&bias, &at.bias}, {&residual, &at.residual}})
    if (*optional) {
      *place = inputs.size();
      inputs.push_back(contiguous(**optional, s));
    }
  return array(shape, mx::float32, std::make_shared<LinearOperation>(s, at), inputs);
}

array gelu(const array& x, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x});
  return array(x.shape(), mx::float32, std::make_shared<Gelu>(s), {contiguous(x, s)});
}

array layer_norm(const array& x, const array& weight, const array& bias, float eps, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x, weight, bias});
  require(x.ndim() > 0 && weight.shape() == mx::Shape{x.shape(-1)} && bias.shape() == weight.shape(),
          "layer_norm: x, weight and bias do not fit");
  require(weight.size() > 0, "layer_norm: weight is empty");
  return array(x.shape(), mx::float32, std::make_shared<LayerNorm>(s, eps),
               {contiguous(x, s), contiguous(weight, s), contiguous(bias, s)});
}

array softmax(const array& x, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x});
  require(x.ndim() > 0 && x.shape(-1) > 0, "softmax: there is nothing to add up");
  return array(x.shape(), mx::float32, std::make_shared<Softmax>(s), {contiguous(x, s)});
}

array attention(const array& query, const array& key, const array& value, int heads, const std::vector<int>& offsets,
                const Optional& mask, const Optional& cos, const Optional& sin, const Optional& bias_k,
                const Optional& bias_v, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {query, key, value, cos, sin, bias_k, bias_v});
  require(query.ndim() > 1 && key.shape() == query.shape() && value.shape() == query.shape(),
          "attention: query, key and value do not fit");
  const int features = query.shape(-1), tokens = features ? query.size() / features : 0;
  require(heads > 0 && features > 0 && features % heads == 0, "attention: heads do not fit");
  require(!offsets.empty() && offsets.front() == 0 && offsets.back() == tokens, "attention: offsets do not fit");
  for (size_t i = 1; i < offsets.size(); i++) require(offsets[i - 1] <= offsets[i], "attention: offsets descend");
  require(!mask || (mask->dtype() == mx::bool_ && mask->shape() == mx::Shape{tokens}), "attention: mask does not fit");
  require(!cos == !sin && !bias_k == !bias_v, "attention: cos and sin, bias_k and bias_v come in pairs");
  for (auto angles : {&cos, &sin})
    require(!*angles || (features / heads % 2 == 0 && (*angles)->shape() == mx::Shape{tokens, features / heads / 2}),
            "attention: cos and sin do not fit");
  for (auto bias : {&bias_k, &bias_v})
    require(!*bias || (!cos && (*bias)->shape() == mx::Shape{features}), "attention: bias_k and bias_v do not fit");

  AttentionInputs at{heads, offsets};
  Arrays inputs{contiguous(query, s), contiguous(key, s), contiguous(value, s)};
  for (auto [optional, place] : {std::pair{&mask, &at.mask},
                                 {&cos, &at.cos},
                                 {&sin, &at.sin},
                                 {&bias_k, &at.bias_k},
                                 {&bias_v, &at.bias_v}})
    if (*optional) {
      *place = inputs.size();
      inputs.push_back(contiguous(**optional, s));
    }
  return array::make_arrays({query.shape(), {tokens, heads}, {tokens, heads}},
                            {mx::float32, mx::float32, mx::float32}, std::make_shared<AttentionOperation>(s, at),
                            inputs)[0];
}

}  // namespace mlx_esm
