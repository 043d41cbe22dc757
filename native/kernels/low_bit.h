// Low-bit weights, converted to float32 block by block: a block fits in the L2 cache, and there is never a float32 copy
// of the whole matrix.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <utility>

#include "arena.h"
#include "kernels.h"
#include "linear.h"

namespace {

using mlx_esm::Dtype;
using mlx_esm::LowBitWeight;

using Byte = unsigned char;
using bytes = Byte __attribute__((vector_size(W)));
using halves = unsigned short __attribute__((vector_size(2 * W)));

template <class V>
inline V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Convert the float16 or bfloat16 in the low half of each lane to float32.
inline vec float_of(uvec half, Dtype dtype) {
  if (dtype == Dtype::bfloat16) return (vec)(half << 16);
#if defined(__AVX512F__)
  // The masked form with all lanes enabled: GCC 12 warns about its own header in the other form.
  return (vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i) __builtin_convertvector(half, halves));
#elif defined(__F16C__)
  return (vec)_mm256_cvtph_ps((__m128i) __builtin_convertvector(half, halves));
#else
  // Change the exponent's bias from 15 to 127. A denormal number gets the smallest exponent, and the implicit leading 1
  // is subtracted. Infinity and NaN have the largest exponent in both formats.
  constexpr unsigned one = 1 << 23;
  const uvec size = (half & 0x7fff) << 13, exponent = size & (31 << 23);
  const uvec moved = size + 112 * one;
  const vec denormal = (vec)(moved + one) - 0x1p-14f;
  const uvec magnitude = exponent == 0 ? (uvec)denormal : exponent == 31 * one ? moved + 112 * one : moved;
  return (vec)(magnitude | (half & 0x8000) << 16);
#endif
}

// Element i of an array, as float32.
inline float element_at(const void* array, Dtype dtype, long i) {
  if (dtype == Dtype::float32) return static_cast<const float*>(array)[i];
  return float_of(uvec{} + static_cast<const unsigned short*>(array)[i], dtype)[0];
}

inline void convert_halves(const unsigned short* row, Dtype dtype, long depth, float* out) {
  auto floats = [=](const halves& v) { return float_of(__builtin_convertvector(v, uvec), dtype); };
  long k = 0;
#pragma GCC unroll 4
  for (; k + W <= depth; k += W) store(out + k, floats(load_as<halves>(row + k)));
  if (k == depth) return;
  halves rest{};
  __builtin_memcpy(&rest, row + k, (depth - k) * sizeof *row);
  store_columns(out + k, floats(rest), depth - k);
}

template <int... L>
inline uvec lane_numbers(std::integer_sequence<int, L...>) {
  return uvec{L...};
}

// W integers of BITS bits, from element i of a row on, where i is a multiple of W.
template <int BITS>
inline uvec integers_at(const Byte* row, unsigned long i) {
  if constexpr (BITS == 8) {
    // Two conversions, one instruction each: GCC 12 compiles a single conversion to many.
    return __builtin_convertvector(__builtin_convertvector(load_as<bytes>(row + i), halves), uvec);
#if defined(__AVX512F__)
  } else if constexpr (BITS == 4) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + i / 2));
    const uvec both = (uvec)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_unpacklo_epi8(v, v));  // each byte twice
    return both >> lane_numbers(std::make_integer_sequence<int, W>()) % 2 * 4 & 15;
#endif
  } else {
    constexpr int WORD = BITS > 4 ? 4 : 8, SIZE = WORD * BITS / 8;  // integers that fit in 32 bits, and their bytes
    const uvec lane = lane_numbers(std::make_integer_sequence<int, W>());
    uvec v{};
#pragma GCC unroll 16
    for (unsigned l = 0; l < W; l += WORD) {
      unsigned word = 0;
      __builtin_memcpy(&word, row + (i + l) / WORD * SIZE, SIZE);
      if (W < WORD) word >>= i % WORD * BITS;
      v = lane >= l ? uvec{} + word : v;
    }
    return v >> lane % WORD * BITS & ((1 << BITS) - 1);
  }
}

// Dequantize `depth` elements of row n from column k on. Both are multiples of 32, the smallest group.
template <int BITS>
inline void dequantize(const LowBitWeight& w, long inputs, long n, long k, long depth, float* out) {
  const Byte* row = static_cast<const Byte*>(w.data) + n * inputs * BITS / 8;
  const int shift = __builtin_ctzl(w.group);  // instead of a division per group, which would take as long as the rest
  for (long i = k, end; i < k + depth; i = end) {
    const long group = i >> shift, place = n * (inputs >> shift) + group;
    const float scale = element_at(w.scales, w.dtype, place), bias = element_at(w.biases, w.dtype, place);
    end = least((group + 1) << shift, k + depth);
    for (long j = i; j < end; j += 32)
#pragma GCC unroll 8
      for (long l = j; l < j + 32; l += W)
        store(out + l - k, __builtin_convertvector((ivec)integers_at<BITS>(row, l), vec) * scale + bias);
  }
}

inline void convert_row(const LowBitWeight& w, long inputs, long n, long k, long depth, float* out) {
  if (!w.scales)
    return convert_halves(static_cast<const unsigned short*>(w.data) + n * inputs + k, w.dtype, depth, out);
  switch (w.bits) {
    case 2:
      return dequantize<2>(w, inputs, n, k, depth, out);
    case 3:
      return dequantize<3>(w, inputs, n, k, depth, out);
    case 4:
      return dequantize<4>(w, inputs, n, k, depth, out);
    case 6:
      return dequantize<6>(w, inputs, n, k, depth, out);
    default:
      return dequantize<8>(w, inputs, n, k, depth, out);
  }
}

// Prefetch `size` bytes into the L2 cache: pieces of rows are too short for the processor's own prefetcher.
inline void prefetch(const Byte* p, long size) {
  for (long b = 0; b < size; b += 64) __builtin_prefetch(p + b, 0, 2);
}

// Convert N rows from column k on to float32. They stay valid until the same thread calls this again.
inline Rows float_rows(const LowBitWeight& w, long inputs, long n, long N, long k, long depth) {
  static thread_local Arena arena;
  arena.clear();
  float* rows = arena.take(N * depth);
  const long bits = w.scales ? w.bits : 16;
  const Byte* piece = static_cast<const Byte*>(w.data) + (n * inputs + k) * bits / 8;
  for (long i = 0; i < N; i++) {
    prefetch(piece + (N + i) * inputs * bits / 8, depth * bits / 8);
    convert_row(w, inputs, n + i, k, depth, rows + i * depth);
  }
  return {rows, depth};
}

}  // namespace
