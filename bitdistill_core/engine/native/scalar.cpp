// The specification: plain loops over the layouts of panels.py. Always built, always correct.
#include "float_ops.h"

namespace bitdistill {
namespace {

void gemv_panel(const uint8_t* lines, int num_lines, const int8_t* x, int32_t* sums) {
  for (int row = 0; row < kPanelRows; ++row) {
    int32_t sum = 0;
    for (int k = 0; k < num_lines * kLineK; ++k) {
      const int line = k / kLineK, plane = k % kLineK / 4, j = k % 4;
      const int code = lines[std::size_t(line) * kLineBytes + row * 4 + j] >> (2 * plane) & 3;
      sum += x[k] * code;
    }
    sums[row] = sum;
  }
}

void unpack_panel(const uint8_t* lines, int num_lines, uint8_t* codes) {
  for (int line = 0; line < num_lines; ++line) {
    for (int plane = 0; plane < 4; ++plane) {
      for (int i = 0; i < kLineBytes; ++i) *codes++ = lines[std::size_t(line) * kLineBytes + i] >> (2 * plane) & 3;
    }
  }
}

void gemm_tile(const uint8_t* codes, const int8_t* x_tile, int steps, int32_t* sums) {
  for (int t = 0; t < kTileTokens; ++t) {
    for (int row = 0; row < kPanelRows; ++row) {
      int32_t sum = 0;
      for (int step = 0; step < steps; ++step) {
        for (int j = 0; j < 4; ++j) {
          sum += codes[(step * kPanelRows + row) * 4 + j] * x_tile[(step * kTileTokens + t) * 4 + j];
        }
      }
      sums[t * kPanelRows + row] = sum;
    }
  }
}

void scan_panel(const uint8_t* scan, int num_groups, const int8_t* x, int32_t* sums) {
  for (int row = 0; row < kPanelRows; ++row) {
    int32_t sum = 0;
    for (int k = 0; k < num_groups * kGroupK; ++k) {
      const uint8_t* group = scan + std::size_t(k / kGroupK) * kScanGroupBytes;
      const int i = k % kGroupK / 8, j = k % kGroupK / 4, b = k % 4;
      const int nibble = group[i * kLineBytes + row * 4 + b] >> (k % 8 < 4 ? 0 : 4) & 15;
      const int bit = group[4 * kLineBytes + row * 4 + b] >> j & 1;
      sum += (2 * nibble + bit) * x[k];
    }
    sums[row] = sum;
  }
}

constexpr Kernels kKernels = {.name = "scalar", .needs = "any processor", .gemv_panel = gemv_panel,
                              .unpack_panel = unpack_panel, .gemv_base3 = nullptr, .unpack_base3 = nullptr,
                              .prepare_base3 = nullptr,
                              .gemm_tile = gemm_tile, .gemm_pair = nullptr, .tables = nullptr, .scan_panel = scan_panel,
                              BITDISTILL_FLOAT_OPS};

}  // namespace

void scalar_unpack_base3(const uint8_t* groups, int num_groups, uint8_t* codes) {
  constexpr int kPowers[] = {1, 3, 9};
  for (int group = 0; group < num_groups; ++group, groups += kBase3Bytes) {
    for (int step = 0; step < kBase3K / 4; ++step) {
      const int i = step / 3;
      for (int row = 0; row < kPanelRows; ++row) {
        for (int j = 0; j < 4; ++j) {
          const int element = kPanelRows * j + row;
          const int magnitude = groups[i / 2 * kLineBytes + element] >> i % 2 * 4 & 15;
          const bool is_negative = groups[4 * kLineBytes + element] >> i & 1;
          *codes++ = uint8_t((13 + (is_negative ? -magnitude : magnitude)) / kPowers[step % 3] % 3);
        }
      }
    }
  }
}

void scalar_gemv_base3(const uint8_t* groups, int num_groups, const int8_t* x, int32_t* sums) {
  for (int row = 0; row < kPanelRows; ++row) sums[row] = 0;
  for (int group = 0; group < num_groups; ++group, groups += kBase3Bytes, x += kBase3K) {
    uint8_t codes[kBase3K * kPanelRows];
    scalar_unpack_base3(groups, 1, codes);
    for (int i = 0; i < kBase3K * kPanelRows; ++i) {
      sums[i / 4 % kPanelRows] += codes[i] * x[i / (4 * kPanelRows) * 4 + i % 4];
    }
  }
}

const Kernels* scalar_kernels() { return &kKernels; }

}  // namespace bitdistill
