#include "instruction_sets.h"
#include "operation.h"
#include "ops.h"

namespace mlx_esm {
namespace {

Arrays plain_swiglu(const Arrays& in, mx::Stream s) {
  return {mx::multiply(mx::multiply(in[0], mx::sigmoid(in[0], s), s), in[1], s)};
}

// Inputs: gate, up and dy. Outputs: the gradients by gate and up.
class SwigluGradient : public Operation {
 public:
  explicit SwigluGradient(mx::Stream s)
      : Operation(s, [s](const Arrays& in) {
          auto f = [s](const Arrays& x) { return plain_swiglu(x, s); };
          return mx::vjp(f, {in[0], in[1]}, {in[2]}).second;
        }) {}

  const char* name() const override { return "SwigluGradient"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [gate = data(in, 0), up = data(in, 1), dy = data(in, 2), dgate = out[0].data<float>(),
              dup = out[1].data<float>(),
              n = long(in[0].size())] { kernels().swiglu_gradient(gate, up, dy, dgate, dup, n); };
    });
  }
};

class Swiglu : public Operation {
 public:
  explicit Swiglu(mx::Stream s) : Operation(s, [s](const Arrays& in) { return plain_swiglu(in, s); }) {}

  const char* name() const override { return "Swiglu"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [gate = data(in, 0), up = data(in, 1), y = out[0].data<float>(), n = long(in[0].size())] {
        kernels().swiglu(gate, up, y, n);
      };
    });
  }

  Arrays vjp(const Arrays& in, const Arrays& dout, const std::vector<int>& argnums, const Arrays&) override {
    auto gradients =
        array::make_arrays({in[0].shape(), in[0].shape()}, {mx::float32, mx::float32},
                           std::make_shared<SwigluGradient>(stream()), {in[0], in[1], contiguous(dout[0], stream())});
    return pick(gradients, argnums);
  }
};

// Inputs: gate and, unless it is 1, x.
class SigmoidGate : public Operation {
 public:
  explicit SigmoidGate(mx::Stream s)
      : Operation(s, [s](const Arrays& in) -> Arrays {
          const array sigmoid = mx::sigmoid(in[0], s);
          return {in.size() > 1 ? mx::multiply(in[1], sigmoid, s) : sigmoid};
        }) {}

  const char* name() const override { return "SigmoidGate"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [x = data(in, in.size() > 1 ? 1 : -1), gate = data(in, 0), y = out[0].data<float>(),
              n = long(in[0].size())] { kernels().sigmoid_gate(x, gate, y, n); };
    });
  }
};

}  // namespace

array sigmoid_gate(const Optional& x, const array& gate, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x, gate});
  require(!x || x->shape() == gate.shape(), "sigmoid_gate: x and gate do not fit");
  Arrays inputs{contiguous(gate, s)};
  append(inputs, x, s);
  return array(gate.shape(), mx::float32, std::make_shared<SigmoidGate>(s), inputs);
}

array swiglu(const array& gate, const array& up, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {gate, up});
  require(gate.shape() == up.shape(), "swiglu: gate and up do not fit");
  return array(gate.shape(), mx::float32, std::make_shared<Swiglu>(s), {contiguous(gate, s), contiguous(up, s)});
}

}  // namespace mlx_esm
