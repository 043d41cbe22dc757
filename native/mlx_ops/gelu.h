// The parts of GELU that the linear layer also uses.
#pragma once

#include "operation.h"

namespace mlx_esm {

array plain_gelu(const array& x, mx::Stream s);                      // in MLX's own operations
array gelu_gradient(const array& x, const array& dy, mx::Stream s);  // dy · the derivative at x

}  // namespace mlx_esm
