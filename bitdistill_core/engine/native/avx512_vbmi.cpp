// Base 3 as it lies in the file, for the second table of avx512_vnni.cpp: vpermb looks 64 codes up at once. Compiled with
// -mavx512vbmi beside the flags of that file, and called only where the processor has it.
#include <immintrin.h>

#include "kernels.h"

namespace bitdistill {
namespace {

typedef int32_t Int16x32 __attribute__((vector_size(64)));

__attribute__((always_inline)) inline __m512i load_bytes(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }

// Code `place` of the values 0 to 31, twice: vpermb looks at six bits of a byte, and the sixth may be anything.
template <int power>
__m512i code_table() {
  alignas(64) uint8_t table[64];
  for (int i = 0; i < 64; ++i) table[i] = uint8_t(i % 32 / power % 3);
  return load_bytes(table);
}

// Calls take(step, codes) for the 24 steps of a group. Values 28 to 31 give codes too, whatever they are.
template <class Take>
__attribute__((always_inline)) inline void for_steps(const uint8_t* group, __m512i first, __m512i second, __m512i third,
                                                     Take&& take) {
  const __m512i bits = load_bytes(group + 4 * kLineBytes);
  const auto value = [&](int i, __m512i nibbles, __m512i bits_at_4) {
    // the lower four bits of one, the others of the other
    const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), nibbles, bits_at_4, 0xca);
    take(3 * i, _mm512_permutexvar_epi8(index, first));
    take(3 * i + 1, _mm512_permutexvar_epi8(index, second));
    take(3 * i + 2, _mm512_permutexvar_epi8(index, third));
  };
  __m512i nibbles = load_bytes(group);
  value(0, nibbles, _mm512_slli_epi16(bits, 4));
  value(1, _mm512_srli_epi16(nibbles, 4), _mm512_slli_epi16(bits, 3));
  nibbles = load_bytes(group + kLineBytes);
  value(2, nibbles, _mm512_slli_epi16(bits, 2));
  value(3, _mm512_srli_epi16(nibbles, 4), _mm512_slli_epi16(bits, 1));
  nibbles = load_bytes(group + 2 * kLineBytes);
  value(4, nibbles, bits);
  value(5, _mm512_srli_epi16(nibbles, 4), _mm512_srli_epi16(bits, 1));
  nibbles = load_bytes(group + 3 * kLineBytes);
  value(6, nibbles, _mm512_srli_epi16(bits, 2));
  value(7, _mm512_srli_epi16(nibbles, 4), _mm512_srli_epi16(bits, 3));
}

}  // namespace

// |sum of code * x| fits int32 (kMaxK). Six sums, to hide the latency of vpdpbusd.
void avx512_vbmi_gemv_base3(const uint8_t* groups, int num_groups, const int8_t* x, int32_t* sums) {
  const __m512i first = code_table<1>(), second = code_table<3>(), third = code_table<9>();
  Int16x32 partial[6] = {};
  for (; num_groups > 0; --num_groups, groups += kBase3Bytes, x += kBase3K) {
    for (int line = 0; line < kBase3Bytes; line += kLineBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(groups + 1024 + line), _MM_HINT_T0);
    }
    for_steps(groups, first, second, third, [&](int step, __m512i codes) {
      int32_t four;
      __builtin_memcpy(&four, x + 4 * step, sizeof four);
      Int16x32& sum = partial[step % 6];
      sum = (Int16x32)_mm512_dpbusd_epi32((__m512i)sum, codes, _mm512_set1_epi32(four));
    });
  }
  const Int16x32 total = (partial[0] + partial[1]) + (partial[2] + partial[3]) + (partial[4] + partial[5]);
  __builtin_memcpy(sums, &total, sizeof total);
}

void avx512_vbmi_unpack_base3(const uint8_t* groups, int num_groups, uint8_t* codes) {
  const __m512i first = code_table<1>(), second = code_table<3>(), third = code_table<9>();
  for (; num_groups > 0; --num_groups, groups += kBase3Bytes, codes += kBase3K * kPanelRows) {
    for_steps(groups, first, second, third,
              [&](int step, __m512i vector) { _mm512_store_si512(codes + step * kLineBytes, vector); });
  }
}

}  // namespace bitdistill
