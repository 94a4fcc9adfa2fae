// Speeds of this machine and of single kernels, for benchmarks/engine.py.
#pragma once

#include "linear.h"

namespace bitdistill {

// 1e9 multiply-adds a second of vpmaddubsw + vpaddw on registers:
// what no AVX2 product of bytes can exceed. x86-64 only.
double measure_multiply_add_ceiling(int num_threads, double seconds);

// 1e9 bytes a second read from a block of `megabytes` (1e6 bytes).
double measure_read_bandwidth(int num_threads, int megabytes);

// 1e9 multiply-adds a second of (tokens, k) times (n, k), the median of `repeats`.
double measure_gemm(const Kernels& kernels, int n, int k, int tokens, int num_threads, int repeats);

// 1e9 bytes of packed weights, of two bits or in base 3, a second of one token times (n, k), the median of `repeats`.
double measure_gemv(const Kernels& kernels, int n, int k, int num_threads, int repeats, bool base3);

}  // namespace bitdistill
