// Keys and values of the tokens that came before.
#pragma once

#include <cstdlib>
#include <memory>

#include "kernels.h"

namespace bitdistill {

// Elements from one position's value to the next.
inline int value_stride(int head_dim) { return (head_dim + 15) / 16 * 16; }

// Keys and values of every layer of one sequence.
class KeyValueCache {
 public:
  KeyValueCache(int num_layers, int num_heads, int head_dim, int capacity, bool half);

  KeyValueHead head(int layer, int index, int first_slot = 0) const;
  std::size_t bytes() const { return num_layers_ * layer_bytes_; }

  const int capacity;
  const bool half;
  int length = 0;

 private:
  struct Free {
    void operator()(uint8_t* data) const { std::free(data); }
  };

  int num_layers_;
  std::size_t key_bytes_, value_bytes_, layer_bytes_;  // of one head, one head, one layer
  std::unique_ptr<uint8_t, Free> data_;
};

// Asks for the last keys of the positions [first, last) of a head, and for some kilobytes of keys and values from
// `first` on: the weights that were read since the last token have pushed them out of the caches.
void prefetch_head(const KeyValueHead& head, int first, int last, int head_dim);

// Copies the first `length` positions of a head, float32. The last block may already hold later positions of `to`.
void copy_prefix(const KeyValueHead& from, const KeyValueHead& to, int length, int head_dim);

}  // namespace bitdistill
