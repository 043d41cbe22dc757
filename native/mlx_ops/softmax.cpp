#include "instruction_sets.h"
#include "operation.h"
#include "ops.h"

namespace mlx_esm {
namespace {

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
  explicit Softmax(mx::Stream s)
      : Operation(s, [s](const Arrays& in) { return Arrays{mx::softmax(in[0], -1, true, s)}; }) {}

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

}  // namespace

array softmax(const array& x, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x});
  require(x.ndim() > 0 && x.shape(-1) > 0, "softmax: the last axis must not be empty");
  return array(x.shape(), mx::float32, std::make_shared<Softmax>(s), {contiguous(x, s)});
}

}  // namespace mlx_esm
