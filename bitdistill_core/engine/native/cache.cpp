#include "cache.h"

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
