// The floating-point kernels, written once with the compiler's vector types and compiled by each instruction set's file
// with that file's flags. Everything here is static: a function compiled for AVX2 must never be linked into code that
// runs elsewhere, so nothing inline from the standard library is used either.
#pragma once

#include "kernels.h"
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bitdistill {
namespace {

#define BITDISTILL_INLINE static inline __attribute__((always_inline))

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8x32 __attribute__((vector_size(32)));
typedef float Float8Unaligned __attribute__((vector_size(32), aligned(4), may_alias));

BITDISTILL_INLINE Float8 load8(const float* x) { return *reinterpret_cast<const Float8Unaligned*>(x); }
BITDISTILL_INLINE void store8(float* x, Float8 v) { *reinterpret_cast<Float8Unaligned*>(x) = v; }
BITDISTILL_INLINE Float8 all8(float x) { return Float8{x, x, x, x, x, x, x, x}; }
BITDISTILL_INLINE Float8 min8(Float8 a, Float8 b) { return a < b ? a : b; }
BITDISTILL_INLINE Float8 max8(Float8 a, Float8 b) { return a > b ? a : b; }

BITDISTILL_INLINE float sum_of(Float8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
BITDISTILL_INLINE float max_of(Float8 v) {
  float result = v[0];
  for (int i = 1; i < 8; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

// The first n of 8 elements, zeros after them.
BITDISTILL_INLINE Float8 load_some(const float* x, int n) {
  float values[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int i = 0; i < n; ++i) values[i] = x[i];
  return load8(values);
}

BITDISTILL_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  uint32_t bits = (rest << 13) + (112u << 23);  // the exponent's bias: 15 to 127
  if (rest >= 0x7c00) bits += 112u << 23;  // infinity and NaN
  float value;
  __builtin_memcpy(&value, &bits, 4);
  if (rest < 0x0400) value = float(rest) * 0x1p-24f;  // subnormal
  __builtin_memcpy(&bits, &value, 4);
  bits |= sign;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Rounds half to even, as vcvtps2ph does; what is too large becomes infinity.
BITDISTILL_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (bits < 0x38800000) {  // below the smallest normal: a multiple of 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    const float rounded = (magnitude * 0x1p24f + 12582912.0f) - 12582912.0f;
    return uint16_t(sign | uint32_t(rounded));
  }
  return uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13));
}

BITDISTILL_INLINE Float8 load8(const uint16_t* x) {
#ifdef __F16C__
  return (Float8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  Float8 values;
  for (int i = 0; i < 8; ++i) values[i] = half_to_float(x[i]);
  return values;
#endif
}

// e^x to about 2 units in the last place; below -87.3 it is 0.
BITDISTILL_INLINE Float8 exp8(Float8 x) {
  const Float8 clamped = max8(min8(x, all8(88.3762626f)), all8(-87.3365402f));
  const Float8 magic = all8(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const Float8 shifted = clamped * all8(1.44269504f) + magic;
  const Float8 n = shifted - magic;
  Float8 r = clamped - n * all8(0.693359375f);
  r = r - n * all8(-2.12194440e-4f);
  Float8 p = all8(1.9875691500e-4f);
  p = p * r + all8(1.3981999507e-3f);
  p = p * r + all8(8.3334519073e-3f);
  p = p * r + all8(4.1665795894e-2f);
  p = p * r + all8(1.6666665459e-1f);
  p = p * r + all8(5.0000001201e-1f);
  p = p * (r * r) + r + all8(1.0f);
  const Int8x32 exponent = ((Int8x32)shifted - (Int8x32)magic) << 23;
  const Float8 result = (Float8)((Int8x32)p + exponent);
  return x < all8(-87.3365402f) ? all8(0.0f) : result;
}

void finish(const int32_t* sums, int tokens, const int32_t* sum_x, const float* scale_x, float weight_scale,
            const float* bias, bool add, float* y, std::size_t stride) {
  for (int t = 0; t < tokens; ++t, sums += kPanelRows, y += stride) {
    const float scale = scale_x[t] * weight_scale;
    const int32_t sum = sum_x[t];
    for (int half = 0; half < kPanelRows; half += 8) {
      Int8x32 integers;
      __builtin_memcpy(&integers, sums + half, sizeof integers);
      integers -= Int8x32{sum, sum, sum, sum, sum, sum, sum, sum};
      Float8 values = __builtin_convertvector(integers, Float8) * all8(scale);
      if (bias != nullptr) values += load8(bias + half);
      if (add) values += load8(y + half);
      store8(y + half, values);
    }
  }
}

void rms_norm(const float* x, const float* weight, float offset, float eps, int n, float* out) {
  Float8 squares = all8(0), squares2 = all8(0);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const Float8 a = load8(x + i), b = load8(x + i + 8);
    squares += a * a;
    squares2 += b * b;
  }
  squares += squares2;
  float tail = 0;
  for (; i < n; ++i) tail += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf((sum_of(squares) + tail) / float(n) + eps);
  for (i = 0; i + 8 <= n; i += 8) store8(out + i, (load8(weight + i) + all8(offset)) * (load8(x + i) * all8(scale)));
  for (; i < n; ++i) out[i] = (weight[i] + offset) * (x[i] * scale);
}

float quantize(const float* x, int n, int8_t* x_int8, int32_t* sum) {
  const Int8x32 no_sign = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff,
                           0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  Float8 largest = all8(1e-5f);
  int i = 0;
  for (; i + 8 <= n; i += 8) largest = max8(largest, (Float8)((Int8x32)load8(x + i) & no_sign));
  if (i < n) largest = max8(largest, (Float8)((Int8x32)load_some(x + i, n - i) & no_sign));
  const float absmax = max_of(largest), inverse = 127.0f / absmax;
  const Float8 magic = all8(12582912.0f);  // rounds half to even
  Int8x32 sums = {0, 0, 0, 0, 0, 0, 0, 0};
#ifdef __AVX2__
  for (i = 0; i + 32 <= n; i += 32) {
    __m256i q[4];
    for (int j = 0; j < 4; ++j) {
      q[j] = _mm256_cvtps_epi32((__m256)(load8(x + i + 8 * j) * all8(inverse)));
      sums += (Int8x32)q[j];
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
    const Float8 scaled = load_some(x + i, count) * all8(inverse);
    const Int8x32 q = (Int8x32)(scaled + magic) - (Int8x32)magic;
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

void store_key_value(const KeyValueHead& head, const float* key, const float* value, int position, int head_dim,
                     int value_stride) {
  const std::size_t first_key = std::size_t(position / kKeyBlock) * head_dim * kKeyBlock + position % kKeyBlock;
  const std::size_t first_value = std::size_t(position) * value_stride;
  if (head.half) {
    uint16_t* keys = static_cast<uint16_t*>(head.key) + first_key;
    uint16_t* values = static_cast<uint16_t*>(head.value) + first_value;
    for (int i = 0; i < head_dim; ++i) keys[i * kKeyBlock] = float_to_half(key[i]);
    for (int i = 0; i < head_dim; ++i) values[i] = float_to_half(value[i]);
  } else {
    float* keys = static_cast<float*>(head.key) + first_key;
    float* values = static_cast<float*>(head.value) + first_value;
    for (int i = 0; i < head_dim; ++i) keys[i * kKeyBlock] = key[i];
    __builtin_memcpy(values, value, sizeof(float) * head_dim);
  }
}

// c[row][0..15] = sum over i of a[row][i] * b[i * b_stride .. + 15]
template <int ROWS, class B>
BITDISTILL_INLINE void rows_times_16(const float* const* a, const B* b, std::size_t b_stride, int count,
                                     Float8 (&c)[ROWS][2]) {
  for (int r = 0; r < ROWS; ++r) c[r][0] = c[r][1] = all8(0);
  for (int i = 0; i < count; ++i) {
    const Float8 b0 = load8(b), b1 = load8(b + 8);
    b += b_stride;
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const Float8 x = all8(a[r][i]);
      c[r][0] += x * b0;
      c[r][1] += x * b1;
    }
  }
}

// Softmax of one row of scores over [first, last), zeros elsewhere in [begin, end); returns 1 / sum.
BITDISTILL_INLINE float softmax_row(float* scores, int begin, int end, int first, int last) {
  for (int i = begin; i < first; ++i) scores[i] = -__builtin_inff();
  for (int i = last; i < end; ++i) scores[i] = -__builtin_inff();
  Float8 largest = load8(scores + begin);
  for (int i = begin + 8; i < end; i += 8) largest = max8(largest, load8(scores + i));
  const Float8 shift = all8(max_of(largest));
  Float8 sum = all8(0);
  for (int i = begin; i < end; i += 8) {
    const Float8 weight = exp8(load8(scores + i) - shift);
    store8(scores + i, weight);
    sum += weight;
  }
  return 1.0f / sum_of(sum);
}

template <int ROWS, class T>
void attend_rows(const AttentionTile& tile) {
  const int d = tile.head_dim;
  int first = tile.first[0], last = tile.last[0];
  for (int r = 1; r < ROWS; ++r) {
    first = tile.first[r] < first ? tile.first[r] : first;
    last = tile.last[r] > last ? tile.last[r] : last;
  }
  const int begin = first / kKeyBlock * kKeyBlock, end = (last + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  const float* weights[ROWS];
  Float8 c[ROWS][2];
  for (int block = begin; block < end; block += kKeyBlock) {
    const T* keys = static_cast<const T*>(tile.head.key) + std::size_t(block) * d;
    rows_times_16<ROWS, T>(tile.query, keys, kKeyBlock, d, c);
    for (int r = 0; r < ROWS; ++r) {
      float* scores = tile.scores + std::size_t(r) * tile.scores_stride + block;
      store8(scores, c[r][0] * all8(tile.scale));
      store8(scores + 8, c[r][1] * all8(tile.scale));
    }
  }
  float inverse[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    float* scores = tile.scores + std::size_t(r) * tile.scores_stride;
    inverse[r] = softmax_row(scores, begin, end, tile.first[r], tile.last[r]);
    weights[r] = scores + begin;
  }
  const T* values = static_cast<const T*>(tile.head.value) + std::size_t(begin) * tile.value_stride;
  for (int column = 0; column < d; column += 16) {
    rows_times_16<ROWS, T>(weights, values + column, tile.value_stride, last - begin, c);
    const int count = d - column < 16 ? d - column : 16;
    for (int r = 0; r < ROWS; ++r) {
      float result[16];
      store8(result, c[r][0] * all8(inverse[r]));
      store8(result + 8, c[r][1] * all8(inverse[r]));
      __builtin_memcpy(tile.out[r] + column, result, sizeof(float) * count);
    }
  }
}

template <class T>
void attend_typed(const AttentionTile& tile) {
  switch (tile.rows) {
    case 1: return attend_rows<1, T>(tile);
    case 2: return attend_rows<2, T>(tile);
    case 3: return attend_rows<3, T>(tile);
    case 4: return attend_rows<4, T>(tile);
    case 5: return attend_rows<5, T>(tile);
    default: return attend_rows<6, T>(tile);
  }
}

void attend(const AttentionTile& tile) {
  tile.head.half ? attend_typed<uint16_t>(tile) : attend_typed<float>(tile);
}

// Eight dwords: dword j holds bit j of each byte of `dword`, that is k = 4 j .. 4 j + 3 of a group of 32.
BITDISTILL_INLINE Int8x32 spread_bits(const uint8_t* dword) {
  int32_t bits;
  __builtin_memcpy(&bits, dword, 4);
  const Int8x32 all = {bits, bits, bits, bits, bits, bits, bits, bits}, shifts = {0, 1, 2, 3, 4, 5, 6, 7};
  const int32_t one = 0x01010101;
  return (all >> shifts) & Int8x32{one, one, one, one, one, one, one, one};
}

BITDISTILL_INLINE Int8x32 rest_codes(const uint8_t* rest) {
  return spread_bits(rest) | spread_bits(rest + 4) << 1 | spread_bits(rest + 8) << 2;
}

void decode_row(const uint8_t* scan_panel, int r, const uint8_t* rest, int num_groups, int8_t* w_int8) {
  const int32_t nibble = 0x0f0f0f0f, zero = int32_t(0x80808080);
  const Int8x32 nibbles = {nibble, nibble, nibble, nibble, nibble, nibble, nibble, nibble};
  const Int8x32 zeros = {zero, zero, zero, zero, zero, zero, zero, zero}, shifts = {0, 4, 0, 4, 0, 4, 0, 4};
  for (int group = 0; group < num_groups; ++group) {
    int32_t n[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(n + i, scan_panel + i * kLineBytes + 4 * r, 4);
    const Int8x32 high = (Int8x32{n[0], n[0], n[1], n[1], n[2], n[2], n[3], n[3]} >> shifts) & nibbles;
    const Int8x32 bit = spread_bits(scan_panel + 4 * kLineBytes + 4 * r);
    const Int8x32 u = high << 4 | bit << 3 | rest_codes(rest);
    const Int8x32 w = u ^ zeros;  // u - 128 as a signed byte
    __builtin_memcpy(w_int8, &w, sizeof w);
    scan_panel += kScanGroupBytes;
    rest += kRestGroupBytes;
    w_int8 += kGroupK;
  }
}

int32_t rest_dot(const uint8_t* rest, int num_groups, const int8_t* x) {
  Int8x32 sums = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int group = 0; group < num_groups; ++group, rest += kRestGroupBytes, x += kGroupK) {
    const Int8x32 codes = rest_codes(rest);
#ifdef __AVX2__
    const __m256i products = _mm256_maddubs_epi16((__m256i)codes, _mm256_loadu_si256((const __m256i*)x));
    sums += (Int8x32)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
#else
    typedef int8_t Bytes32 __attribute__((vector_size(32)));
    const Bytes32 bytes = (Bytes32)codes;
    for (int k = 0; k < kGroupK; ++k) sums[k % 8] += bytes[k] * x[k];
#endif
  }
  int32_t total = 0;
  for (int j = 0; j < 8; ++j) total += sums[j];
  return total;
}

float dot(const float* x, const int8_t* w_int8, int n) {
  Float8 sums[2] = {all8(0), all8(0)};
  for (int i = 0; i < n; i += 16) {
    for (int half = 0; half < 2; ++half) {
      typedef int8_t Bytes8 __attribute__((vector_size(8)));
      Bytes8 bytes;
      __builtin_memcpy(&bytes, w_int8 + i + 8 * half, 8);
      sums[half] += load8(x + i + 8 * half) * __builtin_convertvector(bytes, Float8);
    }
  }
  return sum_of(sums[0] + sums[1]);
}

}  // namespace
}  // namespace bitdistill

// The entries of a Kernels table that this file fills.
#define BITDISTILL_FLOAT_OPS                                                                                   \
  .finish = finish, .rms_norm = rms_norm, .quantize = quantize, .gate_multiply = gate_multiply, .rotate = rotate, \
  .store_key_value = store_key_value, .attend = attend, .decode_row = decode_row, \
  .rest_dot = rest_dot, .dot = dot
