// AVX-VNNI kernels: 256-bit vpdpbusd. Compiled with -mavx2 -mfma -mf16c -mavxvnni and called only where the processor
// has them.
#include "avx2_bytes.h"
#include "float_ops.h"
#include "vnni.h"

namespace bitdistill {
namespace {

BITDISTILL_INLINE void store_sums(int32_t* sums, Int32x8 v) { __builtin_memcpy(sums, &v, sizeof v); }

// Sums are Int32x8 rather than __m256i, which GCC 12 copies before and after every vpdpbusd.
BITDISTILL_INLINE Int32x8 multiply_add(Int32x8 sums, __m256i codes, __m256i x) {
  return (Int32x8)_mm256_dpbusd_avx_epi32((__m256i)sums, codes, x);
}

// Plane p as it lies, codes {0, 4^p, 2 * 4^p}: no shifts, and eight sums that do not wait for one another.
void gemv_panel(const uint8_t* lines, int num_lines, const int8_t* x, int32_t* sums) {
  const __m256i masks[4] = {_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c), _mm256_set1_epi8(0x30),
                            _mm256_set1_epi8(int8_t(0xc0))};
  Int32x8 total[2] = {};
  for (int line = 0; line < num_lines;) {
    const int stop = num_lines - line > kGemvBlockLines ? line + kGemvBlockLines : num_lines;
    Int32x8 low[4] = {}, high[4] = {};
    for (; line < stop; ++line, lines += kLineBytes, x += kLineK) {
      prefetch_ahead(lines, kLineBytes);
      const __m256i a = load_bytes(lines), b = load_bytes(lines + 32);
#pragma GCC unroll 4
      for (int plane = 0; plane < 4; ++plane) {
        const __m256i x4 = broadcast_four(x + 4 * plane);
        low[plane] = multiply_add(low[plane], _mm256_and_si256(a, masks[plane]), x4);
        high[plane] = multiply_add(high[plane], _mm256_and_si256(b, masks[plane]), x4);
      }
    }
    total[0] += low[0] + (low[1] >> 2) + (low[2] >> 4) + (low[3] >> 6);
    total[1] += high[0] + (high[1] >> 2) + (high[2] >> 4) + (high[3] >> 6);
  }
  store_sums(sums, total[0]);
  store_sums(sums + 8, total[1]);
}

// 12 sums of 6 tokens x 16 rows, 2 registers of codes and one of activations: 15 of 16.
void gemm_tile(const uint8_t* codes, const int8_t* x_tile, int steps, int32_t* sums) {
  Int32x8 low[kTileTokens] = {}, high[kTileTokens] = {};
  for (; steps > 0; --steps, codes += 4 * kPanelRows, x_tile += 4 * kTileTokens) {
    const __m256i a = load_bytes(codes), b = load_bytes(codes + 32);
#pragma GCC unroll 6
    for (int t = 0; t < kTileTokens; ++t) {
      const __m256i x4 = broadcast_four(x_tile + 4 * t);
      low[t] = multiply_add(low[t], a, x4);
      high[t] = multiply_add(high[t], b, x4);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTileTokens; ++t, sums += kPanelRows) {
    store_sums(sums, low[t]);
    store_sums(sums + 8, high[t]);
  }
}

// Sums for 8 rows: of nibbles as they lie, times 1 and 16, and of their lower bits, times 1 and 2.
struct ScanSums {
  Int32x8 nibble1, nibble16, bit1, bit2;
};

// One nibble line of 8 rows: the bits of its low nibbles are bit 0 of `bits`, those of its high nibbles bit 1.
BITDISTILL_INLINE void scan_line(ScanSums& sums, __m256i nibbles, __m256i bits, __m256i x_low, __m256i x_high) {
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  sums.nibble1 = multiply_add(sums.nibble1, _mm256_and_si256(nibbles, nibble), x_low);
  sums.bit1 = multiply_add(sums.bit1, _mm256_and_si256(bits, _mm256_set1_epi8(1)), x_low);
  sums.nibble16 = multiply_add(sums.nibble16, _mm256_andnot_si256(nibble, nibbles), x_high);
  sums.bit2 = multiply_add(sums.bit2, _mm256_and_si256(bits, _mm256_set1_epi8(2)), x_high);
}

BITDISTILL_INLINE Int32x8 scan_total(const ScanSums& sums) {
  return 2 * sums.nibble1 + (sums.nibble16 >> 3) + sums.bit1 + (sums.bit2 >> 1);
}

void scan_panel(const uint8_t* scan, int num_groups, const int8_t* x, int32_t* sums) {
  Int32x8 total[2] = {};
  for (int group = 0; group < num_groups;) {
    const int stop = num_groups - group > kScanBlockGroups ? group + kScanBlockGroups : num_groups;
    ScanSums low = {}, high = {};
    for (; group < stop; ++group, scan += kScanGroupBytes, x += kGroupK) {
      prefetch_ahead(scan, kScanGroupBytes);
      __m256i bits_low = load_bytes(scan + 4 * kLineBytes), bits_high = load_bytes(scan + 4 * kLineBytes + 32);
#pragma GCC unroll 4
      for (int line = 0; line < 4; ++line) {
        const __m256i x_low = broadcast_four(x + 8 * line), x_high = broadcast_four(x + 8 * line + 4);
        scan_line(low, load_bytes(scan + line * kLineBytes), bits_low, x_low, x_high);
        scan_line(high, load_bytes(scan + line * kLineBytes + 32), bits_high, x_low, x_high);
        bits_low = _mm256_srli_epi16(bits_low, 2);
        bits_high = _mm256_srli_epi16(bits_high, 2);
      }
    }
    total[0] += scan_total(low);
    total[1] += scan_total(high);
  }
  store_sums(sums, total[0]);
  store_sums(sums + 8, total[1]);
}

constexpr Kernels kKernels = {.name = "avx-vnni", .needs = "AVX-VNNI, AVX2, FMA and F16C", .gemv_panel = gemv_panel,
                              .unpack_panel = unpack_panel, .gemv_base3 = avx2_gemv_base3,
                              .unpack_base3 = avx2_unpack_base3, .prepare_base3 = avx2_prepare_base3,
                              .gemm_tile = gemm_tile, .gemm_pair = nullptr, .tables = nullptr, .scan_panel = scan_panel,
                              BITDISTILL_FLOAT_OPS};

}  // namespace

const Kernels* avx_vnni_kernels() { return &kKernels; }

}  // namespace bitdistill
