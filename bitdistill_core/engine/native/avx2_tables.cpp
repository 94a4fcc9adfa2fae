// Sums by tables in AVX2, for the table of avx2.cpp. Compiled with its flags.
//
// Inside, an int16 lane is a token in the order 0-3, 8-11, 4-7, 12-15, as vpackssdw leaves them, and a row has a slot
// in that same order, as name_triples leaves them.
#include "avx2_bytes.h"

namespace bitdistill {
namespace {

// Codes of a triple's three steps, 8 rows x 4 columns, to 4 (c0 + 3 c1 + 9 c2):
// an eighth of what a row adds to `tables`.
BITDISTILL_INLINE __m256i name_of(__m256i c0, __m256i c1, __m256i c2) {
  const __m256i high = _mm256_add_epi8(c1, _mm256_add_epi8(c2, _mm256_add_epi8(c2, c2)));
  const __m256i name = _mm256_add_epi8(c0, _mm256_add_epi8(high, _mm256_add_epi8(high, high)));
  return _mm256_slli_epi16(name, 2);
}

// The triples of the steps first, first + 1 and first + 2; a step that is not there has weights 0, code 1.
BITDISTILL_INLINE void name_steps(const uint8_t* lines, int first, int num_steps, uint8_t* triples) {
  const __m256i mask = _mm256_set1_epi8(3);
  __m256i names[2];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256i codes[3];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const int step = first + i;
      codes[i] = _mm256_set1_epi8(1);
      if (step >= num_steps) continue;
      const __m256i line = load_bytes(lines + step / 4 * kLineBytes + 32 * half);
      codes[i] = _mm256_and_si256(_mm256_srli_epi16(line, 2 * (step % 4)), mask);
    }
    names[half] = name_of(codes[0], codes[1], codes[2]);
  }
  // [16 rows][4 columns] to [4 columns][16 slots]
  const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i by_column = _mm256_broadcastsi128_si256(bytes);
  const __m256i a = _mm256_shuffle_epi8(names[0], by_column), b = _mm256_shuffle_epi8(names[1], by_column);
  const __m256i low = _mm256_permute4x64_epi64(_mm256_unpacklo_epi32(a, b), 0xd8);
  const __m256i high = _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(a, b), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(triples), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(triples + 32), high);
}

// The eight triples of steps of a group of base 3 to to_of(0) ... to_of(7).
template <class ToOf>
BITDISTILL_INLINE void name_group(const uint8_t* group, ToOf&& to_of) {
  const __m256i slots =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15));
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    for_values(group, half, [&](int i, __m256i magnitudes, __m256i signs) __attribute__((always_inline)) {
      const __m256i value = _mm256_add_epi8(_mm256_sign_epi8(magnitudes, signs), _mm256_set1_epi8(13));
      const __m256i names = _mm256_shuffle_epi8(_mm256_slli_epi16(value, 2), slots);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_of(i) + 32 * half), names);
    });
  }
}

// Three lines are four triples of steps.
void name_triples(const uint8_t* panel, int num_groups, int num_lines, uint8_t* names, std::size_t stride) {
  constexpr int kBytes = 4 * kPanelRows, kAtOnce = kBlockNames / kBytes;  // a triple of steps, how many in a block
  int number = 0;
  const auto at = [&](int triple) { return names + triple / kAtOnce * stride + triple % kAtOnce * kBytes; };
  const uint8_t* lines = panel;
  for (; num_groups > 0; --num_groups, lines += kBase3Bytes, number += 8) {
    name_group(lines, [&](int i) { return at(number + i); });
  }
  for (; num_lines >= 3; num_lines -= 3, lines += 3 * kLineBytes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, ++number) name_steps(lines, 3 * i, 12, at(number));
  }
  for (int step = 0; step < 4 * num_lines; step += 3, ++number) name_steps(lines, step, 4 * num_lines, at(number));
}

// Column j of a step of 16 tokens.
BITDISTILL_INLINE __m256i column_of(const int8_t* step, int j) {
  const __m256i a = _mm256_slli_epi32(load_bytes(step), 24 - 8 * j);
  const __m256i b = _mm256_slli_epi32(load_bytes(step + 32), 24 - 8 * j);
  return _mm256_packs_epi32(_mm256_srai_epi32(a, 24), _mm256_srai_epi32(b, 24));
}

int build_tables(const int8_t* x_tile, int num_steps, int16_t* tables) {
  constexpr int kStepBytes = 4 * kTableTokens;
  const __m256i zero = _mm256_setzero_si256();
  __m256i total = zero;
  for (int step = 0; step < num_steps; step += 3, x_tile += 3 * kStepBytes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m256i x0 = column_of(x_tile, j);
      const __m256i x1 = step + 1 < num_steps ? column_of(x_tile + kStepBytes, j) : zero;
      const __m256i x2 = step + 2 < num_steps ? column_of(x_tile + 2 * kStepBytes, j) : zero;
      const __m256i magnitude = _mm256_add_epi16(_mm256_abs_epi16(x0), _mm256_abs_epi16(x1));
      total = _mm256_add_epi16(total, _mm256_add_epi16(magnitude, _mm256_abs_epi16(x2)));
      const __m256i sum = _mm256_add_epi16(x1, x2), difference = _mm256_sub_epi16(x1, x2);
      const __m256i middles[9] = {_mm256_sub_epi16(zero, sum),        _mm256_sub_epi16(zero, x2), difference,
                                  _mm256_sub_epi16(zero, x1),         zero,                       x1,
                                  _mm256_sub_epi16(zero, difference), x2,                         sum};
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i, tables += 3 * kTableTokens) {
        __m256i* const to = reinterpret_cast<__m256i*>(tables);
        _mm256_store_si256(to, _mm256_sub_epi16(middles[i], x0));
        _mm256_store_si256(to + 1, middles[i]);
        _mm256_store_si256(to + 2, _mm256_add_epi16(middles[i], x0));
      }
    }
  }
  alignas(32) int16_t totals[kTableTokens];
  _mm256_store_si256(reinterpret_cast<__m256i*>(totals), total);
  int largest = 0;
  for (const int16_t token : totals) largest = token > largest ? token : largest;
  return largest;
}

// Every register is a row's sum; what a row adds is an operand in memory. 864 bytes are the table of a triple.
static_assert(kNumTriples * kTableTokens * sizeof(int16_t) == 864);
#define BITDISTILL_ROWS(table, row0, row1)                  \
  "movzbl %%al, %%ecx\n"                                    \
  "movzbl %%ah, %%edx\n"                                    \
  "shrq $16, %%rax\n"                                       \
  "vpaddw " table "(%[tables],%%rcx,8), %%ymm" row0 ", %%ymm" row0 "\n" \
  "vpaddw " table "(%[tables],%%rdx,8), %%ymm" row1 ", %%ymm" row1 "\n"

#define BITDISTILL_TRIPLE(names, names2, table)                                                              \
  "movq " names "(%[names]), %%rax\n"                                                                      \
  BITDISTILL_ROWS(table, "0", "1") BITDISTILL_ROWS(table, "2", "3") BITDISTILL_ROWS(table, "4", "5")         \
  BITDISTILL_ROWS(table, "6", "7")                                                                           \
  "movq " names2 "(%[names]), %%rax\n"                                                                     \
  BITDISTILL_ROWS(table, "8", "9") BITDISTILL_ROWS(table, "10", "11") BITDISTILL_ROWS(table, "12", "13")     \
  BITDISTILL_ROWS(table, "14", "15")

#define BITDISTILL_ROW(offset, row) "vmovdqa " offset "(%[partial]), %%ymm" row "\n"
#define BITDISTILL_STORE_ROW(offset, row) "vmovdqa %%ymm" row ", " offset "(%[partial])\n"
#define BITDISTILL_EACH_ROW(row)                                                                               \
  row("0", "0") row("32", "1") row("64", "2") row("96", "3") row("128", "4") row("160", "5") row("192", "6")   \
  row("224", "7") row("256", "8") row("288", "9") row("320", "10") row("352", "11") row("384", "12")           \
  row("416", "13") row("448", "14") row("480", "15")

void add_tables(const uint8_t* names, const int16_t* tables, int count, int16_t* partial) {
  long left = count;
  asm volatile(
      BITDISTILL_EACH_ROW(BITDISTILL_ROW)
      ".p2align 6\n"
      "1:\n"
      BITDISTILL_TRIPLE("0", "8", "0") BITDISTILL_TRIPLE("16", "24", "864")
      BITDISTILL_TRIPLE("32", "40", "1728") BITDISTILL_TRIPLE("48", "56", "2592")
      "add $64, %[names]\n"
      "add $3456, %[tables]\n"
      "sub $4, %[left]\n"
      "jnz 1b\n"
      BITDISTILL_EACH_ROW(BITDISTILL_STORE_ROW)
      : [names] "+r"(names), [tables] "+r"(tables), [left] "+r"(left)
      : [partial] "r"(partial)
      : "rax", "rcx", "rdx", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10",
        "ymm11", "ymm12", "ymm13", "ymm14", "ymm15", "cc", "memory");
}

// Unpacking each half of a register brings its tokens back into their order.
void flush_partial(int16_t* partial, int32_t* sums) {
  for (int slot = 0; slot < kPanelRows; ++slot, partial += kTableTokens, sums += kTableTokens) {
    __m256i* const from = reinterpret_cast<__m256i*>(partial);
    __m256i* const to = reinterpret_cast<__m256i*>(sums);
    const __m256i values = _mm256_load_si256(from), signs = _mm256_srai_epi16(values, 15);
    _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), _mm256_unpacklo_epi16(values, signs)));
    _mm256_store_si256(to + 1, _mm256_add_epi32(_mm256_load_si256(to + 1), _mm256_unpackhi_epi16(values, signs)));
    _mm256_store_si256(from, _mm256_setzero_si256());
  }
}

// Slots to rows, and [16 rows][16 tokens] to [16 tokens][16 rows].
void transpose_sums(const int32_t* sums, int32_t* out) {
  for (int rows = 0; rows < 2; ++rows) {
    for (int tokens = 0; tokens < 2; ++tokens) {
      Float8 a[8];  // bits
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const int slot = i % 4 + i / 4 * 8 + rows * 4;
        a[i] = (Float8)load_bytes(sums + slot * kTableTokens + 8 * tokens);
      }
      transpose8(a);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        int32_t* const to = out + (8 * tokens + i) * kPanelRows + 8 * rows;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)a[i]);
      }
    }
  }
}

// Eight tokens' dwords of STEPS steps, 4 or 8, to half a line a step.
template <int STEPS>
BITDISTILL_INLINE void place_half(const int8_t* rows, std::size_t stride, int8_t* x_tile) {
  Float8 a[8];  // bits
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t, rows += stride) {
    const __m128i* const four = reinterpret_cast<const __m128i*>(rows);
    a[t] = (Float8)(STEPS == 8 ? load_bytes(rows) : _mm256_castsi128_si256(_mm_loadu_si128(four)));
  }
  transpose8(a);
#pragma GCC unroll 8
  for (int i = 0; i < STEPS; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x_tile + i * 4 * kTableTokens), (__m256i)a[i]);
  }
}

void place_rows(const int8_t* rows, int num_steps, int8_t* x_tile) {
  const std::size_t stride = 4 * std::size_t(num_steps);
  for (; num_steps > 0; num_steps -= 8, rows += 32, x_tile += 32 * kTableTokens) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int8_t* const from = rows + 8 * half * stride;
      num_steps >= 8 ? place_half<8>(from, stride, x_tile + 32 * half)
                     : place_half<4>(from, stride, x_tile + 32 * half);
    }
  }
}

}  // namespace

const TableKernels kAvx2Tables = {place_rows, name_triples, build_tables, add_tables, flush_partial, transpose_sums};

}  // namespace bitdistill
