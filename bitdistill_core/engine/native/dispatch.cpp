#include "dispatch.h"

#include <algorithm>

#include "thread_pool.h"

namespace bitdistill {
namespace {

std::vector<Kernel> detect_kernels() {
  std::vector<Kernel> kernels;
#ifdef BITDISTILL_X86_64
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back({"avx2", ternary_matmul_avx2});
#endif
  kernels.push_back({"scalar", ternary_matmul_scalar});
  return kernels;
}

}  // namespace

const std::vector<Kernel>& available_kernels() {
  static const std::vector<Kernel> kernels = detect_kernels();
  return kernels;
}

const Kernel* find_kernel(const std::string& name) {
  for (const Kernel& kernel : available_kernels()) {
    if (name == kernel.name) return &kernel;
  }
  return nullptr;
}

void ternary_matmul(const Kernel& kernel, const int8_t* x, const uint8_t* w_packed, int32_t* out, int T, int N, int K,
                    int num_threads) {
  const int num_panels = N / kPanelRows;
  const int num_parts = std::clamp(num_threads, 1, std::max(num_panels, 1));
  run_parts(num_parts, [&](int part) {
    const int first = int(int64_t(num_panels) * part / num_parts);
    const int last = int(int64_t(num_panels) * (part + 1) / num_parts);
    kernel.function(x, w_packed, out, T, N, K, first, last);
  });
}

}  // namespace bitdistill
