// What the files for AVX2 and AVX-VNNI do alike with bytes. Static, like float_ops.h: each file compiles its own.
#pragma once

#include <immintrin.h>

#include "vector.h"

namespace bitdistill {
namespace {

BITDISTILL_INLINE __m256i load_bytes(const void* bytes) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(bytes));
}

BITDISTILL_INLINE __m256i broadcast_four(const int8_t* x) {
  return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(x)));
}

[[maybe_unused]] void unpack_panel(const uint8_t* lines, int num_lines, uint8_t* codes) {
  const __m256i mask = _mm256_set1_epi8(3);
  for (int line = 0; line < num_lines; ++line, lines += kLineBytes) {
    __m256i a = load_bytes(lines), b = load_bytes(lines + 32);
    for (int plane = 0; plane < 4; ++plane, codes += kLineBytes) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes), _mm256_and_si256(a, mask));
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes + 32), _mm256_and_si256(b, mask));
      a = _mm256_srli_epi16(a, 2);
      b = _mm256_srli_epi16(b, 2);
    }
  }
}

}  // namespace
}  // namespace bitdistill
