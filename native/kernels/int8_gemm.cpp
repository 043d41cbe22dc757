// An instruction set that adds int8 dot products to another set and shares the other kernels with it. Compiled once per
// set, with TABLE, NAME, VECTOR_WIDTH and ROWS as in kernels.cpp, and
//   BASE           the function that returns the other set's table.

#include "int8_gemm.h"

const mlx_esm::Kernels* mlx_esm::TABLE() {
  static const Kernels table = [] {
    Kernels table = *BASE();
    table.name = NAME;
    table.int8_linear = int8_linear;
    return table;
  }();
  return &table;
}
