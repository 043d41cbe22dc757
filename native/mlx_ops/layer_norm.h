// The gradient of layer norm, which attention also uses.
#pragma once

#include "operation.h"

namespace mlx_esm {

// Returns the gradients by x, weight and bias. The value of the bias is not needed.
Arrays layer_norm_gradient(const array& x, const array& weight, const array& dy, float eps, mx::Stream s);

}  // namespace mlx_esm
