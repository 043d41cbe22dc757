// Linear layers with low-bit weights.
#include "instruction_sets.h"
#include "linear.h"
#include "ops.h"

namespace mlx_esm {
namespace {

Dtype dtype_of(mx::Dtype dtype) {
  if (dtype == mx::float32) return Dtype::float32;
  if (dtype == mx::float16) return Dtype::float16;
  require(dtype == mx::bfloat16, "linear: the weight must be float32, float16 or bfloat16");
  return Dtype::bfloat16;
}

}  // namespace

array half_linear(const array& x, const array& weight, const Optional& bias, const Optional& residual,
                  Activation activation, float output_scale, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x, bias, residual});
  const Dtype type = dtype_of(weight.dtype());
  require(type != Dtype::float32, "half_linear: the weight must be float16 or bfloat16");
  require(weight.ndim() == 2 && x.ndim() > 0 && x.shape(-1) == weight.shape(1), "linear: x and weight do not fit");
  auto float_weight = [s](const Arrays& in) { return mx::astype(in[1], mx::float32, s); };
  auto kernel = [type](const Arrays& in) -> LinearOperation::Work {
    const LowBitWeight weight{in[1].data<void>(), type, nullptr, nullptr, 16, 1};
    return [weight](const float* x, auto... arguments) { kernels().low_bit_linear(x, weight, arguments...); };
  };
  return make_linear(x, {weight}, weight.shape(0), bias, residual, activation, output_scale, float_weight, kernel, s);
}

array quantized_linear(const array& x, const array& weight, const array& scales, const array& biases,
                       const Optional& bias, const Optional& residual, Activation activation, float output_scale,
                       int group_size, int bits, bool integers, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x, bias, residual});
  const Dtype type = dtype_of(scales.dtype());
  require(bits == 4 || bits == 8 || (!integers && (bits == 2 || bits == 3 || bits == 6)),
          "quantized_linear: there is no kernel for so many bits");
  require(group_size == 32 || group_size == 64 || group_size == 128,
          "quantized_linear: group_size must be 32, 64 or 128");
  require(weight.dtype() == mx::uint32 && weight.ndim() == 2,
          "quantized_linear: the weight must be a matrix of uint32");
  require(x.ndim() > 0 && x.shape(-1) % group_size == 0 && long(x.shape(-1)) * bits == 32L * weight.shape(1),
          "linear: x and weight do not fit");
  require(scales.shape() == mx::Shape{weight.shape(0), x.shape(-1) / group_size} && biases.shape() == scales.shape() &&
              biases.dtype() == scales.dtype(),
          "quantized_linear: scales and biases do not fit");
  auto float_weight = [=](const Arrays& in) {
    return mx::astype(mx::dequantize(in[1], in[2], in[3], group_size, bits, "affine", std::nullopt, std::nullopt, s),
                      mx::float32, s);
  };
  auto kernel = [=](const Arrays& in) -> LinearOperation::Work {
    const LowBitWeight weight{in[1].data<void>(), type, in[2].data<void>(), in[3].data<void>(), bits, group_size};
    return [=](const float* x, auto... arguments) {
      (integers ? kernels().int8_linear : kernels().low_bit_linear)(x, weight, arguments...);
    };
  };
  return make_linear(x, {weight, scales, biases}, weight.shape(0), bias, residual, activation, output_scale,
                     float_weight, kernel, s);
}

}  // namespace mlx_esm
