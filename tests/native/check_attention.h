// Checks of store_keys_values and attend.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "checker.h"

namespace {

// IEEE binary16, through double precision.
double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

double round_to_half(double value) {
  const double magnitude = std::fabs(value);
  if (magnitude >= 65520) return std::copysign(INFINITY, value);
  const int shift = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14) - 10;
  return std::copysign(std::ldexp(std::nearbyint(std::ldexp(magnitude, -shift)), shift), value);
}

// Every float16, the floats half-way to its neighbour and those just beside that, stored and read back. A softmax over
// one position is 1, so attend returns the value itself.
void check_halves(Checker& checker) {
  const int head_dim = 64;
  Guarded<uint16_t> key(head_dim * kKeyBlock), value(head_dim);
  Guarded<float> query(head_dim), zeros(head_dim), values(head_dim), out(head_dim), scores(kTileTokens * kKeyBlock);
  std::fill_n(key.data, key.size, uint16_t(0));
  fill(zeros, 0.0f, 0.0f);
  fill(query, 0.0f, 0.0f);
  const KeyValueHead head = {key.data, value.data, true};
  AttentionTile tile = {{query}, {out}, {0}, {1}, 1, head_dim, head_dim, 1.0f, head, scores, kKeyBlock};
  for (int first = 0; first < 0x10000; first += head_dim / 4) {
    for (int i = 0; i < head_dim / 4; ++i) {
      const double low = half_value(uint16_t(first + i)), high = half_value(uint16_t(first + i + 1));
      const float middle = float(std::isfinite(low) && std::isfinite(high) ? (low + high) / 2 : low);
      const float four[4] = {float(low), middle, std::nextafterf(middle, 1e9f), std::nextafterf(middle, -1e9f)};
      std::copy_n(four, 4, values + 4 * i);
    }
    checker.kernels.store_keys_values(head, zeros, values, head_dim, 0, 1, head_dim, head_dim);
    checker.kernels.attend(&tile, 1);
    for (int i = 0; i < head_dim; ++i) {
      const double expected = std::isnan(values[i]) ? values[i] : round_to_half(values[i]);
      const bool both_nan = std::isnan(expected) && std::isnan(out[i]) && std::isnan(half_value(value[i]));
      checker.check(both_nan || (out[i] == expected && half_value(value[i]) == expected),
                    "float16 of %.9g is %04x and read as %.9g, not %.9g", values[i], value[i], out[i], expected);
    }
  }
}

// Keys and values of random numbers at [0, length), NaN where nothing was stored.
struct Cache {
  Cache(const Kernels& kernels, int length, int head_dim, int value_stride, bool half)
      : capacity((length + kKeyBlock - 1) / kKeyBlock * kKeyBlock),
        key_bytes(std::size_t(capacity) * head_dim * (half ? 2 : 4)),
        value_bytes((std::size_t(length - 1) * value_stride + (head_dim + 15) / 16 * 16) * (half ? 2 : 4)),
        head{key_bytes.data, value_bytes.data, half} {
    std::memset(key_bytes, 0xff, key_bytes.size);
    std::memset(value_bytes, 0xff, value_bytes.size);
    for (int position = 0, count; position < length; position += count) {  // in runs of any length
      count = std::min(length - position, random_int(1, 40));
      const std::size_t stride = head_dim + random_int(0, 3), size = (count - 1) * stride + head_dim;
      Guarded<float> key(size), value(size);
      fill(key, -2.0f, 2.0f);
      fill(value, -2.0f, 2.0f);
      kernels.store_keys_values(head, key, value, stride, position, count, head_dim, value_stride);
      for (int t = 0; t < count; ++t) {
        for (int i = 0; i < head_dim; ++i) {
          keys.push_back(half ? round_to_half(key[t * stride + i]) : key[t * stride + i]);
          values.push_back(half ? round_to_half(value[t * stride + i]) : value[t * stride + i]);
        }
      }
    }
  }

  // What lies at an element of the keys' or the values' memory.
  double stored(const uint8_t* bytes, std::size_t index) const {
    if (head.half) {
      uint16_t bits;
      std::memcpy(&bits, bytes + sizeof bits * index, sizeof bits);
      return half_value(bits);
    }
    float value;
    std::memcpy(&value, bytes + sizeof value * index, sizeof value);
    return value;
  }

  int capacity;
  Guarded<uint8_t> key_bytes, value_bytes;
  KeyValueHead head;
  std::vector<double> keys, values;  // [position][head_dim]
};

// Every key and value where it belongs, and nothing behind the last.
void check_stored(Checker& checker, int length, int head_dim, bool half) {
  const int value_stride = (head_dim + 15) / 16 * 16;
  const Cache cache(checker.kernels, length, head_dim, value_stride, half);
  for (int position = 0; position < cache.capacity; ++position) {
    for (int i = 0; i < head_dim; ++i) {
      const std::size_t block = std::size_t(position / kKeyBlock) * head_dim;
      const double key = cache.stored(cache.key_bytes.data, (block + i) * kKeyBlock + position % kKeyBlock);
      const std::size_t index = std::size_t(position) * head_dim + i;
      const bool is_right = position < length ? key == cache.keys[index] : std::isnan(key);
      checker.check(is_right, "key %d of position %d of %d is %.9g", i, position, length, key);
      if (position >= length) continue;
      const double value = cache.stored(cache.value_bytes.data, std::size_t(position) * value_stride + i);
      checker.check(value == cache.values[index], "value %d of position %d is %.9g", i, position, value);
    }
  }
}

void check_row(Checker& checker, const Cache& cache, const AttentionTile& tile, int row) {
  const int d = tile.head_dim, first = tile.first[row], last = tile.last[row];
  std::vector<double> scores, expected(d), magnitude(d);
  double largest = -INFINITY, sum = 0;
  for (int position = first; position < last; ++position) {
    double score = 0;
    for (int i = 0; i < d; ++i) score += double(tile.query[row][i]) * cache.keys[std::size_t(position) * d + i];
    scores.push_back(score * tile.scale);
    largest = std::max(largest, scores.back());
  }
  for (double& score : scores) sum += score = std::exp(score - largest);
  for (int position = first; position < last; ++position) {
    for (int i = 0; i < d; ++i) {
      const double term = scores[position - first] / sum * cache.values[std::size_t(position) * d + i];
      expected[i] += term;
      magnitude[i] += std::fabs(term);
    }
  }
  for (int i = 0; i < d; ++i) {
    checker.near(tile.out[row][i], expected[i], 3e-6 * magnitude[i], "out", last - first, i);
  }
}

// Six rows as one tile of each size, against double precision and, bit by bit, against each row alone.
void check_tile(Checker& checker, int head_dim, bool half, int length, bool is_windowed) {
  const int value_stride = (head_dim + 15) / 16 * 16 + 16 * random_int(0, 1);
  Cache cache(checker.kernels, length, head_dim, value_stride, half);
  Guarded<float> query(std::size_t(kTileTokens) * head_dim), out(query.size), alone(query.size);
  Guarded<float> scores(std::size_t(kTileTokens) * cache.capacity);
  fill(query, -2.0f, 2.0f);
  AttentionTile tile = {};
  tile.head_dim = head_dim;
  tile.value_stride = value_stride;
  tile.scale = 1.0f / std::sqrt(float(head_dim));
  tile.head = cache.head;
  tile.scores_stride = cache.capacity;
  int firsts[kTileTokens], lasts[kTileTokens];
  for (int row = 0; row < kTileTokens; ++row) {
    lasts[row] = row == 0 ? length : random_int(std::max(1, length - 20), length);
    firsts[row] = is_windowed ? random_int(0, lasts[row] - 1) : 0;
  }
  for (int row = 0; row < kTileTokens; ++row) {
    tile.query[0] = query + std::size_t(row) * head_dim;
    tile.out[0] = alone + std::size_t(row) * head_dim;
    tile.first[0] = firsts[row];
    tile.last[0] = lasts[row];
    tile.rows = 1;
    tile.scores = scores + std::size_t(kTileTokens - 1) * cache.capacity;
    checker.kernels.attend(&tile, 1);
  }
  for (int rows = 1; rows <= kTileTokens; ++rows) {
    std::memset(out, 0xff, out.size * sizeof(float));
    for (int row = 0; row < kTileTokens; ++row) {
      tile.query[row] = query + std::size_t(row) * head_dim;
      tile.out[row] = out + std::size_t(row) * head_dim;
      tile.first[row] = firsts[row];
      tile.last[row] = lasts[row];
    }
    tile.rows = rows;
    tile.scores = scores;
    checker.kernels.attend(&tile, 1);
    for (int row = 0; row < rows; ++row) {
      if (rows == kTileTokens) check_row(checker, cache, tile, row);
      checker.same(tile.out[row], alone + std::size_t(row) * head_dim, head_dim, "row alone and in a tile", rows, row);
    }
    for (std::size_t i = std::size_t(rows) * head_dim; i < out.size; ++i) {
      checker.check(std::isnan(out[i]), "rows=%d head_dim=%d wrote a row too many", rows, head_dim);
    }
  }
}

// Several tiles at once, outputs in the place of queries, against each tile alone.
void check_tiles(Checker& checker, int head_dim, bool half, int length, bool is_windowed) {
  const int value_stride = (head_dim + 15) / 16 * 16;
  const std::size_t tile_size = std::size_t(kTileTokens) * head_dim;
  Cache cache(checker.kernels, length, head_dim, value_stride, half);
  Guarded<float> rows(kMostTiles * tile_size), alone(rows.size);
  Guarded<float> scores(std::size_t(kMostTiles) * kTileTokens * cache.capacity);
  fill(rows, -2.0f, 2.0f);
  std::memcpy(alone, rows, rows.size * sizeof(float));
  AttentionTile tiles[kMostTiles] = {};
  for (int i = 0; i < kMostTiles; ++i) {
    AttentionTile& tile = tiles[i];
    tile.head_dim = head_dim;
    tile.value_stride = value_stride;
    tile.scale = 1.0f / std::sqrt(float(head_dim));
    tile.head = cache.head;
    tile.scores_stride = cache.capacity;
    tile.scores = scores + std::size_t(i) * kTileTokens * cache.capacity;
    tile.rows = random_int(1, kTileTokens);
    for (int row = 0; row < tile.rows; ++row) {
      tile.last[row] = random_int(1, length);
      tile.first[row] = is_windowed ? random_int(0, tile.last[row] - 1) : 0;
      tile.query[row] = tile.out[row] = alone + i * tile_size + std::size_t(row) * head_dim;
    }
    checker.kernels.attend(&tile, 1);
    for (int row = 0; row < tile.rows; ++row) {
      tile.query[row] = tile.out[row] = rows + i * tile_size + std::size_t(row) * head_dim;
    }
  }
  const int count = random_int(2, kMostTiles);
  checker.kernels.attend(tiles, count);
  for (int i = 0; i < count; ++i) {
    checker.same(rows + i * tile_size, alone + i * tile_size, tile_size, "tile alone and beside others", i, count);
  }
}

void check_attention(Checker& checker) {
  checker.function = "store_keys_values";
  check_halves(checker);
  for (int head_dim : {4, 16, 20, 128}) {
    for (int length : {1, 8, 15, 50, 130}) {
      for (const bool half : {false, true}) check_stored(checker, length, head_dim, half);
    }
  }
  checker.function = "attend";
  for (int head_dim : {4, 16, 80, 128, 256}) {
    for (int length : {1, 2, 15, 16, 17, 33, 100, 257}) {
      for (int i = 0; i < 4; ++i) check_tile(checker, head_dim, i % 2, length, i / 2);
      for (int i = 0; i < 4; ++i) check_tiles(checker, head_dim, i % 2, length, i / 2);
    }
  }
}

}  // namespace
