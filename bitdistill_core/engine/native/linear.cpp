#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "tables.h"

namespace bitdistill {
namespace {

// Panels that gemm_pair takes.
constexpr int kPairPanels = 2, kPairRows = kPairPanels * kPanelRows;
// The most panels that a thread takes at once.
constexpr int kPiecePanels = 4, kGatedPiecePanels = 8;

// Up to kTileTokens tokens of kPairPanels neighbouring panels at most, to `out` (tokens, stride): integer_sums(block,
// sums) gives the integers of a block, which are scaled and added up in float32, block after block.
template <class IntegerSums>
void add_blocks(const Kernels& kernels, const Product& product, int panel, int num_panels, int first, int tokens,
                float* out, std::size_t stride, IntegerSums&& integer_sums) {
  const Linear& linear = *product.linear;
  const Int8Tokens& x = *product.x;
  alignas(64) int32_t sums[kPairPanels * kTileTokens * kPanelRows];
  alignas(64) float total[kTileTokens * kPairRows];
  // Added to a residual stream one by one, every block would be rounded to what that can hold.
  const bool is_apart = product.add && linear.num_blocks > 1;
  float* const to = is_apart ? total : out;
  const std::size_t to_stride = is_apart ? kPairRows : stride;
  // What is written comes from memory while it is computed.
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < num_panels * kPanelRows; r += 16) __builtin_prefetch(out + t * stride + r, 1);
  }
  for (int block = 0; block < linear.num_blocks; ++block) {
    integer_sums(block, sums);
    for (int i = 0; i < num_panels; ++i) {
      const float* bias = linear.bias == nullptr || block > 0 ? nullptr : linear.bias + (panel + i) * kPanelRows;
      const int32_t* const sum_x = x.sum.data() + std::size_t(block) * x.num_tokens + first;
      kernels.finish(sums + i * kTileTokens * kPanelRows, tokens, sum_x, x.scale.data() + first,
                     linear.scales(panel + i, block), bias, block > 0 || (product.add && !is_apart),
                     to + i * kPanelRows, to_stride);
    }
  }
  for (int t = 0; t < tokens && is_apart; ++t) {
    for (int r = 0; r < num_panels * kPanelRows; ++r) out[t * stride + r] += total[t * kPairRows + r];
  }
}

// One panel of a product for few tokens, to `out` (tokens, stride).
void stream_panel(const Kernels& kernels, Scratch& scratch, const Product& product, int panel, float* out,
                  std::size_t stride) {
  const int8_t* const lookups = scratch.lookups_of(kernels, *product.linear, *product.x);
  add_blocks(kernels, product, panel, 1, 0, product.x->num_tokens, out, stride, [&](int block, int32_t* sums) {
    for (int t = 0; t < product.x->num_tokens; ++t) {
      block_sums(kernels, *product.linear, panel, block, *product.x, lookups, t, sums + t * kPanelRows);
    }
  });
}

// Codes of `num_panels` panels, one panel or a pair, side by side in scratch.
const uint8_t* unpack_panels(const Kernels& kernels, Scratch& scratch, const Linear& linear, int panel, int num_panels,
                             std::size_t panel_codes) {
  uint8_t* const codes = scratch.codes.get(kPairPanels * panel_codes);
  for (int i = 0; i < num_panels; ++i) unpack_codes(kernels, linear, panel + i, codes + i * panel_codes);
  return codes;
}

// Integers of a tile and those codes, sums[panel][t][r].
void tile_sums(const Kernels& kernels, const uint8_t* codes, int num_panels, std::size_t panel_codes,
               const int8_t* x_tile, int steps, int32_t* sums) {
  if (num_panels == 1) return kernels.gemm_tile(codes, x_tile, steps, sums);
  kernels.gemm_pair(codes, codes + panel_codes, x_tile, steps, sums);
}

// One panel or a pair of a product for many tokens, a tile at a time to out_of(first token) with `stride`; after_tile
// is called after each.
template <class OutOf, class AfterTile>
void tile_panels(const Kernels& kernels, Scratch& scratch, const Product& product, int panel, int num_panels,
                 std::size_t stride, OutOf&& out_of, AfterTile&& after_tile) {
  const Linear& linear = *product.linear;
  const Int8Tokens& x = *product.x;
  const std::size_t panel_codes = std::size_t(x.padded_k) * kPanelRows;
  const uint8_t* const codes = unpack_panels(kernels, scratch, linear, panel, num_panels, panel_codes);
  const int block_k = linear.block_lines() * kLineK;
  // The next panels come from memory while these are multiplied, a piece with every tile.
  const char* next = reinterpret_cast<const char*>(linear.panel(panel + num_panels));
  const int num_next = std::min(num_panels, linear.num_panels() - panel - num_panels);
  const int next_lines = int(num_next * linear.panel_bytes() / kLineBytes);
  for (int tile = 0; tile < x.num_tiles(); ++tile) {
    for (int line = next_lines * tile / x.num_tiles(); line < next_lines * (tile + 1) / x.num_tiles(); ++line) {
      __builtin_prefetch(next + std::size_t(line) * kLineBytes);
    }
    const int first = tile * kTileTokens, tokens = std::min(kTileTokens, x.num_tokens - first);
    const int8_t* x_tile = x.x_int8.data() + std::size_t(first) * x.padded_k;
    const auto integer_sums = [&](int block, int32_t* sums) {
      const std::size_t first_k = std::size_t(block) * block_k;
      tile_sums(kernels, codes + first_k * kPanelRows, num_panels, panel_codes, x_tile + first_k * kTileTokens,
                block_k / 4, sums);
    };
    add_blocks(kernels, product, panel, num_panels, first, tokens, out_of(first), stride, integer_sums);
    after_tile(first, tokens);
  }
}

// Sums of a panel by tables, which need no correction for the codes' 1, to `out` (tokens, stride).
void finish_tables(const Kernels& kernels, const Linear& linear, const Int8Tokens& x, int panel, int first, int tokens,
                   const int32_t* sums, bool add, float* out, std::size_t stride) {
  constexpr int32_t kZeros[kTableTokens] = {};
  const float* bias = linear.bias == nullptr ? nullptr : linear.bias + panel * kPanelRows;
  kernels.finish(sums, tokens, kZeros, x.scale.data() + first, linear.scales(panel, 0), bias, add, out, stride);
}

// Products of the same x.
void multiply_by_tables(Team& team, const Kernels& kernels, Scratch* scratch, const Product* products,
                        int num_products) {
  int num_panels = 0;
  for (int i = 0; i < num_products; ++i) num_panels += products[i].linear->num_panels();
  const auto product_of = [&](int& panel) {  // and which of its panels
    const Product* product = products;
    for (; panel >= product->linear->num_panels(); ++product) panel -= product->linear->num_panels();
    return product;
  };
  const auto at = [&](int panel) {
    const Linear* const linear = product_of(panel)->linear;
    return PanelAt{linear, panel};
  };
  for_table_sums(team, kernels, scratch, *products[0].x, num_panels, at,
                 [&](int panel, int first, int tokens, const int32_t* sums) {
                   const Product& product = *product_of(panel);
                   float* const out = product.out + first * product.stride + panel * kPanelRows;
                   finish_tables(kernels, *product.linear, *product.x, panel, first, tokens, sums, product.add, out,
                                 product.stride);
                 });
}

void multiply_gated_by_tables(Team& team, const Kernels& kernels, Scratch* scratch, const Product& gate,
                              const Product& up, Activation activation) {
  multiply_by_tables(team, kernels, scratch, &gate, 1);
  const auto at = [&](int panel) { return PanelAt{up.linear, panel}; };
  for_table_sums(team, kernels, scratch, *up.x, up.linear->num_panels(), at,
                 [&](int panel, int first, int tokens, const int32_t* sums) {
                   alignas(64) float other[kTableTokens * kPanelRows];
                   finish_tables(kernels, *up.linear, *up.x, panel, first, tokens, sums, false, other, kPanelRows);
                   float* const out = gate.out + first * gate.stride + panel * kPanelRows;
                   for (int t = 0; t < tokens; ++t) {
                     kernels.gate_multiply(out + t * gate.stride, other + t * kPanelRows, kPanelRows, activation);
                   }
                 });
}

// How many of the panels [panel, end) the kernel takes at once.
int panels_at_once(const Kernels& kernels, int panel, int end) {
  return kernels.gemm_pair == nullptr ? 1 : std::min(kPairPanels, end - panel);
}

// The panels [begin, end) of a product.
void multiply_panels(const Kernels& kernels, Scratch& scratch, const Product& product, int begin, int end) {
  if (!product.x->tiled()) {
    for (int panel = begin; panel < end; ++panel) {
      stream_panel(kernels, scratch, product, panel, product.out + panel * kPanelRows, product.stride);
    }
    return;
  }
  for (int panel = begin, count; panel < end; panel += count) {
    count = panels_at_once(kernels, panel, end);
    float* const out = product.out + panel * kPanelRows;
    tile_panels(kernels, scratch, product, panel, count, product.stride,
                [&](int first) { return out + first * product.stride; }, [](int, int) {});
  }
}

// Exact sums of one panel or a pair, to out (num_tokens, n).
void store_exact_sums(const Kernels& kernels, Scratch& scratch, const Linear& linear, const Int8Tokens& x, int panel,
                      int num_panels, int32_t* out) {
  int32_t sums[kPairPanels * kTileTokens * kPanelRows];
  const auto store = [&](int first, int tokens) {
    for (int t = 0; t < tokens; ++t) {
      int32_t* const to = out + std::size_t(first + t) * linear.n + panel * kPanelRows;
      for (int r = 0; r < num_panels * kPanelRows; ++r) {
        const int32_t sum = sums[(r / kPanelRows * kTileTokens + t) * kPanelRows + r % kPanelRows];
        to[r] = sum - x.sum.data()[first + t];
      }
    }
  };
  if (!x.tiled()) {
    const int8_t* const lookups = scratch.lookups_of(kernels, linear, x);
    for (int t = 0; t < x.num_tokens; ++t) {
      block_sums(kernels, linear, panel, 0, x, lookups, t, sums);
      store(t, 1);
    }
    return;
  }
  const std::size_t panel_codes = std::size_t(x.padded_k) * kPanelRows;
  const uint8_t* const codes = unpack_panels(kernels, scratch, linear, panel, num_panels, panel_codes);
  for (int first = 0; first < x.num_tokens; first += kTileTokens) {
    const int8_t* const x_tile = x.x_int8.data() + std::size_t(first) * x.padded_k;
    tile_sums(kernels, codes, num_panels, panel_codes, x_tile, x.padded_k / 4, sums);
    store(first, std::min(kTileTokens, x.num_tokens - first));
  }
}

}  // namespace

void block_sums(const Kernels& kernels, const Linear& linear, int panel, int block, const Int8Tokens& tokens,
                const int8_t* lookups, int token, int32_t* sums) {
  const int groups = linear.block_groups(), lines = linear.rest_lines();
  const uint8_t* const codes = linear.panel(panel) + block * linear.block_bytes();
  const std::size_t first_k = std::size_t(block) * linear.block_lines() * kLineK;
  const int8_t* const x = tokens.x_int8.data() + std::size_t(token) * tokens.padded_k + first_k;
  if (groups == 0) return kernels.gemv_panel(codes, lines, x, sums);
  if (lookups != nullptr) lookups += (std::size_t(token) * linear.num_blocks + block) * lookup_bytes(groups);
  kernels.gemv_base3(codes, groups, lookups == nullptr ? x : lookups, sums);
  if (lines == 0) return;
  int32_t rest[kPanelRows];
  kernels.gemv_panel(codes + std::size_t(groups) * kBase3Bytes, lines, x + std::size_t(groups) * kBase3K, rest);
  for (int r = 0; r < kPanelRows; ++r) sums[r] += rest[r];
}

void unpack_codes(const Kernels& kernels, const Linear& linear, int panel, uint8_t* codes) {
  const uint8_t* from = linear.panel(panel);
  if (linear.block_groups() == 0) return kernels.unpack_panel(from, linear.num_lines(), codes);
  const int groups = linear.block_groups(), lines = linear.rest_lines();
  for (int block = 0; block < linear.num_blocks; ++block, from += linear.block_bytes()) {
    kernels.unpack_base3(from, groups, codes);
    codes += std::size_t(groups) * kBase3K * kPanelRows;
    kernels.unpack_panel(from + std::size_t(groups) * kBase3Bytes, lines, codes);
    codes += std::size_t(lines) * kLineK * kPanelRows;
  }
}

void Int8Tokens::resize(const Kernels& kernels, int tokens, int k, int blocks) {
  static std::atomic<uint64_t> last_number{0};
  number = ++last_number;
  num_tokens = tokens;
  padded_k = round_up(k, kLineK);
  num_blocks = blocks;
  tile_tokens = kernels.tables != nullptr && blocks == 1 && tokens > kTileTokens ? kTableTokens : kTileTokens;
  const int rows = tiled() ? num_tiles() * tile_tokens : tokens;
  x_int8.get(std::size_t(rows) * padded_k);
  scale.get(tokens);
  sum.get(std::size_t(blocks) * tokens);
}

void Int8Tokens::place(const Kernels& kernels, int first, int8_t* rows) {
  int8_t* const out = x_int8.data() + std::size_t(first) * padded_k;
  if (!tiled()) {
    std::memcpy(out, rows, padded_k);
    return;
  }
  const int missing = std::max(0, first + tile_tokens - num_tokens);
  std::memset(rows + std::size_t(tile_tokens - missing) * padded_k, 0, std::size_t(missing) * padded_k);
  if (for_tables()) return kernels.tables->place(rows, padded_k / 4, out);
  for (int step = 0; step < padded_k / 4; ++step) {
    for (int t = 0; t < kTileTokens; ++t) {
      std::memcpy(out + (step * kTileTokens + t) * 4, rows + std::size_t(t) * padded_k + step * 4, 4);
    }
  }
}

void Int8Tokens::sum_blocks(int token, const int8_t* row) {
  const int block_k = padded_k / num_blocks;
  for (int block = 0; block < num_blocks; ++block, row += block_k) {
    int32_t total = 0;
    for (int k = 0; k < block_k; ++k) total += row[k];
    sum.data()[std::size_t(block) * num_tokens + token] = total;
  }
}

const int8_t* Scratch::lookups_of(const Kernels& kernels, const Linear& linear, const Int8Tokens& x) {
  const int groups = linear.block_groups();
  if (groups == 0 || kernels.prepare_base3 == nullptr) return nullptr;
  for (const Lookups& made : lookups) {
    if (made.number == x.number) return made.sums.data();
  }
  std::swap(lookups[0], lookups[1]);
  int8_t* to = lookups[0].sums.get(std::size_t(x.num_tokens) * x.num_blocks * lookup_bytes(groups));
  for (int i = 0; i < x.num_tokens * x.num_blocks; ++i, to += lookup_bytes(groups)) {
    kernels.prepare_base3(x.x_int8.data() + std::size_t(i) * (x.padded_k / x.num_blocks), groups, to);
  }
  lookups[0].number = x.number;
  return lookups[0].sums.data();
}

void quantize_tokens(Team& team, const Kernels& kernels, Scratch* scratch, const float* x, std::size_t stride, int k,
                     int num_blocks, int num_tokens, const Norm& outer, const Norm& inner, Int8Tokens& out) {
  out.resize(kernels, num_tokens, k, num_blocks);
  const int at_once = out.tokens_at_once();
  const auto quantize = [&](int first, int thread) {
    float* const normed = scratch[thread].row.get(k);
    int8_t* const rows_int8 = scratch[thread].rows_int8.get(std::size_t(at_once) * out.padded_k);
    for (int token = first; token < std::min(num_tokens, first + at_once); ++token) {
      const float* row = x + token * stride;
      for (const Norm* norm : {&outer, &inner}) {
        if (norm->weight == nullptr) continue;
        kernels.rms_norm(row, norm->weight, norm->offset, norm->eps, k, normed);
        row = normed;
      }
      int8_t* const row_int8 = rows_int8 + std::size_t(token - first) * out.padded_k;
      out.scale.data()[token] = kernels.quantize(row, k, row_int8, out.sum.data() + token);
      std::memset(row_int8 + k, 0, out.padded_k - k);
      if (num_blocks > 1) out.sum_blocks(token, row_int8);
    }
    out.place(kernels, first, rows_int8);
  };
  if (!out.tiled()) {  // shorter than handing it out
    for (int token = 0; token < num_tokens; ++token) quantize(token, 0);
    return;
  }
  team.run(out.num_tiles(), [&](int tile, int thread) { quantize(tile * at_once, thread); });
}

void multiply(Team& team, const Kernels& kernels, Scratch* scratch, const Product* products, int num_products) {
  if (products[0].x->for_tables()) {
    for (int begin = 0, end; begin < num_products; begin = end) {
      for (end = begin + 1; end < num_products && products[end].x == products[begin].x;) ++end;
      multiply_by_tables(team, kernels, scratch, products + begin, end - begin);
    }
    return;
  }
  int num_panels = 0;
  for (int i = 0; i < num_products; ++i) num_panels += products[i].linear->num_panels();
  team.run_through(num_panels, kPiecePanels, [&](int first, int last, int thread) {
    for (const Product* product = products; first < last; ++product) {
      const int own = product->linear->num_panels();
      if (first < own) multiply_panels(kernels, scratch[thread], *product, first, std::min(own, last));
      first = std::max(first - own, 0);
      last -= own;
    }
  });
}

void exact_sums(Team& team, const Kernels& kernels, const Linear& linear, const int8_t* x, int num_tokens,
                int32_t* out) {
  Int8Tokens tokens;
  tokens.resize(kernels, num_tokens, linear.k, 1);
  std::vector<int8_t> rows(std::size_t(tokens.tokens_at_once()) * linear.k);
  for (int first = 0; first < num_tokens; first += tokens.tokens_at_once()) {
    const int count = std::min(tokens.tokens_at_once(), num_tokens - first);
    std::memcpy(rows.data(), x + std::size_t(first) * linear.k, std::size_t(count) * linear.k);
    for (int t = 0; t < count; ++t) tokens.sum_blocks(first + t, rows.data() + std::size_t(t) * linear.k);
    tokens.place(kernels, first, rows.data());
  }
  std::vector<Scratch> scratch(team.num_threads());
  const int num_panels = linear.num_panels();
  if (tokens.for_tables()) {
    const auto at = [&](int panel) { return PanelAt{&linear, panel}; };
    for_table_sums(team, kernels, scratch.data(), tokens, num_panels, at,
                   [&](int panel, int first, int count, const int32_t* sums) {
                     for (int t = 0; t < count; ++t) {
                       int32_t* const to = out + std::size_t(first + t) * linear.n + panel * kPanelRows;
                       std::memcpy(to, sums + t * kPanelRows, sizeof(int32_t) * kPanelRows);
                     }
                   });
    return;
  }
  const int at_once = tokens.tiled() ? panels_at_once(kernels, 0, num_panels) : 1;
  team.run((num_panels + at_once - 1) / at_once, [&](int item, int thread) {
    const int panel = item * at_once, count = std::min(at_once, num_panels - panel);
    store_exact_sums(kernels, scratch[thread], linear, tokens, panel, count, out);
  });
}

void multiply_gated(Team& team, const Kernels& kernels, Scratch* scratch, const Product& gate, const Product& up,
                    Activation activation) {
  if (gate.x->for_tables()) return multiply_gated_by_tables(team, kernels, scratch, gate, up, activation);
  const int num_tokens = gate.x->num_tokens;
  const int num_panels = gate.linear->num_panels();
  team.run_through(num_panels, kGatedPiecePanels, [&](int begin, int end, int thread) {
    float* const up_tile = scratch[thread].up.get(kTileTokens * kPairRows);
    const auto finish = [&](int panel, int num_panels, int first, int tokens) {
      for (int t = 0; t < tokens; ++t) {
        kernels.gate_multiply(gate.out + (first + t) * gate.stride + panel * kPanelRows, up_tile + t * kPairRows,
                              num_panels * kPanelRows, activation);
      }
    };
    if (!gate.x->tiled()) {  // one stream after the other, not two at once
      multiply_panels(kernels, scratch[thread], gate, begin, end);
      for (int panel = begin; panel < end; ++panel) {
        stream_panel(kernels, scratch[thread], up, panel, up_tile, kPairRows);
        finish(panel, 1, 0, num_tokens);
      }
      return;
    }
    for (int panel = begin, count; panel < end; panel += count) {
      count = panels_at_once(kernels, panel, end);
      multiply_panels(kernels, scratch[thread], gate, panel, panel + count);
      tile_panels(kernels, scratch[thread], up, panel, count, kPairRows, [&](int) { return up_tile; },
                  [&](int first, int tokens) { finish(panel, count, first, tokens); });
    }
  });
}

}  // namespace bitdistill
