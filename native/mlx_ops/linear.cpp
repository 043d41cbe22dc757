#include "gelu.h"
#include "instruction_sets.h"
#include "ops.h"

namespace mlx_esm {
namespace {

struct LinearInputs {
  int bias = -1, residual = -1;  // their places behind x and weight
  Activation activation = Activation::none;
};

Arrays plain_linear(const Arrays& in, LinearInputs at, mx::Stream s) {
  array y = mx::matmul(in[0], mx::transpose(in[1], s), s);
  if (at.bias >= 0) y = mx::add(y, in[at.bias], s);
  if (at.activation == Activation::gelu) y = plain_gelu(y, s);
  if (at.activation == Activation::relu) y = mx::maximum(y, array(0.0f), s);
  if (at.residual >= 0) y = mx::add(y, in[at.residual], s);
  return {y};
}

// The sum over the rows of x [rows, n] as a product with ones: a BLAS adds in blocks, mx::sum one by one.
array column_sums(const array& x, mx::Stream s) {
  return mx::reshape(mx::matmul(mx::ones({1, x.shape(0)}, x.dtype(), s), x, s), {x.shape(1)}, s);
}

class LinearOperation : public Operation {
 public:
  LinearOperation(mx::Stream s, LinearInputs at)
      : Operation(s, [s, at](const Arrays& in) { return plain_linear(in, at, s); }), at_(at) {}

  const char* name() const override { return "Linear"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [x = data(in, 0), w = data(in, 1), bias = data(in, at_.bias), residual = data(in, at_.residual),
              y = out[0].data<float>(), outputs = long(in[1].shape(0)), inputs = long(in[1].shape(1)),
              tokens = long(out[0].size() / in[1].shape(0)), activation = at_.activation] {
        kernels().linear(x, w, bias, residual, y, tokens, outputs, inputs, activation);
      };
    });
  }

  Arrays vjp(const Arrays& in, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    auto s = stream();
    const array dy = before_activation(in, rows_of(cotangents[0], s));
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
  // The gradient of what goes into the activation, from that of its result [tokens, outputs]. What goes into it is
  // computed once more: nothing of the size of the output is kept.
  array before_activation(const Arrays& in, const array& dy) {
    if (at_.activation == Activation::none) return dy;
    auto s = stream();
    auto bias = at_.bias >= 0 ? Optional(in[at_.bias]) : std::nullopt;
    const array y = rows_of(linear(in[0], in[1], bias, std::nullopt, Activation::none, s), s);
    if (at_.activation == Activation::gelu) return gelu_gradient(y, dy, s);
    return mx::where(mx::greater(y, array(0.0f), s), dy, array(0.0f), s);
  }

  LinearInputs at_;
};

}  // namespace

array linear(const array& x, const array& weight, const Optional& bias, const Optional& residual,
             Activation activation, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x, weight, bias, residual});
  require(weight.ndim() == 2 && x.ndim() > 0 && x.shape(-1) == weight.shape(1), "linear: x and weight do not fit");
  require(weight.size() > 0, "linear: weight is empty");
  require(!bias || bias->shape() == mx::Shape{weight.shape(0)}, "linear: bias does not fit");
  auto shape = x.shape();
  shape.back() = weight.shape(0);
  require(!residual || residual->shape() == shape, "linear: residual does not fit");

  Arrays inputs{contiguous(x, s), contiguous(weight, s)};
  LinearInputs at;
  at.activation = activation;
  at.bias = append(inputs, bias, s);
  at.residual = append(inputs, residual, s);
  return array(shape, mx::float32, std::make_shared<LinearOperation>(s, at), inputs);
}

}  // namespace mlx_esm
