// The AVX-VNNI and AVX-512 intrinsics of avx_vnni.cpp, avx512_vnni.cpp and avx512_vbmi.cpp in software, so that tests
// can run those very sources on any x86-64 processor with AVX2: g++ -mavx2 -mfma -mf16c -include vnni_emulated.h. Plain
// loops after the vendor's description of each instruction. The compiler makes two 256-bit registers of every __m512i.
//
// Their tables are renamed, so that a program can hold them beside the real ones.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define avx_vnni_kernels emulated_avx_vnni_kernels
#define avx512_vnni_kernels emulated_avx512_vnni_kernels
#define avx512_vbmi_kernels emulated_avx512_vbmi_kernels
#define avx512_vbmi_gemv_base3 emulated_avx512_vbmi_gemv_base3
#define avx512_vbmi_unpack_base3 emulated_avx512_vbmi_unpack_base3

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

inline __m512i slli_epi16(__m512i a, unsigned count) {
  __m512i v;
  for (int i = 0; i < 32; ++i) set(v, i, uint16_t(count > 15 ? 0 : get<uint16_t>(a, i) << count));
  return v;
}

// VPERMB: byte i of the result is the byte of `table` that the lower six bits of byte i of `index` name.
inline __m512i permutexvar_epi8(__m512i index, __m512i table) {
  __m512i v;
  for (int i = 0; i < 64; ++i) set(v, i, get<uint8_t>(table, get<uint8_t>(index, i) & 63));
  return v;
}

// VPTERNLOGD: a bit of `table` for each three bits of a, b and c, a's the highest.
inline __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i v;
  for (int i = 0; i < 8; ++i) {
    uint64_t bits = 0;
    for (int bit = 0; bit < 64; ++bit) {
      const auto at = [&](const __m512i& from) { return get<uint64_t>(from, i) >> bit & 1; };
      bits |= uint64_t(table >> (at(a) << 2 | at(b) << 1 | at(c)) & 1) << bit;
    }
    set(v, i, bits);
  }
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
#undef _mm512_slli_epi16
#undef _mm512_permutexvar_epi8
#undef _mm512_ternarylogic_epi32
#define _mm256_dpbusd_avx_epi32 vnni_emulated::dpbusd<__m256i>
#define _mm512_dpbusd_epi32 vnni_emulated::dpbusd<__m512i>
#define _mm512_loadu_si512 vnni_emulated::loadu
#define _mm512_store_si512 vnni_emulated::store
#define _mm512_set1_epi8 vnni_emulated::set1<int8_t>
#define _mm512_set1_epi32 vnni_emulated::set1<int32_t>
#define _mm512_and_si512 vnni_emulated::and_bits
#define _mm512_srli_epi16 vnni_emulated::srli_epi16
#define _mm512_slli_epi16 vnni_emulated::slli_epi16
#define _mm512_permutexvar_epi8 vnni_emulated::permutexvar_epi8
#define _mm512_ternarylogic_epi32 vnni_emulated::ternarylogic_epi32
