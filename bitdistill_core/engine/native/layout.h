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

// The same codes in base 3, three in five bits. A block of a panel (all of it where a row has one scale) is groups of 6
// lines, 320 bytes each, and up to 5 lines as above. A group holds 24 steps of 4 k as 8 vectors of 64 five-bit values
//
//   value i (i = 0..7), element 16 j + r = w(step 3 i) + 3 w(step 3 i + 1) + 9 w(step 3 i + 2) of row r, k = 4 step + j
//
// from -13 to 13, as a magnitude and a sign:
//
//   nibble line l = 0..3: magnitude of value 2 l in the low nibbles, of value 2 l + 1 in the high ones
//   bit line:             bit i is 1 where value i is negative
constexpr int kBase3Lines = 6, kBase3K = kBase3Lines * kLineK;
constexpr int kBase3Bytes = 320;
constexpr int kBase3Magnitudes = 14;

// |sum of code * x| <= 128 * 2 * K must fit int32 with room for the sum of x.
constexpr int kMaxK = 1 << 22;

// INT8 embedding rows, u = w_int8 + 128 split in its upper 5 bits (`scan`, 16-row panels read as a stream by the output
// head), the next bit (`next`, row after row, read only where those cannot decide) and the lower 2 (`rest`, likewise).
//
//   scan  (V / 16, D / 32, 320): per 16 rows x 32 k four lines of nibbles u >> 4 and one line of the bits u >> 3 & 1
//         nibble line i, byte 4 r + b:  low nibble k = 8 i + b, high nibble k = 8 i + 4 + b, of row r
//         bit line, dword r:            bit 8 b + j is that of k = 4 j + b, j = 0..7
//   next  (V, D / 32, 4): a dword for bit 2 of u, laid out as one of the bit line
//   rest  (V, D / 32, 8): two such dwords, for bits 0 and 1
constexpr int kGroupK = 32;
constexpr int kScanGroupBytes = 320;
constexpr int kNextGroupBytes = 4;
constexpr int kRestGroupBytes = 8;

// Tokens of one tile of the matrix product. Its activations lie as [K / 4][6][4], a dword a token and step of 4 k.
constexpr int kTileTokens = 6;

}  // namespace bitdistill
