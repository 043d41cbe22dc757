// The common part of linear layers with float32, half-precision and quantized weights.
#pragma once

#include <functional>

#include "kernels.h"
#include "operation.h"

namespace mlx_esm {

struct LinearInputs {
  int bias = -1, residual = -1;  // indices among the inputs; -1 if absent
  Activation activation = Activation::none;
  float output_scale = 1;
};

// Inputs: x, the arrays of the weight, then bias and residual if present.
class LinearOperation : public Operation {
 public:
  // Returns the weight as a float32 matrix, for gradients and transformations.
  using FloatWeight = std::function<array(const Arrays& in)>;

  // A kernel reads the addresses of the weight and returns the work to do with them.
  using Work = std::function<void(const float* x, const float* bias, const float* residual, float* y, long tokens,
                                  long outputs, long inputs, Activation activation, float output_scale)>;
  using Kernel = std::function<Work(const Arrays& in)>;

  LinearOperation(mx::Stream s, LinearInputs at, FloatWeight float_weight, Kernel kernel);

  const char* name() const override { return "Linear"; }
  void eval_cpu(const Arrays& in, Arrays& out) override;
  Arrays vjp(const Arrays& in, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override;

 private:
  // The gradient by the activation's input, from that by its output [tokens, outputs]. The input is recomputed: nothing
  // of the size of the output is kept.
  array before_activation(const Arrays& in, const array& weight, const array& dy);

  LinearInputs at_;
  FloatWeight float_weight_;
  Kernel kernel_;
};

// Returns the output of the layer. Throws std::invalid_argument if shapes do not match.
array make_linear(const array& x, const Arrays& weight, int outputs, const Optional& bias, const Optional& residual,
                  Activation activation, float output_scale, LinearOperation::FloatWeight float_weight,
                  LinearOperation::Kernel kernel, mx::Stream s);

}  // namespace mlx_esm
