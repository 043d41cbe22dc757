// The Python module mlx_esm_hf.ops._native.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "instruction_sets.h"
#include "ops.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using mlx::core::array;
using Optional = std::optional<array>;

static mlx_esm::Activation activation_called(const std::optional<std::string>& name) {
  if (!name) return mlx_esm::Activation::none;
  if (*name == "gelu") return mlx_esm::Activation::gelu;
  if (*name == "relu") return mlx_esm::Activation::relu;
  throw std::invalid_argument("linear: the activation '" + *name + "' is neither 'gelu' nor 'relu'");
}

NB_MODULE(_native, m) {
  m.doc() = "The CPU kernels of mlx-esm-hf as operations on float32 mx.arrays; mlx_esm_hf.ops.kernels is their face.";
  nb::module_::import_("mlx.core");  // which registers the type of arrays

  const auto none = nb::none();
  m.def(
      "linear",
      [](const array& x, const array& weight, const Optional& bias, const Optional& residual,
         const std::optional<std::string>& activation) {
        return mlx_esm::linear(x, weight, bias, residual, activation_called(activation));
      },
      "x"_a, "weight"_a, "bias"_a = none, "residual"_a = none, "activation"_a = none);
  m.def("gelu", [](const array& x) { return mlx_esm::gelu(x); }, "x"_a);
  m.def("softmax", [](const array& x) { return mlx_esm::softmax(x); }, "x"_a);
  m.def(
      "layer_norm",
      [](const array& x, const array& weight, const Optional& bias, float eps) {
        return mlx_esm::layer_norm(x, weight, bias, eps);
      },
      "x"_a, "weight"_a, "bias"_a.none(), "eps"_a);
  m.def("sum_of_squares", [](const array& x) { return mlx_esm::sum_of_squares(x); }, "x"_a);
  m.def(
      "adamw",
      [](const array& weight, const array& gradient, const array& mean, const array& square, const array& scale,
         const array& learning_rate, const array& step, float beta1, float beta2, float epsilon, float decay) {
        return mlx_esm::adamw(weight, gradient, mean, square, scale, learning_rate, step, beta1, beta2, epsilon,
                              decay);
      },
      "weight"_a, "gradient"_a, "mean"_a, "square"_a, "scale"_a, "learning_rate"_a, "step"_a, "beta1"_a, "beta2"_a,
      "epsilon"_a, "decay"_a);
  m.def(
      "attention",
      [](const array& query, const array& key, const array& value, int heads, const std::vector<int>& offsets,
         const Optional& mask, const Optional& cos, const Optional& sin, const Optional& bias_k,
         const Optional& bias_v, const Optional& bias) {
        return mlx_esm::attention(query, key, value, heads, offsets, mask, cos, sin, bias_k, bias_v, bias);
      },
      "query"_a, "key"_a, "value"_a, "heads"_a, "offsets"_a, "mask"_a = none, "cos"_a = none, "sin"_a = none,
      "bias_k"_a = none, "bias_v"_a = none, "bias"_a = none);

  m.def("use_threads", &mlx_esm::use_threads, "n"_a);
  m.def("threads", &mlx_esm::threads);
  m.def("instruction_sets", &mlx_esm::instruction_sets);
  m.def("instruction_set", [] { return mlx_esm::kernels().name; });
  m.def("choose", &mlx_esm::choose, "name"_a);
}
