// Multiply-adds on registers alone: as fast as this machine computes, and what a matrix product may hope for.
#pragma once

#include <vector>

#include "threads.h"
#include "vec.h"

namespace {

// Each thread adds to this many vectors, so that no sum waits for its own last one.
constexpr int SUMS = 2 * ROWS;

inline float multiply_adds_on_a_thread(long rounds) {
  vec sums[SUMS], x = splat(0.5f), y = splat(0.25f);
#pragma GCC unroll 32
  for (int i = 0; i < SUMS; i++) sums[i] = splat(i);  // different ones, or the compiler would compute one alone
  asm volatile("" : "+m"(x), "+m"(y));  // which it does not know
  for (long r = 0; r < rounds; r++)
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; i++) sums[i] = sums[i] * x + y;
  vec total{};
#pragma GCC unroll 32
  for (int i = 0; i < SUMS; i++) total += sums[i];
  return sum(total);
}

// Returns the mean of the sums, which all converge to 1/2.
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
