// The AVX-VNNI and AVX-512 intrinsics of avx_vnni.cpp and avx512_vnni.cpp in software, so that tests can run those very
// sources on any x86-64 processor with AVX2: g++ -mavx2 -mfma -mf16c -include vnni_emulated.h. Plain loops after the
// vendor's description of each instruction. The compiler makes two 256-bit registers of every __m512i.
//
// Their tables are renamed, so that a program can hold them beside the real ones.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define avx_vnni_kernels emulated_avx_vnni_kernels
#define avx512_vnni_kernels emulated_avx512_vnni_kernels

namespace vnni_emulated {
namespace {

// Element i of a register of elements of type T.
template <class T, class V>
inline T get(const V& v, int i) {
  T element;
  __builtin_memcpy(&element, reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof(T));
  return element;
}

template <class T, class V>
inline void set(V& v, int i, T element) {
  __builtin_memcpy(reinterpret_cast<char*>(&v) + i * sizeof(T), &element, sizeof(T));
}

// VPDPBUSD: unsigned bytes of a times signed bytes of b, four products added to each dword; wraps, never saturates.
template <class V>
inline V dpbusd(V sums, V a, V b) {
  for (int lane = 0; lane < int(sizeof(V)) / 4; ++lane) {
    uint32_t sum = get<uint32_t>(sums, lane);
    for (int i = 4 * lane; i < 4 * lane + 4; ++i) sum += uint32_t(int32_t(get<uint8_t>(a, i)) * get<int8_t>(b, i));
    set(sums, lane, sum);
  }
  return sums;
}

inline __m512i loadu(const void* memory) {
  __m512i v;
  __builtin_memcpy(&v, memory, sizeof v);
  return v;
}

// Faults where the address is not on 64 bytes, as VMOVDQA does.
inline void store(void* memory, __m512i v) {
  if (reinterpret_cast<uintptr_t>(memory) % 64 != 0) __builtin_trap();
  __builtin_memcpy(memory, &v, sizeof v);
}

template <class T>
inline __m512i set1(T element) {
  __m512i v;
  for (int i = 0; i < 64 / int(sizeof(T)); ++i) set(v, i, element);
  return v;
}

inline __m512i and_bits(__m512i a, __m512i b) {
  __m512i v;
  for (int i = 0; i < 8; ++i) set(v, i, get<uint64_t>(a, i) & get<uint64_t>(b, i));
  return v;
}

inline __m512i srli_epi16(__m512i a, unsigned count) {
  __m512i v;
  for (int i = 0; i < 32; ++i) set(v, i, uint16_t(count > 15 ? 0 : get<uint16_t>(a, i) >> count));
  return v;
}

}  // namespace
}  // namespace vnni_emulated

// Some of these are macros already where the compiler does not optimise.
#undef _mm256_dpbusd_avx_epi32
#undef _mm512_dpbusd_epi32
#undef _mm512_loadu_si512
#undef _mm512_store_si512
#undef _mm512_set1_epi8
#undef _mm512_set1_epi32
#undef _mm512_and_si512
#undef _mm512_srli_epi16
#define _mm256_dpbusd_avx_epi32 vnni_emulated::dpbusd<__m256i>
#define _mm512_dpbusd_epi32 vnni_emulated::dpbusd<__m512i>
#define _mm512_loadu_si512 vnni_emulated::loadu
#define _mm512_store_si512 vnni_emulated::store
#define _mm512_set1_epi8 vnni_emulated::set1<int8_t>
#define _mm512_set1_epi32 vnni_emulated::set1<int32_t>
#define _mm512_and_si512 vnni_emulated::and_bits
#define _mm512_srli_epi16 vnni_emulated::srli_epi16
