// Products of many tokens by tables (TableKernels), spread over the team: each panel's triples are named once for all
// tokens, then a group of 16 tokens builds the tables of a block of triples and takes all panels through it.
#pragma once

#include <algorithm>
#include <cstring>

#include "linear.h"

namespace bitdistill {

// Bytes of triples that are named at once.
constexpr int kNamedBytes = 640 << 10;

struct PanelAt {
  const Linear* linear;
  int panel;
};

// In how many parts a group's panels are shared out, so that threads have the same work. Each part builds
// its own tables.
inline int parts_of_group(int num_groups, int num_threads) {
  int parts = 1;
  while (parts < 4 && num_groups * parts % num_threads != 0 && num_groups * parts < 3 * num_threads) ++parts;
  return parts;
}

// Calls take(i, first token, tokens, sums) for every panel i of num_panels and group of tokens of x; at(i) says which
// panel that is. sums[token][row] are those of w_ternary * x.
template <class At, class Take>
void for_table_sums(Team& team, const Kernels& kernels, Scratch* scratch, const Int8Tokens& x, int num_panels, At&& at,
                    Take&& take) {
  const TableKernels& tables = *kernels.tables;
  const int steps = x.padded_k / 4, panel_sums = kPanelRows * kTableTokens;
  const int num_blocks = (steps + kTableSteps - 1) / kTableSteps, num_groups = x.num_tiles();
  const int at_once = std::max(1, kNamedBytes / (num_blocks * kBlockNames));
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
    const int parts = parts_of_group(num_groups, team.num_threads());
    team.run(num_groups * parts, [&](int item, int thread) {
      const int group = item / parts, part = item % parts;
      const int first = count * part / parts, last = count * (part + 1) / parts;
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
