// Which kernels this processor can run, and one call split over threads.
#pragma once

#include <string>
#include <vector>

#include "ternary_matmul.h"

namespace bitdistill {

struct Kernel {
  const char* name;
  TernaryMatmul function;
};

// Fastest first; "scalar" is always the last.
const std::vector<Kernel>& available_kernels();

// Null if this processor does not have it.
const Kernel* find_kernel(const std::string& name);

// All panels of w_packed, split into at most num_threads runs of neighbours. Integer sums: the same for any split.
void ternary_matmul(const Kernel& kernel, const int8_t* x, const uint8_t* w_packed, int32_t* out, int T, int N, int K,
                    int num_threads);

}  // namespace bitdistill
