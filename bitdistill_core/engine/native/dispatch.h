// Which kernels this processor can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace bitdistill {

// Fastest first; "scalar" is always the last.
const std::vector<const Kernels*>& available_kernels();

// Those of this build, whether the processor has them or not.
const std::vector<const Kernels*>& built_kernels();

// Null if this processor does not have it.
const Kernels* find_kernels(const std::string& name);

}  // namespace bitdistill
