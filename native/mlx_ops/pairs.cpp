#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

#include "instruction_sets.h"
#include "operation.h"
#include "ops.h"

namespace mlx_esm {
namespace {

// Has no vjp: Python differentiates its version of plain MLX operations.
class PairOperation : public Operation {
 public:
  using Work = std::function<void()>;
  using Prepare = std::function<Work(const Arrays& in, float* out)>;

  PairOperation(mx::Stream s, const char* name, Prepare prepare)
      : Operation(s,
                  [name](const Arrays&) -> Arrays {
                    throw std::runtime_error(std::string(name) + ": the kernel has no derivative and no vmap");
                  }),
        name_(name),
        prepare_(std::move(prepare)) {}

  const char* name() const override { return name_; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] { return prepare_(in, out[0].data<float>()); });
  }

 private:
  const char* name_;
  Prepare prepare_;
};

bool is_matrix(const array& x, int rows, int columns) { return x.shape() == mx::Shape{rows, columns}; }
bool is_vector(const Optional& x, int size) { return !x || x->shape() == mx::Shape{size}; }

}  // namespace

array gated_linear(const array& z, const AffineArrays& norm, float eps, const AffineArrays& gate,
                   const AffineArrays& layer, const Optional& x, const std::optional<AffineArrays>& x_norm,
                   const Optional& mask, const Optional& residual, bool y_first, mx::StreamOrDevice device) {
  auto s = checked_stream(
      device, {z, norm.weight, norm.bias, gate.weight, gate.bias, layer.weight, layer.bias, x, mask, residual});
  require(layer.weight.ndim() == 2 && layer.weight.size() > 0 && z.ndim() > 1 && z.shape(-1) == layer.weight.shape(1),
          "gated_linear: z and layer do not fit");
  const int outputs = layer.weight.shape(0), width = layer.weight.shape(1), tokens = z.size() / width;
  require(is_matrix(gate.weight, outputs, width) && is_vector(layer.bias, outputs) && is_vector(gate.bias, outputs),
          "gated_linear: layer and gate do not fit");
  require(is_vector(norm.weight, width) && is_vector(norm.bias, width), "gated_linear: norm does not fit");
  require(!x == !x_norm, "gated_linear: x and x_norm come together");
  if (x) {
    checked_stream(s, {x_norm->weight, x_norm->bias});
    require(x->size() == z.size() && x->shape(0) == width && is_vector(x_norm->weight, width) &&
                is_vector(x_norm->bias, width),
            "gated_linear: x does not fit");
  }
  require(!mask || mask->size() == size_t(tokens), "gated_linear: mask does not fit");
  mx::Shape shape = z.shape();
  shape.back() = outputs;
  require(!residual || (!y_first && residual->shape() == shape), "gated_linear: residual does not fit");
  if (y_first) {
    shape.pop_back();
    shape.insert(shape.begin(), outputs);
  }

  Arrays inputs;
  struct {
    int z, x, mask, residual, norm, norm_bias, x_norm, x_norm_bias, gate, gate_bias, layer, layer_bias;
  } at{};
  at.z = append(inputs, z, s);
  at.x = append(inputs, x, s);
  at.mask = append(inputs, mask, s);
  at.residual = append(inputs, residual, s);
  at.norm = append(inputs, norm.weight, s);
  at.norm_bias = append(inputs, norm.bias, s);
  at.x_norm = append(inputs, x_norm ? Optional(x_norm->weight) : std::nullopt, s);
  at.x_norm_bias = append(inputs, x_norm ? x_norm->bias : std::nullopt, s);
  at.gate = append(inputs, gate.weight, s);
  at.gate_bias = append(inputs, gate.bias, s);
  at.layer = append(inputs, layer.weight, s);
  at.layer_bias = append(inputs, layer.bias, s);
  auto prepare = [=](const Arrays& in, float* out) {
    GatedLinear p{data(in, at.z),
                  data(in, at.x),
                  data(in, at.mask),
                  data(in, at.residual),
                  out,
                  {data(in, at.norm), data(in, at.norm_bias)},
                  {data(in, at.x_norm), data(in, at.x_norm_bias)},
                  {data(in, at.gate), data(in, at.gate_bias)},
                  {data(in, at.layer), data(in, at.layer_bias)},
                  eps,
                  tokens,
                  width,
                  outputs,
                  y_first};
    return [p] { kernels().gated_linear(p); };
  };
  return array(shape, mx::float32, std::make_shared<PairOperation>(s, "GatedLinear", prepare), inputs);
}

array triangle_attention(const array& z, const array& mask, const AffineArrays& norm, float eps, const array& bias,
                         const array& query, const array& key, const array& value, const AffineArrays& gate,
                         const AffineArrays& output, const Optional& residual, bool ending, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {z, mask, norm.weight, norm.bias, bias, query, key, value, gate.weight, gate.bias,
                                   output.weight, output.bias, residual});
  require(z.ndim() == 4 && z.shape(1) == z.shape(2) && z.shape(3) > 0, "triangle_attention: z is not [B, L, L, C]");
  const int proteins = z.shape(0), length = z.shape(1), width = z.shape(3);
  require(mask.shape() == mx::Shape{proteins, length}, "triangle_attention: mask does not fit");
  require(bias.ndim() == 2 && bias.shape(0) > 0 && bias.shape(1) == width && width % bias.shape(0) == 0,
          "triangle_attention: bias does not fit");
  for (auto weight : {&query, &key, &value, &gate.weight, &output.weight})
    require(is_matrix(*weight, width, width), "triangle_attention: a weight is not [C, C]");
  for (auto vector : {&norm.bias, &gate.bias, &output.bias})
    require(is_vector(*vector, width), "triangle_attention: a bias is not [C]");
  require(is_vector(norm.weight, width), "triangle_attention: norm does not fit");
  require(!residual || residual->shape() == z.shape(), "triangle_attention: residual does not fit");

  Arrays inputs;
  struct {
    int z, mask, norm, norm_bias, bias, query, key, value, gate, gate_bias, output, output_bias, residual;
  } at{};
  at.z = append(inputs, z, s);
  at.mask = append(inputs, mask, s);
  at.norm = append(inputs, norm.weight, s);
  at.norm_bias = append(inputs, norm.bias, s);
  at.bias = append(inputs, bias, s);
  at.query = append(inputs, query, s);
  at.key = append(inputs, key, s);
  at.value = append(inputs, value, s);
  at.gate = append(inputs, gate.weight, s);
  at.gate_bias = append(inputs, gate.bias, s);
  at.output = append(inputs, output.weight, s);
  at.output_bias = append(inputs, output.bias, s);
  at.residual = append(inputs, residual, s);
  auto prepare = [=, heads = bias.shape(0)](const Arrays& in, float* out) {
    TriangleAttention p{data(in, at.z),
                        data(in, at.mask),
                        data(in, at.residual),
                        out,
                        {data(in, at.norm), data(in, at.norm_bias)},
                        eps,
                        data(in, at.bias),
                        data(in, at.query),
                        data(in, at.key),
                        data(in, at.value),
                        {data(in, at.gate), data(in, at.gate_bias)},
                        {data(in, at.output), data(in, at.output_bias)},
                        proteins,
                        length,
                        width,
                        heads,
                        ending};
    return [p] { kernels().triangle_attention(p); };
  };
  return array(z.shape(), mx::float32, std::make_shared<PairOperation>(s, "TriangleAttention", prepare), inputs);
}

array transition(const array& x, const AffineArrays& norm, float eps, const AffineArrays& expand,
                 const AffineArrays& shrink, const Optional& residual, bool gated, mx::StreamOrDevice device) {
  auto s = checked_stream(
      device, {x, norm.weight, norm.bias, expand.weight, expand.bias, shrink.weight, shrink.bias, residual});
  require(x.ndim() > 1 && x.shape(-1) > 0 && expand.weight.ndim() == 2, "transition: no matrix");
  const int width = x.shape(-1), rows = expand.weight.shape(0), inner = gated ? rows / 2 : rows;
  require(is_matrix(expand.weight, gated ? 2 * inner : inner, width) && is_matrix(shrink.weight, width, inner) &&
              inner > 0,
          "transition: expand and shrink do not fit");
  require(is_vector(norm.weight, width) && is_vector(norm.bias, width) && is_vector(expand.bias, rows) &&
              is_vector(shrink.bias, width),
          "transition: a bias or the norm does not fit");
  require(!residual || residual->shape() == x.shape(), "transition: residual does not fit");

  Arrays inputs;
  struct {
    int x, norm, norm_bias, expand, expand_bias, shrink, shrink_bias, residual;
  } at{};
  at.x = append(inputs, x, s);
  at.norm = append(inputs, norm.weight, s);
  at.norm_bias = append(inputs, norm.bias, s);
  at.expand = append(inputs, expand.weight, s);
  at.expand_bias = append(inputs, expand.bias, s);
  at.shrink = append(inputs, shrink.weight, s);
  at.shrink_bias = append(inputs, shrink.bias, s);
  at.residual = append(inputs, residual, s);
  auto prepare = [=, tokens = long(x.size() / width)](const Arrays& in, float* out) {
    Transition p{data(in, at.x),
                 data(in, at.residual),
                 out,
                 {data(in, at.norm), data(in, at.norm_bias)},
                 eps,
                 {data(in, at.expand), data(in, at.expand_bias)},
                 {data(in, at.shrink), data(in, at.shrink_bias)},
                 tokens,
                 width,
                 inner,
                 gated};
    return [p] { kernels().transition(p); };
  };
  return array(x.shape(), mx::float32, std::make_shared<PairOperation>(s, "Transition", prepare), inputs);
}

}  // namespace mlx_esm
