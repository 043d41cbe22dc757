// The Python module mlx_esm_hf.ops._native.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "instruction_sets.h"
#include "ops.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using mlx::core::array;
using Optional = std::optional<array>;
using Affine = std::tuple<array, Optional>;       // weight, bias
using Norm = std::tuple<array, Optional, float>;  // weight, bias, eps of a layer norm

static mlx_esm::Activation activation_called(const std::optional<std::string>& name) {
  if (!name) return mlx_esm::Activation::none;
  if (*name == "gelu") return mlx_esm::Activation::gelu;
  if (*name == "relu") return mlx_esm::Activation::relu;
  throw std::invalid_argument("linear: activation must be 'gelu' or 'relu', got '" + *name + "'");
}

template <class Parameters>
static mlx_esm::AffineArrays affine(const Parameters& p) {
  return {std::get<0>(p), std::get<1>(p)};
}

static float eps_of(const Norm& norm) { return std::get<2>(norm); }

NB_MODULE(_native, m) {
  m.doc() =
      "The CPU kernels of mlx-esm-hf as operations on float32 mx.arrays. Use them through mlx_esm_hf.ops.kernels.";
  nb::module_::import_("mlx.core");  // registers the type mx.array

  const auto none = nb::none();
  m.def(
      "linear",
      [](const array& x, const array& weight, const Optional& bias, const Optional& residual,
         const std::optional<std::string>& activation, float output_scale) {
        return mlx_esm::linear(x, weight, bias, residual, activation_called(activation), output_scale);
      },
      "x"_a, "weight"_a, "bias"_a = none, "residual"_a = none, "activation"_a = none, "output_scale"_a = 1.0f);
  m.def(
      "half_linear",
      [](const array& x, const array& weight, const Optional& bias, const Optional& residual,
         const std::optional<std::string>& activation, float output_scale) {
        return mlx_esm::half_linear(x, weight, bias, residual, activation_called(activation), output_scale);
      },
      "x"_a, "weight"_a, "bias"_a = none, "residual"_a = none, "activation"_a = none, "output_scale"_a = 1.0f);
  m.def(
      "quantized_linear",
      [](const array& x, const array& weight, const array& scales, const array& biases, const Optional& bias,
         const Optional& residual, const std::optional<std::string>& activation, float output_scale, int group_size,
         int bits, bool integers) {
        return mlx_esm::quantized_linear(x, weight, scales, biases, bias, residual, activation_called(activation),
                                         output_scale, group_size, bits, integers);
      },
      "x"_a, "weight"_a, "scales"_a, "biases"_a, "bias"_a = none, "residual"_a = none, "activation"_a = none,
      "output_scale"_a = 1.0f, "group_size"_a, "bits"_a, "integers"_a = false);
  m.def("gelu", [](const array& x) { return mlx_esm::gelu(x); }, "x"_a);
  m.def("swiglu", [](const array& gate, const array& up) { return mlx_esm::swiglu(gate, up); }, "gate"_a, "up"_a);
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
        return mlx_esm::adamw(weight, gradient, mean, square, scale, learning_rate, step, beta1, beta2, epsilon, decay);
      },
      "weight"_a, "gradient"_a, "mean"_a, "square"_a, "scale"_a, "learning_rate"_a, "step"_a, "beta1"_a, "beta2"_a,
      "epsilon"_a, "decay"_a);
  m.def(
      "attention",
      [](const array& query, const array& key, const array& value, int heads, const std::vector<int>& offsets,
         const Optional& mask, const Optional& cos, const Optional& sin, const Optional& bias_k, const Optional& bias_v,
         const Optional& bias, const Optional& query_norm, const Optional& key_norm, float eps) {
        return mlx_esm::attention(query, key, value, heads, offsets, mask, cos, sin, bias_k, bias_v, bias, query_norm,
                                  key_norm, eps);
      },
      "query"_a, "key"_a, "value"_a, "heads"_a, "offsets"_a, "mask"_a = none, "cos"_a = none, "sin"_a = none,
      "bias_k"_a = none, "bias_v"_a = none, "bias"_a = none, "query_norm"_a = none, "key_norm"_a = none,
      "eps"_a = 1e-5f);
  m.def(
      "windowed_attention",
      [](const array& query, const array& key, const array& value, int heads, const std::vector<int>& offsets,
         int window, const Optional& mask) {
        return mlx_esm::windowed_attention(query, key, value, heads, offsets, window, mask);
      },
      "query"_a, "key"_a, "value"_a, "heads"_a, "offsets"_a, "window"_a, "mask"_a = none);
  m.def(
      "sigmoid_gate", [](const Optional& x, const array& gate) { return mlx_esm::sigmoid_gate(x, gate); }, "x"_a.none(),
      "gate"_a);
  m.def(
      "gated_linear",
      [](const array& z, const Norm& norm, const Affine& gate, const Affine& layer, const Optional& x,
         const std::optional<Norm>& x_norm, const Optional& mask, const Optional& residual, bool y_first) {
        if (x_norm && eps_of(*x_norm) != eps_of(norm))
          throw std::invalid_argument("gated_linear: norm and x_norm must have the same eps");
        const auto of_x = x_norm ? std::optional(affine(*x_norm)) : std::nullopt;
        return mlx_esm::gated_linear(z, affine(norm), eps_of(norm), affine(gate), affine(layer), x, of_x, mask,
                                     residual, y_first);
      },
      "z"_a, "norm"_a, "gate"_a, "layer"_a, "x"_a = none, "x_norm"_a = none, "mask"_a = none, "residual"_a = none,
      "y_first"_a = false);
  m.def(
      "triangle_attention",
      [](const array& z, const array& mask, const Norm& norm, const array& bias, const array& query, const array& key,
         const array& value, const Affine& gate, const Affine& output, const Optional& residual, bool ending) {
        return mlx_esm::triangle_attention(z, mask, affine(norm), eps_of(norm), bias, query, key, value, affine(gate),
                                           affine(output), residual, ending);
      },
      "z"_a, "mask"_a, "norm"_a, "bias"_a, "query"_a, "key"_a, "value"_a, "gate"_a, "output"_a, "residual"_a = none,
      "ending"_a = false);
  m.def(
      "transition",
      [](const array& x, const Norm& norm, const Affine& expand, const Affine& shrink, const Optional& residual,
         bool gated) {
        return mlx_esm::transition(x, affine(norm), eps_of(norm), affine(expand), affine(shrink), residual, gated);
      },
      "x"_a, "norm"_a, "expand"_a, "shrink"_a, "residual"_a = none, "gated"_a = false);
  m.def("mapped", &mlx_esm::mapped, "path"_a, "offset"_a, "shape"_a, "dtype"_a);

  m.def(
      "multiply_adds", [](double operations) { return mlx_esm::kernels().multiply_adds(operations); }, "operations"_a);
  m.def("use_threads", &mlx_esm::use_threads, "n"_a);
  m.def("threads", &mlx_esm::threads);
  m.def("instruction_sets", &mlx_esm::instruction_sets);
  m.def("instruction_set", [] { return mlx_esm::kernels().name; });
  m.def("choose", &mlx_esm::choose, "name"_a);
}
