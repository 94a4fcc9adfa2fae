// The arithmetic of the engine, one table of functions for each instruction set. dispatch.cpp chooses a table.
//
// Kernels allocate nothing, check nothing and never throw. Integer results are exact, so they are equal in every table;
// floating-point results are those of IEEE float32 in an order that depends on the table, never on the batch: a token
// gets the same bits whatever other tokens are computed beside it, and on any number of threads.
#pragma once

#include "layout.h"

namespace bitdistill {

// How far ahead of what it multiplies a stream asks for its next bytes: 1 KiB is less than the memory's latency takes,
// and slower than not to ask at all.
constexpr int kPrefetchBytes = 3072;

// Asks for the lines of [stream, stream + num_bytes), that far ahead.
__attribute__((always_inline)) inline void prefetch_ahead(const void* stream, int num_bytes) {
  for (int byte = 0; byte < num_bytes; byte += kLineBytes) {
    __builtin_prefetch(static_cast<const char*>(stream) + kPrefetchBytes + byte);
  }
}

enum class Activation { kSilu, kGeluTanh };

// Keys and values of one head of one layer of one sequence. `key` is (capacity / 16, head_dim, 16): 16 positions side
// by side, so that scores need no horizontal sums; `value` is (capacity, value_stride).
struct KeyValueHead {
  void* key;
  void* value;
  bool half;  // float16 instead of float32
};

constexpr int kKeyBlock = 16;

// Tiles of attention that share the keys and values they read.
constexpr int kMostTiles = 4;

// Up to kTileTokens rows of queries against one head of keys. Row i sees the positions [first[i], last[i]).
struct AttentionTile {
  const float* query[kTileTokens];
  float* out[kTileTokens];
  int first[kTileTokens];
  int last[kTileTokens];
  int rows;
  int head_dim;
  int value_stride;  // a multiple of 16
  float scale;
  KeyValueHead head;
  float* scores;  // scratch, kTileTokens * scores_stride
  int scores_stride;  // >= the largest `last` rounded up to 16
};

// Sums of many tokens by tables in the place of multiplications, for processors that load more than they multiply.
//
// Three columns of a row have ternary weights of 27 kinds. For kTableTokens tokens their 27 sums of activations are 27
// vectors, a lane a token, and a row adds the one that its weights name: 48 multiply-adds for a load and an addition.
// A triple is column j of the steps 3 i, 3 i + 1 and 3 i + 2, in the order of (i, j); beyond the last step all is 0.
constexpr int kTableTokens = 16;
constexpr int kNumTriples = 27;
// Triples whose tables lie in the nearest cache together, a block.
constexpr int kTableTriples = 24, kBlockNames = kTableTriples * kPanelRows;
constexpr int kTableSteps = kTableTriples / 4 * 3;  // steps of 4 k that a block covers, four triples for three

struct TableKernels {
  // Rows of kTableTokens tokens, 4 * num_steps bytes each, to a tile; num_steps is a multiple of 4.
  void (*place)(const int8_t* rows, int num_steps, int8_t* x_tile);

  // Of a panel, which of the 27 each row has of each triple, 16 bytes a triple; `stride` from block to block.
  // A panel is groups of base 3, none in a file of two bits, and lines.
  void (*name_triples)(const uint8_t* panel, int num_groups, int num_lines, uint8_t* names, std::size_t stride);

  // (triples, 27, 16) of steps of a tile of kTableTokens tokens, at most a block. Returns the largest that a partial
  // sum of these triples can be, the sum of |x| of a token.
  int (*build)(const int8_t* x_tile, int num_steps, int16_t* tables);

  // Adds `count` triples of a panel, a multiple of 4, to its partial sums (16, 16). Tables and sums lie on 32-byte
  // addresses.
  void (*add)(const uint8_t* names, const int16_t* tables, int count, int16_t* partial);

  // Adds partial sums to sums, and clears them.
  void (*flush)(int16_t* partial, int32_t* sums);

  // To out[token][row], sum over k of w_ternary[row][k] * x[token][k].
  void (*transpose)(const int32_t* sums, int32_t* out);
};

// Of what avx2_prepare_base3 writes: before the first group, and for each.
constexpr int kLookupHead = 64, kLookupBytes = 1024;
inline std::size_t lookup_bytes(int num_groups) { return kLookupHead + std::size_t(num_groups) * kLookupBytes; }

// Of a token, what the sums over a row of `scan` say of its logit, but for what the mean adds: the rest of the row and
// of the token are off by no more than the last two say, times norms of the row.
struct ScanQuery {
  int32_t middle;    // added to 16 times a sum, gives twice the integer product
  float half_scale;  // of that
  float per_error, per_row_norm;
};

struct Kernels {
  const char* name;
  const char* needs;  // what the processor must have

  // sums[r] = sum over k of code[r][k] * x[k] for one panel; codes are w_ternary + 1. x is (16 * num_lines).
  void (*gemv_panel)(const uint8_t* lines, int num_lines, const int8_t* x, int32_t* sums);

  // A panel's codes, one a byte, as [K / 4][16 rows][4]: 64 bytes a step of 4 k. `codes` lies on a 64-byte address.
  void (*unpack_panel)(const uint8_t* lines, int num_lines, uint8_t* codes);

  // The same two of groups of base 3, 96 k each. Null where such files are expanded when they are loaded.
  void (*gemv_base3)(const uint8_t* groups, int num_groups, const int8_t* x, int32_t* sums);
  void (*unpack_base3)(const uint8_t* groups, int num_groups, uint8_t* codes);

  // What gemv_base3 reads in the place of x, once for all panels: lookup_bytes of it, on a 32-byte address. Null where
  // it reads x itself.
  void (*prepare_base3)(const int8_t* x, int num_groups, int8_t* lookups);

  // sums[t][r] = sum over k of code[r][k] * x[t][k] for an unpacked panel and a tile of tokens. steps = K / 4.
  void (*gemm_tile)(const uint8_t* codes, const int8_t* x_tile, int steps, int32_t* sums);

  // The same of two panels, sums[panel][t][r]. Null where one panel fills the registers.
  void (*gemm_pair)(const uint8_t* codes, const uint8_t* codes2, const int8_t* x_tile, int steps, int32_t* sums);

  // Null where multiplications are as fast.
  const TableKernels* tables;

  // sums[r] = sum over k of (u >> 3) * x[k] for one panel of `scan`.
  void (*scan_panel)(const uint8_t* scan, int num_groups, const int8_t* x, int32_t* sums);

  // Of a panel's 16 rows by those sums: logits in `values`, and in `bounds` the most that they can be, infinity where
  // float32 cannot tell. Returns bit r for every row whose bound is at least `least`.
  uint32_t (*bound_rows)(const int32_t* sums, const float* row_scale, const float* scan_error, const float* row_norm,
                         const ScanQuery& query, float least, float* values, float* bounds);

  // y[t][r] = (sums[t][r] - sum_x[t]) * (scale_x[t] * weight_scale[r]) + bias[r] for some tokens x 16 rows, token t at
  // y + t * stride; added to y instead where `add`. bias may be null.
  void (*finish)(const int32_t* sums, int tokens, const int32_t* sum_x, const float* scale_x, const float* weight_scale,
                 const float* bias, bool add, float* y, std::size_t stride);

  // out = (weight + offset) * x / sqrt(mean(x^2) + eps), n elements. out may be x.
  void (*rms_norm)(const float* x, const float* weight, float offset, float eps, int n, float* out);

  // x_int8 = round_half_even(x * 127 / absmax); absmax has a floor of 1e-5. Returns absmax / 127, and the sum of
  // x_int8. If an element is infinite or NaN: zeros, and NaN.
  float (*quantize)(const float* x, int n, int8_t* x_int8, int32_t* sum);

  // gate = act(gate) * up
  void (*gate_multiply)(float* gate, const float* up, int n, Activation activation);

  // x[i], x[i + d/2] rotated by the angle i of cos, sin (d / 2).
  void (*rotate)(float* x, const float* cos, const float* sin, int head_dim);

  // Stores keys and values, (count, head_dim) each with `stride` from row to row, at `position` and those behind it.
  void (*store_keys_values)(const KeyValueHead& head, const float* keys, const float* values, std::size_t stride,
                            int position, int count, int head_dim, int value_stride);

  // Softmax attention of up to kMostTiles tiles with the same head. A query may lie where its row's output goes.
  void (*attend)(const AttentionTile* tiles, int count);

  // w_int8 (32 * num_groups) of row r of a panel of `scan`, and its rows of `next` and `rest`.
  void (*decode_row)(const uint8_t* scan_panel, int r, const uint8_t* next, const uint8_t* rest, int num_groups,
                     int8_t* w_int8);

  // sum over k of the bit of k times x[k], of one row of `next`.
  int32_t (*next_dot)(const uint8_t* next, int num_groups, const int8_t* x);

  // sum over k of x[k] * w_int8[k]; n is a multiple of 32.
  float (*dot)(const float* x, const int8_t* w_int8, int n);
};

// Each in a file of its own, compiled for its instruction set; dispatch.cpp asks the processor before it uses one.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
extern const TableKernels kAvx2Tables;
const Kernels* avx_vnni_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_vbmi_kernels();
const Kernels* neon_kernels();

// Base 3: the specification; for any processor with AVX2; what the table avx512-vbmi has of avx512_vbmi.cpp.
void scalar_gemv_base3(const uint8_t* groups, int num_groups, const int8_t* x, int32_t* sums);
void scalar_unpack_base3(const uint8_t* groups, int num_groups, uint8_t* codes);
void avx2_prepare_base3(const int8_t* x, int num_groups, int8_t* lookups);
void avx2_gemv_base3(const uint8_t* groups, int num_groups, const int8_t* lookups, int32_t* sums);
void avx2_unpack_base3(const uint8_t* groups, int num_groups, uint8_t* codes);
void avx512_vbmi_gemv_base3(const uint8_t* groups, int num_groups, const int8_t* x, int32_t* sums);
void avx512_vbmi_unpack_base3(const uint8_t* groups, int num_groups, uint8_t* codes);

}  // namespace bitdistill
