#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace bitdistill {
namespace {

// Keys and values of the first `length` positions, float32. The last block may already hold later positions of `to`.
void copy_prefix(const KeyValueHead& from, const KeyValueHead& to, int length, int head_dim, int value_stride) {
  const auto* from_key = static_cast<const float*>(from.key);
  auto* to_key = static_cast<float*>(to.key);
  const int whole = length / kKeyBlock * kKeyBlock;
  std::memcpy(to_key, from_key, sizeof(float) * whole * head_dim);
  for (int i = 0; i < head_dim; ++i) {
    const std::size_t row = std::size_t(whole) * head_dim + i * kKeyBlock;
    std::memcpy(to_key + row, from_key + row, sizeof(float) * (length - whole));
  }
  std::memcpy(to.value, from.value, sizeof(float) * length * value_stride);
}

// Tokens that go through a layer together: enough to share unpacked weights, few enough that the buffers stay small.
constexpr int kChunkTokens = 24 * kTileTokens;

}  // namespace

struct Model::Workspace {
  Buffer<float> x;  // the residual stream of the whole batch
  Buffer<float> q, k, v, attended, inner, branch;
  Int8Tokens normed, normed_k, normed_v;  // the latter two where SubLN gives each linear a norm of its own
  std::vector<std::vector<float>> cos, sin;  // of each kind of rotary embedding, (positions, head_dim / 2)
  int first_position = 0;
  std::unique_ptr<KeyValueCache> layer_cache;  // of all segments, used layer after layer where there is no cache
  std::vector<Scratch> scratch;
};

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
      num_slots += round_up(segments[s].start + segments[s].length, kKeyBlock);
      last_position = std::max(last_position, segments[s].start + segments[s].length);
    }
  }
};

KeyValueCache::KeyValueCache(const ModelConfig& config, int num_layers, int capacity, bool half)
    : capacity(round_up(capacity, kKeyBlock)), half(half), num_layers_(num_layers) {
  const std::size_t element = half ? sizeof(uint16_t) : sizeof(float);
  key_bytes_ = element * config.head_dim * this->capacity;
  value_bytes_ = element * config.value_stride() * this->capacity;
  layer_bytes_ = (key_bytes_ + value_bytes_) * config.num_key_value_heads;
  // Zeros: positions that are not there yet are read along with their block. Memory comes when it is touched.
  data_.reset(static_cast<uint8_t*>(std::calloc(bytes(), 1)));
  if (!data_) throw std::bad_alloc();
}

KeyValueHead KeyValueCache::head(int layer, int index, int first_slot) const {
  uint8_t* begin = data_.get() + layer * layer_bytes_ + index * (key_bytes_ + value_bytes_);
  return {begin + key_bytes_ / capacity * first_slot, begin + key_bytes_ + value_bytes_ / capacity * first_slot, half};
}

Model::Model(ModelConfig config, std::vector<Layer> layers, const float* final_norm, Int8Rows embedding, Int8Rows head,
             const Kernels& kernels, int num_threads)
    : config(std::move(config)),
      kernels(kernels),
      num_layers(int(layers.size())),
      hidden_stride(round_up(this->config.hidden_size, kGroupK)),
      layers_(std::move(layers)),
      final_norm_(final_norm),
      embedding_(embedding),
      head_(head),
      team_(num_threads) {}

Model::~Model() = default;

std::unique_ptr<Model::Workspace> Model::take_workspace() {
  const std::lock_guard<std::mutex> lock(idle_mutex_);
  if (idle_.empty()) {
    auto workspace = std::make_unique<Workspace>();
    workspace->scratch.resize(team_.num_threads());
    return workspace;
  }
  std::unique_ptr<Workspace> workspace = std::move(idle_.back());
  idle_.pop_back();
  return workspace;
}

void Model::forward(const std::vector<Segment>& segments, const std::vector<int>& outputs, KeyValueCache* cache,
                    float* hidden) {
  const Batch batch(segments, cache);
  std::unique_ptr<Workspace> workspace = take_workspace();
  Workspace& space = *workspace;

  // Angles of the positions in the batch.
  space.first_position = batch.last_position;
  for (const Segment& segment : segments) space.first_position = std::min(space.first_position, segment.start);
  const int half_dim = config.head_dim / 2;
  space.cos.resize(config.frequencies.size());
  space.sin.resize(config.frequencies.size());
  for (std::size_t kind = 0; kind < config.frequencies.size(); ++kind) {
    space.cos[kind].resize(std::size_t(batch.last_position - space.first_position) * half_dim);
    space.sin[kind].resize(space.cos[kind].size());
    for (int position = space.first_position; position < batch.last_position; ++position) {
      const std::size_t row = std::size_t(position - space.first_position) * half_dim;
      for (int i = 0; i < half_dim; ++i) {
        const float angle = float(position) * config.frequencies[kind][i];
        space.cos[kind][row + i] = std::cos(angle);
        space.sin[kind][row + i] = std::sin(angle);
      }
    }
  }

  if (cache == nullptr && (!space.layer_cache || space.layer_cache->capacity < batch.num_slots)) {
    space.layer_cache.reset();
    space.layer_cache = std::make_unique<KeyValueCache>(config, 1, batch.num_slots, false);
  }

  // Embedding rows come from the file, a token each; neighbours are often the same.
  float* x = space.x.get(std::size_t(batch.num_tokens) * hidden_stride);
  {
    std::vector<int> id(1);
    std::vector<int8_t> w_int8(embedding_.padded_size());
    int token = 0, previous = -1;
    for (const Segment& segment : segments) {
      for (int i = 0; i < segment.length; ++i, ++token) {
        id[0] = segment.ids[i];
        if (id[0] != previous) read_rows(kernels, embedding_, id, w_int8.data());
        previous = id[0];
        const float scale = embedding_.row_scale[id[0]];
        float* row = x + std::size_t(token) * hidden_stride;
        for (int d = 0; d < hidden_stride; ++d) row[d] = float(w_int8[d]) * scale;
        if (config.embedding_multiplier != 1.0f) {
          for (int d = 0; d < hidden_stride; ++d) row[d] *= config.embedding_multiplier;
        }
      }
    }
  }

  for (int layer = 0; layer < num_layers; ++layer) {
    for (int first = 0; first < batch.num_tokens; first += kChunkTokens) {
      run_chunk(space, batch, layer, first, std::min(kChunkTokens, batch.num_tokens - first));
    }
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    float* out = hidden + i * hidden_stride;
    std::memset(out, 0, sizeof(float) * hidden_stride);
    kernels.rms_norm(x + std::size_t(outputs[i]) * hidden_stride, final_norm_, config.norm_offset, config.norm_eps,
                     config.hidden_size, out);
  }
  if (cache != nullptr) cache->length += batch.num_tokens;
  const std::lock_guard<std::mutex> lock(idle_mutex_);
  idle_.push_back(std::move(workspace));
}

void Model::run_chunk(Workspace& space, const Batch& batch, int layer_index, int first, int count) {
  const Layer& layer = layers_[layer_index];
  const std::size_t q_stride = round_up(layer.q.n, kPanelRows), kv_stride = round_up(layer.k.n, kPanelRows);
  const std::size_t inner_stride = round_up(layer.gate.n, kPanelRows);
  float* x = space.x.data() + std::size_t(first) * hidden_stride;
  float* q = space.q.get(count * q_stride);
  float* k = space.k.get(count * kv_stride);
  float* v = space.v.get(count * kv_stride);
  Scratch* scratch = space.scratch.data();
  const auto norm = [&](const float* weight) { return Norm{weight, config.norm_offset, config.norm_eps}; };
  const auto sub_norm = [&](const Linear& linear) { return Norm{linear.input_norm, 0, config.sub_norm_eps}; };
  const auto quantize = [&](const float* from, std::size_t stride, int size, const Norm& outer, const Norm& inner,
                            Int8Tokens& to) {
    quantize_tokens(team_, kernels, scratch, from, stride, size, count, outer, inner, to);
  };
  // A linear that adds to the residual stream, normed on its way there in Gemma.
  const auto add_branch = [&](const Linear& linear, const float* post_norm) {
    if (post_norm == nullptr) {
      const Product product{&linear, &space.normed, x, std::size_t(hidden_stride), true};
      return multiply(team_, kernels, scratch, &product, 1);
    }
    float* branch = space.branch.get(std::size_t(count) * hidden_stride);
    const Product product{&linear, &space.normed, branch, std::size_t(hidden_stride), false};
    multiply(team_, kernels, scratch, &product, 1);
    for (int t = 0; t < count; ++t) {
      float* row = branch + std::size_t(t) * hidden_stride;
      kernels.rms_norm(row, post_norm, config.norm_offset, config.norm_eps, config.hidden_size, row);
      for (int d = 0; d < config.hidden_size; ++d) x[std::size_t(t) * hidden_stride + d] += row[d];
    }
  };

  const Norm input = norm(layer.norms.input);
  quantize(x, hidden_stride, config.hidden_size, input, sub_norm(layer.q), space.normed);
  const bool own_norms = layer.k.input_norm != nullptr;
  if (own_norms) {
    quantize(x, hidden_stride, config.hidden_size, input, sub_norm(layer.k), space.normed_k);
    quantize(x, hidden_stride, config.hidden_size, input, sub_norm(layer.v), space.normed_v);
  }
  const Product projections[] = {{&layer.q, &space.normed, q, q_stride, false},
                                 {&layer.k, own_norms ? &space.normed_k : &space.normed, k, kv_stride, false},
                                 {&layer.v, own_norms ? &space.normed_v : &space.normed, v, kv_stride, false}};
  multiply(team_, kernels, scratch, projections, 3);
  attend(space, batch, layer_index, first, count);

  quantize(space.attended.data(), q_stride, layer.o.k, Norm{}, sub_norm(layer.o), space.normed);
  add_branch(layer.o, config.has_feedforward_norms ? layer.norms.post_attention : nullptr);

  const Norm before = norm(config.has_feedforward_norms ? layer.norms.pre_feedforward : layer.norms.post_attention);
  quantize(x, hidden_stride, config.hidden_size, before, sub_norm(layer.gate), space.normed);
  if (own_norms) quantize(x, hidden_stride, config.hidden_size, before, sub_norm(layer.up), space.normed_k);
  float* inner = space.inner.get(count * inner_stride);
  multiply_gated(team_, kernels, scratch, {&layer.gate, &space.normed, inner, inner_stride, false},
                 {&layer.up, own_norms ? &space.normed_k : &space.normed, nullptr, 0, false}, config.activation);
  quantize(inner, inner_stride, layer.down.k, Norm{}, sub_norm(layer.down), space.normed);
  add_branch(layer.down, config.has_feedforward_norms ? layer.norms.post_feedforward : nullptr);
}

void Model::attend(Workspace& space, const Batch& batch, int layer_index, int first, int count) {
  const Layer& layer = layers_[layer_index];
  const int d = config.head_dim, kv_heads = config.num_key_value_heads, group = config.num_heads / kv_heads;
  const int value_stride = config.value_stride();
  const std::size_t q_stride = round_up(layer.q.n, kPanelRows), kv_stride = round_up(layer.k.n, kPanelRows);
  float* const q = space.q.data();
  float* const k = space.k.data();
  float* const attended = space.attended.get(count * q_stride);
  const auto head_of = [&](int segment, int kv_head) {
    if (batch.cache != nullptr) return batch.cache->head(layer_index, kv_head);
    return space.layer_cache->head(0, kv_head, batch.first_slot[segment]);
  };

  // Norm and rotate queries and keys, store keys and values.
  const auto prepare = [&](int t) {
    const int position = batch.position_of[first + t], segment = batch.segment_of[first + t];
    const std::size_t angle = std::size_t(position - space.first_position) * (d / 2);
    const float *cos = space.cos[layer.rope].data() + angle, *sin = space.sin[layer.rope].data() + angle;
    const auto turn = [&](float* row, int heads, const float* norm) {
      for (int head = 0; head < heads; ++head) {
        float* x = row + head * d;
        if (norm != nullptr) kernels.rms_norm(x, norm, config.norm_offset, config.norm_eps, d, x);
        kernels.rotate(x, cos, sin, d);
      }
    };
    turn(q + t * q_stride, config.num_heads, layer.norms.query);
    turn(k + t * kv_stride, kv_heads, layer.norms.key);
    for (int head = 0; head < kv_heads; ++head) {
      kernels.store_key_value(head_of(segment, head), k + t * kv_stride + head * d,
                              space.v.data() + t * kv_stride + head * d, position, d, value_stride);
    }
  };
  if (count <= kStreamTokens) {
    for (int t = 0; t < count; ++t) prepare(t);
  } else {
    constexpr int kTokens = 8;
    team_.run((count + kTokens - 1) / kTokens, [&](int item, int) {
      for (int t = item * kTokens; t < std::min(count, (item + 1) * kTokens); ++t) prepare(t);
    });
  }

  // Rows of one kv head are (token, query head of its group); a share is up to kShareTiles tiles of them.
  struct Share {
    int segment, first_token, num_tokens, kv_head, first_row;
  };
  constexpr int kShareTiles = 8;
  std::vector<Share> shares;
  int longest = 0;
  for (int t = 0; t < count;) {
    const int segment = batch.segment_of[first + t];
    const int end = std::min(batch.first_token[segment] + batch.segments[segment].length - first, count);
    // A segment that begins here gets its parent's keys and values, which are all there by now.
    if (batch.segments[segment].parent >= 0 && batch.first_token[segment] == first + t) {
      for (int head = 0; head < kv_heads; ++head) {
        copy_prefix(head_of(batch.segments[segment].parent, head), head_of(segment, head),
                    batch.segments[segment].start, d, value_stride);
      }
    }
    for (int head = 0; head < kv_heads; ++head) {
      for (int row = 0; row < (end - t) * group; row += kShareTiles * kTileTokens) {
        shares.push_back({segment, t, end - t, head, row});
      }
    }
    longest = std::max(longest, batch.position_of[first + end - 1] + 1);
    t = end;
  }
  const int scores_stride = round_up(longest, kKeyBlock);
  team_.run(int(shares.size()), [&](int item, int thread) {
    const Share& share = shares[item];
    AttentionTile tile;
    tile.head_dim = d;
    tile.value_stride = value_stride;
    tile.scale = config.attention_scale;
    tile.head = head_of(share.segment, share.kv_head);
    tile.scores_stride = scores_stride;
    tile.scores = space.scratch[thread].scores.get(std::size_t(kTileTokens) * scores_stride);
    const int num_rows = share.num_tokens * group;
    const int last_row = std::min(num_rows, share.first_row + kShareTiles * kTileTokens);
    for (int row = share.first_row; row < last_row; row += kTileTokens) {
      tile.rows = std::min(kTileTokens, last_row - row);
      for (int r = 0; r < tile.rows; ++r) {
        const int token = share.first_token + (row + r) / group;
        const std::size_t at = token * q_stride + (share.kv_head * group + (row + r) % group) * d;
        const int position = batch.position_of[first + token];
        tile.query[r] = q + at;
        tile.out[r] = attended + at;
        tile.first[r] = layer.window > 0 ? std::max(0, position + 1 - layer.window) : 0;
        tile.last[r] = position + 1;
      }
      kernels.attend(tile);
    }
  });
}

void Model::row_logits(const float* hidden, int num_hidden, const std::vector<int>& rows, float* logits) {
  bitdistill::row_logits(kernels, head_, hidden, num_hidden, hidden_stride, rows, logits);
  softcap(logits, num_hidden * rows.size());
}

void Model::logits(const float* hidden, int num_hidden, float* logits) {
  all_logits(team_, kernels, head_, hidden, num_hidden, hidden_stride, logits);
  softcap(logits, std::size_t(num_hidden) * config.vocab_size);
}

std::vector<Candidate> Model::top(const float* hidden, int count, HeadStatistics* statistics) {
  std::vector<Candidate> result = top_rows(team_, kernels, head_, hidden, count, statistics);
  for (Candidate& candidate : result) softcap(&candidate.logit, 1);
  return result;
}

void Model::softcap(float* logits, std::size_t count) const {
  if (config.logit_softcap == 0) return;
  for (std::size_t i = 0; i < count; ++i) logits[i] = std::tanh(logits[i] / config.logit_softcap) * config.logit_softcap;
}

}  // namespace bitdistill
