// AVX2 kernels. Compiled with -mavx2 -mfma -mf16c and called only where the processor has them.
#include "avx2_bytes.h"
#include "float_ops.h"

namespace bitdistill {
namespace {

// vpmaddubsw adds two products code * x of one row, x from -128 to 127, in an int16 lane that must never leave
// [-32768, 32767]:
//   codes {0, 1, 2}     [-512, 508]       64 additions: [-32768, 32512]
//   codes {0, 4, 8}     [-2048, 2032]     16 additions: [-32768, 32512]
//   codes 0 .. 31       [-7936, 7874]      4 additions: [-31744, 31496]
// Then vpmaddwd by ones joins the two lanes of a row to int32. Each bound counts every partial sum on the way.
constexpr int kGemmFlushSteps = 64;
constexpr int kGemvFlushLines = 8;  // 2 additions a line to each accumulator: 16 of codes {0, 4, 8}

BITDISTILL_INLINE __m256i multiply_add(__m256i sums, __m256i codes, __m256i x) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x));
}

// Planes 1 and 3 stay where they are in the byte, as codes {0, 4, 8}: that saves two of three shifts.
void gemv_panel(const uint8_t* lines, int num_lines, const int8_t* x, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1), mask1 = _mm256_set1_epi8(0x03), mask4 = _mm256_set1_epi8(0x0c);
  __m256i low = _mm256_setzero_si256(), high = low;
  for (int line = 0; line < num_lines;) {
    const int stop = line + kGemvFlushLines < num_lines ? line + kGemvFlushLines : num_lines;
    __m256i low1 = _mm256_setzero_si256(), high1 = low1, low4 = low1, high4 = low1;
    for (; line < stop; ++line, lines += kLineBytes, x += kLineK) {
      prefetch_ahead(lines, kLineBytes);
      const __m256i a = load_bytes(lines), b = load_bytes(lines + 32);
      const __m256i a2 = _mm256_srli_epi16(a, 4), b2 = _mm256_srli_epi16(b, 4);
      const __m256i x0 = broadcast_four(x), x1 = broadcast_four(x + 4);
      const __m256i x2 = broadcast_four(x + 8), x3 = broadcast_four(x + 12);
      low1 = multiply_add(low1, _mm256_and_si256(a, mask1), x0);
      high1 = multiply_add(high1, _mm256_and_si256(b, mask1), x0);
      low4 = multiply_add(low4, _mm256_and_si256(a, mask4), x1);
      high4 = multiply_add(high4, _mm256_and_si256(b, mask4), x1);
      low1 = multiply_add(low1, _mm256_and_si256(a2, mask1), x2);
      high1 = multiply_add(high1, _mm256_and_si256(b2, mask1), x2);
      low4 = multiply_add(low4, _mm256_and_si256(a2, mask4), x3);
      high4 = multiply_add(high4, _mm256_and_si256(b2, mask4), x3);
    }
    low = _mm256_add_epi32(low, _mm256_madd_epi16(low1, ones));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(high1, ones));
    low = _mm256_add_epi32(low, _mm256_srai_epi32(_mm256_madd_epi16(low4, ones), 2));
    high = _mm256_add_epi32(high, _mm256_srai_epi32(_mm256_madd_epi16(high4, ones), 2));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8), high);
}

// One step of 4 k for one token: its dword in every lane, times 8 + 8 rows. Compilers spill accumulators out of the
// equivalent intrinsics, so the 16 registers are given by hand: 0-11 sums of 6 tokens x 16 rows, 12-13 codes,
// 14-15 free.
#define BITDISTILL_TOKEN(offset, low, high)        \
  "vpbroadcastd " offset "(%[x]), %%ymm14\n"        \
  "vpmaddubsw %%ymm14, %%ymm12, %%ymm15\n"          \
  "vpmaddubsw %%ymm14, %%ymm13, %%ymm14\n"          \
  "vpaddw %%ymm15, %%ymm" low ", %%ymm" low "\n"    \
  "vpaddw %%ymm14, %%ymm" high ", %%ymm" high "\n"

#define BITDISTILL_STEP(w, w2, x0, x1, x2, x3, x4, x5)                                                        \
  "vmovdqa " w "(%[w]), %%ymm12\n"                                                                            \
  "vmovdqa " w2 "(%[w]), %%ymm13\n"                                                                           \
  BITDISTILL_TOKEN(x0, "0", "1") BITDISTILL_TOKEN(x1, "2", "3") BITDISTILL_TOKEN(x2, "4", "5")                \
  BITDISTILL_TOKEN(x3, "6", "7") BITDISTILL_TOKEN(x4, "8", "9") BITDISTILL_TOKEN(x5, "10", "11")

#define BITDISTILL_CLEAR(a) "vpxor %%ymm" a ", %%ymm" a ", %%ymm" a "\n"

#define BITDISTILL_FLUSH(a, offset)                     \
  "vpmaddwd %%ymm12, %%ymm" a ", %%ymm" a "\n"          \
  "vpaddd " offset "(%[sums]), %%ymm" a ", %%ymm" a "\n" \
  "vmovdqu %%ymm" a ", " offset "(%[sums])\n"

void gemm_tile(const uint8_t* codes, const int8_t* x_tile, int steps, int32_t* sums) {
  alignas(32) static const int16_t ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  for (int i = 0; i < kTileTokens * kPanelRows; i += 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + i), _mm256_setzero_si256());
  }
  while (steps > 0) {
    long count = steps < kGemmFlushSteps ? steps : kGemmFlushSteps;  // a multiple of 4, as K is of 16
    steps -= int(count);
    asm volatile(
        BITDISTILL_CLEAR("0") BITDISTILL_CLEAR("1") BITDISTILL_CLEAR("2") BITDISTILL_CLEAR("3")
        BITDISTILL_CLEAR("4") BITDISTILL_CLEAR("5") BITDISTILL_CLEAR("6") BITDISTILL_CLEAR("7")
        BITDISTILL_CLEAR("8") BITDISTILL_CLEAR("9") BITDISTILL_CLEAR("10") BITDISTILL_CLEAR("11")
        ".p2align 5\n"
        "1:\n"
        BITDISTILL_STEP("0", "32", "0", "4", "8", "12", "16", "20")
        BITDISTILL_STEP("64", "96", "24", "28", "32", "36", "40", "44")
        BITDISTILL_STEP("128", "160", "48", "52", "56", "60", "64", "68")
        BITDISTILL_STEP("192", "224", "72", "76", "80", "84", "88", "92")
        "add $256, %[w]\n"
        "add $96, %[x]\n"
        "sub $4, %[count]\n"
        "jnz 1b\n"
        "vmovdqa (%[ones]), %%ymm12\n"
        BITDISTILL_FLUSH("0", "0") BITDISTILL_FLUSH("1", "32") BITDISTILL_FLUSH("2", "64")
        BITDISTILL_FLUSH("3", "96") BITDISTILL_FLUSH("4", "128") BITDISTILL_FLUSH("5", "160")
        BITDISTILL_FLUSH("6", "192") BITDISTILL_FLUSH("7", "224") BITDISTILL_FLUSH("8", "256")
        BITDISTILL_FLUSH("9", "288") BITDISTILL_FLUSH("10", "320") BITDISTILL_FLUSH("11", "352")
        : [w] "+r"(codes), [x] "+r"(x_tile), [count] "+r"(count)
        : [sums] "r"(sums), [ones] "r"(ones)
        : "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12",
          "ymm13", "ymm14", "ymm15", "cc", "memory");
  }
}

void scan_panel(const uint8_t* scan, int num_groups, const int8_t* x, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(0x1e), bit = _mm256_set1_epi8(1);
  __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int group = 0; group < num_groups; ++group, scan += kScanGroupBytes, x += kGroupK) {
    prefetch_ahead(scan, kScanGroupBytes);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i bits = load_bytes(scan + 4 * kLineBytes + 32 * half);
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        __m256i partial = _mm256_setzero_si256();
#pragma GCC unroll 2
        for (int line = 2 * pair; line < 2 * pair + 2; ++line) {
          const __m256i nibbles = load_bytes(scan + line * kLineBytes + 32 * half);
          const __m256i first = _mm256_and_si256(_mm256_add_epi8(nibbles, nibbles), nibble);
          const __m256i second = _mm256_and_si256(_mm256_srli_epi16(nibbles, 3), nibble);
          const __m256i bit0 = _mm256_and_si256(bits, bit), bit1 = _mm256_and_si256(_mm256_srli_epi16(bits, 1), bit);
          partial = multiply_add(partial, _mm256_or_si256(first, bit0), broadcast_four(x + 8 * line));
          partial = multiply_add(partial, _mm256_or_si256(second, bit1), broadcast_four(x + 8 * line + 4));
          bits = _mm256_srli_epi16(bits, 2);
        }
        total[half] = _mm256_add_epi32(total[half], _mm256_madd_epi16(partial, ones));
      }
    }
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), total[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8), total[1]);
}

constexpr Kernels kKernels = {.name = "avx2", .needs = "AVX2, FMA and F16C", .gemv_panel = gemv_panel,
                              .unpack_panel = unpack_panel, .gemv_base3 = avx2_gemv_base3,
                              .unpack_base3 = avx2_unpack_base3, .prepare_base3 = avx2_prepare_base3,
                              .gemm_tile = gemm_tile, .gemm_pair = nullptr, .tables = &kAvx2Tables,
                              .scan_panel = scan_panel, BITDISTILL_FLOAT_OPS};

}  // namespace

const Kernels* avx2_kernels() { return &kKernels; }

}  // namespace bitdistill
