// The one contract every kernel meets: INT8 activations times packed ternary weights, exact INT32 sums.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitdistill {

// out[t * N + n] = sum over k of x[t * K + k] * w_ternary[n][k],   n in [16 * first_panel, 16 * last_panel)
//
//   x         (T, K) int8, row-major, any value from -128 to 127. K is a multiple of 16; the caller pads with zeros.
//   w_packed  (N / 16, K / 16, 64) uint8, codes w_ternary + 1 in {0, 1, 2}. N is a multiple of 16; padding has code 1.
//   out       (T, N) int32. Only the columns of the given panels are written, so panels can be split over threads.
//
// A panel is 16 rows, stored as K / 16 lines of 64 bytes; a line holds 16 rows x 16 k:
//
//   byte   0  1  2  3 | 4  5  6  7 | ... | 28 .. 31 | 32 .. 35 | ... | 60 .. 63
//   row    0          | 1          | ... | 7        | 8        | ... | 15
//   j      0  1  2  3 | 0  1  2  3 | ... | 0 .. 3   | 0 .. 3   | ... | 0 .. 3
//
//   bits 2p and 2p+1 of a byte (p = 0..3) hold the code of k = 16 * line + 4 * p + j.
//
// The sums are exact for K <= kMaxK. No alignment is required; 64-byte lines on 64-byte addresses are faster.
// Kernels allocate nothing, check nothing and never throw: Python has validated shapes and types.
using TernaryMatmul = void (*)(const int8_t* x, const uint8_t* w_packed, int32_t* out, int T, int N, int K,
                               int first_panel, int last_panel);

constexpr int kPanelRows = 16;
constexpr int kLineK = 16;
constexpr int kLineBytes = 64;

// |sum| <= 128 * 2 * K, before the codes are shifted back by one, must fit int32.
constexpr int kMaxK = 1 << 22;

void ternary_matmul_scalar(const int8_t* x, const uint8_t* w_packed, int32_t* out, int T, int N, int K,
                           int first_panel, int last_panel);

void ternary_matmul_avx2(const int8_t* x, const uint8_t* w_packed, int32_t* out, int T, int N, int K,
                         int first_panel, int last_panel);

}  // namespace bitdistill
