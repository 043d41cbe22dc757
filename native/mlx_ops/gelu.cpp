#include "gelu.h"

#include <cmath>

#include "instruction_sets.h"
#include "ops.h"

namespace mlx_esm {
namespace {

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

}  // namespace

array plain_gelu(const array& x, mx::Stream s) {
  auto phi = mx::add(mx::erf(mx::multiply(x, array(std::sqrt(0.5f)), s), s), array(1.0f), s);
  return mx::multiply(mx::multiply(x, phi, s), array(0.5f), s);
}

array gelu_gradient(const array& x, const array& dy, mx::Stream s) {
  return array(x.shape(), mx::float32, std::make_shared<GeluGradient>(s), {x, contiguous(dy, s)});
}

array gelu(const array& x, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x});
  return array(x.shape(), mx::float32, std::make_shared<Gelu>(s), {contiguous(x, s)});
}

}  // namespace mlx_esm
