// The kernels as operations of MLX: lazy, on a CPU stream, and differentiable.
#pragma once

#include <optional>
#include <vector>

#include "kernels.h"
#include "mlx/mlx.h"

namespace mlx_esm {

namespace mx = mlx::core;

// All arrays but the mask are float32; see kernels.h for what is computed. The leading axes of x are tokens. What does
// not fit together throws std::invalid_argument.
mx::array linear(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias,
                 const std::optional<mx::array>& residual, Activation activation, mx::StreamOrDevice s = {});
mx::array gelu(const mx::array& x, mx::StreamOrDevice s = {});
mx::array layer_norm(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias, float eps,
                     mx::StreamOrDevice s = {});
mx::array softmax(const mx::array& x, mx::StreamOrDevice s = {});
mx::array sum_of_squares(const mx::array& x, mx::StreamOrDevice s = {});
// The new weight, mean and square.
std::vector<mx::array> adamw(const mx::array& weight, const mx::array& gradient, const mx::array& mean,
                             const mx::array& square, const mx::array& scale, const mx::array& learning_rate,
                             const mx::array& step, float beta1, float beta2, float epsilon, float decay,
                             mx::StreamOrDevice s = {});
mx::array attention(const mx::array& query, const mx::array& key, const mx::array& value, int heads,
                    const std::vector<int>& offsets, const std::optional<mx::array>& mask,
                    const std::optional<mx::array>& cos, const std::optional<mx::array>& sin,
                    const std::optional<mx::array>& bias_k, const std::optional<mx::array>& bias_v,
                    const std::optional<mx::array>& bias, mx::StreamOrDevice s = {});

}  // namespace mlx_esm
