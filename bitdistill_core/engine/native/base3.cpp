#include "base3.h"

#include <cstring>

namespace bitdistill {
namespace {

// A magnitude of 14 or 15 has its upper three bits.
bool is_sound_group(const uint8_t* group) {
  uint8_t found = 0;
  for (int i = 0; i < 4 * kLineBytes; ++i) found |= group[i] >> 3 & group[i] >> 2 & group[i] >> 1;
  return (found & 0x11) == 0;
}

// Code 3 is no ternary weight.
bool has_code_3(const uint8_t* bytes, std::size_t count) {
  uint8_t found = 0;
  for (std::size_t i = 0; i < count; ++i) found |= bytes[i] & bytes[i] >> 1;
  return (found & 0x55) != 0;
}

// The three codes of a value, two bits each, the first lowest. Comparisons, as vectors of bytes have no division.
inline uint8_t three_codes(uint8_t magnitude, uint8_t is_negative) {
  uint8_t value = uint8_t(13 + (is_negative ? -magnitude : magnitude));
  const uint8_t third = uint8_t((value >= 9) + (value >= 18));
  value = uint8_t(value - 9 * third);
  const uint8_t second = uint8_t((value >= 3) + (value >= 6));
  return uint8_t((value - 3 * second) | second << 2 | third << 4);
}

// A byte of each of the six lines is four of the 24 steps of its row and column; four values, 24 bits, are three lines.
void expand_group(const uint8_t* __restrict group, uint8_t* __restrict lines) {
  const uint8_t* const signs = group + 4 * kLineBytes;
  for (int half = 0; half < 2; ++half, group += 2 * kLineBytes, lines += 3 * kLineBytes) {
    uint8_t by_column[3][kLineBytes];
    for (int i = 0; i < kLineBytes; ++i) {
      const uint8_t low = group[i], high = group[kLineBytes + i], bits = uint8_t(signs[i] >> 4 * half);
      const uint8_t a = three_codes(low & 15, bits & 1), b = three_codes(low >> 4, bits & 2);
      const uint8_t c = three_codes(high & 15, bits & 4), d = three_codes(high >> 4, bits & 8);
      by_column[0][i] = uint8_t(a | b << 6);
      by_column[1][i] = uint8_t(b >> 2 | c << 4);
      by_column[2][i] = uint8_t(c >> 4 | d << 2);
    }
    for (int line = 0; line < 3; ++line) {
      for (int i = 0; i < kLineBytes; ++i) lines[line * kLineBytes + i] = by_column[line][i % 4 * kPanelRows + i / 4];
    }
  }
}

// Calls on_group(group) and on_lines(lines, bytes) for all of `linear`, in order.
template <class OnGroup, class OnLines>
void for_parts(const Linear& linear, OnGroup&& on_group, OnLines&& on_lines) {
  const std::size_t group_bytes = std::size_t(linear.block_groups()) * kBase3Bytes;
  const uint8_t* block = linear.codes;
  for (std::size_t i = 0; i < std::size_t(linear.num_panels()) * linear.num_blocks;
       ++i, block += linear.block_bytes()) {
    for (int group = 0; group < linear.block_groups(); ++group) on_group(block + std::size_t(group) * kBase3Bytes);
    on_lines(block + group_bytes, linear.block_bytes() - group_bytes);
  }
}

}  // namespace

bool is_sound(const Linear& linear) {
  bool is_sound = true;
  for_parts(
      linear, [&](const uint8_t* group) { is_sound &= is_sound_group(group); },
      [&](const uint8_t* lines, std::size_t bytes) { is_sound &= !has_code_3(lines, bytes); });
  return is_sound;
}

void expand_base3(const Linear& linear, uint8_t* lines) {
  for_parts(
      linear,
      [&](const uint8_t* group) {
        expand_group(group, lines);
        lines += kBase3Lines * kLineBytes;
      },
      [&](const uint8_t* from, std::size_t bytes) {
        std::memcpy(lines, from, bytes);
        lines += bytes;
      });
}

}  // namespace bitdistill
