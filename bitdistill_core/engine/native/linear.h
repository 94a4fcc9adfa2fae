// Ternary linear layers: INT8 activations of a chunk of tokens, and products with packed weights spread over the team.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"
#include "team.h"

namespace bitdistill {

// Up to this many tokens the packed weights are multiplied as they stream by; more tokens share unpacked weights.
constexpr int kStreamTokens = 3;

// A block of memory on a 64-byte address that only grows. Its contents are lost when it does.
template <class T>
class Buffer {
 public:
  T* get(std::size_t count) {
    if (count > count_) {
      data_.reset();
      count_ = 0;  // and stays so where there is no memory
      const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (!data_) throw std::bad_alloc();
      count_ = count;
    }
    return data_.get();
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t count_ = 0;
};

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// y = (weight_scale * w_ternary) @ x + bias, x normed first where `input_norm` is given (SubLN).
//
// Codes are 16-row panels of two bits a weight or of base 3 (layout.h). A row is num_blocks blocks of the same number
// of weights, each with a scale of its own; several blocks are of whole lines. weight_scale is (num_panels, num_blocks,
// 16); where scale_stride is 0, one panel's stand for all of them.
class Linear {
 public:
  Linear() = default;
  Linear(const uint8_t* codes, int n, int k, int num_blocks, bool is_base3)
      : codes(codes),
        n(n),
        k(k),
        num_blocks(num_blocks),
        block_lines_(num_lines() / num_blocks),
        block_groups_(is_base3 ? block_lines_ / kBase3Lines : 0),
        block_bytes_(std::size_t(block_groups_) * kBase3Bytes + std::size_t(rest_lines()) * kLineBytes) {}

  const uint8_t* codes = nullptr;
  int n = 0, k = 0;
  int num_blocks = 1;
  const float* weight_scale = nullptr;
  std::size_t scale_stride = 0;       // from panel to panel
  const float* bias = nullptr;        // padded to 16
  const float* input_norm = nullptr;  // (k,)

  int num_panels() const { return (n + kPanelRows - 1) / kPanelRows; }
  int num_lines() const { return (k + kLineK - 1) / kLineK; }
  int block_lines() const { return block_lines_; }
  int block_groups() const { return block_groups_; }  // of base 3; the rest are lines
  int rest_lines() const { return block_lines_ - block_groups_ * kBase3Lines; }  // of a block
  std::size_t block_bytes() const { return block_bytes_; }
  std::size_t panel_bytes() const { return block_bytes_ * num_blocks; }
  const uint8_t* panel(int index) const { return codes + index * panel_bytes(); }
  const float* scales(int panel, int block) const { return weight_scale + panel * scale_stride + block * kPanelRows; }

 private:
  int block_lines_ = 0, block_groups_ = 0;
  std::size_t block_bytes_ = 0;
};

// x_int8 of a chunk: row after row for up to kStreamTokens tokens, otherwise in tiles, [K / 4][tile_tokens][4].
struct Int8Tokens {
  Buffer<int8_t> x_int8;
  Buffer<float> scale;   // activation_scale
  Buffer<int32_t> sum;   // of x_int8, (num_blocks, num_tokens)
  uint64_t number = 0;   // another one whenever the tokens are
  int num_tokens = 0;
  int padded_k = 0;
  int num_blocks = 1;
  int tile_tokens = kTileTokens;  // or kTableTokens, to be multiplied by tables

  bool tiled() const { return num_tokens > kStreamTokens; }
  bool for_tables() const { return tiled() && tile_tokens == kTableTokens; }
  int num_tiles() const { return (num_tokens + tile_tokens - 1) / tile_tokens; }
  // For kernels.tables where it is there and faster, which one tile of kTileTokens is not.
  void resize(const Kernels& kernels, int tokens, int k, int num_blocks);
  // Tokens that are placed together: those of a tile, or one.
  int tokens_at_once() const { return tiled() ? tile_tokens : 1; }
  // Places the tokens from `first` on, tokens_at_once() of them or what is left: row after row of padded_k elements,
  // those beyond k 0. `rows` has room for tokens_at_once(), which this may overwrite.
  void place(const Kernels& kernels, int first, int8_t* rows);
  // Sums up each block of a token's row.
  void sum_blocks(int token, const int8_t* row);
};

// sums[r] = sum over k of code[r][k] * x[k] of a block of a panel, for one of few tokens;
// `lookups` as Scratch has them.
void block_sums(const Kernels& kernels, const Linear& linear, int panel, int block, const Int8Tokens& x,
                const int8_t* lookups, int token, int32_t* sums);

// A panel's codes, one a byte, as [K / 4][16 rows][4].
void unpack_codes(const Kernels& kernels, const Linear& linear, int panel, uint8_t* codes);

// Scratch of one thread.
struct Scratch {
  Buffer<uint8_t> codes;    // an unpacked panel
  Buffer<float> row;         // a normed token
  Buffer<int8_t> rows_int8;  // tokens that are placed together
  Buffer<float> up;
  Buffer<uint8_t> triples;  // of the first thread: named triples of all panels at once
  Buffer<int16_t> tables, partial;
  Buffer<int32_t> sums;
  Buffer<float> scores;     // of attention
  struct Lookups {          // for gemv_base3
    Buffer<int8_t> sums;    // (num_tokens, num_blocks, lookup_bytes)
    uint64_t number = 0;    // of the tokens they are of
  };
  // The last one first: where SubLN gives each linear a norm of its own, gate and up take turns.
  Lookups lookups[2];

  // The lookups of few tokens, made by each thread for itself; null where gemv_base3 reads x_int8.
  const int8_t* lookups_of(const Kernels& kernels, const Linear& linear, const Int8Tokens& x);
};

// out = x @ w^T, (tokens, stride) float; rows beyond n up to the next multiple of 16 are written too.
struct Product {
  const Linear* linear;
  const Int8Tokens* x;
  float* out;
  std::size_t stride;
  bool add;
};

// RMSNorm; none where `weight` is null.
struct Norm {
  const float* weight = nullptr;
  float offset = 0;
  float eps = 0;
};

// Quantises tokens of x (num_tokens, stride) for linears of k columns in num_blocks blocks, normed by `outer`, then by
// `inner`.
void quantize_tokens(Team& team, const Kernels& kernels, Scratch* scratch, const float* x, std::size_t stride, int k,
                     int num_blocks, int num_tokens, const Norm& outer, const Norm& inner, Int8Tokens& out);

// All products at once, their panels shared out over the team.
void multiply(Team& team, const Kernels& kernels, Scratch* scratch, const Product* products, int num_products);

// out (num_tokens, n) = w_ternary @ x, the integers alone: x is (num_tokens, k) INT8, rows are one block, and n and k
// those of whole panels and lines.
void exact_sums(Team& team, const Kernels& kernels, const Linear& linear, const int8_t* x, int num_tokens,
                int32_t* out);

// out = act(x @ gate^T) * (x @ up^T)
void multiply_gated(Team& team, const Kernels& kernels, Scratch* scratch, const Product& gate, const Product& up,
                    Activation activation);

}  // namespace bitdistill
