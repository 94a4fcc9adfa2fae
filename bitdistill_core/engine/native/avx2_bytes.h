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

// The values of two columns in half a group of base 3, [column][16 rows]: calls take(i, magnitudes, signs) for i from 7
// to 0. A byte of `signs` is below 0 for a negative value, above 0 for another.
template <class Take>
BITDISTILL_INLINE void for_values(const uint8_t* group, int half, Take&& take) {
  const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi8(1);
  const __m256i bits = load_bytes(group + 4 * kLineBytes + 32 * half);
  __m256i signs = _mm256_or_si256(bits, one);
#pragma GCC unroll 4
  for (int line = 3; line >= 0; --line) {
    const __m256i nibbles = load_bytes(group + line * kLineBytes + 32 * half);
    take(2 * line + 1, _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), nibble), signs);
    signs = line > 0 ? _mm256_add_epi8(signs, signs) : _mm256_or_si256(_mm256_slli_epi16(bits, 7), one);
    take(2 * line, _mm256_and_si256(nibbles, nibble), signs);
    signs = _mm256_add_epi8(signs, signs);
  }
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
