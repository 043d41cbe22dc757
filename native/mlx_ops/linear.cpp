#include "linear.h"

#include <utility>

#include "gelu.h"
#include "instruction_sets.h"
#include "ops.h"

namespace mlx_esm {
namespace {

// Sum the rows of x [rows, n] by a product with ones: BLAS sums in blocks, which rounds less than mx::sum.
array column_sums(const array& x, mx::Stream s) {
  return mx::reshape(mx::matmul(mx::ones({1, x.shape(0)}, x.dtype(), s), x, s), {x.shape(1)}, s);
}

Arrays plain_linear(const Arrays& in, const array& weight, LinearInputs at, mx::Stream s) {
  array y = mx::matmul(in[0], mx::transpose(weight, s), s);
  if (at.bias >= 0) y = mx::add(y, in[at.bias], s);
  if (at.activation == Activation::gelu) y = plain_gelu(y, s);
  if (at.activation == Activation::relu) y = mx::maximum(y, array(0.0f), s);
  if (at.output_scale != 1) y = mx::multiply(y, array(at.output_scale), s);
  if (at.residual >= 0) y = mx::add(y, in[at.residual], s);
  return {y};
}

}  // namespace

LinearOperation::LinearOperation(mx::Stream s, LinearInputs at, FloatWeight float_weight, Kernel kernel)
    : Operation(s, [=](const Arrays& in) { return plain_linear(in, float_weight(in), at, s); }),
      at_(at),
      float_weight_(std::move(float_weight)),
      kernel_(std::move(kernel)) {}

void LinearOperation::eval_cpu(const Arrays& in, Arrays& out) {
  run(out, [&] {
    const long inputs = in[0].shape(-1), outputs = out[0].shape(-1), tokens = out[0].size() / outputs;
    return [=, work = kernel_(in), x = data(in, 0), bias = data(in, at_.bias), residual = data(in, at_.residual),
            y = out[0].data<float>(), activation = at_.activation, output_scale = at_.output_scale] {
      work(x, bias, residual, y, tokens, outputs, inputs, activation, output_scale);
    };
  });
}

Arrays LinearOperation::vjp(const Arrays& in, const Arrays& cotangents, const std::vector<int>& argnums,
                            const Arrays&) {
  auto s = stream();
  const array scaled = at_.output_scale == 1 ? cotangents[0] : mx::multiply(cotangents[0], array(at_.output_scale), s);
  const array weight = float_weight_(in), dy = before_activation(in, weight, rows_of(scaled, s));
  Arrays gradients;
  for (int i : argnums) {
    if (i == 0)
      gradients.push_back(mx::reshape(mx::matmul(dy, weight, s), in[0].shape(), s));
    else if (i == at_.bias)
      gradients.push_back(column_sums(dy, s));
    else if (i == at_.residual)
      gradients.push_back(cotangents[0]);
    else if (i == 1 && mx::issubdtype(in[1].dtype(), mx::floating))
      gradients.push_back(mx::astype(mx::matmul(mx::transpose(dy, s), rows_of(in[0], s), s), in[1].dtype(), s));
    else
      throw std::invalid_argument("linear: a quantized weight has no gradient");
  }
  return gradients;
}

array LinearOperation::before_activation(const Arrays& in, const array& weight, const array& dy) {
  if (at_.activation == Activation::none) return dy;
  auto s = stream();
  auto bias = at_.bias >= 0 ? Optional(in[at_.bias]) : std::nullopt;
  const array y = rows_of(linear(in[0], weight, bias, std::nullopt, Activation::none, 1, s), s);
  if (at_.activation == Activation::gelu) return gelu_gradient(y, dy, s);
  return mx::where(mx::greater(y, array(0.0f), s), dy, array(0.0f), s);
}

array make_linear(const array& x, const Arrays& weight, int outputs, const Optional& bias, const Optional& residual,
                  Activation activation, float output_scale, LinearOperation::FloatWeight float_weight,
                  LinearOperation::Kernel kernel, mx::Stream s) {
  require(outputs > 0 && x.shape(-1) > 0, "linear: weight is empty");
  require(!bias || bias->shape() == mx::Shape{outputs}, "linear: bias does not fit");
  auto shape = x.shape();
  shape.back() = outputs;
  require(!residual || residual->shape() == shape, "linear: residual does not fit");

  Arrays inputs{contiguous(x, s)};
  for (auto& part : weight) inputs.push_back(contiguous(part, s));
  LinearInputs at;
  at.activation = activation;
  at.output_scale = output_scale;
  at.bias = append(inputs, bias, s);
  at.residual = append(inputs, residual, s);
  return array(shape, mx::float32, std::make_shared<LinearOperation>(s, at, std::move(float_weight), std::move(kernel)),
               inputs);
}

array linear(const array& x, const array& weight, const Optional& bias, const Optional& residual, Activation activation,
             float output_scale, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x, weight, bias, residual});
  require(weight.ndim() == 2 && x.ndim() > 0 && x.shape(-1) == weight.shape(1), "linear: x and weight do not fit");
  auto float_weight = [](const Arrays& in) { return in[1]; };
  auto kernel = [](const Arrays& in) -> LinearOperation::Work {
    return [w = data(in, 1)](const float* x, auto... arguments) { kernels().linear(x, w, arguments...); };
  };
  return make_linear(x, {weight}, weight.shape(0), bias, residual, activation, output_scale, float_weight, kernel, s);
}

}  // namespace mlx_esm
