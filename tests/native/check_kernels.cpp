// Compares every table of kernels compiled into this program, and supported by this processor, with the scalar table
// (integers: equal) and with double precision (floats: within a tolerance). One line a table; fails on any difference.
//
// Whole products of linear.cpp come last, with each table's kernels on two threads.
//
// Inputs and outputs end where an inaccessible page begins: a kernel that reads or writes past them ends the program.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check_attention.h"
#include "check_products.h"
#include "check_ternary.h"
#include "checker.h"
#include "dispatch.h"

namespace bitdistill {
const Kernels* emulated_avx_vnni_kernels();
const Kernels* emulated_avx512_vnni_kernels();
const Kernels* emulated_avx512_vbmi_kernels();
}  // namespace bitdistill

namespace {

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

// One row of a panel of `scan`, of `next` and of `rest`, by the words of panels.py.
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
    check_rows(checker, 300, pattern);
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

void check_bounds(Checker& checker, bool beyond_float) {
  Guarded<int32_t> sums(kPanelRows);
  Guarded<float> scale(kPanelRows), error(kPanelRows), norm(kPanelRows), values(kPanelRows), bounds(kPanelRows);
  const ScanQuery query{random_int(-1 << 24, 1 << 24), 0.01f, 3.0f, 0.2f};
  for (int r = 0; r < kPanelRows; ++r) sums[r] = int32_t(random_bits()) >> random_int(5, 20);
  for (Guarded<float>* numbers : {&scale, &error, &norm}) fill(*numbers, 1e-3f, 50.0f);
  if (beyond_float) scale[3] = 3e38f;  // an infinite value, of one sign or the other
  const float least = beyond_float ? INFINITY : 0.0f;
  const uint32_t mask = checker.kernels.bound_rows(sums, scale, error, norm, query, least, values, bounds);
  for (int r = 0; r < kPanelRows; ++r) {
    const double value = 0.01f * (16.0 * sums[r] + query.middle) * scale[r];
    const double more = double(scale[r]) * (3.0 * error[r] + double(0.2f) * norm[r]);
    checker.check((mask >> r & 1) == (bounds[r] >= least), "row %d: mask %x, bound %g", r, mask, bounds[r]);
    if (beyond_float && r == 3) {
      checker.check(bounds[r] == INFINITY, "row %d: bound %g", r, bounds[r]);
      continue;
    }
    checker.near(values[r], value, 3e-7 * std::fabs(value), "value", r, 0);
    checker.near(bounds[r], value + more, 5e-7 * (std::fabs(value) + more), "bound", r, 0);
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
  checker.function = "bound_rows";
  for (int repeat = 0; repeat < 20; ++repeat) check_bounds(checker, repeat % 2 == 1);
  check_attention(checker);
}

struct Table {
  const Kernels* kernels;
  const char* note;
  bool is_supported;
};

std::vector<Table> tables() {
  std::vector<Table> result;
  for (const Kernels* kernels : built_kernels()) {
    result.push_back({kernels, "", find_kernels(kernels->name) != nullptr});
  }
#ifdef __x86_64__
  const bool has_avx2 = find_kernels("avx2") != nullptr;
  for (const Kernels* kernels :
       {emulated_avx_vnni_kernels(), emulated_avx512_vnni_kernels(), emulated_avx512_vbmi_kernels()}) {
    result.push_back({kernels, " (emulated)", has_avx2});
  }
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
    check_products(checker);
    if (checker.differences > 0) std::printf("\n");
    std::printf("%ld checks, %ld differences\n", checker.checks, checker.differences);
    is_right = is_right && checker.differences == 0;
  }
  return is_right ? 0 : 1;
}
