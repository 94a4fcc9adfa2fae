// What the files for AVX-512 do alike with bytes. Static, like float_ops.h: each file compiles its own.
#pragma once

#include <immintrin.h>

#include "vector.h"

namespace bitdistill {
namespace {

// 16 sums of 32 bits, not __m512i, which GCC 12 copies before and after every vpdpbusd.
typedef int32_t Int32x16 __attribute__((vector_size(64)));

BITDISTILL_INLINE __m512i load_bytes(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }

BITDISTILL_INLINE __m512i broadcast_four(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

BITDISTILL_INLINE Int32x16 multiply_add(Int32x16 sums, __m512i codes, __m512i x) {
  return (Int32x16)_mm512_dpbusd_epi32((__m512i)sums, codes, x);
}

BITDISTILL_INLINE void store_sums(int32_t* sums, Int32x16 v) { __builtin_memcpy(sums, &v, sizeof v); }

}  // namespace
}  // namespace bitdistill
