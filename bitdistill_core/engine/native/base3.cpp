#include "base3.h"

#include <array>
#include <cstring>

namespace bitdistill {
namespace {

// Two bits a code of the three in each value, the first lowest.
constexpr std::array<uint8_t, 32> kThreeCodes = [] {
  std::array<uint8_t, 32> codes{};
  for (int value = 0; value < kBase3Values; ++value) {
    codes[value] = uint8_t(value % 3 | value / 3 % 3 << 2 | value / 9 << 4);
  }
  return codes;
}();

// A value of 27 or more has bits 3 and 4, and bit 2 or both of the lowest two.
bool is_sound_group(const uint8_t* group) {
  uint8_t found = 0;
  for (int line = 0; line < 4; ++line) {
    for (int j = 0; j < kLineBytes; ++j) {
      const uint8_t nibbles = group[line * kLineBytes + j];
      const uint8_t too_large = nibbles >> 3 & (nibbles >> 2 | (nibbles >> 1 & nibbles)) & 0x11;  // but for bit 4
      const uint8_t bits = group[4 * kLineBytes + j] >> 2 * line;
      found |= too_large & ((bits & 1) | (bits & 2) << 3);
    }
  }
  return found == 0;
}

// Code 3 is no ternary weight.
bool has_code_3(const uint8_t* bytes, std::size_t count) {
  uint8_t found = 0;
  for (std::size_t i = 0; i < count; ++i) found |= bytes[i] & bytes[i] >> 1;
  return (found & 0x55) != 0;
}

// A byte of each of the six lines is four of the 24 steps of its row and column: 48 bits, six of each value.
void expand_group(const uint8_t* group, uint8_t* lines) {
  for (int j = 0; j < kLineBytes; ++j) {
    uint64_t codes = 0;
    for (int i = 0; i < 8; ++i) {
      const int nibble = group[i / 2 * kLineBytes + j] >> i % 2 * 4 & 15, bit = group[4 * kLineBytes + j] >> i & 1;
      codes |= uint64_t(kThreeCodes[bit << 4 | nibble]) << 6 * i;
    }
    for (int line = 0; line < kBase3Lines; ++line) lines[line * kLineBytes + j] = uint8_t(codes >> 8 * line);
  }
}

// Calls on_group(group) and on_lines(lines, bytes) for all of `linear`, in order.
template <class OnGroup, class OnLines>
void for_parts(const Linear& linear, OnGroup&& on_group, OnLines&& on_lines) {
  const std::size_t group_bytes = std::size_t(linear.block_groups()) * kBase3Bytes;
  const uint8_t* block = linear.codes;
  for (std::size_t i = 0; i < std::size_t(linear.num_panels()) * linear.num_blocks; ++i, block += linear.block_bytes()) {
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
