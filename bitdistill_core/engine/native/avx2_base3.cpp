// Base 3 as it lies in the file, in AVX2: vpshufb looks sums of three activations up, instead of multiplying. Compiled
// with the flags of avx2.cpp, for its table and those of the processors that have more than AVX2 but no AVX-512 VBMI.
//
// A value is a sign and a magnitude. For the three columns of a triple, the 14 magnitudes have 14 sums of activations,
// which fit a lane of vpshufb, whose every byte finds a row's sum; vpsignb gives it the row's sign. A sum T, at most
// 384, takes two bytes: T = 31 high + low. Eight triples add up in bytes, and ten times eight in int16, before they
// must be widened: |low| <= 15, |high| <= 12, and 10 * 8 * 384 = 30,720.
#include "avx2_bytes.h"

namespace bitdistill {
namespace {

constexpr int kRadix = 31, kReciprocal = 1057;  // vpmulhrsw by 1057 divides by 31 and rounds
constexpr int kFlushGroups = 5;                 // of two times eight triples to a lane

constexpr bool splits_into_small_bytes() {
  for (int sum = -384; sum <= 384; ++sum) {
    const int high = (sum * kReciprocal + (1 << 14)) >> 15, low = sum - kRadix * high;
    if (low < -15 || low > 15 || high < -12 || high > 12) return false;
  }
  return true;
}
static_assert(splits_into_small_bytes() && 8 * 15 <= 127 && 2 * 8 * kFlushGroups * 384 <= 32767);

// The weights of the magnitudes 0 to 7 and 8 to 15, int16: 14 and 15 are none.
struct Weights {
  alignas(16) int16_t of[2][3][8];
};

constexpr Weights kWeights = [] {
  Weights weights{};
  for (int magnitude = 0; magnitude < kBase3Magnitudes; ++magnitude) {
    for (int place = 0, value = magnitude + 13; place < 3; ++place, value /= 3) {
      weights.of[magnitude / 8][place][magnitude % 8] = int16_t(value % 3 - 1);
    }
  }
  return weights;
}();

BITDISTILL_INLINE __m256i both_lanes(const void* bytes) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
}

// Column `first` of 12 in the low lane and the next in the high lane, int16 in every place.
BITDISTILL_INLINE __m256i columns_of(__m256i twelve, int first) {
  // a byte of `twelve` to the upper half of a place, 0 to the lower one
  const __m128i column = _mm_set1_epi16(int16_t(first << 8 | 0x80));
  const __m128i next = _mm_set1_epi16(int16_t((first + 1) << 8 | 0x80));
  return _mm256_srai_epi16(_mm256_shuffle_epi8(twelve, _mm256_set_m128i(next, column)), 8);
}

BITDISTILL_INLINE __m256i sums_of(const int16_t (&weights)[3][8], __m256i x0, __m256i x1, __m256i x2) {
  const __m256i sum = _mm256_sign_epi16(x0, both_lanes(weights[0]));
  const __m256i rest = _mm256_sign_epi16(x1, both_lanes(weights[1]));
  return _mm256_add_epi16(_mm256_add_epi16(sum, rest), _mm256_sign_epi16(x2, both_lanes(weights[2])));
}

}  // namespace

// Behind the sum of x, for each group and half of it 8 pairs of registers: low and high bytes of the sums of value i.
void avx2_prepare_base3(const int8_t* x, int num_groups, int8_t* lookups) {
  int32_t sum = 0;
  for (int k = 0; k < num_groups * kBase3K; ++k) sum += x[k];
  __builtin_memcpy(lookups, &sum, sizeof sum);
  lookups += kLookupHead;
  for (; num_groups > 0; --num_groups, x += kBase3K, lookups += kLookupBytes) {
    for (int i = 0; i < 8; ++i) {
      int64_t first;
      int32_t last;
      __builtin_memcpy(&first, x + 12 * i, sizeof first);
      __builtin_memcpy(&last, x + 12 * i + 8, sizeof last);
      const __m256i twelve = _mm256_broadcastsi128_si256(_mm_set_epi64x(last, first));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i x0 = columns_of(twelve, 2 * half), x1 = columns_of(twelve, 2 * half + 4);
        const __m256i x2 = columns_of(twelve, 2 * half + 8);
        __m256i low[2], high[2];
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
          const __m256i sums = sums_of(kWeights.of[part], x0, x1, x2);
          high[part] = _mm256_mulhrs_epi16(sums, _mm256_set1_epi16(kReciprocal));
          low[part] = _mm256_sub_epi16(sums, _mm256_mullo_epi16(high[part], _mm256_set1_epi16(kRadix)));
        }
        __m256i* const to = reinterpret_cast<__m256i*>(lookups + half * (kLookupBytes / 2) + i * 64);
        _mm256_store_si256(to, _mm256_packs_epi16(low[0], low[1]));
        _mm256_store_si256(to + 1, _mm256_packs_epi16(high[0], high[1]));
      }
    }
  }
}

void avx2_gemv_base3(const uint8_t* groups, int num_groups, const int8_t* lookups, int32_t* sums) {
  int32_t sum_x;
  __builtin_memcpy(&sum_x, lookups, sizeof sum_x);
  lookups += kLookupHead;
  const __m256i radix = _mm256_set1_epi16(kRadix << 8 | 1);
  __m256i total[2] = {_mm256_set1_epi32(sum_x), _mm256_set1_epi32(sum_x)};
  while (num_groups > 0) {
    const int count = num_groups < kFlushGroups ? num_groups : kFlushGroups;
    num_groups -= count;
    // rows 0 to 7, 8 to 15; a column in each lane
    __m256i partial[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int group = 0; group < count; ++group, groups += kBase3Bytes, lookups += kLookupBytes) {
      prefetch_ahead(groups, kBase3Bytes);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i low = _mm256_setzero_si256(), high = low;
        for_values(groups, half, [&](int i, __m256i magnitudes, __m256i signs) __attribute__((always_inline)) {
          const int8_t* const lookup = lookups + half * (kLookupBytes / 2) + i * 64;
          low = _mm256_add_epi8(low, _mm256_sign_epi8(_mm256_shuffle_epi8(load_bytes(lookup), magnitudes), signs));
          const __m256i high_bytes = _mm256_shuffle_epi8(load_bytes(lookup + 32), magnitudes);
          high = _mm256_add_epi8(high, _mm256_sign_epi8(high_bytes, signs));
          asm("" : "+x"(low), "+x"(high));  // one after the other: as trees, sums need more registers than there are
        });
        partial[0] = _mm256_add_epi16(partial[0], _mm256_maddubs_epi16(radix, _mm256_unpacklo_epi8(low, high)));
        partial[1] = _mm256_add_epi16(partial[1], _mm256_maddubs_epi16(radix, _mm256_unpackhi_epi8(low, high)));
      }
    }
    for (int part = 0; part < 2; ++part) {
      const __m256i column = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(partial[part]));
      const __m256i next = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(partial[part], 1));
      total[part] = _mm256_add_epi32(total[part], _mm256_add_epi32(column, next));
    }
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), total[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8), total[1]);
}

void avx2_unpack_base3(const uint8_t* groups, int num_groups, uint8_t* codes) {
  const __m256i one = _mm256_set1_epi8(1);
  const __m256i pairs = both_lanes("\0\1\10\11\2\3\12\13\4\5\14\15\6\7\16\17");
  __m256i weights[3];
  for (int place = 0; place < 3; ++place) {
    weights[place] = _mm256_packs_epi16(both_lanes(kWeights.of[0][place]), both_lanes(kWeights.of[1][place]));
  }
  for (; num_groups > 0; --num_groups, groups += kBase3Bytes, codes += kBase3K * kPanelRows) {
    __m256i first[24];  // by step, [2 columns][16 rows]
    for_values(groups, 0, [&](int i, __m256i magnitudes, __m256i signs) __attribute__((always_inline)) {
      for (int place = 0; place < 3; ++place) {
        first[3 * i + place] = _mm256_sign_epi8(_mm256_shuffle_epi8(weights[place], magnitudes), signs);
      }
    });
    for_values(groups, 1, [&](int i, __m256i magnitudes, __m256i signs) __attribute__((always_inline)) {
      for (int place = 0; place < 3; ++place) {  // to [16 rows][4 columns]
        const __m256i a = first[3 * i + place];
        const __m256i b = _mm256_sign_epi8(_mm256_shuffle_epi8(weights[place], magnitudes), signs);
        const __m256i even = _mm256_permute2x128_si256(a, b, 0x20), odd = _mm256_permute2x128_si256(a, b, 0x31);
        const __m256i low = _mm256_permute4x64_epi64(_mm256_unpacklo_epi8(even, odd), 0xd8);
        const __m256i high = _mm256_permute4x64_epi64(_mm256_unpackhi_epi8(even, odd), 0xd8);
        __m256i* const to = reinterpret_cast<__m256i*>(codes + (3 * i + place) * kLineBytes);
        _mm256_store_si256(to, _mm256_add_epi8(_mm256_shuffle_epi8(low, pairs), one));
        _mm256_store_si256(to + 1, _mm256_add_epi8(_mm256_shuffle_epi8(high, pairs), one));
      }
    });
  }
}

}  // namespace bitdistill
