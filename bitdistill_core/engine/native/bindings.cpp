// Python's door to the kernels: types and the GIL, no arithmetic. bitdistill_core/engine/kernels.py validates.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "dispatch.h"

namespace nb = nanobind;

namespace {

using Activations = nb::ndarray<const int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PackedWeights = nb::ndarray<const uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::vector<std::string> available_kernels() {
  std::vector<std::string> names;
  for (const bitdistill::Kernel& kernel : bitdistill::available_kernels()) names.emplace_back(kernel.name);
  return names;
}

void ternary_matmul(const Activations& x, const PackedWeights& w_packed, const Sums& out, const std::string& kernel,
                    int num_threads) {
  const bitdistill::Kernel* found = bitdistill::find_kernel(kernel);
  if (found == nullptr) throw std::invalid_argument("no such kernel on this processor: " + kernel);
  const int8_t* x_data = x.data();
  const uint8_t* w_data = w_packed.data();
  int32_t* out_data = out.data();
  const int T = int(x.shape(0)), K = int(x.shape(1)), N = int(out.shape(1));
  const nb::gil_scoped_release released;
  bitdistill::ternary_matmul(*found, x_data, w_data, out_data, T, N, K, num_threads);
}

}  // namespace

NB_MODULE(_native, module) {
  module.attr("MAX_K") = bitdistill::kMaxK;
  module.def("available_kernels", &available_kernels, "Names of the kernels this processor can run, fastest first.");
  module.def("ternary_matmul", &ternary_matmul, nb::arg("x").noconvert(), nb::arg("w_packed").noconvert(),
             nb::arg("out").noconvert(), nb::arg("kernel"), nb::arg("num_threads"),
             "Fills out (T, N) with the exact sums of x (T, K) and w_packed (N/16, K/16, 64).");
}
