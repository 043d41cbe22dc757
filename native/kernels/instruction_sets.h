// Which instruction sets this machine has, and the one whose kernels are used.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace mlx_esm {

// The table of this machine's best instruction set, until another is chosen by its name.
const Kernels& kernels();
std::vector<std::string> instruction_sets();  // that this machine has, the best one first
void choose(const std::string& name);         // throws std::invalid_argument

}  // namespace mlx_esm
