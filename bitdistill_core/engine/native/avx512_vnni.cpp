// AVX-512 VNNI kernels: 512-bit vpdpbusd, so that 16 rows x 4 k are one register. Compiled with -mavx512f -mavx512bw
// -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c and called only where the processor has them.
#include "avx512_bytes.h"
#include "float_ops.h"
#include "vnni.h"

namespace bitdistill {
namespace {

// Plane p as it lies, codes {0, 4^p, 2 * 4^p}: no shifts, and four sums that do not wait for one another.
BITDISTILL_INLINE void gemv_line(Int32x16 (&sums)[4], const uint8_t* line, const int8_t* x) {
  const __m512i codes = load_bytes(line);
  sums[0] = multiply_add(sums[0], _mm512_and_si512(codes, _mm512_set1_epi8(0x03)), broadcast_four(x));
  sums[1] = multiply_add(sums[1], _mm512_and_si512(codes, _mm512_set1_epi8(0x0c)), broadcast_four(x + 4));
  sums[2] = multiply_add(sums[2], _mm512_and_si512(codes, _mm512_set1_epi8(0x30)), broadcast_four(x + 8));
  sums[3] = multiply_add(sums[3], _mm512_and_si512(codes, _mm512_set1_epi8(int8_t(0xc0))), broadcast_four(x + 12));
}

BITDISTILL_INLINE Int32x16 gemv_total(const Int32x16 (&sums)[4]) {
  return sums[0] + (sums[1] >> 2) + (sums[2] >> 4) + (sums[3] >> 6);
}

// Two lines at a time, each with sums of its own, to hide the latency of vpdpbusd.
void gemv_panel(const uint8_t* lines, int num_lines, const int8_t* x, int32_t* sums) {
  Int32x16 total = {};
  for (int line = 0; line < num_lines;) {
    const int stop = num_lines - line > kGemvBlockLines ? line + kGemvBlockLines : num_lines;
    Int32x16 even[4] = {}, odd[4] = {};
    for (; line + 2 <= stop; line += 2, lines += 2 * kLineBytes, x += 2 * kLineK) {
      prefetch_ahead(lines, 2 * kLineBytes);
      gemv_line(even, lines, x);
      gemv_line(odd, lines + kLineBytes, x + kLineK);
    }
    if (line < stop) {
      gemv_line(even, lines, x);
      ++line;  // the last of the panel: blocks are of an even number of lines
    }
    total += gemv_total(even) + gemv_total(odd);
  }
  store_sums(sums, total);
}

void unpack_panel(const uint8_t* lines, int num_lines, uint8_t* codes) {
  const __m512i mask = _mm512_set1_epi8(3);
  for (int line = 0; line < num_lines; ++line, lines += kLineBytes, codes += 4 * kLineBytes) {
    const __m512i bytes = load_bytes(lines);
    _mm512_store_si512(codes, _mm512_and_si512(bytes, mask));
    _mm512_store_si512(codes + 64, _mm512_and_si512(_mm512_srli_epi16(bytes, 2), mask));
    _mm512_store_si512(codes + 128, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask));
    _mm512_store_si512(codes + 192, _mm512_and_si512(_mm512_srli_epi16(bytes, 6), mask));
  }
}

// 6 tokens x 16 rows, with separate sums for even and odd steps: 12 registers, to hide the latency of vpdpbusd.
void gemm_tile(const uint8_t* codes, const int8_t* x_tile, int steps, int32_t* sums) {
  Int32x16 even[kTileTokens] = {}, odd[kTileTokens] = {};
  for (; steps > 0; steps -= 2, codes += 8 * kPanelRows, x_tile += 8 * kTileTokens) {  // a multiple of 4, as K is of 16
    const __m512i a = load_bytes(codes), b = load_bytes(codes + 4 * kPanelRows);
#pragma GCC unroll 6
    for (int t = 0; t < kTileTokens; ++t) {
      even[t] = multiply_add(even[t], a, broadcast_four(x_tile + 4 * t));
      odd[t] = multiply_add(odd[t], b, broadcast_four(x_tile + 4 * (kTileTokens + t)));
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTileTokens; ++t) store_sums(sums + t * kPanelRows, even[t] + odd[t]);
}

// 6 tokens x 32 rows: each broadcast serves two panels, so that vpdpbusd and not the loads are what a step waits for.
void gemm_pair(const uint8_t* codes, const uint8_t* codes2, const int8_t* x_tile, int steps, int32_t* sums) {
  Int32x16 first[kTileTokens] = {}, second[kTileTokens] = {};
  for (; steps > 0; --steps, codes += 4 * kPanelRows, codes2 += 4 * kPanelRows, x_tile += 4 * kTileTokens) {
    const __m512i a = load_bytes(codes), b = load_bytes(codes2);
#pragma GCC unroll 6
    for (int t = 0; t < kTileTokens; ++t) {
      const __m512i x = broadcast_four(x_tile + 4 * t);
      first[t] = multiply_add(first[t], a, x);
      second[t] = multiply_add(second[t], b, x);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTileTokens; ++t) {
    store_sums(sums + t * kPanelRows, first[t]);
    store_sums(sums + (kTileTokens + t) * kPanelRows, second[t]);
  }
}

// Sums of nibbles as they lie, times 1 and 16, and of their lower bits, times 1 and 2.
struct ScanSums {
  Int32x16 nibble1, nibble16, bit1, bit2;
};

// One nibble line: the bits of its low nibbles are bit 0 of `bits`, those of its high nibbles bit 1.
BITDISTILL_INLINE void scan_line(ScanSums& sums, __m512i nibbles, __m512i bits, const int8_t* x) {
  const __m512i x_low = broadcast_four(x), x_high = broadcast_four(x + 4);
  sums.nibble1 = multiply_add(sums.nibble1, _mm512_and_si512(nibbles, _mm512_set1_epi8(0x0f)), x_low);
  sums.bit1 = multiply_add(sums.bit1, _mm512_and_si512(bits, _mm512_set1_epi8(1)), x_low);
  sums.nibble16 = multiply_add(sums.nibble16, _mm512_and_si512(nibbles, _mm512_set1_epi8(int8_t(0xf0))), x_high);
  sums.bit2 = multiply_add(sums.bit2, _mm512_and_si512(bits, _mm512_set1_epi8(2)), x_high);
}

void scan_panel(const uint8_t* scan, int num_groups, const int8_t* x, int32_t* sums) {
  Int32x16 total = {};
  for (int group = 0; group < num_groups;) {
    const int stop = num_groups - group > kScanBlockGroups ? group + kScanBlockGroups : num_groups;
    ScanSums block = {};
    for (; group < stop; ++group, scan += kScanGroupBytes, x += kGroupK) {
      prefetch_ahead(scan, kScanGroupBytes);
      const __m512i bits = load_bytes(scan + 4 * kLineBytes);
      scan_line(block, load_bytes(scan), bits, x);
      scan_line(block, load_bytes(scan + kLineBytes), _mm512_srli_epi16(bits, 2), x + 8);
      scan_line(block, load_bytes(scan + 2 * kLineBytes), _mm512_srli_epi16(bits, 4), x + 16);
      scan_line(block, load_bytes(scan + 3 * kLineBytes), _mm512_srli_epi16(bits, 6), x + 24);
    }
    total += 2 * block.nibble1 + (block.nibble16 >> 3) + block.bit1 + (block.bit2 >> 1);
  }
  store_sums(sums, total);
}

constexpr Kernels kKernels = {.name = "avx512-vnni", .needs = "AVX-512 F, BW, DQ, VL and VNNI, FMA and F16C",
                              .gemv_panel = gemv_panel, .unpack_panel = unpack_panel, .gemv_base3 = avx2_gemv_base3,
                              .unpack_base3 = avx2_unpack_base3, .prepare_base3 = avx2_prepare_base3,
                              .gemm_tile = gemm_tile, .gemm_pair = gemm_pair, .tables = nullptr,
                              .scan_panel = scan_panel, BITDISTILL_FLOAT_OPS};

// A constant: asking for it must not run an instruction of this file.
constinit const Kernels kVbmiKernels = [] {
  Kernels table = kKernels;
  table.name = "avx512-vbmi";
  table.needs = "AVX-512 F, BW, DQ, VL, VNNI and VBMI, FMA and F16C";
  table.gemv_base3 = avx512_vbmi_gemv_base3;
  table.unpack_base3 = avx512_vbmi_unpack_base3;
  table.prepare_base3 = nullptr;
  return table;
}();

}  // namespace

const Kernels* avx512_vnni_kernels() { return &kKernels; }
const Kernels* avx512_vbmi_kernels() { return &kVbmiKernels; }

}  // namespace bitdistill
