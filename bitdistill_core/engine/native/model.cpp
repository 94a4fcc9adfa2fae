#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "workspace.h"

namespace bitdistill {
namespace {

// Tokens that go through a layer together: enough to share unpacked weights or named triples, few enough that the
// buffers stay small.
constexpr int kChunkTokens = 16 * kTileTokens, kTableChunkTokens = 12 * kTableTokens;

// Positions whose keys and values a workspace keeps between calls.
constexpr int kKeptSlots = 8192;

}  // namespace

Model::Model(ModelConfig config, std::vector<Layer> layers, const float* final_norm, Int8Rows embedding, Int8Rows head,
             uint8_t* head_scan, uint8_t* head_next, const Kernels& kernels, int num_threads)
    : config(std::move(config)),
      kernels(kernels),
      num_layers(int(layers.size())),
      hidden_stride(round_up(this->config.hidden_size, kGroupK)),
      layers_(std::move(layers)),
      final_norm_(final_norm),
      embedding_(embedding),
      head_(head),
      head_scan_(head_scan),
      head_next_(head_next),
      has_head_copies_(head_scan == head.scan && head_next == head.next),
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

  compute_angles(space, batch);
  if (cache == nullptr && (!space.layer_cache || space.layer_cache->capacity < batch.num_slots)) {
    space.layer_cache.reset();
    space.layer_cache =
        std::make_unique<KeyValueCache>(1, config.num_key_value_heads, config.head_dim, batch.num_slots, false);
  }

  const std::size_t stride = row_stride(hidden_stride);
  float* const x = space.x.get(batch.num_tokens * stride);
  embed(segments, x, stride);

  // Of the last layer's tokens, all give keys and values, but only those whose output is wanted go on.
  const int last_layer = num_layers - 1;
  const bool all_wanted = int(outputs.size()) == batch.num_tokens;
  const bool has_tables = kernels.tables != nullptr;
  const int most = has_tables ? kTableChunkTokens : kChunkTokens, tile_tokens = has_tables ? kTableTokens : kTileTokens;
  const int num_chunks = (batch.num_tokens + most - 1) / most;  // of nearly the same size
  const int chunk = round_up((batch.num_tokens + num_chunks - 1) / num_chunks, tile_tokens);
  for (int layer = 0; layer < num_layers; ++layer) {
    for (int first = 0; first < batch.num_tokens; first += chunk) {
      const Tokens tokens{x + first * stride, stride, batch.segment_of.data() + first, batch.position_of.data() + first,
                          std::min(chunk, batch.num_tokens - first)};
      run_layer(space, batch, layer, tokens, layer < last_layer || all_wanted ? Part::kAll : Part::kKeysAndValues);
    }
  }
  std::vector<int> segment_of, position_of;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    segment_of.push_back(batch.segment_of[outputs[i]]);
    position_of.push_back(batch.position_of[outputs[i]]);
    std::memcpy(hidden + i * hidden_stride, x + outputs[i] * stride, sizeof(float) * hidden_stride);
  }
  for (int first = 0; first < int(outputs.size()) && !all_wanted; first += kChunkTokens) {
    const Tokens tokens{hidden + std::size_t(first) * hidden_stride, std::size_t(hidden_stride),
                        segment_of.data() + first, position_of.data() + first,
                        std::min(kChunkTokens, int(outputs.size()) - first)};
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

void Model::compute_angles(Workspace& space, const Batch& batch) const {
  space.first_position = batch.last_position;
  for (const Segment& segment : batch.segments) space.first_position = std::min(space.first_position, segment.start);
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
}

void Model::embed(const std::vector<Segment>& segments, float* x, std::size_t stride) const {
  std::vector<int> id(1);
  std::vector<int8_t> w_int8(embedding_.padded_size());
  int token = 0, previous = -1;
  float scale = 0;
  for (const Segment& segment : segments) {
    for (int i = 0; i < segment.length; ++i, ++token) {
      id[0] = segment.ids[i];
      if (id[0] != previous) read_rows(kernels, embedding_, id, w_int8.data(), &scale);
      previous = id[0];
      float* row = x + token * stride;
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

void Model::run_layer(Workspace& space, const Batch& batch, int layer_index, const Tokens& tokens, Part part) {
  const Layer& layer = layers_[layer_index];
  const int count = tokens.count;
  const std::size_t q_stride = row_stride(layer.q.n), kv_stride = row_stride(layer.k.n);
  const std::size_t inner_stride = row_stride(layer.gate.n);
  float* const x = tokens.x;
  const std::size_t x_stride = tokens.stride;
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
      const Product product{&linear, &space.normed, x, x_stride, true};
      return multiply(team_, kernels, scratch, &product, 1);
    }
    float* const branch = space.branch.get(count * x_stride);
    const Product product{&linear, &space.normed, branch, x_stride, false};
    multiply(team_, kernels, scratch, &product, 1);
    for_tokens(team_, count, [&](int first, int last) {
      for (int t = first; t < last; ++t) {
        float* const row = branch + t * x_stride;
        kernels.rms_norm(row, post_norm, config.norm_offset, config.norm_eps, config.hidden_size, row);
        for (int d = 0; d < config.hidden_size; ++d) x[t * x_stride + d] += row[d];
      }
    });
  };

  const Norm input = norm(layer.norms.input);
  const bool own_norms = layer.k.input_norm != nullptr;  // SubLN in every linear: each quantises for itself
  const bool has_queries = part != Part::kKeysAndValues, has_keys = part != Part::kQueries;
  if (has_queries || !own_norms) quantize(x, x_stride, input, layer.q, space.normed);
  if (has_keys && own_norms) {
    quantize(x, x_stride, input, layer.k, space.normed_k);
    quantize(x, x_stride, input, layer.v, space.normed_v);
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
  quantize(x, x_stride, before, layer.gate, space.normed);
  if (own_norms) quantize(x, x_stride, before, layer.up, space.normed_k);
  multiply_gated(team_, kernels, scratch, {&layer.gate, &space.normed, rows, inner_stride, false},
                 {&layer.up, own_norms ? &space.normed_k : &space.normed, nullptr, 0, false}, config.activation);
  quantize(rows, inner_stride, Norm{}, layer.down, space.normed);
  add_branch(layer.down, config.has_feedforward_norms ? layer.norms.post_feedforward : nullptr);
}

Int8Rows Model::head() {
  Int8Rows rows = head_;
  if (!has_head_copies_.load(std::memory_order_acquire)) {
    if (getpid() != owner_) return rows;
    const std::lock_guard<std::mutex> lock(head_copies_mutex_);
    if (!has_head_copies_.load(std::memory_order_relaxed)) copy_streamed(team_, head_, head_scan_, head_next_);
    has_head_copies_.store(true, std::memory_order_release);
  }
  rows.scan = head_scan_;
  rows.next = head_next_;
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
  for (std::size_t i = 0; i < count; ++i) {
    logits[i] = std::tanh(logits[i] / config.logit_softcap) * config.logit_softcap;
  }
}

}  // namespace bitdistill
