// The instruction sets of this machine, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace mlx_esm {

// The table in use: that of the machine's best instruction set, unless another was chosen.
const Kernels& kernels();
std::vector<std::string> instruction_sets();  // of this machine, the best one first
void choose(const std::string& name);         // throws std::invalid_argument

}  // namespace mlx_esm
