#include "dispatch.h"

#if defined(BITDISTILL_X86_64)
#include <cpuid.h>
#elif defined(BITDISTILL_AARCH64)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace bitdistill {
namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

#if defined(BITDISTILL_X86_64)
// __builtin_cpu_supports knows neither name before Clang 18.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

#if defined(BITDISTILL_AVX_VNNI)
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif
#endif

// Fastest first.
std::vector<Choice> choices() {
  std::vector<Choice> result;
#if defined(BITDISTILL_X86_64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_vnni = avx2 && avx512 && __builtin_cpu_supports("avx512vnni");
  result.push_back({avx512_vbmi_kernels(), avx512_vnni && __builtin_cpu_supports("avx512vbmi")});
  result.push_back({avx512_vnni_kernels(), avx512_vnni});
#if defined(BITDISTILL_AVX_VNNI)
  result.push_back({avx_vnni_kernels(), avx2 && has_avx_vnni()});
#endif
  result.push_back({avx2_kernels(), avx2});
#elif defined(BITDISTILL_AARCH64)
  result.push_back({neon_kernels(), (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0});
#endif
  result.push_back({scalar_kernels(), true});
  return result;
}

std::vector<const Kernels*> chosen(bool only_supported) {
  std::vector<const Kernels*> result;
  for (const Choice& choice : choices()) {
    if (choice.supported || !only_supported) result.push_back(choice.kernels);
  }
  return result;
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> kernels = chosen(true);
  return kernels;
}

const std::vector<const Kernels*>& built_kernels() {
  static const std::vector<const Kernels*> kernels = chosen(false);
  return kernels;
}

const Kernels* find_kernels(const std::string& name) {
  for (const Kernels* kernels : available_kernels()) {
    if (name == kernels->name) return kernels;
  }
  return nullptr;
}

}  // namespace bitdistill
