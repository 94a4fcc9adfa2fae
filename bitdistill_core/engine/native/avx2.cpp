// AVX2 kernel. Compiled with -mavx2 -mfma and called only where the processor has them, so nothing inline from the
// standard library is used here: the linker could share such a function with code that runs on any processor.
#include <immintrin.h>

#include "ternary_matmul.h"

namespace bitdistill {
namespace {

// How many lines may be added in int16 before a flush to int32. vpmaddubsw adds two products code * x of one row:
// at least 2 * 2 * -128 = -512 and at most 2 * 2 * 127 = 508, so it never saturates. A line adds four of them (its
// planes) to each int16 lane: after 16 lines a lane is in [-512 * 64, 508 * 64] = [-32768, 32512], exactly what int16
// holds. Every partial sum lies in a smaller range. 17 lines could overflow.
constexpr int kFlushLines = 16;

// Tokens whose sums of activations are kept on the stack: a panel is read once for all of them.
constexpr int kBlockTokens = 64;

// Tokens that reuse an unpacked line. 4 tokens x 2 halves = 8 accumulators; with codes, lines, masks: 15 registers.
constexpr int kTileTokens = 4;

int32_t sum_of_activations(const int8_t* x, int K) {
  const __m128i one8 = _mm_set1_epi8(1);
  const __m128i one16 = _mm_set1_epi16(1);
  __m128i sums = _mm_setzero_si128();
  for (int k = 0; k < K; k += kLineK) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k));
    sums = _mm_add_epi32(sums, _mm_madd_epi16(_mm_maddubs_epi16(one8, values), one16));
  }
  sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
  sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1));
  return _mm_cvtsi128_si32(sums);
}

inline __m256i load_line_half(const uint8_t* bytes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
}

inline __m256i broadcast_four_activations(const int8_t* x) {
  return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(x)));
}

// One panel for TOKENS tokens: out = sum of code * x - sum of x, because the codes are w_ternary + 1.
template <int TOKENS>
void panel_times_tokens(const int8_t* x, const uint8_t* lines, int32_t* out, const int32_t* activation_sums, int N,
                        int K) {
  const __m256i two_bits = _mm256_set1_epi8(3);
  const __m256i one16 = _mm256_set1_epi16(1);
  const int num_lines = K / kLineK;
  __m256i sums[TOKENS][2];
  for (int t = 0; t < TOKENS; ++t) sums[t][0] = sums[t][1] = _mm256_set1_epi32(-activation_sums[t]);

  for (int first = 0; first < num_lines; first += kFlushLines) {
    const int last = first + kFlushLines < num_lines ? first + kFlushLines : num_lines;
    __m256i partial[TOKENS][2];
    for (int t = 0; t < TOKENS; ++t) partial[t][0] = partial[t][1] = _mm256_setzero_si256();
    for (int line = first; line < last; ++line) {
      __m256i low = load_line_half(lines + std::size_t(line) * kLineBytes);
      __m256i high = load_line_half(lines + std::size_t(line) * kLineBytes + kLineBytes / 2);
#pragma GCC unroll 4
      for (int plane = 0; plane < 4; ++plane) {
        const __m256i low_codes = _mm256_and_si256(low, two_bits);
        const __m256i high_codes = _mm256_and_si256(high, two_bits);
        for (int t = 0; t < TOKENS; ++t) {
          const __m256i four = broadcast_four_activations(x + std::size_t(t) * K + line * kLineK + plane * 4);
          partial[t][0] = _mm256_add_epi16(partial[t][0], _mm256_maddubs_epi16(low_codes, four));
          partial[t][1] = _mm256_add_epi16(partial[t][1], _mm256_maddubs_epi16(high_codes, four));
        }
        low = _mm256_srli_epi16(low, 2);  // bits that cross into a neighbour byte are masked off
        high = _mm256_srli_epi16(high, 2);
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      for (int half = 0; half < 2; ++half) {
        sums[t][half] = _mm256_add_epi32(sums[t][half], _mm256_madd_epi16(partial[t][half], one16));
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    int32_t* row_sums = out + std::size_t(t) * N;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row_sums), sums[t][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row_sums + 8), sums[t][1]);
  }
}

}  // namespace

void ternary_matmul_avx2(const int8_t* x, const uint8_t* w_packed, int32_t* out, int T, int N, int K,
                         int first_panel, int last_panel) {
  int32_t activation_sums[kBlockTokens];
  for (int block = 0; block < T; block += kBlockTokens) {
    const int num_tokens = T - block < kBlockTokens ? T - block : kBlockTokens;
    const int8_t* block_x = x + std::size_t(block) * K;
    for (int t = 0; t < num_tokens; ++t) activation_sums[t] = sum_of_activations(block_x + std::size_t(t) * K, K);
    for (int panel = first_panel; panel < last_panel; ++panel) {
      const uint8_t* lines = w_packed + std::size_t(panel) * (K / kLineK) * kLineBytes;
      int32_t* block_out = out + std::size_t(block) * N + panel * kPanelRows;
      for (int t = 0; t < num_tokens; t += kTileTokens) {
        const int8_t* tile_x = block_x + std::size_t(t) * K;
        int32_t* tile_out = block_out + std::size_t(t) * N;
        switch (num_tokens - t) {
          case 1: panel_times_tokens<1>(tile_x, lines, tile_out, activation_sums + t, N, K); break;
          case 2: panel_times_tokens<2>(tile_x, lines, tile_out, activation_sums + t, N, K); break;
          case 3: panel_times_tokens<3>(tile_x, lines, tile_out, activation_sums + t, N, K); break;
          default: panel_times_tokens<4>(tile_x, lines, tile_out, activation_sums + t, N, K);
        }
      }
    }
  }
}

}  // namespace bitdistill
