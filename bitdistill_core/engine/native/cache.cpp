#include "cache.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace bitdistill {

KeyValueCache::KeyValueCache(int num_layers, int num_heads, int head_dim, int capacity, bool half)
    : capacity((capacity + kKeyBlock - 1) / kKeyBlock * kKeyBlock), half(half), num_layers_(num_layers) {
  const std::size_t element = half ? sizeof(uint16_t) : sizeof(float);
  key_bytes_ = element * head_dim * this->capacity;
  value_bytes_ = element * value_stride(head_dim) * this->capacity;
  layer_bytes_ = (key_bytes_ + value_bytes_) * num_heads;
  // Zeros: positions that are not there yet are read along with their block. Memory comes when it is touched.
  data_.reset(static_cast<uint8_t*>(std::calloc(bytes(), 1)));
  if (!data_) throw std::bad_alloc();
}

KeyValueHead KeyValueCache::head(int layer, int index, int first_slot) const {
  uint8_t* begin = data_.get() + layer * layer_bytes_ + index * (key_bytes_ + value_bytes_);
  return {begin + key_bytes_ / capacity * first_slot, begin + key_bytes_ + value_bytes_ / capacity * first_slot, half};
}

void prefetch_head(const KeyValueHead& head, int first, int last, int head_dim) {
  constexpr std::size_t kMost = 16384;  // of keys or values: longer runs the processor notices by itself
  const std::size_t element = head.half ? sizeof(uint16_t) : sizeof(float);
  const std::size_t block = element * head_dim * kKeyBlock, value = element * value_stride(head_dim);
  const auto ask = [](const void* begin, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(begin) + i);
  };
  const char* const keys = static_cast<const char*>(head.key);
  const std::size_t first_block = first / kKeyBlock, last_block = (last - 1) / kKeyBlock;
  ask(keys + last_block * block, block);
  ask(keys + first_block * block, std::min((last_block - first_block) * block, kMost));
  ask(static_cast<const char*>(head.value) + first * value, std::min((last - first) * value, kMost));
}

void copy_prefix(const KeyValueHead& from, const KeyValueHead& to, int length, int head_dim) {
  const auto* from_key = static_cast<const float*>(from.key);
  auto* to_key = static_cast<float*>(to.key);
  const int whole = length / kKeyBlock * kKeyBlock;
  std::memcpy(to_key, from_key, sizeof(float) * whole * head_dim);
  for (int i = 0; i < head_dim; ++i) {
    const std::size_t row = std::size_t(whole) * head_dim + i * kKeyBlock;
    std::memcpy(to_key + row, from_key + row, sizeof(float) * (length - whole));
  }
  std::memcpy(to.value, from.value, sizeof(float) * length * value_stride(head_dim));
}

}  // namespace bitdistill
