// What model.cpp and attention.cpp share: the segments of a call, and the buffers it works in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "model.h"

namespace bitdistill {

struct Model::Workspace {
  Buffer<float> x;  // the residual stream of the whole batch
  Buffer<float> rows;    // of a chunk: queries, keys and values; attention in place of the queries; then the gated MLP
  Buffer<float> branch;
  Int8Tokens normed, normed_k, normed_v;  // the latter two where SubLN gives each linear a norm of its own
  std::vector<std::vector<float>> cos, sin;  // of each kind of rotary embedding, (positions, head_dim / 2)
  int first_position = 0;
  std::unique_ptr<KeyValueCache> layer_cache;  // of all segments, used layer after layer where there is no cache
  std::vector<Scratch> scratch;
};

// Work on tokens [first, last); few are done sooner than they are handed out.
template <class Work>
void for_tokens(Team& team, int count, Work&& work) {
  if (count <= kStreamTokens) return work(0, count);
  constexpr int kTokens = 16;
  team.run((count + kTokens - 1) / kTokens,
           [&](int item, int) { work(item * kTokens, std::min(count, (item + 1) * kTokens)); });
}

// The segments of one call, with what each token needs.
struct Model::Batch {
  const std::vector<Segment>& segments;
  std::vector<int> first_token;  // of each segment, in the batch
  std::vector<int> first_slot;   // of each segment's position 0, in the workspace's cache
  std::vector<int> segment_of, position_of;  // of each token
  KeyValueCache* cache;
  int num_tokens = 0, num_slots = 0, last_position = 0;

  Batch(const std::vector<Segment>& segments, KeyValueCache* cache) : segments(segments), cache(cache) {
    for (std::size_t s = 0; s < segments.size(); ++s) {
      first_token.push_back(num_tokens);
      first_slot.push_back(num_slots);
      for (int i = 0; i < segments[s].length; ++i) {
        segment_of.push_back(int(s));
        position_of.push_back(segments[s].start + i);
      }
      num_tokens += segments[s].length;
      const int64_t end = int64_t(num_slots) + round_up(segments[s].start + segments[s].length, kKeyBlock);
      if (end > INT32_MAX) throw std::invalid_argument("a batch has too many segments behind long ones");
      num_slots = int(end);
      last_position = std::max(last_position, segments[s].start + segments[s].length);
    }
  }
};

// From token to token in a workspace, for n columns: not a multiple of 4 KiB, where rows share a few sets of a cache.
inline std::size_t row_stride(int n) {
  const std::size_t stride = round_up(n, kPanelRows);
  return stride % 1024 == 0 ? stride + kPanelRows : stride;
}

// Rows of the residual stream that go through a layer together, and which tokens they are.
struct Model::Tokens {
  float* x;  // (count, stride)
  std::size_t stride;
  const int* segment_of;
  const int* position_of;
  int count;
};

}  // namespace bitdistill
