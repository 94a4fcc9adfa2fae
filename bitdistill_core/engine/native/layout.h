// The packed layouts, as bitdistill_core/packing.py writes them. No arithmetic here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitdistill {

// Ternary weights, (N / 16, K / 16, 64) uint8, codes w_ternary + 1 in {0, 1, 2}. N and K are padded to multiples of 16
// with code 1. A panel is 16 rows, stored as K / 16 lines of 64 bytes; a line holds 16 rows x 16 k:
//
//   byte   0  1  2  3 | 4  5  6  7 | ... | 28 .. 31 | 32 .. 35 | ... | 60 .. 63
//   row    0          | 1          | ... | 7        | 8        | ... | 15
//   j      0  1  2  3 | 0  1  2  3 | ... | 0 .. 3   | 0 .. 3   | ... | 0 .. 3
//
//   bits 2p and 2p+1 of a byte (p = 0..3) hold the code of k = 16 * line + 4 * p + j.
constexpr int kPanelRows = 16;
constexpr int kLineK = 16;
constexpr int kLineBytes = 64;

// |sum of code * x| <= 128 * 2 * K must fit int32 with room for the sum of x.
constexpr int kMaxK = 1 << 22;

// INT8 embedding rows, u = w_int8 + 128 split in its upper 5 bits (`scan`, 16-row panels read as a stream by the output
// head) and its lower 3 bits (`rest`, row after row, read only where the upper bits cannot decide).
//
//   scan  (V / 16, D / 32, 320): per 16 rows x 32 k four lines of nibbles u >> 4 and one line of the bits u >> 3 & 1
//         nibble line i, byte 4 r + b:  low nibble k = 8 i + b, high nibble k = 8 i + 4 + b, of row r
//         bit line, dword r:            bit 8 b + j is that of k = 4 j + b, j = 0..7
//   rest  (V, D / 32, 12): three dwords for bits 0, 1 and 2 of u, each laid out as a dword of the bit line
constexpr int kGroupK = 32;
constexpr int kScanGroupBytes = 320;
constexpr int kRestGroupBytes = 12;

// Tokens of one tile of the matrix product. Its activations lie as [K / 4][6][4], a dword a token and step of 4 k.
constexpr int kTileTokens = 6;

}  // namespace bitdistill
