// How long the files that multiply by vpdpbusd may sum up.
#pragma once

namespace bitdistill {

// vpdpbusd adds four products code * x of one row, codes 0 to 255 and x from -128 to 127, to an int32 lane and never
// saturates. So codes stay where they are in the byte and each place has its own sum, divided once at the end, where
// that is exact; what such a sum may hold sets the length of a block. A line or group adds to a row at most
//   gemv   codes {0, 64, 128}   4 products:   -65536   32768 lines fit int32
//   scan   codes 0, 16 .. 240  16 products:  -491520    4369 groups fit int32
constexpr int kGemvBlockLines = 32768;
constexpr int kScanBlockGroups = 4096;

}  // namespace bitdistill
