#include "measure.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace bitdistill {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// A packed matrix of pseudo-random codes and INT8 activations for it.
struct Case {
  float weight_scale[kPanelRows];
  Buffer<uint8_t> packed;
  Buffer<float> x, out;
  Linear linear;
  Int8Tokens tokens;
  std::vector<Scratch> scratch;

  Case(Team& team, const Kernels& kernels, int n, int k, int num_tokens, bool base3) : scratch(team.num_threads()) {
    linear = Linear(nullptr, n, k, 1, base3);
    std::fill_n(weight_scale, kPanelRows, 1.0f);
    linear.weight_scale = weight_scale;
    const std::size_t bytes = linear.num_panels() * linear.panel_bytes();
    uint8_t* data = packed.get(bytes);
    uint64_t state = 88172645463325252u;
    for (std::size_t i = 0; i < bytes; ++i) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      data[i] = uint8_t(state % 3 | state / 3 % 3 << 2 | state / 9 % 3 << 4 | state / 27 % 3 << 6);
    }
    linear.codes = data;
    float* values = x.get(std::size_t(num_tokens) * k);
    for (std::size_t i = 0; i < std::size_t(num_tokens) * k; ++i) values[i] = float(i % 255) - 127;
    quantize_tokens(team, kernels, scratch.data(), values, k, k, 1, num_tokens, Norm{}, Norm{}, tokens);
    out.get(std::size_t(num_tokens) * round_up(n, kPanelRows));
  }

  double seconds(Team& team, const Kernels& kernels, int repeats) {
    const Product product{&linear, &tokens, out.data(), std::size_t(round_up(linear.n, kPanelRows)), false};
    multiply(team, kernels, scratch.data(), &product, 1);
    std::vector<double> times;
    for (int i = 0; i < repeats; ++i) {
      for (Scratch& own : scratch) own.lookups[0].number = 0;  // which a layer has to make
      const double start = now();
      multiply(team, kernels, scratch.data(), &product, 1);
      times.push_back(now() - start);
    }
    return median(times);
  }
};

// The exclusive or of 64-byte lines, asked for ahead as in the streamed product or left to the processor.
template <bool ahead>
#if defined(__x86_64__)
__attribute__((target("avx2")))
#endif
uint64_t read_lines(const uint64_t* lines, std::size_t count) {
  typedef uint64_t Lane __attribute__((vector_size(32), may_alias));
  Lane sums[4] = {};
  const Lane* lanes = reinterpret_cast<const Lane*>(lines);
  for (std::size_t i = 0; i + 4 <= count * 2; i += 4) {
    if (ahead) prefetch_ahead(lanes + i, 2 * kLineBytes);
    for (int j = 0; j < 4; ++j) sums[j] ^= lanes[i + j];
  }
  const Lane sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

#if defined(__x86_64__)
// 12 accumulators, as in the matrix product; 32 multiply-adds each.
__attribute__((target("avx2"))) void multiply_add_block(long count) {
  asm volatile(
      "1:\n"
#define BITDISTILL_STEP(a) "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\nvpaddw %%ymm14, %%ymm" a ", %%ymm" a "\n"
      BITDISTILL_STEP("0") BITDISTILL_STEP("1") BITDISTILL_STEP("2") BITDISTILL_STEP("3") BITDISTILL_STEP("4")
      BITDISTILL_STEP("5") BITDISTILL_STEP("6") BITDISTILL_STEP("7") BITDISTILL_STEP("8") BITDISTILL_STEP("9")
      BITDISTILL_STEP("10") BITDISTILL_STEP("11")
#undef BITDISTILL_STEP
      "dec %[count]\n"
      "jnz 1b\n"
      : [count] "+r"(count)
      :
      : "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12",
        "ymm13", "ymm14", "cc");
}
#endif

}  // namespace

double measure_multiply_add_ceiling(int num_threads, double seconds) {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2")) throw std::runtime_error("the multiply-add ceiling is that of AVX2");
  Team team(num_threads);
  constexpr long kSteps = 200000;
  std::vector<double> rates;
  for (const double end = now() + seconds; now() < end;) {
    const double start = now();
    team.run(num_threads, [&](int, int) { multiply_add_block(kSteps); });
    rates.push_back(double(num_threads) * kSteps * 12 * 32 / (now() - start) / 1e9);
  }
  return median(rates);
#else
  (void)num_threads, (void)seconds;
  throw std::runtime_error("the multiply-add ceiling is that of AVX2");
#endif
}

double measure_read_bandwidth(int num_threads, int megabytes) {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2")) throw std::runtime_error("the read bandwidth is measured with AVX2");
#endif
  Team team(num_threads);
  const std::size_t num_lines = std::size_t(megabytes) * 1000000 / 64;
  Buffer<uint64_t> block;
  std::fill_n(block.get(num_lines * 8), num_lines * 8, 1);
  const int shares = num_threads * 4;
  std::vector<uint64_t> results(shares);
  std::vector<double> rates[2];
  for (int repeat = 0; repeat < 18; ++repeat) {
    const auto read = repeat % 2 == 0 ? read_lines<true> : read_lines<false>;
    const double start = now();
    team.run(shares, [&](int share, int) {
      const std::size_t first = num_lines * share / shares, last = num_lines * (share + 1) / shares;
      results[share] = read(block.data() + first * 8, last - first);
    });
    rates[repeat % 2].push_back(double(num_lines) * 64 / (now() - start) / 1e9);
  }
  if (std::count(results.begin(), results.end(), 2) > 0) throw std::runtime_error("unreachable: the block holds ones");
  return std::max(median(rates[0]), median(rates[1]));  // which is faster depends on the processor
}

double measure_gemm(const Kernels& kernels, int n, int k, int tokens, int num_threads, int repeats) {
  Team team(num_threads);
  Case matrix(team, kernels, n, k, tokens, kernels.gemv_base3 != nullptr);
  return double(n) * k * tokens / matrix.seconds(team, kernels, repeats) / 1e9;
}

double measure_gemv(const Kernels& kernels, int n, int k, int num_threads, int repeats, bool base3) {
  if (base3 && kernels.gemv_base3 == nullptr) {
    throw std::invalid_argument("these kernels stream two bits a weight only");
  }
  Team team(num_threads);
  Case matrix(team, kernels, n, k, 1, base3);
  const double bytes = double(matrix.linear.num_panels()) * matrix.linear.panel_bytes();
  return bytes / matrix.seconds(team, kernels, repeats) / 1e9;
}

}  // namespace bitdistill
