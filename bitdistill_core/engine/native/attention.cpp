// Attention of a layer: keys and values go to the cache, queries look them up.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "workspace.h"

namespace bitdistill {
namespace {

// Norms and rotates `heads` heads of one token.
void rotate_heads(const Kernels& kernels, const ModelConfig& config, const float* norm, const float* cos,
                  const float* sin, int heads, float* row) {
  for (int head = 0; head < heads; ++head, row += config.head_dim) {
    if (norm != nullptr) kernels.rms_norm(row, norm, config.norm_offset, config.norm_eps, config.head_dim, row);
    kernels.rotate(row, cos, sin, config.head_dim);
  }
}

// Rows of attention that a thread takes at once, and how many scores of them it keeps, unless one tile has more.
constexpr int kShareRows = 2 * kMostTiles * kTileTokens, kMostScores = 32768;

}  // namespace

KeyValueHead Model::head_of(Workspace& space, const Batch& batch, int layer, int segment, int kv_head) const {
  if (batch.cache != nullptr) return batch.cache->head(layer, kv_head);
  return space.layer_cache->head(0, kv_head, batch.first_slot[segment]);
}

bool Model::is_single(const Batch& batch, const Tokens& tokens) const {
  return batch.cache != nullptr && batch.num_tokens == 1 && tokens.count == 1 &&
         config.num_heads / config.num_key_value_heads <= kShareRows;
}

void Model::store_keys_and_values(Workspace& space, const Batch& batch, int layer_index, const Tokens& tokens) {
  const Layer& layer = layers_[layer_index];
  const int d = config.head_dim, kv_heads = config.num_key_value_heads;
  const std::size_t stride = row_stride(layer.k.n);
  float* const keys = space.rows.data() + tokens.count * row_stride(layer.q.n);
  const float* const values = keys + tokens.count * stride;
  for_tokens(team_, tokens.count, [&](int first, int last) {
    for (int t = first; t < last; ++t) {
      const std::size_t angle = std::size_t(tokens.position_of[t] - space.first_position) * (d / 2);
      rotate_heads(kernels, config, layer.norms.key, space.cos[layer.rope].data() + angle,
                   space.sin[layer.rope].data() + angle, kv_heads, keys + t * stride);
    }
    for (int head = 0; head < kv_heads; ++head) {  // one after the other: neighbouring positions share their lines
      for (int t = first, end; t < last; t = end) {  // a segment's tokens
        const int segment = tokens.segment_of[t];
        for (end = t + 1; end < last && tokens.segment_of[end] == segment;) ++end;
        const std::size_t at = t * stride + head * d;
        kernels.store_keys_values(head_of(space, batch, layer_index, segment, head), keys + at, values + at, stride,
                                  tokens.position_of[t], end - t, d, config.value_stride());
      }
    }
  });
  // A segment that begins here gets its parent's keys and values, which are all there by now.
  for (int t = 0; t < tokens.count; ++t) {
    const int s = tokens.segment_of[t];
    const Segment& segment = batch.segments[s];
    if (segment.parent < 0 || tokens.position_of[t] != segment.start) continue;
    for (int head = 0; head < kv_heads; ++head) {
      copy_prefix(head_of(space, batch, layer_index, segment.parent, head), head_of(space, batch, layer_index, s, head),
                  segment.start, d);
    }
  }
}

void Model::attend(Workspace& space, const Batch& batch, int layer_index, const Tokens& tokens) {
  const Layer& layer = layers_[layer_index];
  const int d = config.head_dim, kv_heads = config.num_key_value_heads, group = config.num_heads / kv_heads;
  const std::size_t stride = row_stride(layer.q.n);
  float* const q = space.rows.data();
  const auto rotate = [&](int t, const float* norm, int heads, float* row) {
    const std::size_t angle = std::size_t(tokens.position_of[t] - space.first_position) * (d / 2);
    rotate_heads(kernels, config, norm, space.cos[layer.rope].data() + angle, space.sin[layer.rope].data() + angle,
                 heads, row);
  };
  const bool single = is_single(batch, tokens);
  if (!single) {
    for_tokens(team_, tokens.count, [&](int first, int last) {
      for (int t = first; t < last; ++t) rotate(t, layer.norms.query, config.num_heads, q + t * stride);
    });
  }

  // Rows of one kv head are (token, query head of its group); a share is up to kShareRows of them.
  struct Share {
    int segment, first_token, num_tokens, kv_head, first_row;
  };
  std::vector<Share> shares;
  int longest = 0;
  for (int t = 0; t < tokens.count;) {
    const int segment = tokens.segment_of[t];
    int end = t;
    for (; end < tokens.count && tokens.segment_of[end] == segment; ++end) {
      longest = std::max(longest, tokens.position_of[end] + 1);
    }
    for (int head = 0; head < kv_heads; ++head) {
      for (int row = 0; row < (end - t) * group; row += kShareRows) {
        shares.push_back({segment, t, end - t, head, row});
      }
    }
    t = end;
  }
  const int scores_stride = round_up(longest, kKeyBlock) + kKeyBlock;  // no power of two, whose rows share cache lines
  const std::size_t tile_scores = std::size_t(kTileTokens) * scores_stride;
  const int num_tiles = int(std::clamp<std::size_t>(kMostScores / tile_scores, 1, kMostTiles));  // at once
  team_.run(int(shares.size()), [&](int item, int thread) {
    const Share& share = shares[item];
    AttentionTile all;  // what its tiles have in common
    all.head_dim = d;
    all.value_stride = config.value_stride();
    all.scale = config.attention_scale;
    all.head = head_of(space, batch, layer_index, share.segment, share.kv_head);
    if (single) {  // one token of a generation: a step less if each head prepares itself
      const std::size_t kv_stride = row_stride(layer.k.n);
      const int last = tokens.position_of[0] + 1;
      prefetch_head(all.head, layer.window > 0 ? std::max(0, last - layer.window) : 0, last, d);
      float* const key = q + stride + share.kv_head * d;
      rotate(0, layer.norms.key, 1, key);
      kernels.store_keys_values(all.head, key, key + kv_stride, 0, tokens.position_of[0], 1, d, config.value_stride());
      rotate(0, layer.norms.query, group, q + share.kv_head * group * d);
    }
    all.scores_stride = scores_stride;
    float* const scores = space.scratch[thread].scores.get(num_tiles * tile_scores);
    const int num_rows = share.num_tokens * group;
    const int last_row = std::min(num_rows, share.first_row + kShareRows);
    const auto query_of = [&](int row) {
      return q + (share.first_token + row / group) * stride + (share.kv_head * group + row % group) * d;
    };
    for (int begin = share.first_row, end; begin < last_row; begin = end) {
      end = std::min(last_row, begin + num_tiles * kTileTokens);
      AttentionTile tiles[kMostTiles];
      int count = 0;
      for (int row = begin; row < end; row += kTileTokens, ++count) {
        AttentionTile& tile = tiles[count] = all;
        tile.scores = scores + count * tile_scores;
        tile.rows = std::min(kTileTokens, end - row);
        for (int r = 0; r < tile.rows; ++r) {
          const int position = tokens.position_of[share.first_token + (row + r) / group];
          tile.query[r] = tile.out[r] = query_of(row + r);
          tile.first[r] = layer.window > 0 ? std::max(0, position + 1 - layer.window) : 0;
          tile.last[r] = position + 1;
        }
      }
      kernels.attend(tiles, count);
    }
  });
}

}  // namespace bitdistill
