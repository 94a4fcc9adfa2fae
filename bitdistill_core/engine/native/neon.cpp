// NEON kernels for processors with the dot product instructions. Compiled with -march=armv8.2-a+dotprod and called only
// where the processor has them.
#include <arm_neon.h>

#include "float_ops.h"

namespace bitdistill {
namespace {

// sdot by lane adds, to each int32 lane, four products of one row with the same four x: the broadcast is free. A line's
// 16 rows are four registers. Bytes are signed, which every code is as long as it is below 128: so planes 0 to 2 stay
// where they are in the byte, as codes {0, 4^p, 2 * 4^p} with sums of their own, and plane 3 is shifted down.
constexpr int kRegisters = 4;

// A sum of codes {0, 16, 32} changes by at most 16384 a line: 131072 lines fit int32.
constexpr int kGemvBlockLines = 131072;

BITDISTILL_INLINE int8x16_t masked(uint8x16_t bytes, uint8_t mask) {
  return vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(mask)));
}

void gemv_panel(const uint8_t* lines, int num_lines, const int8_t* x, int32_t* sums) {
  int32x4_t total[kRegisters];
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) total[i] = vdupq_n_s32(0);
  for (int line = 0; line < num_lines;) {
    const int stop = num_lines - line > kGemvBlockLines ? line + kGemvBlockLines : num_lines;
    int32x4_t plane0[kRegisters], plane1[kRegisters], plane2[kRegisters], plane3[kRegisters];
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) plane0[i] = plane1[i] = plane2[i] = plane3[i] = vdupq_n_s32(0);
    for (; line < stop; ++line, lines += kLineBytes, x += kLineK) {
      const int8x16_t x16 = vld1q_s8(x);
#pragma GCC unroll 4
      for (int i = 0; i < kRegisters; ++i) {
        const uint8x16_t bytes = vld1q_u8(lines + 16 * i);
        plane0[i] = vdotq_laneq_s32(plane0[i], masked(bytes, 0x03), x16, 0);
        plane1[i] = vdotq_laneq_s32(plane1[i], masked(bytes, 0x0c), x16, 1);
        plane2[i] = vdotq_laneq_s32(plane2[i], masked(bytes, 0x30), x16, 2);
        plane3[i] = vdotq_laneq_s32(plane3[i], vreinterpretq_s8_u8(vshrq_n_u8(bytes, 6)), x16, 3);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) {
      total[i] = vaddq_s32(total[i], vaddq_s32(plane0[i], plane3[i]));
      total[i] = vaddq_s32(total[i], vaddq_s32(vshrq_n_s32(plane1[i], 2), vshrq_n_s32(plane2[i], 4)));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) vst1q_s32(sums + 4 * i, total[i]);
}

void unpack_panel(const uint8_t* lines, int num_lines, uint8_t* codes) {
  const uint8x16_t mask = vdupq_n_u8(3);
  for (int line = 0; line < num_lines; ++line, lines += kLineBytes, codes += 4 * kLineBytes) {
    for (int i = 0; i < kLineBytes; i += 16) {
      const uint8x16_t bytes = vld1q_u8(lines + i);
      vst1q_u8(codes + i, vandq_u8(bytes, mask));
      vst1q_u8(codes + 64 + i, vandq_u8(vshrq_n_u8(bytes, 2), mask));
      vst1q_u8(codes + 128 + i, vandq_u8(vshrq_n_u8(bytes, 4), mask));
      vst1q_u8(codes + 192 + i, vshrq_n_u8(bytes, 6));
    }
  }
}

// Adds one step of 4 k for token t, whose four x are lane LANE of `x`.
template <int LANE>
BITDISTILL_INLINE void add_token(int32x4_t (&sums)[kTileTokens][kRegisters], int t, const int8x16_t (&w)[kRegisters],
                                 int8x16_t x) {
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) sums[t][i] = vdotq_laneq_s32(sums[t][i], w[i], x, LANE);
}

// 24 sums of 6 tokens x 16 rows, 4 registers of codes and 2 of activations: 30 of 32. GCC 12 puts a sum on the stack
// where the loop does two steps at once.
void gemm_tile(const uint8_t* codes, const int8_t* x_tile, int steps, int32_t* sums) {
  int32x4_t c[kTileTokens][kRegisters];
#pragma GCC unroll 6
  for (int t = 0; t < kTileTokens; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) c[t][i] = vdupq_n_s32(0);
  }
  for (; steps > 0; --steps, codes += 4 * kPanelRows, x_tile += 4 * kTileTokens) {
    int8x16_t w[kRegisters];
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) w[i] = vreinterpretq_s8_u8(vld1q_u8(codes + 16 * i));
    const int8x16_t x0 = vld1q_s8(x_tile), x1 = vcombine_s8(vld1_s8(x_tile + 16), vdup_n_s8(0));
    add_token<0>(c, 0, w, x0);
    add_token<1>(c, 1, w, x0);
    add_token<2>(c, 2, w, x0);
    add_token<3>(c, 3, w, x0);
    add_token<0>(c, 4, w, x1);
    add_token<1>(c, 5, w, x1);
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTileTokens; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) vst1q_s32(sums + t * kPanelRows + 4 * i, c[t][i]);
  }
}

// 2 * nibble + bit 0 of `bits`.
BITDISTILL_INLINE int8x16_t join(uint8x16_t nibbles, uint8x16_t bits) {
  return vreinterpretq_s8_u8(vsliq_n_u8(bits, nibbles, 1));
}

// One nibble line of four rows: the bits of its low nibbles are bit 0 of `bits`, those of its high nibbles bit 1.
template <int LANE>
BITDISTILL_INLINE int32x4_t scan_line(int32x4_t sums, uint8x16_t nibbles, uint8x16_t bits, int8x16_t x) {
  sums = vdotq_laneq_s32(sums, join(vandq_u8(nibbles, vdupq_n_u8(15)), bits), x, LANE);
  return vdotq_laneq_s32(sums, join(vshrq_n_u8(nibbles, 4), vshrq_n_u8(bits, 1)), x, LANE + 1);
}

void scan_panel(const uint8_t* scan, int num_groups, const int8_t* x, int32_t* sums) {
  int32x4_t first[kRegisters], second[kRegisters];  // of the lower and the upper 16 k of each group
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) first[i] = second[i] = vdupq_n_s32(0);
  for (int group = 0; group < num_groups; ++group, scan += kScanGroupBytes, x += kGroupK) {
    const int8x16_t x0 = vld1q_s8(x), x1 = vld1q_s8(x + 16);
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) {
      const uint8_t* bytes = scan + 16 * i;
      const uint8x16_t bits = vld1q_u8(bytes + 4 * kLineBytes);
      first[i] = scan_line<0>(first[i], vld1q_u8(bytes), bits, x0);
      second[i] = scan_line<0>(second[i], vld1q_u8(bytes + 2 * kLineBytes), vshrq_n_u8(bits, 4), x1);
      first[i] = scan_line<2>(first[i], vld1q_u8(bytes + kLineBytes), vshrq_n_u8(bits, 2), x0);
      second[i] = scan_line<2>(second[i], vld1q_u8(bytes + 3 * kLineBytes), vshrq_n_u8(bits, 6), x1);
      asm("" ::: "memory");  // GCC 12 would load the whole group first and put sums on the stack
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) vst1q_s32(sums + 4 * i, vaddq_s32(first[i], second[i]));
}

constexpr Kernels kKernels = {.name = "neon", .needs = "Advanced SIMD with the dot product instructions (asimddp)",
                              .gemv_panel = gemv_panel, .unpack_panel = unpack_panel, .gemv_base3 = nullptr,
                              .unpack_base3 = nullptr, .prepare_base3 = nullptr, .gemm_tile = gemm_tile,
                              .gemm_pair = nullptr, .tables = nullptr,
                              .scan_panel = scan_panel, BITDISTILL_FLOAT_OPS};

}  // namespace

const Kernels* neon_kernels() { return &kKernels; }

}  // namespace bitdistill
