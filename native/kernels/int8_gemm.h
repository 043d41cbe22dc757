// int8 GEMM: unsigned weights of 4 or 8 bits times activations quantized to int8, with one scale per token and group.
//
// A lane is a token, as in gemm.h, but holds several of its integers: four bytes if the machine has a dot product of
// bytes (VNNI, Arm's dot product), otherwise two integers of 16 bits.
#pragma once

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "low_bit.h"

namespace {

// Return sum + the dot product of the integers in w with those in each lane of x. On Arm both operands are signed:
// OFFSET is subtracted from the weights, and the sum starts at OFFSET · (the sum of x's integers) to compensate.
#if defined(__AVX512VNNI__)
constexpr int TOGETHER = 4, OFFSET = 0;
inline ivec dot(ivec sum, unsigned w, uvec x) {
  return (ivec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(w), (__m512i)x);
}
#elif defined(__AVXVNNI__)
constexpr int TOGETHER = 4, OFFSET = 0;
inline ivec dot(ivec sum, unsigned w, uvec x) {
  return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(w), (__m256i)x);
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int TOGETHER = 4, OFFSET = 128;
inline ivec dot(ivec sum, unsigned w, uvec x) {
  return (ivec)vdotq_lane_s32((int32x4_t)sum, (int8x16_t)x, (int8x8_t)(uint32x2_t){w}, 0);
}
#else
constexpr int TOGETHER = 2, OFFSET = 0;
#if defined(__AVX512BW__)
inline ivec dot(ivec sum, unsigned w, uvec x) {
  return sum + (ivec)_mm512_madd_epi16(_mm512_set1_epi32(w), (__m512i)x);
}
#elif defined(__AVX2__)
inline ivec dot(ivec sum, unsigned w, uvec x) {
  return sum + (ivec)_mm256_madd_epi16(_mm256_set1_epi32(w), (__m256i)x);
}
#elif defined(__SSE2__)
inline ivec dot(ivec sum, unsigned w, uvec x) { return sum + (ivec)_mm_madd_epi16(_mm_set1_epi32(w), (__m128i)x); }
#else
inline ivec dot(ivec sum, unsigned w, uvec x) {
  return sum + (int)(w & 0xffff) * ((ivec)(x << 16) >> 16) + (int)(w >> 16) * ((ivec)x >> 16);
}
#endif
#endif

constexpr int WIDTH = 32 / TOGETHER;  // bits per integer in a lane, which holds TOGETHER of them

// A panel of T = V * W tokens with K inputs, quantized: x ≈ scale · integer.
struct Int8Panel {
  unsigned* integers;    // [K / TOGETHER, T], TOGETHER in each element
  float *scales, *sums;  // [K / group, T]: the scales, and scale · (sum of the group's integers)
  int* integer_sums;     // [K / group, T]: the sums of the group's integers
};

// Quantize a panel [K, V * W] of floats.
template <int V>
inline void round_panel(const float* panel, long K, long group, Int8Panel out) {
  constexpr long T = V * W;
  constexpr float round = 1.5f * (1 << 23);  // adding it leaves the nearest integer in the low bits
  for (long g = 0; g < K / group; g++)
    for (int j = 0; j < V; j++) {
      const float* x = panel + g * group * T + j * W;
      vec largest{}, poison{};
      for (long k = 0; k < group; k++) {
        const vec v = load(x + k * T);
        largest = max(max(v, -v), largest);
        poison += v * 0.0f;  // NaN if an element is infinite or NaN
      }
      const vec to_integer = largest > 1e-30f ? 127.0f / largest : vec{};
      const vec scale = largest / 127.0f + poison;
      vec sum{};
      for (long k = 0; k < group; k += TOGETHER) {
        uvec together{};
#pragma GCC unroll 4
        for (int i = 0; i < TOGETHER; i++) {
          // The maximum changes no result. It separates product and sum, so that no compiler fuses them and all machines
          // round alike.
          const vec shifted = max(load(x + (k + i) * T) * to_integer, splat(-127.0f)) + round;
          sum += shifted - round;
          together |= ((uvec)shifted & ((1u << WIDTH) - 1)) << WIDTH * i;
        }
        __builtin_memcpy(out.integers + (g * group + k) / TOGETHER * T + j * W, &together, sizeof together);
      }
      store(out.scales + g * T + j * W, scale);
      store(out.sums + g * T + j * W, sum * scale);
      const ivec integer_sum = __builtin_convertvector(sum, ivec);
      __builtin_memcpy(out.integer_sums + g * T + j * W, &integer_sum, sizeof integer_sum);
    }
}

// Rows of a weight in the layout that `dot` takes.
struct WeightRows {
  const Byte* integers;
  long stride;                   // bytes
  const float *scales, *biases;  // [N, groups]
  long groups, group;
};

// Expand `depth` integers of a row, from column k on, to the layout that `dot` takes.
template <int BITS>
inline void spread(const Byte* row, long k, long depth, Byte* out) {
  if (BITS == 8 && TOGETHER == 4) {
    for (long i = 0; i < depth; i++) out[i] = row[k + i] - OFFSET;
    return;
  }
  for (long i = 0; i < depth; i += W) {
    const uvec v = integers_at<BITS>(row, k + i) - OFFSET;
    if constexpr (TOGETHER == 4) {
      const bytes narrow = __builtin_convertvector(v, bytes);
      __builtin_memcpy(out + i, &narrow, sizeof narrow);
    } else {
      const halves narrow = __builtin_convertvector(v, halves);
      __builtin_memcpy(out + 2 * i, &narrow, sizeof narrow);
    }
  }
}

// Return N rows from column k on, where a group starts. They stay valid until the same thread calls this again.
inline WeightRows weight_rows(const LowBitWeight& w, long inputs, long n, long N, long k, long depth) {
  static thread_local Arena arena;
  arena.clear();
  const long groups = depth / w.group, stride = depth * 4 / TOGETHER;
  float *scales = arena.take(N * groups), *biases = arena.take(N * groups);
  for (long i = 0; i < N; i++)
    for (long g = 0; g < groups; g++) {
      const long place = ((n + i) * inputs + k) / w.group + g;
      scales[i * groups + g] = element_at(w.scales, w.dtype, place);
      biases[i * groups + g] = element_at(w.biases, w.dtype, place);
    }
  const Byte* rows = static_cast<const Byte*>(w.data) + n * inputs * w.bits / 8;
  if (w.bits == 8 && TOGETHER == 4 && !OFFSET)  // the stored layout is what `dot` takes
    return {rows + k, inputs, scales, biases, groups, w.group};
  Byte* integers = reinterpret_cast<Byte*>(arena.take(N * depth / TOGETHER));
  for (long i = 0; i < N; i++) {
    const Byte* row = rows + i * inputs * w.bits / 8;
    prefetch(row + (N * inputs + k) * w.bits / 8, depth * w.bits / 8);
    w.bits == 4 ? spread<4>(row, k, depth, integers + i * stride) : spread<8>(row, k, depth, integers + i * stride);
  }
  return {integers, stride, scales, biases, groups, w.group};
}

// Tile height: int32 accumulators plus float totals for V vectors of tokens fill the register file.
template <int V>
constexpr int INT8_ROWS = MR * NV / (2 * V);

// c[R, V * W] = R rows from row `first` on, times the panel; += if `add`.
template <int R, int V>
inline void multiply_int8(const WeightRows& w, long first, const Int8Panel& x, float* __restrict c, bool add) {
  constexpr long T = V * W;
  vec total[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) total[i][j] = add ? load(c + i * T + j * W) : vec{};
  for (long g = 0; g < w.groups; g++) {
    ivec acc[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) acc[i][j] = OFFSET * load_as<ivec>(x.integer_sums + g * T + j * W);
    const Byte* row = w.integers + first * w.stride + g * w.group * 4 / TOGETHER;
    const unsigned* panel = x.integers + g * w.group / TOGETHER * T;
#pragma GCC unroll 4
    for (long k = 0; k < w.group / TOGETHER; k++) {
      uvec b[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) b[j] = load_as<uvec>(panel + k * T + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) {
        const unsigned a = load_as<unsigned>(row + i * w.stride + 4 * k);
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) acc[i][j] = dot(acc[i][j], a, b[j]);
      }
    }
    const float *scales = w.scales + first * w.groups + g, *biases = w.biases + first * w.groups + g;
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) {
        const vec scale = load(x.scales + g * T + j * W) * scales[i * w.groups];
        // Combine the scale and bias terms before accumulating: they are large and may cancel.
        const vec bias = load(x.sums + g * T + j * W) * biases[i * w.groups];
        total[i][j] += __builtin_convertvector(acc[i][j], vec) * scale + bias;
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) store(c + i * T + j * W, total[i][j]);
}

template <int V, int R = INT8_ROWS<V>>
inline void multiply_int8_rest(long rows, const WeightRows& w, long first, const Int8Panel& x, float* c, bool add) {
  if constexpr (R > 0) {
    if (rows == R) return multiply_int8<R, V>(w, first, x, c, add);
    multiply_int8_rest<V, R - 1>(rows, w, first, x, c, add);
  }
}

// The quantized panels of a round of tokens.
struct Int8Panels {
  Int8Panel first;
  long inputs, group;

  // The panel of V vectors of tokens from token t on, from column k on.
  template <int V>
  Int8Panel at(long t, long k) const {
    const long i = t * inputs + k * V * W, g = i / group;
    return {first.integers + i / TOGETHER, first.scales + g, first.sums + g, first.integer_sums + g};
  }
};

// Multiply a block of tokens by a block of outputs.
inline void int8_block(const Linear& p, const Block& block, const Int8Panels& panels, const LowBitWeight& weight) {
  static thread_local Arena arena;
  const long K = p.inputs, depth = round_up(TOGETHER * DEPTH, weight.group);
  arena.clear();
  float* product = arena.take(p.token_block * OUTPUTS);
  for (long n0 = block.first; n0 < block.last; n0 += OUTPUTS) {
    const long N = least(OUTPUTS, block.last - n0);
    for (long k = 0; k < K; k += depth) {
      const WeightRows rows = weight_rows(weight, K, n0, N, k, least(depth, K - k));
      for (long t = block.t0; t < block.t1; t += NR)
        for_panel(block.t1 - t, [&](auto V) {
          float* c = product + (t - block.t0) * N;
          const Int8Panel panel = panels.at<V>(t, k);
          constexpr long R = INT8_ROWS<V>;
          long n = 0;
          for (; n + R <= N; n += R) multiply_int8<R, V>(rows, n, panel, c + n * V * W, k > 0);
          multiply_int8_rest<V>(N - n, rows, n, panel, c + n * V * W, k > 0);
          if (k + depth >= K) finish<V>(p, block, t, n0, N, c);
        });
    }
  }
}

// Pack and quantize the panel of NR tokens from t on.
inline void quantize_tokens(const Linear& p, long t, const Int8Panels& panels) {
  static thread_local Arena arena;
  arena.clear();
  const long K = p.inputs;
  float* floats = arena.take(K * NR);
  for_panel(p.tokens - t, [&](auto V) {
    pack<V>(p.x + t * K, K, least(NR, p.tokens - t), K, floats);
    round_panel<V>(floats, K, panels.group, panels.at<V>(t, 0));
  });
}

inline void int8_layer(Linear p, const LowBitWeight& weight) {
  if (!p.tokens || !p.outputs) return;
  static thread_local Arena arena;
  arena.clear();
  cut(p);
  const long K = p.inputs, groups = p.round * (K / weight.group);
  auto integers = reinterpret_cast<unsigned*>(arena.take(p.round * K / TOGETHER));
  float *scales = arena.take(groups), *sums = arena.take(groups);
  const Int8Panels panels{{integers, scales, sums, reinterpret_cast<int*>(arena.take(groups))}, K, weight.group};
  auto pack_panel = [&](const Linear& p, long panel) { quantize_tokens(p, panel * NR, panels); };
  in_rounds(p, pack_panel, [&](const Linear& p, const Block& block) { int8_block(p, block, panels, weight); });
}

void int8_linear(const float* x, const LowBitWeight& weight, const float* bias, const float* residual, float* y,
                 long tokens, long outputs, long inputs, Activation activation, float output_scale) {
  int8_layer({x, bias, residual, y, tokens, outputs, inputs, activation, output_scale}, weight);
}

}  // namespace
