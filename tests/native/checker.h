// What the checks of check_kernels.cpp share: numbers, memory that ends at an inaccessible page, counting.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

using namespace bitdistill;

constexpr std::size_t kPage = 65536;  // a multiple of every processor's

inline uint64_t random_state = 1;

inline uint32_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(random_state >> 32);
}
inline int random_int(int low, int high) { return low + int(random_bits() % uint32_t(high - low + 1)); }
inline float random_float(float low, float high) { return low + (high - low) * (float(random_bits()) * 0x1p-32f); }

// `size` elements followed by an inaccessible page, or by `slack` bytes and that page.
template <class T>
struct Guarded {
  explicit Guarded(std::size_t size, int slack = 0) : size(size) {
    const std::size_t bytes = size * sizeof(T) + slack;
    mapped = (bytes + kPage - 1) / kPage * kPage;
    base = static_cast<char*>(mmap(nullptr, mapped + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base, mapped, PROT_READ | PROT_WRITE) != 0) std::abort();
    data = reinterpret_cast<T*>(base + mapped - bytes);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base, mapped + kPage); }
  operator T*() { return data; }
  T& operator[](std::size_t i) { return data[i]; }

  std::size_t size, mapped;
  char* base;
  T* data;
};

inline void fill(Guarded<float>& x, float low, float high) {
  for (std::size_t i = 0; i < x.size; ++i) x[i] = random_float(low, high);
}

struct Checker {
  const Kernels& kernels;
  const char* function = "";
  long checks = 0, differences = 0;

  void check(bool is_right, const char* format, ...) {
    ++checks;
    if (is_right || ++differences > 10) return;
    std::va_list arguments;
    va_start(arguments, format);
    std::printf("\n  %s: ", function);
    std::vprintf(format, arguments);
    va_end(arguments);
  }
  void near(double value, double expected, double tolerance, const char* what, int size, int i) {
    check(std::fabs(value - expected) <= tolerance, "%s size=%d i=%d: %.9g, not %.9g +- %.2g", what, size, i, value,
          expected, tolerance);
  }
  template <class T>
  void same(const T* values, const T* expected, std::size_t count, const char* what, int size, int pattern) {
    check(std::memcmp(values, expected, count * sizeof(T)) == 0, "%s size=%d pattern=%d differs", what, size, pattern);
  }
};
