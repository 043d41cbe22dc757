#include "instruction_sets.h"
#include "operation.h"
#include "ops.h"

namespace mlx_esm {
namespace {

Operation::Function no_plain(const char* name) {
  return
      [name](const Arrays&) -> Arrays { throw std::invalid_argument(std::string(name) + " has no transformations"); };
}

class SumOfSquares : public Operation {
 public:
  explicit SumOfSquares(mx::Stream s) : Operation(s, no_plain("SumOfSquares")) {}

  const char* name() const override { return "SumOfSquares"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    run(out, [&] {
      return
          [x = data(in, 0), y = out[0].data<float>(), n = long(in[0].size())] { *y = kernels().sum_of_squares(x, n); };
    });
  }
};

// Inputs: weight, gradient, mean, square, and the scalars scale, learning rate and step.
class AdamWStep : public Operation {
 public:
  AdamWStep(mx::Stream s, AdamW settings) : Operation(s, no_plain("AdamW")), settings_(settings) {}

  const char* name() const override { return "AdamW"; }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const int sources[] = {0, 2, 3};
    for (int i = 0; i < 3; i++)  // in place if nothing else uses the input
      if (in[sources[i]].is_donatable()) out[i].copy_shared_buffer(in[sources[i]]);
    run(out, [&] {
      AdamW p = settings_;
      p.weight = data(in, 0), p.gradient = data(in, 1), p.mean = data(in, 2), p.square = data(in, 3);
      p.new_weight = out[0].data<float>(), p.new_mean = out[1].data<float>(), p.new_square = out[2].data<float>();
      return [p, scale = data(in, 4), rate = data(in, 5), step = in[6].data<uint64_t>(),
              n = long(in[0].size())]() mutable {
        p.scale = *scale, p.learning_rate = *rate, p.step = *step;
        kernels().adamw(p, n);
      };
    });
  }

 private:
  AdamW settings_;
};

}  // namespace

array sum_of_squares(const array& x, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {x});
  return array({}, mx::float32, std::make_shared<SumOfSquares>(s), {contiguous(x, s)});
}

std::vector<array> adamw(const array& weight, const array& gradient, const array& mean, const array& square,
                         const array& scale, const array& learning_rate, const array& step, float beta1, float beta2,
                         float epsilon, float decay, mx::StreamOrDevice device) {
  auto s = checked_stream(device, {weight, gradient, mean, square, scale, learning_rate});
  require(gradient.shape() == weight.shape() && mean.shape() == weight.shape() && square.shape() == weight.shape(),
          "adamw: weight, gradient and moments do not fit");
  require(scale.size() == 1 && learning_rate.size() == 1 && step.size() == 1 && step.dtype() == mx::uint64,
          "adamw: scale, learning rate and step must be scalars, and step must be uint64");
  AdamW settings{};
  settings.beta1 = beta1, settings.beta2 = beta2, settings.epsilon = epsilon, settings.decay = decay;
  Arrays inputs;
  for (auto& x : {weight, gradient, mean, square, scale, learning_rate, step}) inputs.push_back(contiguous(x, s));
  const auto shape = weight.shape();
  return array::make_arrays({shape, shape, shape}, {mx::float32, mx::float32, mx::float32},
                            std::make_shared<AdamWStep>(s, settings), inputs);
}

}  // namespace mlx_esm
