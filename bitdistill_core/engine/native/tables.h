// Products of many tokens by tables (TableKernels), spread over the team: each panel's triples are named once for all
// tokens, then a group of 16 tokens builds the tables of a block of triples and takes all panels through it.
#pragma once

#include <algorithm>
#include <cstring>

#include "linear.h"

namespace bitdistill {

// The most bytes of triples that are named at once.
constexpr int kNamedBytes = 1152 << 10;

struct PanelAt {
  const Linear* linear;
  int panel;
};

// Groups of tokens as items for a team: whole ones, and one a thread at the end in parts of its panels, which thus end
// at nearly the same time. Each part builds its own tables.
struct GroupItems {
  int num_whole, num_parts, num_items;

  GroupItems(int num_groups, int num_threads) {
    const int num_split = std::min(num_groups, num_threads);
    num_whole = num_groups - num_split;
    num_parts = num_threads == 1 ? 1 : std::clamp((2 * num_threads + num_split - 1) / num_split, 2, 4);
    num_items = num_whole + num_split * num_parts;
  }
  int group(int item) const { return item < num_whole ? item : num_whole + (item - num_whole) / num_parts; }
  // Of `count` panels, the first of an item, and the one behind its last.
  int begin(int item, int count) const { return item < num_whole ? 0 : part(item) * count / num_parts; }
  int end(int item, int count) const { return item < num_whole ? count : (part(item) + 1) * count / num_parts; }

 private:
  int part(int item) const { return (item - num_whole) % num_parts; }
};

// Calls take(i, first token, tokens, sums) for every panel i of num_panels and group of tokens of x; at(i) says which
// panel that is. sums[token][row] are those of w_ternary * x.
template <class At, class Take>
void for_table_sums(Team& team, const Kernels& kernels, Scratch* scratch, const Int8Tokens& x, int num_panels, At&& at,
                    Take&& take) {
  const TableKernels& tables = *kernels.tables;
  const int steps = x.padded_k / 4, panel_sums = kPanelRows * kTableTokens;
  const int num_blocks = (steps + kTableSteps - 1) / kTableSteps, num_groups = x.num_tiles();
  const int most = std::max(1, kNamedBytes / (num_blocks * kBlockNames)), num_rounds = (num_panels + most - 1) / most;
  const int at_once = (num_panels + num_rounds - 1) / num_rounds;
  for (int begin = 0; begin < num_panels; begin += at_once) {
    const int count = std::min(at_once, num_panels - begin);
    const std::size_t stride = std::size_t(count) * kBlockNames;  // from block to block: panels are side by side
    uint8_t* const names = scratch[0].triples.get(num_blocks * stride);
    constexpr int kShare = 4;
    team.run((count + kShare - 1) / kShare, [&](int share, int) {
      for (int i = share * kShare; i < std::min(count, (share + 1) * kShare); ++i) {
        const auto [linear, panel] = at(begin + i);
        tables.name_triples(linear->panel(panel), linear->block_groups(), linear->rest_lines(), names + i * kBlockNames,
                            stride);
      }
    });
    const GroupItems items(num_groups, team.num_threads());
    team.run(items.num_items, [&](int item, int thread) {
      const int group = items.group(item), first = items.begin(item, count), last = items.end(item, count);
      if (first == last) return;
      int16_t* const partial = scratch[thread].partial.get((last - first) * panel_sums);
      int32_t* const sums = scratch[thread].sums.get((last - first) * panel_sums);
      int16_t* const table = scratch[thread].tables.get(kTableTriples * kNumTriples * kTableTokens);
      std::fill_n(partial, (last - first) * panel_sums, 0);
      std::fill_n(sums, (last - first) * panel_sums, 0);
      const int8_t* const x_tile = x.x_int8.data() + std::size_t(group) * kTableTokens * x.padded_k;
      int largest = 0;  // that a partial sum can be
      for (int block = 0; block < num_blocks; ++block) {
        const int step = block * kTableSteps, here = std::min(kTableSteps, steps - step);
        const int more = tables.build(x_tile + std::size_t(step) * 4 * kTableTokens, here, table);
        const bool is_full = largest + more > INT16_MAX;
        largest = is_full ? more : largest + more;
        const uint8_t* const block_names = names + block * stride;
        for (int i = first; i < last; ++i) {
          int16_t* const to = partial + (i - first) * panel_sums;
          if (is_full) tables.flush(to, sums + (i - first) * panel_sums);
          tables.add(block_names + i * kBlockNames, table, (here + 2) / 3 * 4, to);
        }
      }
      const int token = group * kTableTokens, tokens = std::min(kTableTokens, x.num_tokens - token);
      for (int i = first; i < last; ++i) {
        alignas(64) int32_t out[kTableTokens * kPanelRows];
        tables.flush(partial + (i - first) * panel_sums, sums + (i - first) * panel_sums);
        tables.transpose(sums + (i - first) * panel_sums, out);
        take(begin + i, token, tokens, out);
      }
    });
  }
}

}  // namespace bitdistill
