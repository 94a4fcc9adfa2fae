#include "linear.h"

#include <algorithm>
#include <cstring>

namespace bitdistill {
namespace {

// The panels of a step in shares that threads take one by one: enough that a slow thread takes fewer, and long where
// weights stream from memory.
struct Shares {
  int num_panels, num_threads;
  bool tiled;

  int count() const { return std::min(num_panels, (tiled ? 6 : 2) * num_threads); }
  int begin(int share) const { return int(int64_t(num_panels) * share / count()); }
};

// One panel of a product for few tokens, to `out` (tokens, stride).
void stream_panel(const Kernels& kernels, const Product& product, int panel, float* out, std::size_t stride) {
  const Linear& linear = *product.linear;
  const Int8Tokens& x = *product.x;
  alignas(32) int32_t sums[kStreamTokens * kPanelRows];
  for (int t = 0; t < x.num_tokens; ++t) {
    kernels.gemv_panel(linear.panel(panel), linear.num_lines(), x.x_int8.data() + std::size_t(t) * x.padded_k,
                       sums + t * kPanelRows);
  }
  kernels.finish(sums, x.num_tokens, x.sum.data(), x.scale.data(), linear.weight_scale,
                 linear.bias == nullptr ? nullptr : linear.bias + panel * kPanelRows, product.add, out, stride);
}

template <class Finish>
void tile_panel(const Kernels& kernels, Scratch& scratch, const Product& product, int panel, Finish&& after_tile) {
  const Linear& linear = *product.linear;
  const Int8Tokens& x = *product.x;
  uint8_t* codes = scratch.codes.get(std::size_t(x.padded_k) * kPanelRows);
  kernels.unpack_panel(linear.panel(panel), linear.num_lines(), codes);
  alignas(32) int32_t sums[kTileTokens * kPanelRows];
  // The next panel comes from memory while this one is multiplied, a piece with every tile.
  const char* next = reinterpret_cast<const char*>(linear.panel(panel + 1));
  const int next_lines = panel + 1 < linear.num_panels() ? linear.num_lines() : 0;
  for (int tile = 0; tile < x.num_tiles(); ++tile) {
    for (int line = next_lines * tile / x.num_tiles(); line < next_lines * (tile + 1) / x.num_tiles(); ++line) {
      __builtin_prefetch(next + std::size_t(line) * kLineBytes);
    }
    const int first = tile * kTileTokens, tokens = std::min(kTileTokens, x.num_tokens - first);
    kernels.gemm_tile(codes, x.x_int8.data() + std::size_t(first) * x.padded_k, x.padded_k / 4, sums);
    after_tile(sums, first, tokens);
  }
}

void multiply_panel(const Kernels& kernels, Scratch& scratch, const Product& product, int panel) {
  if (!product.x->tiled()) {
    return stream_panel(kernels, product, panel, product.out + panel * kPanelRows, product.stride);
  }
  const Linear& linear = *product.linear;
  const Int8Tokens& x = *product.x;
  tile_panel(kernels, scratch, product, panel, [&](const int32_t* sums, int first, int tokens) {
    kernels.finish(sums, tokens, x.sum.data() + first, x.scale.data() + first, linear.weight_scale,
                   linear.bias == nullptr ? nullptr : linear.bias + panel * kPanelRows, product.add,
                   product.out + first * product.stride + panel * kPanelRows, product.stride);
  });
}

}  // namespace

void Int8Tokens::resize(int tokens, int k) {
  num_tokens = tokens;
  padded_k = round_up(k, kLineK);
  const int rows = tiled() ? num_tiles() * kTileTokens : tokens;
  x_int8.get(std::size_t(rows) * padded_k);
  scale.get(tokens);
  sum.get(tokens);
  if (tiled() && tokens % kTileTokens != 0) {  // the last tile's missing tokens
    const std::size_t tile = std::size_t(kTileTokens) * padded_k;
    std::memset(x_int8.data() + (num_tiles() - 1) * tile, 0, tile);
  }
}

void Int8Tokens::place(int token, int k, int8_t* row) {
  std::memset(row + k, 0, padded_k - k);
  if (!tiled()) {
    std::memcpy(x_int8.data() + std::size_t(token) * padded_k, row, padded_k);
    return;
  }
  int8_t* out = x_int8.data() + std::size_t(token / kTileTokens) * kTileTokens * padded_k + token % kTileTokens * 4;
  for (int step = 0; step < padded_k / 4; ++step) std::memcpy(out + step * kTileTokens * 4, row + step * 4, 4);
}

void quantize_tokens(Team& team, const Kernels& kernels, Scratch* scratch, const float* x, std::size_t stride, int k,
                     int num_tokens, const Norm& outer, const Norm& inner, Int8Tokens& out) {
  out.resize(num_tokens, k);
  const auto quantize = [&](int token, int thread) {
    const float* row = x + token * stride;
    float* normed = scratch[thread].row.get(k);
    if (outer.weight != nullptr) {
      kernels.rms_norm(row, outer.weight, outer.offset, outer.eps, k, normed);
      row = normed;
    }
    if (inner.weight != nullptr) {
      kernels.rms_norm(row, inner.weight, inner.offset, inner.eps, k, normed);
      row = normed;
    }
    int8_t* row_int8 = scratch[thread].row_int8.get(out.padded_k);
    out.scale.data()[token] = kernels.quantize(row, k, row_int8, out.sum.data() + token);
    out.place(token, k, row_int8);
  };
  if (num_tokens <= kStreamTokens) {  // shorter than handing it out
    for (int token = 0; token < num_tokens; ++token) quantize(token, 0);
    return;
  }
  constexpr int kTokens = 8;
  team.run((num_tokens + kTokens - 1) / kTokens, [&](int item, int thread) {
    for (int t = item * kTokens; t < std::min(num_tokens, (item + 1) * kTokens); ++t) quantize(t, thread);
  });
}

void multiply(Team& team, const Kernels& kernels, Scratch* scratch, const Product* products, int num_products) {
  int num_panels = 0;
  for (int i = 0; i < num_products; ++i) num_panels += products[i].linear->num_panels();
  const Shares shares{num_panels, team.num_threads(), products[0].x->tiled()};
  team.run(shares.count(), [&](int share, int thread) {
    int first = shares.begin(share), last = shares.begin(share + 1);
    for (const Product* product = products; first < last; ++product) {
      const int own = product->linear->num_panels();
      for (; first < std::min(own, last); ++first) multiply_panel(kernels, scratch[thread], *product, first);
      first -= own;
      last -= own;
      first = std::max(first, 0);
    }
  });
}

void multiply_gated(Team& team, const Kernels& kernels, Scratch* scratch, const Product& gate, const Product& up,
                    Activation activation) {
  const Shares shares{gate.linear->num_panels(), team.num_threads(), gate.x->tiled()};
  const int num_tokens = gate.x->num_tokens;
  team.run(shares.count(), [&](int share, int thread) {
    float* up_tile = scratch[thread].up.get(kTileTokens * kPanelRows);
    const int begin = shares.begin(share), end = shares.begin(share + 1);
    const auto finish = [&](int panel, int first, int tokens) {
      for (int t = 0; t < tokens; ++t) {
        kernels.gate_multiply(gate.out + (first + t) * gate.stride + panel * kPanelRows, up_tile + t * kPanelRows,
                              kPanelRows, activation);
      }
    };
    if (!gate.x->tiled()) {  // one stream after the other, not two at once
      for (int panel = begin; panel < end; ++panel) multiply_panel(kernels, scratch[thread], gate, panel);
      for (int panel = begin; panel < end; ++panel) {
        stream_panel(kernels, up, panel, up_tile, kPanelRows);
        finish(panel, 0, num_tokens);
      }
      return;
    }
    for (int panel = begin; panel < end; ++panel) {
      multiply_panel(kernels, scratch[thread], gate, panel);
      const Int8Tokens& x = *up.x;
      const float* bias = up.linear->bias == nullptr ? nullptr : up.linear->bias + panel * kPanelRows;
      tile_panel(kernels, scratch[thread], up, panel, [&](const int32_t* sums, int first, int tokens) {
        kernels.finish(sums, tokens, x.sum.data() + first, x.scale.data() + first, up.linear->weight_scale, bias, false,
                       up_tile, kPanelRows);
        finish(panel, first, tokens);
      });
    }
  });
}

}  // namespace bitdistill
