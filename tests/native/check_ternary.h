// Checks of ternary products: panels of two bits and of base 3, tiles, sums by tables.
#pragma once

#include <cstdlib>
#include <cstring>
#include <vector>

#include "checker.h"

namespace {

// Activations of a pattern: anything; the extremes; both by turns; first one, then the other.
enum Pattern { kRandom, kLowest, kHighest, kAlternating, kHalves, kNumPatterns };

void fill_activations(int8_t* x, int count, int pattern) {
  for (int i = 0; i < count; ++i) {
    const bool is_low =
        pattern == kLowest || (pattern == kAlternating && i % 2) || (pattern == kHalves && i < count / 2);
    x[i] = int8_t(pattern == kRandom ? random_int(-128, 127) : is_low ? -128 : 127);
  }
}

// Lines of random codes.
void fill_lines(uint8_t* lines, std::size_t num_bytes) {
  for (std::size_t i = 0; i < num_bytes; ++i) {
    lines[i] = 0;
    for (int p = 0; p < 4; ++p) lines[i] = uint8_t(lines[i] << 2 | random_int(0, 2));
  }
}

void check_ternary(Checker& checker, int num_lines, int pattern) {
  const Kernels &kernels = checker.kernels, &expected = *scalar_kernels();
  const int slack = num_lines % 2, k = num_lines * kLineK;
  Guarded<uint8_t> lines(std::size_t(num_lines) * kLineBytes, slack), codes(std::size_t(k) * kPanelRows),
      expected_codes(codes.size);
  std::memset(lines, 0xaa, lines.size);  // four codes 2 a byte
  if (pattern == kRandom) fill_lines(lines, lines.size);
  Guarded<int8_t> x(k, slack), x_tile(std::size_t(k) * kTileTokens, slack);
  Guarded<int32_t> sums(kPanelRows), tile_sums(kPanelRows * kTileTokens);
  int32_t expected_sums[kPanelRows * kTileTokens];

  fill_activations(x, k, pattern);
  checker.function = "gemv_panel";
  kernels.gemv_panel(lines, num_lines, x, sums);
  expected.gemv_panel(lines, num_lines, x, expected_sums);
  checker.same(sums.data, expected_sums, kPanelRows, "sums", num_lines, pattern);
  checker.function = "unpack_panel";
  kernels.unpack_panel(lines, num_lines, codes);
  expected.unpack_panel(lines, num_lines, expected_codes);
  checker.same(codes.data, expected_codes.data, codes.size, "codes", num_lines, pattern);
  checker.function = "gemm_tile";
  fill_activations(x_tile, k * kTileTokens, pattern);
  kernels.gemm_tile(expected_codes, x_tile, k / 4, tile_sums);
  expected.gemm_tile(expected_codes, x_tile, k / 4, expected_sums);
  checker.same(tile_sums.data, expected_sums, tile_sums.size, "sums", num_lines, pattern);
  if (kernels.gemm_pair == nullptr) return;
  checker.function = "gemm_pair";
  Guarded<uint8_t> codes2(codes.size);
  Guarded<int32_t> pair_sums(2 * tile_sums.size);
  for (std::size_t i = 0; i < codes.size; ++i) codes2[i] = uint8_t(2 - expected_codes[i]);
  kernels.gemm_pair(expected_codes, codes2, x_tile, k / 4, pair_sums);
  checker.same(pair_sums.data, expected_sums, tile_sums.size, "sums of the first", num_lines, pattern);
  expected.gemm_tile(codes2, x_tile, k / 4, expected_sums);
  checker.same(pair_sums.data + tile_sums.size, expected_sums, tile_sums.size, "sums of the second", num_lines,
               pattern);
}

// Groups of base 3, of random values or of one; all values, [group][8][64].
std::vector<int> fill_groups(uint8_t* groups, int num_groups, bool is_random, int one) {
  std::vector<int> values;
  std::memset(groups, 0, std::size_t(num_groups) * kBase3Bytes);
  for (int group = 0; group < num_groups; ++group, groups += kBase3Bytes) {
    for (int i = 0; i < 8; ++i) {
      for (int element = 0; element < kLineBytes; ++element) {
        const int value = is_random ? random_int(-13, 13) : one;
        values.push_back(value);
        groups[i / 2 * kLineBytes + element] |= uint8_t(std::abs(value) << i % 2 * 4);
        groups[4 * kLineBytes + element] |= uint8_t(int(value < 0) << i);
      }
    }
  }
  return values;
}

// A panel by tables, block after block, against sums of products; a partial sum is flushed when the next might not fit.
// The first of its lines are groups of base 3, if there are.
void check_tables(Checker& checker, int num_groups, int num_rest, int pattern) {
  if (checker.kernels.tables == nullptr) return;
  const TableKernels& tables = *checker.kernels.tables;
  checker.function = "tables";
  const int num_lines = num_groups * kBase3Lines + num_rest, k = num_lines * kLineK;
  const int steps = k / 4, num_blocks = (steps + kTableSteps - 1) / kTableSteps;
  const int last_steps = steps - (num_blocks - 1) * kTableSteps;
  const std::size_t group_bytes = std::size_t(num_groups) * kBase3Bytes;
  Guarded<uint8_t> panel(group_bytes + std::size_t(num_rest) * kLineBytes, num_rest % 2);
  Guarded<uint8_t> codes(std::size_t(k) * kPanelRows);
  fill_groups(panel.data, num_groups, pattern == kRandom, pattern == kAlternating ? -13 : 13);
  uint8_t* const rest = panel.data + group_bytes;
  std::memset(rest, pattern == kAlternating ? 0 : 0xaa, panel.size - group_bytes);  // four weights -1 a byte, or 1
  if (pattern == kRandom) fill_lines(rest, panel.size - group_bytes);
  scalar_unpack_base3(panel, num_groups, codes);
  uint8_t* const rest_codes = codes.data + std::size_t(num_groups) * kBase3K * kPanelRows;
  scalar_kernels()->unpack_panel(rest, num_rest, rest_codes);
  Guarded<int8_t> x_tile(std::size_t(k) * kTableTokens, num_lines % 2);
  fill_activations(x_tile, k * kTableTokens, pattern);
  Guarded<int8_t> rows(x_tile.size, num_lines % 2), placed(x_tile.size);
  for (int t = 0; t < kTableTokens; ++t) {
    for (int i = 0; i < k; ++i) rows[t * k + i] = x_tile[(i / 4 * kTableTokens + t) * 4 + i % 4];
  }
  tables.place(rows, steps, placed);
  checker.same(placed.data, x_tile.data, x_tile.size, "tile of rows", num_lines, pattern);
  const std::size_t last_names = std::size_t(last_steps + 2) / 3 * 4 * kPanelRows;
  Guarded<uint8_t> names(std::size_t(num_blocks - 1) * 2 * kBlockNames + last_names);  // as if there were two panels
  tables.name_triples(panel, num_groups, num_rest, names, 2 * kBlockNames);
  Guarded<int16_t> table(std::size_t(kTableTriples) * kNumTriples * kTableTokens), partial(kPanelRows * kTableTokens);
  Guarded<int32_t> sums(partial.size), out(partial.size);
  std::memset(partial, 0, partial.size * sizeof(int16_t));
  std::memset(sums, 0, sums.size * sizeof(int32_t));
  int largest = 0;
  for (int block = 0; block < num_blocks; ++block) {
    const int here = block + 1 < num_blocks ? kTableSteps : last_steps;
    const int more = tables.build(x_tile + std::size_t(block) * kTableSteps * 4 * kTableTokens, here, table);
    if (largest + more > INT16_MAX) {
      tables.flush(partial, sums);
      largest = 0;
    }
    tables.add(names + std::size_t(block) * 2 * kBlockNames, table, (here + 2) / 3 * 4, partial);
    largest += more;
    for (std::size_t i = 0; i < partial.size; ++i) {
      checker.check(std::abs(int(partial[i])) <= largest, "size=%d pattern=%d: a partial sum above its bound",
                    num_lines, pattern);
    }
  }
  tables.flush(partial, sums);
  tables.transpose(sums, out);
  std::vector<int32_t> expected(out.size);
  for (int step = 0; step < steps; ++step) {
    for (int i = 0; i < 4 * kPanelRows * kTableTokens; ++i) {
      const int token = i / (4 * kPanelRows), row = i / 4 % kPanelRows, j = i % 4;
      expected[token * kPanelRows + row] +=
          (codes[(step * kPanelRows + row) * 4 + j] - 1) * x_tile[(step * kTableTokens + token) * 4 + j];
    }
  }
  checker.same(out.data, expected.data(), expected.size(), "sums", num_lines, pattern);
}

void check_base3(Checker& checker, int num_groups, int pattern) {
  const bool is_scalar = &checker.kernels == scalar_kernels();  // does not stream base 3, but specifies it
  const auto gemv = is_scalar ? scalar_gemv_base3 : checker.kernels.gemv_base3;
  const auto unpack = is_scalar ? scalar_unpack_base3 : checker.kernels.unpack_base3;
  if (gemv == nullptr) return;
  const int slack = num_groups % 2, k = num_groups * kBase3K;
  Guarded<uint8_t> groups(std::size_t(num_groups) * kBase3Bytes, slack), codes(std::size_t(k) * kPanelRows);
  std::vector<uint8_t> expected_codes(codes.size);
  const int one = pattern == kAlternating ? -13 : 13;
  const std::vector<int> values = fill_groups(groups.data, num_groups, pattern == kRandom, one);
  for (std::size_t i = 0; i < values.size(); ++i) {  // element 16 j + r of value v of a group
    const std::size_t value = i / kLineBytes, row = i % kPanelRows, j = i % kLineBytes / kPanelRows;
    int rest = values[i] + 13;
    for (std::size_t step = 3 * value; step < 3 * value + 3; ++step, rest /= 3) {
      expected_codes[(step * kPanelRows + row) * 4 + j] = uint8_t(rest % 3);
    }
  }
  checker.function = "unpack_base3";
  unpack(groups, num_groups, codes);
  checker.same(codes.data, expected_codes.data(), codes.size, "codes", num_groups, pattern);
  Guarded<int8_t> x(k, slack);
  Guarded<int32_t> sums(kPanelRows);
  int32_t expected_sums[kPanelRows];
  fill_activations(x, k, pattern);
  checker.function = "gemv_base3";
  const int8_t* prepared = x;
  Guarded<int8_t> lookups(lookup_bytes(num_groups));
  if (!is_scalar && checker.kernels.prepare_base3 != nullptr) {
    checker.kernels.prepare_base3(x, num_groups, lookups);
    prepared = lookups;
  }
  gemv(groups, num_groups, prepared, sums);
  for (int row = 0; row < kPanelRows; ++row) {
    expected_sums[row] = 0;
    for (int i = 0; i < k; ++i) expected_sums[row] += x[i] * expected_codes[(i / 4 * kPanelRows + row) * 4 + i % 4];
  }
  checker.same(sums.data, expected_sums, kPanelRows, "sums", num_groups, pattern);
}

}  // namespace
