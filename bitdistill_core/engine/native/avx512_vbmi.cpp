// Base 3 as it lies in the file, for the second table of avx512_vnni.cpp: vpermb looks 64 codes up at once. Compiled
// with -mavx512vbmi beside the flags of that file, and called only where the processor has it.
#include "avx512_bytes.h"

namespace bitdistill {
namespace {

// The three codes of a value, for vpermb, which looks at six bits of a byte: the magnitude in the lower four and, as
// the sign, bit 4 for even values, bit 5 for odd ones; the other one may be anything. So one shift does for two values.
struct CodeTables {
  uint8_t codes[2][3][64];
};

alignas(64) constexpr CodeTables kCodes = [] {
  CodeTables tables{};
  for (int odd = 0; odd < 2; ++odd) {
    for (int place = 0, power = 1; place < 3; ++place, power *= 3) {
      for (int i = 0; i < 64; ++i) {
        const int magnitude = i % 16 < kBase3Magnitudes ? i % 16 : 0;
        tables.codes[odd][place][i] = uint8_t((13 + (i >> (4 + odd) & 1 ? -magnitude : magnitude)) / power % 3);
      }
    }
  }
  return tables;
}();

// [4 columns][16 rows] to [16 rows][4 columns], as vpdpbusd adds four neighbours up.
struct Transposed {
  uint8_t from[64];
};

alignas(64) constexpr Transposed kTransposed = [] {
  Transposed transposed{};
  for (int i = 0; i < 64; ++i) transposed.from[i] = uint8_t(i % 4 * kPanelRows + i / 4);
  return transposed;
}();

// Calls take(step, codes) for the 24 steps of a group. Magnitudes 14 and 15 give codes too, whatever they are.
template <class Take>
BITDISTILL_INLINE void for_steps(const uint8_t* group, Take&& take) {
  const __m512i bits = load_bytes(group + 4 * kLineBytes);
  const auto value = [&](int i, __m512i nibbles, __m512i fifths) {
    // the lower four bits of one, the others of the other
    const __m512i value = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), nibbles, fifths, 0xca);
    const __m512i index = _mm512_permutexvar_epi8(load_bytes(kTransposed.from), value);
    const auto& tables = kCodes.codes[i % 2];
    for (int place = 0; place < 3; ++place) {
      take(3 * i + place, _mm512_permutexvar_epi8(index, load_bytes(tables[place])));
    }
  };
  const auto line = [&](int i, __m512i fifths) {
    const __m512i nibbles = load_bytes(group + i * kLineBytes);
    value(2 * i, nibbles, fifths);
    value(2 * i + 1, _mm512_srli_epi16(nibbles, 4), fifths);
  };
  line(0, _mm512_slli_epi16(bits, 4));
  line(1, _mm512_slli_epi16(bits, 2));
  line(2, bits);
  line(3, _mm512_srli_epi16(bits, 2));
}

}  // namespace

// |sum of code * x| fits int32 (kMaxK). Six sums, to hide the latency of vpdpbusd.
void avx512_vbmi_gemv_base3(const uint8_t* groups, int num_groups, const int8_t* x, int32_t* sums) {
  Int32x16 partial[6] = {};
  for (; num_groups > 0; --num_groups, groups += kBase3Bytes, x += kBase3K) {
    prefetch_ahead(groups, kBase3Bytes);
    for_steps(groups, [&](int step, __m512i codes) {
      partial[step % 6] = multiply_add(partial[step % 6], codes, broadcast_four(x + 4 * step));
    });
  }
  store_sums(sums, (partial[0] + partial[1]) + (partial[2] + partial[3]) + (partial[4] + partial[5]));
}

void avx512_vbmi_unpack_base3(const uint8_t* groups, int num_groups, uint8_t* codes) {
  for (; num_groups > 0; --num_groups, groups += kBase3Bytes, codes += kBase3K * kPanelRows) {
    for_steps(groups, [&](int step, __m512i vector) { _mm512_store_si512(codes + step * kLineBytes, vector); });
  }
}

}  // namespace bitdistill
