// The specification: plain loops over the layout of ternary_matmul.h. Always built, always correct.
#include "ternary_matmul.h"

namespace bitdistill {

void ternary_matmul_scalar(const int8_t* x, const uint8_t* w_packed, int32_t* out, int T, int N, int K,
                           int first_panel, int last_panel) {
  const int num_lines = K / kLineK;
  for (int panel = first_panel; panel < last_panel; ++panel) {
    const uint8_t* lines = w_packed + std::size_t(panel) * num_lines * kLineBytes;
    for (int t = 0; t < T; ++t) {
      const int8_t* activations = x + std::size_t(t) * K;
      int32_t* sums = out + std::size_t(t) * N + panel * kPanelRows;
      for (int row = 0; row < kPanelRows; ++row) {
        int32_t sum = 0;
        for (int k = 0; k < K; ++k) {
          const int line = k / kLineK, plane = k % kLineK / 4, j = k % 4;
          const int code = lines[std::size_t(line) * kLineBytes + row * 4 + j] >> (2 * plane) & 3;
          sum += activations[k] * (code - 1);
        }
        sums[row] = sum;
      }
    }
  }
}

}  // namespace bitdistill
