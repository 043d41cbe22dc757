// Multiply-adds in registers: the peak speed of this machine, and so the upper bound of a matrix product.
#pragma once

#include <vector>

#include "threads.h"
#include "vec.h"

namespace {

// Enough independent accumulators per thread to hide the latency of multiply-adds.
constexpr int SUMS = 2 * ROWS;

inline float multiply_adds_on_a_thread(long rounds) {
  vec sums[SUMS], x = splat(0.5f), y = splat(0.25f);
#pragma GCC unroll 32
  for (int i = 0; i < SUMS; i++) sums[i] = splat(i);  // all different, or the compiler would compute only one
  asm volatile("" : "+m"(x), "+m"(y));                // hides their values from the compiler
  for (long r = 0; r < rounds; r++)
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; i++) sums[i] = sums[i] * x + y;
  vec total{};
#pragma GCC unroll 32
  for (int i = 0; i < SUMS; i++) total += sums[i];
  return sum(total);
}

// Returns the mean of the accumulators, all of which converge to 1/2.
float multiply_adds(double operations) {
  const int n = mlx_esm::threads();
  const long rounds = operations / (2.0 * W * SUMS * n) + 1;
  std::vector<float> totals(n);
  mlx_esm::parallel_for(n, [&](long i) { totals[i] = multiply_adds_on_a_thread(rounds); });
  float total = 0;
  for (float t : totals) total += t;
  return total / (W * SUMS * n);
}

}  // namespace
