// Checks of linear.cpp with a table's kernels: whole products of one token, a few and many, on two threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check_ternary.h"
#include "checker.h"
#include "linear.h"

namespace {

// A linear of random weights; panels of two bits, or of base 3 with the columns that are left over in two bits.
struct RandomLinear {
  RandomLinear(int n, int k, int num_blocks, bool is_base3, bool has_bias)
      : linear(nullptr, n, k, num_blocks, is_base3),
        codes(linear.num_panels() * linear.panel_bytes()),
        weight_scale(linear.num_panels() * num_blocks * kPanelRows),
        bias(linear.num_panels() * kPanelRows),
        w(std::size_t(linear.num_panels()) * kPanelRows * linear.num_lines() * kLineK) {
    linear.codes = codes.data;
    linear.weight_scale = weight_scale.data;
    linear.scale_stride = std::size_t(num_blocks) * kPanelRows;
    if (has_bias) linear.bias = bias.data;
    fill(weight_scale, 1e-3f, 1.0f);
    fill(bias, -10.0f, 10.0f);
    for (int panel = 0; panel < linear.num_panels(); ++panel) {
      for (int block = 0; block < num_blocks; ++block) fill_block(panel, block);
    }
  }

  void fill_block(int panel, int block) {
    const int groups = linear.block_groups(), lines = linear.rest_lines(), block_k = linear.block_lines() * kLineK;
    uint8_t* const to = codes.data + panel * linear.panel_bytes() + block * linear.block_bytes();
    uint8_t* const rest = to + std::size_t(groups) * kBase3Bytes;
    fill_groups(to, groups, true, 0);
    fill_lines(rest, std::size_t(lines) * kLineBytes);
    std::vector<uint8_t> unpacked(std::size_t(block_k) * kPanelRows);
    scalar_unpack_base3(to, groups, unpacked.data());
    scalar_kernels()->unpack_panel(rest, lines, unpacked.data() + std::size_t(groups) * kBase3K * kPanelRows);
    for (int r = 0; r < kPanelRows; ++r) {
      for (int i = 0; i < block_k; ++i) {
        const int code = unpacked[(std::size_t(i / 4) * kPanelRows + r) * 4 + i % 4];
        weight(panel * kPanelRows + r, block * block_k + i) = int8_t(code - 1);
      }
    }
  }
  int8_t& weight(int row, int k) { return w[std::size_t(row) * linear.num_lines() * kLineK + k]; }

  Linear linear;
  Guarded<uint8_t> codes;
  Guarded<float> weight_scale, bias;
  std::vector<int8_t> w;  // (rows, padded k)
};

// What a product does with x (tokens, k) on top of `before`.
std::vector<float> product_of(Team& team, const Kernels& kernels, const Linear& linear, const float* x, int num_tokens,
                              const std::vector<float>& before, bool add) {
  std::vector<Scratch> scratch(team.num_threads());
  Int8Tokens tokens;
  quantize_tokens(team, kernels, scratch.data(), x, linear.k, linear.k, linear.num_blocks, num_tokens, Norm{}, Norm{},
                  tokens);
  std::vector<float> out = before;
  const Product product{&linear, &tokens, out.data(), std::size_t(linear.num_panels()) * kPanelRows, add};
  multiply(team, kernels, scratch.data(), &product, 1);
  return out;
}

std::vector<float> gated_of(Team& team, const Kernels& kernels, const Linear& gate, const Linear& up, const float* x,
                            int num_tokens) {
  std::vector<Scratch> scratch(team.num_threads());
  Int8Tokens tokens;
  quantize_tokens(team, kernels, scratch.data(), x, gate.k, gate.k, gate.num_blocks, num_tokens, Norm{}, Norm{},
                  tokens);
  const std::size_t stride = std::size_t(gate.num_panels()) * kPanelRows;
  std::vector<float> out(num_tokens * stride);
  multiply_gated(team, kernels, scratch.data(), {&gate, &tokens, out.data(), stride, false},
                 {&up, &tokens, nullptr, 0, false}, Activation::kSilu);
  return out;
}

// A product against sums of products, then each of its tokens, bit by bit, against that token alone.
void check_product(Checker& checker, Team& team, RandomLinear& random, int num_tokens, bool add) {
  const Kernels& kernels = checker.kernels;
  const Linear& linear = random.linear;
  const std::size_t stride = std::size_t(linear.num_panels()) * kPanelRows;
  Guarded<float> x(std::size_t(num_tokens) * linear.k), row(linear.k), start(num_tokens * stride);
  fill(x, -3.0f, 3.0f);
  fill(start, -10.0f, 10.0f);
  const std::vector<float> before(start.data, start.data + start.size);
  const std::vector<float> out = product_of(team, kernels, linear, x, num_tokens, before, add);
  std::vector<int8_t> x_int8(linear.num_lines() * kLineK);
  const int block_k = linear.block_lines() * kLineK;
  for (int t = 0; t < num_tokens; ++t) {
    std::copy_n(x + std::size_t(t) * linear.k, linear.k, row.data);
    int32_t sum_x;
    const float scale = kernels.quantize(row, linear.k, x_int8.data(), &sum_x);
    for (int r = 0; r < linear.n; ++r) {
      double expected = linear.bias == nullptr ? 0 : linear.bias[r], magnitude = std::fabs(expected);
      for (int block = 0; block < linear.num_blocks; ++block) {
        int32_t sum = 0;
        for (int k = block * block_k; k < std::min((block + 1) * block_k, linear.k); ++k) {
          sum += random.weight(r, k) * x_int8[k];
        }
        const double term = double(sum) * scale * linear.scales(r / kPanelRows, block)[r % kPanelRows];
        expected += term;
        magnitude += std::fabs(term);
      }
      if (add) expected += before[t * stride + r];
      checker.near(out[t * stride + r], expected, 1e-6 * (magnitude + 20), "out", num_tokens, r);
    }
    const std::vector<float> own(before.begin() + t * stride, before.begin() + (t + 1) * stride);
    const std::vector<float> alone = product_of(team, kernels, linear, row, 1, own, add);
    checker.same(out.data() + t * stride, alone.data(), linear.n, "token in a batch and alone", num_tokens, t);
  }
}

void check_gated(Checker& checker, Team& team, RandomLinear& gate, RandomLinear& up, int num_tokens) {
  const Kernels& kernels = checker.kernels;
  const std::size_t stride = std::size_t(gate.linear.num_panels()) * kPanelRows;
  Guarded<float> x(std::size_t(num_tokens) * gate.linear.k);
  fill(x, -3.0f, 3.0f);
  const std::vector<float> none(num_tokens * stride);
  const std::vector<float> a = product_of(team, kernels, gate.linear, x, num_tokens, none, false);
  const std::vector<float> b = product_of(team, kernels, up.linear, x, num_tokens, none, false);
  const std::vector<float> out = gated_of(team, kernels, gate.linear, up.linear, x, num_tokens);
  for (int t = 0; t < num_tokens; ++t) {
    for (int r = 0; r < gate.linear.n; ++r) {
      const std::size_t i = t * stride + r;
      const double expected = a[i] / (1 + std::exp(-double(a[i]))) * b[i];
      checker.near(out[i], expected, 1e-5 * std::fabs(expected) + 1e-30, "gated", num_tokens, r);
    }
  }
}

// exact_sums against sums of products.
void check_exact(Checker& checker, Team& team, RandomLinear& random, int num_tokens) {
  const Linear& linear = random.linear;
  Guarded<int8_t> x(std::size_t(num_tokens) * linear.k);
  fill_activations(x, int(x.size), kRandom);
  std::vector<int32_t> out(std::size_t(num_tokens) * linear.n);
  exact_sums(team, checker.kernels, linear, x, num_tokens, out.data());
  for (int t = 0; t < num_tokens; ++t) {
    for (int r = 0; r < linear.n; ++r) {
      int32_t sum = 0;
      for (int k = 0; k < linear.k; ++k) sum += random.weight(r, k) * x[std::size_t(t) * linear.k + k];
      const int32_t found = out[std::size_t(t) * linear.n + r];
      checker.check(found == sum, "tokens=%d t=%d row=%d: %d, not %d", num_tokens, t, r, found, sum);
    }
  }
}

void check_products(Checker& checker) {
  Team team(2);
  for (int repeat = 0; repeat < 24; ++repeat) {
    const bool is_base3 = checker.kernels.unpack_base3 != nullptr && repeat % 2 == 1;
    const int num_tokens[] = {1, 3, 4, 6, 7, 13, 16, 17, 45}, num_panels = random_int(1, 9);
    const int num_blocks = repeat % 3 == 2 ? 2 : 1, num_lines = num_blocks * random_int(1, 13);
    const int n = num_panels * kPanelRows - random_int(0, 15);
    const int k = num_lines * kLineK - (num_blocks == 1 ? random_int(0, 15) : 0);
    RandomLinear first(n, k, num_blocks, is_base3, repeat % 4 < 2), second(n, k, num_blocks, is_base3, false);
    RandomLinear whole(num_panels * kPanelRows, num_lines * kLineK, 1, is_base3, false);
    for (const int tokens : num_tokens) {
      checker.function = "multiply";
      check_product(checker, team, first, tokens, repeat % 4 % 3 == 0);
      checker.function = "multiply_gated";
      check_gated(checker, team, first, second, tokens);
      checker.function = "exact_sums";
      check_exact(checker, team, whole, tokens);
    }
  }
}

}  // namespace
