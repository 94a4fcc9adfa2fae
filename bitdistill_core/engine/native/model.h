// The whole decoder: token ids in, final hidden states out. The arithmetic is transformers' in float32, but for the
// ternary products, which are exact integers.
#pragma once

#include <unistd.h>

#include <mutex>
#include <vector>

#include "cache.h"
#include "head.h"
#include "linear.h"

namespace bitdistill {

struct LayerNorms {
  const float* input = nullptr;
  const float* post_attention = nullptr;
  const float* pre_feedforward = nullptr;   // Gemma
  const float* post_feedforward = nullptr;  // Gemma
  const float* query = nullptr;             // q/k norm
  const float* key = nullptr;
};

struct Layer {
  Linear q, k, v, o, gate, up, down;
  LayerNorms norms;
  int window = 0;  // 0: sees every position
  int rope = 0;    // index in ModelConfig::frequencies
};

struct ModelConfig {
  int hidden_size, intermediate_size, num_heads, num_key_value_heads, head_dim, vocab_size;
  float norm_eps, norm_offset, sub_norm_eps, embedding_multiplier, attention_scale, logit_softcap;
  Activation activation;
  bool has_feedforward_norms;
  std::vector<std::vector<float>> frequencies;  // (head_dim / 2) of each kind of rotary embedding

  int value_stride() const { return bitdistill::value_stride(head_dim); }
};

// Tokens that follow each other. Their first position is `start`; what is before them is in the cache, or belongs to
// segment `parent` and its parents, which come earlier in the batch.
struct Segment {
  const int32_t* ids;
  int length;
  int start;
  int parent;  // -1: none
};

class Model {
 public:
  // head_scan: memory for `scan` of the head, filled when it is first needed, or what `head` has.
  Model(ModelConfig config, std::vector<Layer> layers, const float* final_norm, Int8Rows embedding, Int8Rows head,
        uint8_t* head_scan, uint8_t* head_next, const Kernels& kernels, int num_threads);
  ~Model();

  // Final hidden states, normed, of the tokens `outputs` (indices into the concatenated segments), (outputs, hidden).
  // With a cache there is one segment, which starts at the cache's length and is added to it.
  void forward(const std::vector<Segment>& segments, const std::vector<int>& outputs, KeyValueCache* cache,
               float* hidden);

  // Logits (num_hidden, num_rows) of some vocabulary rows.
  void row_logits(const float* hidden, int num_hidden, const std::vector<int>& rows, float* logits);
  // Logits (num_hidden, vocab).
  void logits(const float* hidden, int num_hidden, float* logits);
  // The `count` largest logits, largest first; of equals the lowest id comes first.
  std::vector<Candidate> top(const float* hidden, int count, HeadStatistics* statistics);

  const ModelConfig config;
  const Kernels& kernels;
  const int num_layers;
  const int hidden_stride;
  int num_threads() const { return team_.num_threads(); }

 private:
  struct Workspace;
  struct Batch;
  struct Tokens;
  enum class Part { kAll, kKeysAndValues, kQueries };

  // Cosines and sines of the positions in the batch.
  void compute_angles(Workspace& workspace, const Batch& batch) const;
  // Embeddings (tokens, stride). Their rows come from the file, a token each; neighbours are often the same.
  void embed(const std::vector<Segment>& segments, float* x, std::size_t stride) const;
  void run_layer(Workspace& workspace, const Batch& batch, int layer, const Tokens& tokens, Part part);
  void store_keys_and_values(Workspace& workspace, const Batch& batch, int layer, const Tokens& tokens);
  void attend(Workspace& workspace, const Batch& batch, int layer, const Tokens& tokens);
  bool is_single(const Batch& batch, const Tokens& tokens) const;
  KeyValueHead head_of(Workspace& workspace, const Batch& batch, int layer, int segment, int kv_head) const;
  void softcap(float* logits, std::size_t count) const;
  // The head with its copies; with the map where a forked child has none, as a thread may have been filling them.
  Int8Rows head();
  // A forked child has workspaces of its own: another thread may have held the mutex when it was forked.
  bool keeps_workspaces() const { return getpid() == owner_; }
  std::unique_ptr<Workspace> take_workspace();

  std::vector<Layer> layers_;
  const float* final_norm_;
  Int8Rows embedding_, head_;
  uint8_t *const head_scan_, *const head_next_;  // copies in large pages
  std::atomic<bool> has_head_copies_;
  std::mutex head_copies_mutex_;
  Team team_;
  const pid_t owner_ = getpid();
  std::mutex idle_mutex_;
  std::vector<std::unique_ptr<Workspace>> idle_;  // kept from call to call, one for each caller at a time
};

}  // namespace bitdistill
