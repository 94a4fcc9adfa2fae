// The floating-point kernels, written once with the compiler's vector types and compiled by each instruction set's file
// with that file's flags. Everything here is static: a function compiled for AVX2 must never be linked into code that
// runs elsewhere, so nothing inline from the standard library is used either.
#pragma once

#include "attention_ops.h"
#include "vector.h"

namespace bitdistill {
namespace {

void finish(const int32_t* sums, int tokens, const int32_t* sum_x, const float* scale_x, const float* weight_scale,
            const float* bias, bool add, float* y, std::size_t stride) {
  for (int t = 0; t < tokens; ++t, sums += kPanelRows, y += stride) {
    const Float8 scale = all8(scale_x[t]);
    const int32_t sum = sum_x[t];
    for (int half = 0; half < kPanelRows; half += 8) {
      Int32x8 integers;
      __builtin_memcpy(&integers, sums + half, sizeof integers);
      integers -= Int32x8{sum, sum, sum, sum, sum, sum, sum, sum};
      Float8 values = __builtin_convertvector(integers, Float8) * (scale * load8(weight_scale + half));
      if (bias != nullptr) values += load8(bias + half);
      if (add) values += load8(y + half);
      store8(y + half, values);
    }
  }
}

void rms_norm(const float* x, const float* weight, float offset, float eps, int n, float* out) {
  Float8 squares[4] = {all8(0), all8(0), all8(0), all8(0)};
  int i = 0;
  for (; i + 32 <= n; i += 32) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Float8 values = load8(x + i + 8 * j);
      squares[j] += values * values;
    }
  }
  float tail = 0;
  for (; i < n; ++i) tail += x[i] * x[i];
  const float sum = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3])) + tail;
  const float scale = 1.0f / __builtin_sqrtf(sum / float(n) + eps);
  for (i = 0; i + 8 <= n; i += 8) store8(out + i, (load8(weight + i) + all8(offset)) * (load8(x + i) * all8(scale)));
  for (; i < n; ++i) out[i] = (weight[i] + offset) * (x[i] * scale);
}

// The nearest integer, half to even. As an instruction where there is one: a compiler may fuse the product before an
// addition, which rounds once and elsewhere.
BITDISTILL_INLINE Int32x8 round8(Float8 x) {
#if defined(__AVX2__)
  return (Int32x8)_mm256_cvtps_epi32((__m256)x);
#elif defined(__ARM_NEON)
  int32x4_t halves[2];
  float32x4_t parts[2];
  __builtin_memcpy(parts, &x, sizeof parts);
  for (int i = 0; i < 2; ++i) halves[i] = vcvtnq_s32_f32(parts[i]);
  Int32x8 result;
  __builtin_memcpy(&result, halves, sizeof result);
  return result;
#else
  const Float8 magic = all8(12582912.0f);
  return (Int32x8)(x + magic) - (Int32x8)magic;
#endif
}

// Positive floats are in the order of their bits; infinity and NaN are above them all. Four maxima, which need not wait
// for one another.
float quantize(const float* x, int n, int8_t* x_int8, int32_t* sum) {
  const int32_t no_sign = 0x7fffffff, infinity = 0x7f800000;
  const Int32x8 floor = (Int32x8)all8(1e-5f);
  const Int32x8 mask = {no_sign, no_sign, no_sign, no_sign, no_sign, no_sign, no_sign, no_sign};
  Int32x8 largest[4] = {floor, floor, floor, floor};
  int i = 0;
  for (; i + 32 <= n; i += 32) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Int32x8 bits = (Int32x8)load8(x + i + 8 * j) & mask;
      largest[j] = bits > largest[j] ? bits : largest[j];
    }
  }
  for (; i < n; i += 8) {
    const Int32x8 bits = (Int32x8)(i + 8 <= n ? load8(x + i) : load_some(x + i, n - i)) & mask;
    largest[0] = bits > largest[0] ? bits : largest[0];
  }
  for (int j = 1; j < 4; ++j) largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
  int32_t bits = 0;
  for (int j = 0; j < 8; ++j) bits = largest[0][j] > bits ? largest[0][j] : bits;
  if (bits >= infinity) {
    __builtin_memset(x_int8, 0, n);
    *sum = 0;
    return __builtin_nanf("");
  }
  float absmax;
  __builtin_memcpy(&absmax, &bits, sizeof absmax);
  const float inverse = 127.0f / absmax;
  Int32x8 sums = {0, 0, 0, 0, 0, 0, 0, 0};
#ifdef __AVX2__
  for (i = 0; i + 32 <= n; i += 32) {
    __m256i q[4];
    for (int j = 0; j < 4; ++j) {
      q[j] = _mm256_cvtps_epi32((__m256)(load8(x + i + 8 * j) * all8(inverse)));
      sums += (Int32x8)q[j];
    }
    const __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
    const __m256i bytes = _mm256_packs_epi16(low, high);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x_int8 + i), _mm256_permutevar8x32_epi32(bytes, order));
  }
#else
  i = 0;
#endif
  for (; i < n; i += 8) {
    const int count = n - i < 8 ? n - i : 8;
    const Int32x8 q = round8((count == 8 ? load8(x + i) : load_some(x + i, count)) * all8(inverse));
    sums += q;
    for (int j = 0; j < count; ++j) x_int8[i + j] = int8_t(q[j]);
  }
  int32_t total = 0;
  for (int j = 0; j < 8; ++j) total += sums[j];
  *sum = total;
  return absmax / 127.0f;
}

BITDISTILL_INLINE Float8 activate8(Float8 x, Activation activation) {
  if (activation == Activation::kSilu) return x / (exp8(-x) + all8(1.0f));
  const Float8 u = all8(0.797884561f) * (x + all8(0.044715f) * x * x * x);
  const Float8 tanh = all8(1.0f) - all8(2.0f) / (exp8(u + u) + all8(1.0f));
  return x * all8(0.5f) * (tanh + all8(1.0f));
}

void gate_multiply(float* gate, const float* up, int n, Activation activation) {
  int i = 0;
  for (; i + 8 <= n; i += 8) store8(gate + i, activate8(load8(gate + i), activation) * load8(up + i));
  if (i == n) return;
  const Float8 last = activate8(load_some(gate + i, n - i), activation) * load_some(up + i, n - i);
  for (int j = 0; i + j < n; ++j) gate[i + j] = last[j];
}

void rotate(float* x, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  float* second = x + half;
  int i = 0;
  for (; i + 8 <= half; i += 8) {
    const Float8 a = load8(x + i), b = load8(second + i), c = load8(cos + i), s = load8(sin + i);
    store8(x + i, a * c - b * s);
    store8(second + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = second[i];
    x[i] = a * cos[i] - b * sin[i];
    second[i] = b * cos[i] + a * sin[i];
  }
}

BITDISTILL_INLINE void store_number(float* to, float value) { *to = value; }
BITDISTILL_INLINE void store_number(uint16_t* to, float value) { *to = float_to_half(value); }

template <class T>
void store_typed(const KeyValueHead& head, const float* keys, const float* values, std::size_t stride, int position,
                 int count, int head_dim, int value_stride) {
  const std::size_t block = std::size_t(head_dim) * kKeyBlock;
  for (int t = 0, most; t < count; t += most) {
    T* const to = static_cast<T*>(head.key) + (position + t) / kKeyBlock * block + (position + t) % kKeyBlock;
    const float* const from = keys + t * stride;
    most = 1;
    int i = 0;
#ifdef __AVX2__
    if (count - t >= 8 && (position + t) % 8 == 0) {  // eight keys' columns, which lie together
      most = 8;
      for (; i + 8 <= head_dim; i += 8) {
        Float8 columns[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) columns[j] = load8(from + j * stride + i);
        transpose8(columns);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) store8(to + (i + j) * kKeyBlock, columns[j]);
      }
    }
#endif
    for (; i < head_dim; ++i) {
      for (int j = 0; j < most; ++j) store_number(to + i * kKeyBlock + j, from[j * stride + i]);
    }
  }
  T* to = static_cast<T*>(head.value) + std::size_t(position) * value_stride;
  for (int t = 0; t < count; ++t, to += value_stride, values += stride) {
    int i = 0;
    for (; i + 8 <= head_dim; i += 8) store8(to + i, load8(values + i));
    for (; i < head_dim; ++i) store_number(to + i, values[i]);
  }
}

void store_keys_values(const KeyValueHead& head, const float* keys, const float* values, std::size_t stride,
                       int position, int count, int head_dim, int value_stride) {
  const auto store = head.half ? store_typed<uint16_t> : store_typed<float>;
  store(head, keys, values, stride, position, count, head_dim, value_stride);
}

// Eight dwords: dword j holds bit j of each byte of `dword`, that is k = 4 j .. 4 j + 3 of a group of 32.
BITDISTILL_INLINE Int32x8 spread_bits(const uint8_t* dword) {
  int32_t bits;
  __builtin_memcpy(&bits, dword, 4);
  const Int32x8 all = {bits, bits, bits, bits, bits, bits, bits, bits}, shifts = {0, 1, 2, 3, 4, 5, 6, 7};
  const int32_t one = 0x01010101;
  return (all >> shifts) & Int32x8{one, one, one, one, one, one, one, one};
}

void decode_row(const uint8_t* scan_panel, int r, const uint8_t* next, const uint8_t* rest, int num_groups,
                int8_t* w_int8) {
  const int32_t nibble = 0x0f0f0f0f, zero = int32_t(0x80808080);
  const Int32x8 nibbles = {nibble, nibble, nibble, nibble, nibble, nibble, nibble, nibble};
  const Int32x8 zeros = {zero, zero, zero, zero, zero, zero, zero, zero}, shifts = {0, 4, 0, 4, 0, 4, 0, 4};
  for (int group = 0; group < num_groups; ++group) {
    int32_t n[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(n + i, scan_panel + i * kLineBytes + 4 * r, 4);
    const Int32x8 lines = {n[0], n[0], n[1], n[1], n[2], n[2], n[3], n[3]};
    const Int32x8 high = (lines >> shifts) & nibbles;
    const Int32x8 bit = spread_bits(scan_panel + 4 * kLineBytes + 4 * r);
    const Int32x8 low = spread_bits(next) << 2 | spread_bits(rest + 4) << 1 | spread_bits(rest);
    const Int32x8 u = high << 4 | bit << 3 | low;
    const Int32x8 w = u ^ zeros;  // u - 128 as a signed byte
    __builtin_memcpy(w_int8, &w, sizeof w);
    scan_panel += kScanGroupBytes;
    next += kNextGroupBytes;
    rest += kRestGroupBytes;
    w_int8 += kGroupK;
  }
}

int32_t next_dot(const uint8_t* next, int num_groups, const int8_t* x) {
  Int32x8 sums = {0, 0, 0, 0, 0, 0, 0, 0};
#ifdef __AVX2__
  constexpr int kFlushGroups = 127;  // two of x, from -128, a lane and group: 127 * 256 = 32,512
  while (num_groups > 0) {
    const int count = num_groups < kFlushGroups ? num_groups : kFlushGroups;
    num_groups -= count;
    __m256i partial = _mm256_setzero_si256();
    for (int group = 0; group < count; ++group, next += kNextGroupBytes, x += kGroupK) {
      const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
      partial = _mm256_add_epi16(partial, _mm256_maddubs_epi16((__m256i)spread_bits(next), values));
    }
    sums += (Int32x8)_mm256_madd_epi16(partial, _mm256_set1_epi16(1));
  }
#else
  for (int group = 0; group < num_groups; ++group, next += kNextGroupBytes, x += kGroupK) {
    typedef int8_t Bytes32 __attribute__((vector_size(32)));
    const Bytes32 bytes = (Bytes32)spread_bits(next);
    for (int k = 0; k < kGroupK; ++k) sums[k % 8] += bytes[k] * x[k];
  }
#endif
  int32_t total = 0;
  for (int j = 0; j < 8; ++j) total += sums[j];
  return total;
}

uint32_t bound_rows(const int32_t* sums, const float* row_scale, const float* scan_error, const float* row_norm,
                    const ScanQuery& query, float least, float* values, float* bounds) {
  typedef uint32_t Uint32x8 __attribute__((vector_size(32)));
  const uint32_t middle = uint32_t(query.middle);  // the sum of the two fits int32, each alone may not
  const Float8 infinity = all8(__builtin_inff());
  uint32_t mask = 0;
#pragma GCC unroll 2
  for (int half = 0; half < kPanelRows; half += 8) {
    Uint32x8 integers;
    __builtin_memcpy(&integers, sums + half, sizeof integers);
    integers = integers * 16 + Uint32x8{middle, middle, middle, middle, middle, middle, middle, middle};
    const Float8 scale = load8(row_scale + half);
    const Float8 value = all8(query.half_scale) * __builtin_convertvector((Int32x8)integers, Float8) * scale;
    const Float8 error = all8(query.per_error) * load8(scan_error + half);
    Float8 bound = value + scale * (error + all8(query.per_row_norm) * load8(row_norm + half));
    const Int32x8 is_known = (value - value == all8(0)) & (bound == bound);  // both are numbers, the first a finite one
    bound = is_known ? bound : infinity;
    store8(values + half, value);
    store8(bounds + half, bound);
    const Int32x8 is_kept = bound >= all8(least);
#ifdef __AVX2__
    mask |= uint32_t(_mm256_movemask_ps((__m256)is_kept)) << half;
#else
    for (int r = 0; r < 8; ++r) mask |= uint32_t(is_kept[r] & 1) << (half + r);
#endif
  }
  return mask;
}

BITDISTILL_INLINE Float8 load_bytes_as_floats(const int8_t* bytes) {
#ifdef __AVX2__
  return (Float8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#else
  Float8 values;
  for (int i = 0; i < 8; ++i) values[i] = bytes[i];
  return values;
#endif
}

float dot(const float* x, const int8_t* w_int8, int n) {
  Float8 sums[4] = {all8(0), all8(0), all8(0), all8(0)};
  for (int i = 0; i < n; i += 32) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += load8(x + i + 8 * j) * load_bytes_as_floats(w_int8 + i + 8 * j);
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace
}  // namespace bitdistill

// The entries of a Kernels table that this file fills.
#define BITDISTILL_FLOAT_OPS                                                                                   \
  .bound_rows = bound_rows, .finish = finish, .rms_norm = rms_norm, .quantize = quantize,                      \
  .gate_multiply = gate_multiply, .rotate = rotate, .store_keys_values = store_keys_values, .attend = attend,       \
  .decode_row = decode_row, .next_dot = next_dot, .dot = dot
