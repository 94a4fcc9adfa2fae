// The sizes of the packed layouts. bitdistill_core/panels.py writes them and has their drawings. No arithmetic here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitdistill {

// Ternary weights, codes of two bits: a panel of 16 rows, stored as lines of 16 columns.
constexpr int kPanelRows = 16;
constexpr int kLineK = 16;
constexpr int kLineBytes = 64;

// The same codes in base 3: a group of 6 lines, in values of three codes, from -13 to 13.
constexpr int kBase3Lines = 6, kBase3K = kBase3Lines * kLineK;
constexpr int kBase3Bytes = 320;
constexpr int kBase3Magnitudes = 14;

// |sum of code * x| <= 128 * 2 * K must fit int32 with room for the sum of x.
constexpr int kMaxK = 1 << 22;

// INT8 embedding rows, u = w_int8 + 128: a group of 32 columns in a panel of `scan` (the upper 5 bits of 16 rows), and
// in a row of `next` (the next bit) and of `rest` (the lower 2).
constexpr int kGroupK = 32;
constexpr int kScanGroupBytes = 320;
constexpr int kNextGroupBytes = 4;
constexpr int kRestGroupBytes = 8;

// Tokens of one tile of the matrix product. Its activations lie as [K / 4][6][4], a dword a token and step of 4 k.
constexpr int kTileTokens = 6;

}  // namespace bitdistill
