#include "layer_norm.h"

#include "instruction_sets.h"
#include "mlx/backend/common/utils.h"
#include "ops.h"

namespace mlx_esm {
namespace {

// Inputs: x, weight and dy.
class LayerNormGradient : public Operation {
 public:
  LayerNormGradient(mx::Stream s, float eps)
      : Operation(s,
                  [s, eps](const Arrays& in) {
                    auto f = [s, eps](const Arrays& x) {
                      return Arrays{mx::fast::layer_norm(x[0], x[1], x[2], eps, s)};
                    };
                    return mx::vjp(f, {in[0], in[1], mx::zeros_like(in[1], s)}, {in[2]}).second;
                  }),
        eps_(eps) {}

  const char* name() const override { return "LayerNormGradient"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return [x = data(in, 0), weight = data(in, 1), dy = data(in, 2), dx = out[0].data<float>(),
              dweight = out[1].data<float>(), dbias = out[2].data<float>(), width = long(in[1].size()),
              rows = long(in[0].size() / in[1].size()),
              eps = eps_] { kernels().layer_norm_gradient(x, weight, dy, dx, dweight, dbias, rows, width, eps); };
    });
  }

 private:
  float eps_;
};

// Inputs: x, weight and optionally a bias.
class LayerNorm : public Operation {
 public:
  LayerNorm(mx::Stream s, float eps)
      : Operation(s,
                  [s, eps](const Arrays& in) {
                    auto bias = in.size() > 2 ? Optional(in[2]) : std::nullopt;
                    return Arrays{mx::fast::layer_norm(in[0], in[1], bias, eps, s)};
                  }),
        eps_(eps) {}

  const char* name() const override { return "LayerNorm"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    // In place if possible: a row is read before it is written.
    if (mx::is_donatable(in[0], out[0])) out[0].copy_shared_buffer(in[0]);
    run(out, [&] {
      return [x = data(in, 0), weight = data(in, 1), bias = data(in, in.size() > 2 ? 2 : -1), y = out[0].data<float>(),
              width = long(in[1].size()), rows = long(in[0].size() / in[1].size()),
              eps = eps_] { kernels().layer_norm(x, weight, bias, y, rows, width, eps); };
    });
  }

  Arrays vjp(const Arrays& in, const Arrays& dout, const std::vector<int>& argnums, const Arrays&) override {
    return pick(layer_norm_gradient(in[0], in[1], dout[0], eps_, stream()), argnums);
  }

 private:
  float eps_;
};

}  // namespace

Arrays layer_norm_gradient(const array& x, const array& weight, const array& dy, float eps, mx::Stream s) {
  return array::make_arrays({x.shape(), weight.shape(), weight.shape()}, {mx::float32, mx::float32, mx::float32},
                            std::make_shared<LayerNormGradient>(s, eps), {x, weight, contiguous(dy, s)});
}

array layer_norm(const array& x, const array& weight, const Optional& bias, float eps, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x, weight, bias});
  require(x.ndim() > 0 && weight.shape() == mx::Shape{x.shape(-1)} && (!bias || bias->shape() == weight.shape()),
          "layer_norm: x, weight and bias do not fit");
  require(weight.size() > 0, "layer_norm: weight is empty");
  Arrays inputs{contiguous(x, s), contiguous(weight, s)};
  append(inputs, bias, s);
  return array(x.shape(), mx::float32, std::make_shared<LayerNorm>(s, eps), inputs);
}

}  // namespace mlx_esm
