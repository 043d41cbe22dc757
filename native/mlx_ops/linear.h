// What linear layers have in common, however their weights are stored.
#pragma once

#include <functional>

#include "kernels.h"
#include "operation.h"

namespace mlx_esm {

struct LinearInputs {
  int bias = -1, residual = -1;  // their places behind x and the weight
  Activation activation = Activation::none;
  float output_scale = 1;
};

// The first input is x, behind it come what the weight is stored in, bias and residual.
class LinearOperation : public Operation {
 public:
  // The weight as a matrix of float32, for what is not the kernel's.
  using Whole = std::function<array(const Arrays& in)>;

  // Reads the addresses of the weight, and returns what computes with them.
  using Work = std::function<void(const float* x, const float* bias, const float* residual, float* y, long tokens,
                                  long outputs, long inputs, Activation activation, float output_scale)>;
  using Kernel = std::function<Work(const Arrays& in)>;

  LinearOperation(mx::Stream s, LinearInputs at, Whole whole, Kernel kernel);

  const char* name() const override { return "Linear"; }
  void eval_cpu(const Arrays& in, Arrays& out) override;
  Arrays vjp(const Arrays& in, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override;

 private:
  // The gradient of what goes into the activation, from that of its result [tokens, outputs]. What goes into it is
  // computed once more: nothing of the size of the output is kept.
  array before_activation(const Arrays& in, const array& weight, const array& dy);

  LinearInputs at_;
  Whole whole_;
  Kernel kernel_;
};

// The operation's result. What does not fit together throws std::invalid_argument.
array make_linear(const array& x, const Arrays& weight, int outputs, const Optional& bias, const Optional& residual,
                  Activation activation, float output_scale, LinearOperation::Whole whole, LinearOperation::Kernel kernel,
                  mx::Stream s);

}  // namespace mlx_esm
