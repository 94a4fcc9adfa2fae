// Eight floats at once, with the compiler's vector types, for float_ops.h. Static, like everything there.
#pragma once

#include "kernels.h"

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace bitdistill {
namespace {

#define BITDISTILL_INLINE static inline __attribute__((always_inline))

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int32x8 __attribute__((vector_size(32)));
typedef float Float8Unaligned __attribute__((vector_size(32), aligned(4), may_alias));

BITDISTILL_INLINE Float8 load8(const float* x) { return *reinterpret_cast<const Float8Unaligned*>(x); }
BITDISTILL_INLINE void store8(float* x, Float8 v) { *reinterpret_cast<Float8Unaligned*>(x) = v; }
BITDISTILL_INLINE Float8 all8(float x) { return Float8{x, x, x, x, x, x, x, x}; }
BITDISTILL_INLINE Float8 min8(Float8 a, Float8 b) { return a < b ? a : b; }
BITDISTILL_INLINE Float8 max8(Float8 a, Float8 b) { return a > b ? a : b; }

BITDISTILL_INLINE float sum_of(Float8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
BITDISTILL_INLINE float max_of(Float8 v) {
  float result = v[0];
  for (int i = 1; i < 8; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

// The first n of 8 elements, zeros after them.
BITDISTILL_INLINE Float8 load_some(const float* x, int n) {
  float values[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int i = 0; i < n; ++i) values[i] = x[i];
  return load8(values);
}

BITDISTILL_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  uint32_t bits = (rest << 13) + (112u << 23);  // the exponent's bias: 15 to 127
  if (rest >= 0x7c00) bits += 112u << 23;  // infinity and NaN
  float value;
  __builtin_memcpy(&value, &bits, 4);
  if (rest < 0x0400) value = float(rest) * 0x1p-24f;  // subnormal
  __builtin_memcpy(&bits, &value, 4);
  bits |= sign;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Rounds half to even, as vcvtps2ph does; what is too large becomes infinity.
BITDISTILL_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (bits < 0x38800000) {  // below the smallest normal: a multiple of 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    const float rounded = (magnitude * 0x1p24f + 12582912.0f) - 12582912.0f;
    return uint16_t(sign | uint32_t(rounded));
  }
  return uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13));
}

#ifdef __F16C__
BITDISTILL_INLINE Float8 load8(const uint16_t* x) {
  return (Float8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
BITDISTILL_INLINE void store8(uint16_t* x, Float8 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
BITDISTILL_INLINE void store8(uint16_t* x, Float8 v) {
  for (int i = 0; i < 8; ++i) x[i] = float_to_half(v[i]);
}
#endif

#ifdef __AVX2__
// Rows to columns, 8 x 8.
BITDISTILL_INLINE void transpose8(Float8 (&a)[8]) {
  __m256 b[8], c[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_ps((__m256)a[2 * i], (__m256)a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_ps((__m256)a[2 * i], (__m256)a[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256d first = (__m256d)b[4 * i + j], second = (__m256d)b[4 * i + 2 + j];
      c[4 * i + 2 * j] = (__m256)_mm256_unpacklo_pd(first, second);
      c[4 * i + 2 * j + 1] = (__m256)_mm256_unpackhi_pd(first, second);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = (Float8)_mm256_permute2f128_ps(c[i], c[4 + i], 0x20);
    a[4 + i] = (Float8)_mm256_permute2f128_ps(c[i], c[4 + i], 0x31);
  }
}
#endif

// e^x to about 2 units in the last place; below -87.3 it is 0.
BITDISTILL_INLINE Float8 exp8(Float8 x) {
  const Float8 clamped = max8(min8(x, all8(88.3762626f)), all8(-87.3365402f));
  const Float8 magic = all8(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const Float8 shifted = clamped * all8(1.44269504f) + magic;
  const Float8 n = shifted - magic;
  Float8 r = clamped - n * all8(0.693359375f);
  r = r - n * all8(-2.12194440e-4f);
  Float8 p = all8(1.9875691500e-4f);
  p = p * r + all8(1.3981999507e-3f);
  p = p * r + all8(8.3334519073e-3f);
  p = p * r + all8(4.1665795894e-2f);
  p = p * r + all8(1.6666665459e-1f);
  p = p * r + all8(5.0000001201e-1f);
  p = p * (r * r) + r + all8(1.0f);
  const Int32x8 exponent = ((Int32x8)shifted - (Int32x8)magic) << 23;
  const Float8 result = (Float8)((Int32x8)p + exponent);
  const Float8 positive = x < all8(-87.3365402f) ? all8(0.0f) : result;
  return x == x ? positive : x;  // NaN
}

}  // namespace
}  // namespace bitdistill
