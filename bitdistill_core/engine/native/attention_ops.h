// Softmax attention, for float_ops.h and like it: written once, compiled by each instruction set's file, all static.
#pragma once

#include "vector.h"

namespace bitdistill {
namespace {

// One register of floats, and how many groups of 16 columns a product of rows takes at once. GCC keeps a vector type in
// memory where registers are smaller.
#if defined(__AVX512F__)
typedef float Register __attribute__((vector_size(64)));
typedef float RegisterUnaligned __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int kGroups = 2;
#elif defined(__AVX__)
typedef Float8 Register;
typedef Float8Unaligned RegisterUnaligned;
constexpr int kGroups = 1;
#else
typedef float Register __attribute__((vector_size(16)));
typedef float RegisterUnaligned __attribute__((vector_size(16), aligned(4), may_alias));
constexpr int kGroups = 1;
#endif
constexpr int kValueBlock = 32;  // positions
constexpr int kLanes = sizeof(Register) / sizeof(float), kRegisters16 = 16 / kLanes;

BITDISTILL_INLINE Register load_register(const float* x) { return *reinterpret_cast<const RegisterUnaligned*>(x); }
BITDISTILL_INLINE Register load_register(const uint16_t* x) {
#if defined(__AVX512F__)
  return (Register)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__F16C__)
  return load8(x);
#elif defined(__ARM_NEON)
  return (Register)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
#else
  return Register{half_to_float(x[0]), half_to_float(x[1]), half_to_float(x[2]), half_to_float(x[3])};
#endif
}

constexpr int kColumns = 16 * kGroups, kColumnRegisters = kGroups * kRegisters16;

// The first n of a register's floats, n from 1, to or from memory. (A memcpy of a size that the compiler does not know
// becomes a slow instruction.)
BITDISTILL_INLINE Register load_first(const float* x, int n) {
  if (n >= kLanes) return load_register(x);
  float values[kLanes] = {};
  for (int i = 0; i < n; ++i) values[i] = x[i];
  return load_register(values);
}
BITDISTILL_INLINE void store_first(float* x, Register v, int n) {
  if (n >= kLanes) {
    *reinterpret_cast<RegisterUnaligned*>(x) = v;
    return;
  }
  for (int i = 0; i < n; ++i) x[i] = v[i];
}

// sums[row][16 g .. 16 g + 15] += sum over i of a[row][i] * b[g][i * b_stride .. + 15], one after the other
template <int ROWS, class B>
BITDISTILL_INLINE void multiply_rows(const float* const* a, const B* const* b, std::size_t b_stride, int count,
                                     Register (&sums)[ROWS][kColumnRegisters]) {
  for (int i = 0; i < count; ++i) {
    Register columns[kColumnRegisters];
#pragma GCC unroll 4
    for (int j = 0; j < kColumnRegisters; ++j) {
      columns[j] = load_register(b[j / kRegisters16] + i * b_stride + j % kRegisters16 * kLanes);
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumnRegisters; ++j) sums[r][j] += a[r][i] * columns[j];
    }
  }
}

// Softmax of one row of scores over [first, last), zeros elsewhere in [begin, end); returns 1 / sum.
BITDISTILL_INLINE float softmax_row(float* scores, int begin, int end, int first, int last) {
  for (int i = begin; i < first; ++i) scores[i] = -__builtin_inff();
  for (int i = last; i < end; ++i) scores[i] = -__builtin_inff();
  Float8 largest = load8(scores + begin);
  for (int i = begin + 8; i < end; i += 8) largest = max8(largest, load8(scores + i));
  const Float8 shift = all8(max_of(largest));
  Float8 sum = all8(0);
  for (int i = begin; i < end; i += 8) {
    const Float8 weight = exp8(load8(scores + i) - shift);
    store8(scores + i, weight);
    sum += weight;
  }
  return 1.0f / sum_of(sum);
}

// The positions that a tile sees: whole blocks of keys, the last of which ends behind `last`.
struct Seen {
  int begin, end, last;
};

BITDISTILL_INLINE Seen seen_by(const AttentionTile& tile) {
  int begin = tile.first[0], last = tile.last[0];
  for (int r = 1; r < tile.rows; ++r) {
    begin = tile.first[r] < begin ? tile.first[r] : begin;
    last = tile.last[r] > last ? tile.last[r] : last;
  }
  return {begin / kKeyBlock * kKeyBlock, (last + kKeyBlock - 1) / kKeyBlock * kKeyBlock, last};
}

BITDISTILL_INLINE float* scores_of(const AttentionTile& tile, int row) {
  return tile.scores + std::size_t(row) * tile.scores_stride;
}

// Scores of the positions [begin, end), whole blocks, at most kColumns.
template <int ROWS, class T>
void score_rows(const AttentionTile& tile, int begin, int end) {
  const T* keys[kGroups];
  for (int g = 0; g < kGroups; ++g) {  // a group that is not there repeats the first
    const int position = begin + 16 * g < end ? begin + 16 * g : begin;
    keys[g] = static_cast<const T*>(tile.head.key) + std::size_t(position) * tile.head_dim;
  }
  Register sums[ROWS][kColumnRegisters] = {};
  multiply_rows<ROWS, T>(tile.query, keys, kKeyBlock, tile.head_dim, sums);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    float* const scores = scores_of(tile, r) + begin;
#pragma GCC unroll 4
    for (int j = 0; j < kColumnRegisters; ++j) {
      if (begin + j * kLanes < end) store_first(scores + j * kLanes, sums[r][j] * tile.scale, kLanes);
    }
  }
}

// Columns [column, column + kColumns) of add_values; `whole` where a row has them all.
template <int ROWS, class T, bool whole>
BITDISTILL_INLINE void add_columns(const AttentionTile& tile, const T* values, const float* const* weights, int count,
                                   int column, bool is_first, const float* scale) {
  const int d = tile.head_dim;
  const T* columns[kGroups];
  for (int g = 0; g < kGroups; ++g) columns[g] = values + (whole || column + 16 * g < d ? column + 16 * g : column);
  Register sums[ROWS][kColumnRegisters] = {};
  if (!is_first) {
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int j = 0, i = column; j < kColumnRegisters; ++j, i += kLanes) {
        if (whole || i < d) sums[r][j] = load_first(tile.out[r] + i, whole ? kLanes : d - i);
      }
    }
  }
  multiply_rows<ROWS, T>(weights, columns, tile.value_stride, count, sums);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int j = 0, i = column; j < kColumnRegisters; ++j, i += kLanes) {
      if (whole || i < d) store_first(tile.out[r] + i, sums[r][j] * scale[r], whole ? kLanes : d - i);
    }
  }
}

// Adds the values of the positions [begin, end), by their weights, to the rows' outputs, or sets those where
// `is_first`; then multiplies each row by its scale.
template <int ROWS, class T>
void add_values(const AttentionTile& tile, int begin, int end, bool is_first, const float* scale) {
  const float* weights[ROWS];
  for (int r = 0; r < ROWS; ++r) weights[r] = scores_of(tile, r) + begin;
  const T* values = static_cast<const T*>(tile.head.value) + std::size_t(begin) * tile.value_stride;
  int column = 0;
  for (; column + kColumns <= tile.head_dim; column += kColumns) {
    add_columns<ROWS, T, true>(tile, values, weights, end - begin, column, is_first, scale);
  }
  if (column == tile.head_dim) return;
  add_columns<ROWS, T, false>(tile, values, weights, end - begin, column, is_first, scale);
}

// By the number of a tile's rows.
template <class T>
constexpr void (*kScoreRows[])(const AttentionTile&, int, int) = {
    nullptr,          score_rows<1, T>, score_rows<2, T>, score_rows<3, T>,
    score_rows<4, T>, score_rows<5, T>, score_rows<6, T>};
template <class T>
constexpr void (*kAddValues[])(const AttentionTile&, int, int, bool, const float*) = {
    nullptr,          add_values<1, T>, add_values<2, T>, add_values<3, T>,
    add_values<4, T>, add_values<5, T>, add_values<6, T>};

// Asks for share i of `count` of the positions [begin, end), as far as there are any before `stop`.
BITDISTILL_INLINE void prefetch_share(const void* data, std::size_t bytes, int begin, int end, int stop, int i,
                                      int count) {
  end = end < stop ? end : stop;
  if (begin >= end) return;
  const std::size_t size = std::size_t(end - begin) * bytes;
  const char* const first = static_cast<const char*>(data) + std::size_t(begin) * bytes;
  for (std::size_t at = size * i / count / kLineBytes * kLineBytes; at < size * (i + 1) / count; at += kLineBytes) {
    __builtin_prefetch(first + at);
  }
}

// A block of keys, then a block of values, is used by all tiles while it is in the nearest cache. A row's sums run over
// its positions in their order, whatever else is in the tiles.
template <class T>
void attend_typed(const AttentionTile* tiles, int count) {
  Seen all[kMostTiles];
  int begin = tiles[0].first[0] / kKeyBlock * kKeyBlock, end = 0;
  for (int i = 0; i < count; ++i) {
    all[i] = seen_by(tiles[i]);
    begin = all[i].begin < begin ? all[i].begin : begin;
    end = all[i].end > end ? all[i].end : end;
  }
  const KeyValueHead& head = tiles[0].head;
  const std::size_t key_bytes = sizeof(T) * tiles[0].head_dim, value_bytes = sizeof(T) * tiles[0].value_stride;
  for (int block = begin; block < end; block += kColumns) {
    for (int i = 0; i < count; ++i) {
      prefetch_share(head.key, key_bytes, block + kColumns, block + 2 * kColumns, end, i, count);
      const Seen& seen = all[i];
      const int from = block > seen.begin ? block : seen.begin;
      const int to = block + kColumns < seen.end ? block + kColumns : seen.end;
      if (from < to) kScoreRows<T>[tiles[i].rows](tiles[i], from, to);
    }
  }
  constexpr float kOnes[kTileTokens] = {1, 1, 1, 1, 1, 1};
  float scale[kMostTiles][kTileTokens];
  for (int i = 0; i < count; ++i) {
    const Seen& seen = all[i];
    for (int r = 0; r < tiles[i].rows; ++r) {
      scale[i][r] = softmax_row(scores_of(tiles[i], r), seen.begin, seen.end, tiles[i].first[r], tiles[i].last[r]);
    }
  }
  for (int block = begin; block < end; block += kValueBlock) {
    for (int i = 0; i < count; ++i) {
      prefetch_share(head.value, value_bytes, block + kValueBlock, block + 2 * kValueBlock, end, i, count);
      const Seen& seen = all[i];
      const int from = block > seen.begin ? block : seen.begin;
      const int to = block + kValueBlock < seen.last ? block + kValueBlock : seen.last;
      const bool is_first = from == seen.begin, is_last = to == seen.last;
      if (from < to) kAddValues<T>[tiles[i].rows](tiles[i], from, to, is_first, is_last ? scale[i] : kOnes);
    }
  }
}

void attend(const AttentionTile* tiles, int count) {
  tiles[0].head.half ? attend_typed<uint16_t>(tiles, count) : attend_typed<float>(tiles, count);
}

}  // namespace
}  // namespace bitdistill
