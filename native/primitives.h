// The kernels as operations of MLX: lazy, on a CPU stream, and differentiable.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace mlx_esm {

namespace mx = mlx::core;

// The table of this machine's best instruction set, until another is chosen by its name.
const Kernels& kernels();
std::vector<std::string> instruction_sets();  // that this machine has, the best one first
void choose(const std::string& name);

// All arrays are float32; see kernels.h for what they compute. The leading axes of x are tokens.
mx::array linear(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias,
                 const std::optional<mx::array>& residual, bool gelu, mx::StreamOrDevice s = {});
mx::array gelu(const mx::array& x, mx::StreamOrDevice s = {});
mx::array layer_norm(const mx::array& x, const mx::array& weight, const mx::array& bias, float eps,
                     mx::StreamOrDevice s = {});
mx::array softmax(const mx::array& x, mx::StreamOrDevice s = {});
mx::array attention(const mx::array& query, const mx::array& key, const mx::array& value, int heads,
                    const std::vector<int>& offsets, const std::optional<mx::array>& mask,
                    const std::optional<mx::array>& cos, const std::optional<mx::array>& sin,
                    const std::optional<mx::array>& bias_k, const std::optional<mx::array>& bias_v,
                    mx::StreamOrDevice s = {});

}  // namespace mlx_esm
