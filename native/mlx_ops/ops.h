// The kernels as MLX operations: lazy, on a CPU stream, and differentiable.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "mlx/mlx.h"

namespace mlx_esm {

namespace mx = mlx::core;

// kernels.h says what is computed. All arrays are float32, except masks and low-bit weights. The leading axes of x are
// tokens. Throws std::invalid_argument if shapes or dtypes do not match.
mx::array linear(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias,
                 const std::optional<mx::array>& residual, Activation activation, float output_scale,
                 mx::StreamOrDevice s = {});
// weight is float16 or bfloat16.
mx::array half_linear(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias,
                      const std::optional<mx::array>& residual, Activation activation, float output_scale,
                      mx::StreamOrDevice s = {});
// weight, scales and biases are those of mx::quantize with mode "affine"; scales and biases may be in half precision.
// With `integers`, x is rounded to int8. Gradients, jvp and vmap are those of a layer that does not round x.
mx::array quantized_linear(const mx::array& x, const mx::array& weight, const mx::array& scales,
                           const mx::array& biases, const std::optional<mx::array>& bias,
                           const std::optional<mx::array>& residual, Activation activation, float output_scale,
                           int group_size, int bits, bool integers, mx::StreamOrDevice s = {});
mx::array gelu(const mx::array& x, mx::StreamOrDevice s = {});
mx::array swiglu(const mx::array& gate, const mx::array& up, mx::StreamOrDevice s = {});
mx::array layer_norm(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias, float eps,
                     mx::StreamOrDevice s = {});
mx::array softmax(const mx::array& x, mx::StreamOrDevice s = {});
mx::array sum_of_squares(const mx::array& x, mx::StreamOrDevice s = {});
// Returns the new weight, mean and square.
std::vector<mx::array> adamw(const mx::array& weight, const mx::array& gradient, const mx::array& mean,
                             const mx::array& square, const mx::array& scale, const mx::array& learning_rate,
                             const mx::array& step, float beta1, float beta2, float epsilon, float decay,
                             mx::StreamOrDevice s = {});
mx::array attention(const mx::array& query, const mx::array& key, const mx::array& value, int heads,
                    const std::vector<int>& offsets, const std::optional<mx::array>& mask,
                    const std::optional<mx::array>& cos, const std::optional<mx::array>& sin,
                    const std::optional<mx::array>& bias_k, const std::optional<mx::array>& bias_v,
                    const std::optional<mx::array>& bias, const std::optional<mx::array>& query_norm,
                    const std::optional<mx::array>& key_norm, float eps, mx::StreamOrDevice s = {});

mx::array windowed_attention(const mx::array& query, const mx::array& key, const mx::array& value, int heads,
                             const std::vector<int>& offsets, int window, const std::optional<mx::array>& mask,
                             mx::StreamOrDevice s = {});
mx::array sigmoid_gate(const std::optional<mx::array>& x, const mx::array& gate, mx::StreamOrDevice s = {});

// The parameters of a linear layer or of a layer norm, as in kernels.h.
struct AffineArrays {
  mx::array weight;
  std::optional<mx::array> bias;
};

mx::array gated_linear(const mx::array& z, const AffineArrays& norm, float eps, const AffineArrays& gate,
                       const AffineArrays& layer, const std::optional<mx::array>& x,
                       const std::optional<AffineArrays>& x_norm, const std::optional<mx::array>& mask,
                       const std::optional<mx::array>& residual, bool y_first, mx::StreamOrDevice s = {});
mx::array triangle_attention(const mx::array& z, const mx::array& mask, const AffineArrays& norm, float eps,
                             const mx::array& bias, const mx::array& query, const mx::array& key,
                             const mx::array& value, const AffineArrays& gate, const AffineArrays& output,
                             const std::optional<mx::array>& residual, bool ending, mx::StreamOrDevice s = {});
mx::array transition(const mx::array& x, const AffineArrays& norm, float eps, const AffineArrays& expand,
                     const AffineArrays& shrink, const std::optional<mx::array>& residual, bool gated,
                     mx::StreamOrDevice s = {});

// Returns the array that starts at byte `offset` of a file. Its pages are read when they are used, so the file must not
// change. Throws std::system_error if the file cannot be mapped.
mx::array mapped(const std::string& path, long offset, const std::vector<int>& shape, mx::Dtype dtype);

}  // namespace mlx_esm
