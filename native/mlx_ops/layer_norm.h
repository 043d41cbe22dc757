// Layer norm's gradient, which attention needs as well.
#pragma once

#include "operation.h"

namespace mlx_esm {

// Those of x, weight and bias, which need no bias.
Arrays layer_norm_gradient(const array& x, const array& weight, const array& dy, float eps, mx::Stream s);

}  // namespace mlx_esm
