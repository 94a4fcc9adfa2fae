#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

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

// Work on tokens [first, last); few are done sooner than they are handed out.
template <class Work>
void for_tokens(Team& team, int count, Work&& work) {
  if (count <= kStreamTokens) return work(0, count);
  constexpr int kTokens = 16;
  team.run((count + kTokens - 1) / kTokens,
           [&](int item, int) { work(item * kTokens, std::min(count, (item + 1) * kTokens)); });
}

// Tokens that go through a layer together: enough to share unpacked weights or named triples, few enough that the buffers
// stay small.
constexpr int kChunkTokens = 16 * kTileTokens, kTableChunkTokens = 12 * kTableTokens;

// Rows of attention that a thread takes at once, and how many scores of them it keeps, unless one tile has more.
constexpr int kShareRows = 2 * kMostTiles * kTileTokens, kMostScores = 32768;

// Positions whose keys and values a workspace keeps between calls.
constexpr int kKeptSlots = 8192;

}  // namespace

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

// Rows of the residual stream that go through a layer together, and which tokens they are.
struct Model::Tokens {
  float* x;  // (count, hidden_stride)
  const int* segment_of;
  const int* position_of;
  int count;
};

Model::Model(ModelConfig config, std::vector<Layer> layers, const float* final_norm, Int8Rows embedding, Int8Rows head,
             uint8_t* head_scan, const Kernels& kernels, int num_threads)
    : config(std::move(config)),
      kernels(kernels),
      num_layers(int(layers.size())),
      hidden_stride(round_up(this->config.hidden_size, kGroupK)),
      layers_(std::move(layers)),
      final_norm_(final_norm),
      embedding_(embedding),
      head_(head),
      head_scan_(head_scan),
      has_head_scan_(head_scan == head.scan),
      team_(num_threads) {}

Model::~Model() = default;

std::unique_ptr<Model::Workspace> Model::take_workspace() {
  if (keeps_workspaces()) {
    const std::lock_guard<std::mutex> lock(idle_mutex_);
    if (!idle_.empty()) {
      std::unique_ptr<Workspace> workspace = std::move(idle_.back());
      idle_.pop_back();
      return workspace;
    }
  }
  auto workspace = std::make_unique<Workspace>();
  workspace->scratch.resize(team_.num_threads());
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
    space.layer_cache = std::make_unique<KeyValueCache>(1, config.num_key_value_heads, config.head_dim, batch.num_slots, false);
  }

  // Embedding rows come from the file, a token each; neighbours are often the same.
  float* x = space.x.get(std::size_t(batch.num_tokens) * hidden_stride);
  {
    std::vector<int> id(1);
    std::vector<int8_t> w_int8(embedding_.padded_size());
    int token = 0, previous = -1;
    float scale = 0;
    for (const Segment& segment : segments) {
      for (int i = 0; i < segment.length; ++i, ++token) {
        id[0] = segment.ids[i];
        if (id[0] != previous) read_rows(kernels, embedding_, id, w_int8.data(), &scale);
        previous = id[0];
        float* row = x + std::size_t(token) * hidden_stride;
        for (int d = 0; d < config.hidden_size; ++d) {
          row[d] = float(w_int8[d]) * scale * embedding_.column_scale[d] + embedding_.mean[d];
        }
        std::fill(row + config.hidden_size, row + hidden_stride, 0.0f);
        if (config.embedding_multiplier != 1.0f) {
          for (int d = 0; d < hidden_stride; ++d) row[d] *= config.embedding_multiplier;
        }
      }
    }
  }

  // Of the last layer's tokens, all give keys and values, but only those whose output is wanted go on.
  const int last_layer = num_layers - 1;
  const bool all_wanted = int(outputs.size()) == batch.num_tokens;
  const bool has_tables = kernels.tables != nullptr;
  const int most = has_tables ? kTableChunkTokens : kChunkTokens, tile_tokens = has_tables ? kTableTokens : kTileTokens;
  const int num_chunks = (batch.num_tokens + most - 1) / most;  // of nearly the same size
  const int chunk = round_up((batch.num_tokens + num_chunks - 1) / num_chunks, tile_tokens);
  for (int layer = 0; layer < num_layers; ++layer) {
    for (int first = 0; first < batch.num_tokens; first += chunk) {
      const Tokens tokens{x + std::size_t(first) * hidden_stride, batch.segment_of.data() + first,
                          batch.position_of.data() + first, std::min(chunk, batch.num_tokens - first)};
      run_layer(space, batch, layer, tokens, layer < last_layer || all_wanted ? Part::kAll : Part::kKeysAndValues);
    }
  }
  std::vector<int> segment_of, position_of;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    segment_of.push_back(batch.segment_of[outputs[i]]);
    position_of.push_back(batch.position_of[outputs[i]]);
    std::memcpy(hidden + i * hidden_stride, x + std::size_t(outputs[i]) * hidden_stride, sizeof(float) * hidden_stride);
  }
  for (int first = 0; first < int(outputs.size()) && !all_wanted; first += kChunkTokens) {
    const Tokens tokens{hidden + std::size_t(first) * hidden_stride, segment_of.data() + first,
                        position_of.data() + first, std::min(kChunkTokens, int(outputs.size()) - first)};
    run_layer(space, batch, last_layer, tokens, Part::kQueries);
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    float* row = hidden + i * hidden_stride;
    kernels.rms_norm(row, final_norm_, config.norm_offset, config.norm_eps, config.hidden_size, row);
    std::memset(row + config.hidden_size, 0, sizeof(float) * (hidden_stride - config.hidden_size));
  }
  if (cache != nullptr) cache->length += batch.num_tokens;
  if (!keeps_workspaces()) return;
  if (space.layer_cache && space.layer_cache->capacity > kKeptSlots) space.layer_cache.reset();
  const std::lock_guard<std::mutex> lock(idle_mutex_);
  idle_.push_back(std::move(workspace));
}

KeyValueHead Model::head_of(Workspace& space, const Batch& batch, int layer, int segment, int kv_head) const {
  if (batch.cache != nullptr) return batch.cache->head(layer, kv_head);
  return space.layer_cache->head(0, kv_head, batch.first_slot[segment]);
}

void Model::run_layer(Workspace& space, const Batch& batch, int layer_index, const Tokens& tokens, Part part) {
  const Layer& layer = layers_[layer_index];
  const int count = tokens.count;
  const std::size_t q_stride = round_up(layer.q.n, kPanelRows), kv_stride = round_up(layer.k.n, kPanelRows);
  const std::size_t inner_stride = round_up(layer.gate.n, kPanelRows);
  float* const x = tokens.x;
  float* const rows = space.rows.get(count * std::max(inner_stride, q_stride + 2 * kv_stride));
  float *const q = rows, *const k = q + count * q_stride, *const v = k + count * kv_stride;
  Scratch* scratch = space.scratch.data();
  const auto norm = [&](const float* weight) { return Norm{weight, config.norm_offset, config.norm_eps}; };
  // What `linear` multiplies, and any other of its input and blocks that has no norm of its own.
  const auto quantize = [&](const float* from, std::size_t stride, const Norm& outer, const Linear& linear,
                            Int8Tokens& to) {
    const Norm inner{linear.input_norm, 0, config.sub_norm_eps};
    quantize_tokens(team_, kernels, scratch, from, stride, linear.k, linear.num_blocks, count, outer, inner, to);
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
  const bool own_norms = layer.k.input_norm != nullptr;  // SubLN in every linear: each quantises for itself
  const bool has_queries = part != Part::kKeysAndValues, has_keys = part != Part::kQueries;
  if (has_queries || !own_norms) quantize(x, hidden_stride, input, layer.q, space.normed);
  if (has_keys && own_norms) {
    quantize(x, hidden_stride, input, layer.k, space.normed_k);
    quantize(x, hidden_stride, input, layer.v, space.normed_v);
  }
  const Product projections[] = {{&layer.q, &space.normed, q, q_stride, false},
                                 {&layer.k, own_norms ? &space.normed_k : &space.normed, k, kv_stride, false},
                                 {&layer.v, own_norms ? &space.normed_v : &space.normed, v, kv_stride, false}};
  multiply(team_, kernels, scratch, projections + (has_queries ? 0 : 1), (has_queries ? 1 : 0) + (has_keys ? 2 : 0));
  if (has_keys && !is_single(batch, tokens)) store_keys_and_values(space, batch, layer_index, tokens);
  if (!has_queries) return;
  attend(space, batch, layer_index, tokens);

  quantize(q, q_stride, Norm{}, layer.o, space.normed);
  add_branch(layer.o, config.has_feedforward_norms ? layer.norms.post_attention : nullptr);

  const Norm before = norm(config.has_feedforward_norms ? layer.norms.pre_feedforward : layer.norms.post_attention);
  quantize(x, hidden_stride, before, layer.gate, space.normed);
  if (own_norms) quantize(x, hidden_stride, before, layer.up, space.normed_k);
  multiply_gated(team_, kernels, scratch, {&layer.gate, &space.normed, rows, inner_stride, false},
                 {&layer.up, own_norms ? &space.normed_k : &space.normed, nullptr, 0, false}, config.activation);
  quantize(rows, inner_stride, Norm{}, layer.down, space.normed);
  add_branch(layer.down, config.has_feedforward_norms ? layer.norms.post_feedforward : nullptr);
}

bool Model::is_single(const Batch& batch, const Tokens& tokens) const {
  return batch.cache != nullptr && batch.num_tokens == 1 && tokens.count == 1 &&
         config.num_heads / config.num_key_value_heads <= kShareRows;
}

void Model::store_keys_and_values(Workspace& space, const Batch& batch, int layer_index, const Tokens& tokens) {
  const Layer& layer = layers_[layer_index];
  const int d = config.head_dim, kv_heads = config.num_key_value_heads;
  const std::size_t stride = round_up(layer.k.n, kPanelRows);
  float* const keys = space.rows.data() + tokens.count * std::size_t(round_up(layer.q.n, kPanelRows));
  const float* const values = keys + tokens.count * stride;
  for_tokens(team_, tokens.count, [&](int first, int last) {
    for (int t = first; t < last; ++t) {
      const std::size_t angle = std::size_t(tokens.position_of[t] - space.first_position) * (d / 2);
      rotate_heads(kernels, config, layer.norms.key, space.cos[layer.rope].data() + angle,
                   space.sin[layer.rope].data() + angle, kv_heads, keys + t * stride);
    }
    for (int head = 0; head < kv_heads; ++head) {  // one after the other: neighbouring positions share their lines
      for (int t = first; t < last; ++t) {
        const std::size_t at = t * stride + head * d;
        kernels.store_key_value(head_of(space, batch, layer_index, tokens.segment_of[t], head), keys + at, values + at,
                                tokens.position_of[t], d, config.value_stride());
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
  const std::size_t stride = round_up(layer.q.n, kPanelRows);
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
  const std::size_t tile_scores = std::size_t(kTileTokens) * scores_stride, tile_rows = std::size_t(kTileTokens) * d;
  const int num_tiles = int(std::clamp<std::size_t>(kMostScores / tile_scores, 1, kMostTiles));  // at once
  team_.run(int(shares.size()), [&](int item, int thread) {
    const Share& share = shares[item];
    AttentionTile all;  // what its tiles have in common
    all.head_dim = d;
    all.value_stride = config.value_stride();
    all.scale = config.attention_scale;
    all.head = head_of(space, batch, layer_index, share.segment, share.kv_head);
    if (single) {  // one token of a generation: a step less if each head prepares itself
      const std::size_t kv_stride = round_up(layer.k.n, kPanelRows);
      const int last = tokens.position_of[0] + 1;
      prefetch_head(all.head, layer.window > 0 ? std::max(0, last - layer.window) : 0, last, d);
      float* const key = q + stride + share.kv_head * d;
      rotate(0, layer.norms.key, 1, key);
      kernels.store_key_value(all.head, key, key + kv_stride, tokens.position_of[0], d, config.value_stride());
      rotate(0, layer.norms.query, group, q + share.kv_head * group * d);
    }
    all.scores_stride = scores_stride;
    float* const rows = space.scratch[thread].attention.get(num_tiles * (tile_rows + tile_scores));
    float* const scores = rows + num_tiles * tile_rows;
    const int num_rows = share.num_tokens * group;
    const int last_row = std::min(num_rows, share.first_row + kShareRows);
    const auto query_of = [&](int row) {
      return q + (share.first_token + row / group) * stride + (share.kv_head * group + row % group) * d;
    };
    for (int begin = share.first_row, end; begin < last_row; begin = end) {
      end = std::min(last_row, begin + num_tiles * kTileTokens);
      // Queries and outputs lie together here: where they come from, many share a few sets of the cache.
      for (int row = begin; row < end; ++row) std::memcpy(rows + (row - begin) * d, query_of(row), sizeof(float) * d);
      AttentionTile tiles[kMostTiles];
      int count = 0;
      for (int row = begin; row < end; row += kTileTokens, ++count) {
        AttentionTile& tile = tiles[count] = all;
        tile.scores = scores + count * tile_scores;
        tile.rows = std::min(kTileTokens, end - row);
        for (int r = 0; r < tile.rows; ++r) {
          const int position = tokens.position_of[share.first_token + (row + r) / group];
          tile.query[r] = tile.out[r] = rows + (row + r - begin) * d;
          tile.first[r] = layer.window > 0 ? std::max(0, position + 1 - layer.window) : 0;
          tile.last[r] = position + 1;
        }
      }
      kernels.attend(tiles, count);
      for (int row = begin; row < end; ++row) std::memcpy(query_of(row), rows + (row - begin) * d, sizeof(float) * d);
    }
  });
}

Int8Rows Model::head() {
  Int8Rows rows = head_;
  if (!has_head_scan_.load(std::memory_order_acquire)) {
    if (getpid() != owner_) return rows;
    const std::lock_guard<std::mutex> lock(head_scan_mutex_);
    if (!has_head_scan_.load(std::memory_order_relaxed)) copy_scan(team_, head_, head_scan_);
    has_head_scan_.store(true, std::memory_order_release);
  }
  rows.scan = head_scan_;
  return rows;
}

void Model::row_logits(const float* hidden, int num_hidden, const std::vector<int>& rows, float* logits) {
  bitdistill::row_logits(kernels, head_, hidden, num_hidden, hidden_stride, rows, logits);
  softcap(logits, num_hidden * rows.size());
}

void Model::logits(const float* hidden, int num_hidden, float* logits) {
  all_logits(team_, kernels, head(), hidden, num_hidden, hidden_stride, logits);
  softcap(logits, std::size_t(num_hidden) * config.vocab_size);
}

std::vector<Candidate> Model::top(const float* hidden, int count, HeadStatistics* statistics) {
  std::vector<Candidate> result = top_rows(team_, kernels, head(), hidden, count, statistics);
  for (Candidate& candidate : result) softcap(&candidate.logit, 1);
  return result;
}

void Model::softcap(float* logits, std::size_t count) const {
  if (config.logit_softcap == 0) return;
  for (std::size_t i = 0; i < count; ++i) logits[i] = std::tanh(logits[i] / config.logit_softcap) * config.logit_softcap;
}

}  // namespace bitdistill
