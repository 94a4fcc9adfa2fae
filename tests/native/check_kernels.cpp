// Compares every table of kernels compiled into this program, and supported by this processor, with the scalar table
// (integers: equal) and with double precision (floats: within a tolerance). One line a table; fails on any difference.
//
// Inputs and outputs end where an inaccessible page begins: a kernel that reads or writes past them ends the program.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#ifdef __linux__
#include <sys/auxv.h>
#endif

#include "check_attention.h"
#include "checker.h"

namespace bitdistill {
const Kernels* emulated_avx_vnni_kernels();
const Kernels* emulated_avx512_vnni_kernels();
const Kernels* emulated_avx512_vbmi_kernels();
}  // namespace bitdistill

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

void check_ternary(Checker& checker, int num_lines, int pattern) {
  const Kernels &kernels = checker.kernels, &expected = *scalar_kernels();
  const int slack = num_lines % 2, k = num_lines * kLineK;
  Guarded<uint8_t> lines(std::size_t(num_lines) * kLineBytes, slack), codes(std::size_t(k) * kPanelRows),
      expected_codes(codes.size);
  for (std::size_t i = 0; i < lines.size; ++i) {
    lines[i] = 0xaa;  // four codes 2
    for (int p = 0; pattern == kRandom && p < 4; ++p) lines[i] = uint8_t(lines[i] << 2 | random_int(0, 2));
  }
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
  checker.same(pair_sums.data + tile_sums.size, expected_sums, tile_sums.size, "sums of the second", num_lines, pattern);
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
  const int num_lines = num_groups * kBase3Lines + num_rest, k = num_lines * kLineK, steps = k / 4, block_steps = kTableTriples / 4 * 3;
  const int num_blocks = (steps + block_steps - 1) / block_steps, last_steps = steps - (num_blocks - 1) * block_steps;
  const std::size_t group_bytes = std::size_t(num_groups) * kBase3Bytes;
  Guarded<uint8_t> panel(group_bytes + std::size_t(num_rest) * kLineBytes, num_rest % 2), codes(std::size_t(k) * kPanelRows);
  fill_groups(panel.data, num_groups, pattern == kRandom, pattern == kAlternating ? -13 : 13);
  for (std::size_t i = group_bytes; i < panel.size; ++i) {
    panel[i] = pattern == kAlternating ? 0 : 0xaa;  // four weights -1, or four weights 1
    for (int p = 0; pattern == kRandom && p < 4; ++p) panel[i] = uint8_t(panel[i] << 2 | random_int(0, 2));
  }
  scalar_unpack_base3(panel, num_groups, codes);
  scalar_kernels()->unpack_panel(panel.data + group_bytes, num_rest, codes.data + std::size_t(num_groups) * kBase3K * kPanelRows);
  Guarded<int8_t> x_tile(std::size_t(k) * kTableTokens, num_lines % 2);
  fill_activations(x_tile, k * kTableTokens, pattern);
  const std::size_t last_names = std::size_t(last_steps + 2) / 3 * 4 * kPanelRows;
  Guarded<uint8_t> names(std::size_t(num_blocks - 1) * 2 * kBlockNames + last_names);  // as if there were two panels
  tables.name_triples(panel, num_groups, num_rest, names, 2 * kBlockNames);
  Guarded<int16_t> table(std::size_t(kTableTriples) * kNumTriples * kTableTokens), partial(kPanelRows * kTableTokens);
  Guarded<int32_t> sums(partial.size), out(partial.size);
  std::memset(partial, 0, partial.size * sizeof(int16_t));
  std::memset(sums, 0, sums.size * sizeof(int32_t));
  int largest = 0;
  for (int block = 0; block < num_blocks; ++block) {
    const int here = block + 1 < num_blocks ? block_steps : last_steps;
    const int more = tables.build(x_tile + std::size_t(block) * block_steps * 4 * kTableTokens, here, table);
    if (largest + more > INT16_MAX) {
      tables.flush(partial, sums);
      largest = 0;
    }
    tables.add(names + std::size_t(block) * 2 * kBlockNames, table, (here + 2) / 3 * 4, partial);
    largest += more;
    for (std::size_t i = 0; i < partial.size; ++i) {
      checker.check(std::abs(int(partial[i])) <= largest, "size=%d pattern=%d: a partial sum above its bound", num_lines, pattern);
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
  const std::vector<int> values = fill_groups(groups.data, num_groups, pattern == kRandom, pattern == kAlternating ? -13 : 13);
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

void check_scan(Checker& checker, int num_groups, int pattern) {
  const int slack = num_groups % 2;
  Guarded<uint8_t> scan(std::size_t(num_groups) * kScanGroupBytes, slack);
  for (std::size_t i = 0; i < scan.size; ++i) scan[i] = pattern == kRandom ? uint8_t(random_int(0, 255)) : 0xff;
  Guarded<int8_t> x(std::size_t(num_groups) * kGroupK, slack);
  fill_activations(x, num_groups * kGroupK, pattern);
  Guarded<int32_t> sums(kPanelRows);
  int32_t expected_sums[kPanelRows];
  checker.function = "scan_panel";
  checker.kernels.scan_panel(scan, num_groups, x, sums);
  scalar_kernels()->scan_panel(scan, num_groups, x, expected_sums);
  checker.same(sums.data, expected_sums, kPanelRows, "sums", num_groups, pattern);
}

// One row of a panel of `scan`, of `next` and of `rest`, by the words of layout.h.
int row_code(const uint8_t* scan, int row, const uint8_t* next, const uint8_t* rest, int k) {
  const int group = k / kGroupK, i = k % kGroupK / 8, j = k % kGroupK / 4, b = k % 4;
  const uint8_t* lines = scan + std::size_t(group) * kScanGroupBytes;
  const uint8_t* low = rest + std::size_t(group) * kRestGroupBytes;
  const int nibble = lines[i * kLineBytes + 4 * row + b] >> (k % 8 < 4 ? 0 : 4) & 15;
  const int u = nibble << 4 | (lines[4 * kLineBytes + 4 * row + b] >> j & 1) << 3;
  return u | (next[group * kNextGroupBytes + b] >> j & 1) << 2 | (low[4 + b] >> j & 1) << 1 | (low[b] >> j & 1);
}

void check_rows(Checker& checker, int num_groups, int pattern) {
  const int n = num_groups * kGroupK;
  Guarded<uint8_t> scan(std::size_t(num_groups) * kScanGroupBytes), next(std::size_t(num_groups) * kNextGroupBytes),
      rest(std::size_t(num_groups) * kRestGroupBytes);
  for (std::size_t i = 0; i < scan.size; ++i) scan[i] = uint8_t(random_int(0, 255));
  for (std::size_t i = 0; i < next.size; ++i) next[i] = pattern == kRandom ? uint8_t(random_int(0, 255)) : 0xff;
  for (std::size_t i = 0; i < rest.size; ++i) rest[i] = pattern == kRandom ? uint8_t(random_int(0, 255)) : 0xff;
  Guarded<int8_t> w_int8(n), x(n);
  fill_activations(x, n, pattern);
  std::vector<int8_t> expected(n);
  checker.function = "decode_row";
  for (int row = 0; row < kPanelRows; ++row) {
    checker.kernels.decode_row(scan, row, next, rest, num_groups, w_int8);
    for (int k = 0; k < n; ++k) expected[k] = int8_t(row_code(scan, row, next, rest, k) - 128);
    checker.same(w_int8.data, expected.data(), expected.size(), "w_int8", num_groups, row);
  }
  int32_t sum = 0;
  for (int k = 0; k < n; ++k) sum += (row_code(scan, 0, next, rest, k) >> 2 & 1) * x[k];
  checker.function = "next_dot";
  const int32_t found = checker.kernels.next_dot(next, num_groups, x);
  checker.check(found == sum, "size=%d pattern=%d: %d, not %d", num_groups, pattern, found, sum);
}

// The long ones exceed what int32 sums of codes that were not shifted down can hold.
void check_integers(Checker& checker) {
  for (int pattern = 0; pattern < kNumPatterns; ++pattern) {
    for (int size = 1; size <= 70; ++size) {
      check_ternary(checker, size, pattern);
      check_tables(checker, 0, size, pattern);
      if (size <= 20) check_tables(checker, size, size % 6, pattern);
      if (size <= 20) check_base3(checker, size, pattern);
      check_scan(checker, size, pattern);
      check_rows(checker, size, pattern);
    }
    check_ternary(checker, 256, pattern);
    check_tables(checker, 0, 256, pattern);
    check_tables(checker, 42, 4, pattern);
    check_scan(checker, 256, pattern);
  }
  for (int pattern : {kLowest, kHighest}) {
    check_ternary(checker, 140001, pattern);
    check_base3(checker, 301, pattern);
    check_scan(checker, 9001, pattern);
  }
}

void check_finish(Checker& checker, int tokens, bool has_bias, bool add) {
  const std::size_t stride = kPanelRows + std::size_t(random_int(0, 3));
  const std::size_t size = stride * (tokens - 1) + kPanelRows;
  Guarded<int32_t> sums(std::size_t(tokens) * kPanelRows), sum_x(tokens);
  Guarded<float> scale_x(tokens), weight_scale(kPanelRows), bias(kPanelRows), y(size), alone(kPanelRows);
  for (std::size_t i = 0; i < sums.size; ++i) sums[i] = int32_t(random_bits()) >> random_int(3, 28);
  for (int t = 0; t < tokens; ++t) sum_x[t] = int32_t(random_bits()) >> random_int(4, 28);
  fill(scale_x, 1e-4f, 1.0f);
  fill(bias, -10.0f, 10.0f);
  fill(y, -10.0f, 10.0f);
  fill(weight_scale, 1e-3f, 1.0f);
  const std::vector<float> before(y.data, y.data + size);
  checker.kernels.finish(sums, tokens, sum_x, scale_x, weight_scale, has_bias ? bias.data : nullptr, add, y, stride);
  for (std::size_t i = 0; i < size; ++i) {
    const std::size_t t = i / stride, row = i % stride;
    if (row >= kPanelRows) {
      checker.check(y[i] == before[i], "tokens=%d wrote between two tokens", tokens);
      continue;
    }
    const double term = (double(sums[t * kPanelRows + row]) - sum_x[t]) * scale_x[t] * weight_scale[row];
    const double extra = (has_bias ? bias[row] : 0.0f), old = add ? before[i] : 0.0f;
    checker.near(y[i], term + extra + old, 3e-7 * (std::fabs(term) + std::fabs(extra) + std::fabs(old)), "y", tokens,
                 int(i));
  }
  for (int t = 0; t < tokens; ++t) {
    std::memcpy(alone, before.data() + t * stride, sizeof(float) * kPanelRows);
    checker.kernels.finish(sums + t * kPanelRows, 1, sum_x + t, scale_x + t, weight_scale,
                           has_bias ? bias.data : nullptr, add, alone, stride);
    checker.same(alone.data, y + t * stride, kPanelRows, "token alone", tokens, t);
  }
}

void check_rms_norm(Checker& checker, int n, float offset, bool in_place, float magnitude) {
  Guarded<float> x(n), weight(n), out(n);
  fill(x, -magnitude, magnitude);
  fill(weight, -2.0f, 2.0f);
  const float eps = 1e-6f;
  const std::vector<float> before(x.data, x.data + n);
  checker.kernels.rms_norm(x, weight, offset, eps, n, in_place ? x.data : out.data);
  double squares = 0;
  for (float value : before) squares += double(value) * value;
  for (int i = 0; i < n; ++i) {
    const double expected = (double(weight[i]) + offset) * before[i] / std::sqrt(squares / n + eps);
    const double tolerance = 1e-6 * (std::fabs(expected) + std::fabs(before[i]) / std::sqrt(squares / n + eps));
    checker.near(in_place ? x[i] : out[i], expected, tolerance, "out", n, i);
  }
}

// Half-way cases are exact where absmax is 127 (`ties`).
void check_quantize(Checker& checker, int n, float magnitude, bool ties) {
  Guarded<float> x(n);
  Guarded<int8_t> x_int8(n);
  fill(x, -magnitude, magnitude);
  if (ties) {
    for (int i = 0; i < n; ++i) x[i] = float(random_int(-127, 126)) + 0.5f;
    x[std::size_t(random_int(0, n - 1))] = 127.0f;
  }
  int32_t sum = 0, expected_sum = 0;
  const float scale = checker.kernels.quantize(x, n, x_int8, &sum);
  float absmax = 1e-5f;
  for (int i = 0; i < n; ++i) absmax = std::fmax(absmax, std::fabs(x[i]));
  for (int i = 0; i < n; ++i) {
    const double exact = double(x[i]) * 127 / absmax;
    expected_sum += x_int8[i];
    checker.near(x_int8[i], ties ? std::nearbyint(exact) : exact, ties ? 0 : 0.5 + 3e-5, "x_int8", n, i);
  }
  checker.check(sum == expected_sum, "n=%d: sum %d, not %d", n, sum, expected_sum);
  checker.check(scale == absmax / 127.0f, "n=%d: scale %.9g, not %.9g", n, scale, absmax / 127.0f);
}

void check_quantize_not_finite(Checker& checker, int n, float value) {
  Guarded<float> x(n);
  Guarded<int8_t> x_int8(n);
  fill(x, -1.0f, 1.0f);
  x[std::size_t(random_int(0, n - 1))] = value;
  std::memset(x_int8, 1, n);
  int32_t sum = 1;
  const float scale = checker.kernels.quantize(x, n, x_int8, &sum);
  bool is_zero = sum == 0;
  for (int i = 0; i < n; ++i) is_zero = is_zero && x_int8[i] == 0;
  checker.check(std::isnan(scale) && is_zero, "n=%d with %g: scale %g, sum %d, or not all zeros", n, value, scale, sum);
}

void check_gate_multiply(Checker& checker, int n, float range, Activation activation) {
  Guarded<float> gate(n), up(n);
  fill(gate, -range, range);
  fill(up, -3.0f, 3.0f);
  const std::vector<float> before(gate.data, gate.data + n);
  checker.kernels.gate_multiply(gate, up, n, activation);
  for (int i = 0; i < n; ++i) {
    const double x = before[i], u = 0.7978845608028654 * (x + 0.044715 * x * x * x);
    const double silu = x / (1 + std::exp(-x)), gelu = x / 2 * (1 + std::tanh(u));
    const bool is_silu = activation == Activation::kSilu;
    const double expected = (is_silu ? silu : gelu) * up[i];
    // e^-x stops growing at 2.4e38, and 1 + tanh is as exact as a float near 1.
    const double tolerance = is_silu ? 1e-6 * std::fabs(expected) + 5e-39 * std::fabs(x * up[i])
                                     : 3e-7 * std::fabs(x * up[i]);
    checker.near(gate[i], expected, tolerance, is_silu ? "silu" : "gelu", n, i);
  }
}

void check_rotate(Checker& checker, int head_dim) {
  const int half = head_dim / 2;
  Guarded<float> x(head_dim), cos(half), sin(half);
  fill(x, -5.0f, 5.0f);
  fill(cos, -1.0f, 1.0f);
  fill(sin, -1.0f, 1.0f);
  const std::vector<float> before(x.data, x.data + head_dim);
  checker.kernels.rotate(x, cos, sin, head_dim);
  for (int i = 0; i < half; ++i) {
    const double a = before[i], b = before[i + half], tolerance = 2e-7 * (std::fabs(a) + std::fabs(b));
    checker.near(x[i], a * cos[i] - b * sin[i], tolerance, "first half", head_dim, i);
    checker.near(x[i + half], b * cos[i] + a * sin[i], tolerance, "second half", head_dim, i);
  }
}

void check_dot(Checker& checker, int n) {
  Guarded<float> x(n);
  Guarded<int8_t> w_int8(n);
  fill(x, -4.0f, 4.0f);
  fill_activations(w_int8, n, kRandom);
  double expected = 0, magnitude = 0;
  for (int i = 0; i < n; ++i) {
    expected += double(x[i]) * w_int8[i];
    magnitude += std::fabs(double(x[i]) * w_int8[i]);
  }
  checker.near(checker.kernels.dot(x, w_int8, n), expected, 5e-7 * magnitude, "dot", n, 0);
}

void check_floats(Checker& checker) {
  checker.function = "finish";
  for (int i = 0; i < 200; ++i) check_finish(checker, i % 6 + 1, i / 6 % 2, i / 12 % 2);
  std::vector<int> sizes = {64, 100, 1024, 1027};
  for (int n = 1; n <= 40; ++n) sizes.push_back(n);
  for (int n : sizes) {
    checker.function = "rms_norm";
    for (int i = 0; i < 4; ++i) {
      for (float magnitude : {1e-4f, 0.1f, 100.0f}) check_rms_norm(checker, n, float(i % 2), i / 2, magnitude);
    }
    checker.function = "quantize";
    for (float magnitude : {0.0f, 1e-6f, 1.0f, 3e4f}) check_quantize(checker, n, magnitude, false);
    check_quantize(checker, n, 0.0f, true);
    for (float value : {INFINITY, -INFINITY, NAN}) check_quantize_not_finite(checker, n, value);
    checker.function = "gate_multiply";
    for (float range : {0.01f, 1.0f, 10.0f, 100.0f, 1e5f, 1e15f}) {
      check_gate_multiply(checker, n, range, Activation::kSilu);
      check_gate_multiply(checker, n, range, Activation::kGeluTanh);
    }
  }
  checker.function = "rotate";
  for (int head_dim : {2, 4, 6, 16, 22, 80, 128, 256}) check_rotate(checker, head_dim);
  checker.function = "dot";
  for (int n = 32; n <= 1024; n += 32) check_dot(checker, n);
  checker.function = "attend";
  check_attention(checker);
}

struct Table {
  const Kernels* kernels;
  const char* note;
  bool is_supported;
};

std::vector<Table> tables() {
  std::vector<Table> result = {{scalar_kernels(), "", true}};
#ifdef __x86_64__
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  result.push_back({avx2_kernels(), "", avx2});
  result.push_back({emulated_avx_vnni_kernels(), " (emulated)", avx2});
  result.push_back({emulated_avx512_vnni_kernels(), " (emulated)", avx2});
  result.push_back({emulated_avx512_vbmi_kernels(), " (emulated)", avx2});
  result.push_back({avx_vnni_kernels(), "", avx2 && __builtin_cpu_supports("avxvnni")});
  const bool avx512_vnni = avx2 && avx512 && __builtin_cpu_supports("avx512vnni");
  result.push_back({avx512_vnni_kernels(), "", avx512_vnni});
  result.push_back({avx512_vbmi_kernels(), "", avx512_vnni && __builtin_cpu_supports("avx512vbmi")});
#elif defined(__linux__)
  result.push_back({neon_kernels(), "", (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0});
#else
  result.push_back({neon_kernels(), "", true});
#endif
  return result;
}

}  // namespace

int main() {
  bool is_right = true;
  for (const Table& table : tables()) {
    std::printf("%s%s: ", table.kernels->name, table.note);
    std::fflush(stdout);
    if (!table.is_supported) {
      std::printf("not run, this processor lacks one of %s\n", table.kernels->needs);
      continue;
    }
    random_state = 1;
    Checker checker{*table.kernels};
    check_integers(checker);
    check_floats(checker);
    if (checker.differences > 0) std::printf("\n");
    std::printf("%ld checks, %ld differences\n", checker.checks, checker.differences);
    is_right = is_right && checker.differences == 0;
  }
  return is_right ? 0 : 1;
}
