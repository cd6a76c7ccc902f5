// What a model is and how one run of it is sized.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "../../devices/format.h"
#include "../../devices/kernels.h"

namespace edge_moe {

// One kind of attention, which some layers have: what runtime/layers/attention.py or latent.py says of it.
struct AttentionConfig {
  int heads = 0, kv_heads = 0;
  int head_dim = 0;                   // of queries and keys
  int v_dim = 0;                      // of values
  int rope_dim = 0;                   // how many of head_dim are turned by position: the first, over a latent the last
  std::vector<float> rope_frequency;  // (rope_dim/2,) radians a position
  float rope_scale = 1;               // of cos and sin
  bool rope_interleaved = false;      // the pairs that are turned are neighbours
  float softmax_scale = 1;            // of the products of queries and keys
  bool qk_norm_full = false;          // one norm over all heads at once, else per head; weights absent: none
  bool norm_after_rope = false;       // the norms of heads come after they are turned
  float qkv_clip = 0;                 // 0: off
  int sliding_window = 0;             // 0: all

  // Keys and values from one latent a token, which is all that is cached, instead of kv_heads of each.
  int kv_rank = 0;  // size of the latent; 0: none
  int q_rank = 0;   // of the queries' own; 0: they come straight from the input
  float latent_norm_eps = 1e-6f;
  std::vector<float> query_scales;  // of queries at positions below query_context, below twice that...; none: 1
  int query_context = 1;

  int latent_cached() const { return kv_rank + rope_dim; }
  int q_dim() const { return heads * head_dim; }
  int kv_dim() const { return kv_heads * head_dim; }
  float query_scale(int position) const { return query_scales.empty() ? 1.0f : query_scales[position / query_context]; }

  // What the KV cache has of a layer: rows of positions, its latents, or of each KV head its keys and then, of all,
  // values.
  size_t cached_rows() const { return kv_rank ? 1 : 2 * size_t(kv_heads); }
  size_t cached_values() const { return size_t(kv_rank ? latent_cached() : head_dim); }  // of a row and position
};

// How router logits become the routing weights of experts; see RouterRule.
enum class RouterScore { kSoftmax, kSigmoid, kSparsemixer };

// runtime/config.py's ModelConfig, and how this run is sized.
struct EngineConfig {
  int layers = 0, dim = 0, vocab = 0;
  std::vector<AttentionConfig> attentions;  // the kinds that there are
  std::vector<int> attention_of;            // (layers,): the kind of each
  int expert_hidden = 0;
  std::vector<int> experts, top_k;  // (layers,): of each layer; 0 in one without experts
  int activation = 0;               // Kernels::gate_up
  bool layer_norm = false;          // the norms of the residual stream are LayerNorms with a bias, else RMSNorms
  float norm_eps = 1e-6f;
  float embedding_scale = 1;  // of embeddings on their way into the residual stream
  float residual_scale = 1;   // of what attention and MLPs add to it
  float logits_scale = 1;
  int shared_hidden = 0, dense_hidden = 0;

  const AttentionConfig& attention(int layer) const { return attentions[attention_of[layer]]; }
  bool has_latents() const {
    return most_of([](const AttentionConfig& a) { return a.kv_rank; }) > 0;
  }
  // The largest of what count(attention) says of the kinds.
  template <typename Count>
  size_t most_of(const Count& count) const {
    size_t largest = 0;
    for (const AttentionConfig& attention : attentions) largest = std::max(largest, size_t(count(attention)));
    return largest;
  }
  size_t key_positions() const { return align_up(context, kKeyBlock); }

  // The router's rule; see RouterRule.
  RouterScore router_score = RouterScore::kSoftmax;
  float router_threshold = 0;  // of kSparsemixer
  bool renormalise = false, group_top2sum = false;
  float routing_scale = 1;  // of routing weights, the residual scale included
  int groups = 1, top_groups = 1;
  std::vector<std::vector<int>> expert_groups;  // (layers, experts): the group of each; empty where there is one

  int sequences = 1;       // that there is a KV cache for
  int context = 0;         // positions in each
  bool half_cache = true;  // keys and values, or latents, in half precision, else floats
  int chunk = 0;           // most tokens of one step()
  int logits_rows = 1;     // most rows of logits of one step()
  int threads = 1;
  bool spin = true;  // threads that have nothing to do spin for some microseconds before they sleep

  // Of one sequence, layer by layer.
  size_t kv_row_bytes(int layer) const { return key_positions() * kv_position_bytes(layer); }
  size_t kv_layer_bytes(int layer) const { return attention(layer).cached_rows() * kv_row_bytes(layer); }
  size_t kv_position_bytes(int layer) const {
    return attention(layer).cached_values() * (half_cache ? sizeof(uint16_t) : sizeof(float));
  }
  size_t kv_cache_bytes() const {
    size_t bytes = 0;
    for (int layer = 0; layer < layers; ++layer) bytes += kv_layer_bytes(layer);
    return bytes;
  }
  // Where each layer's begins, and after the last the bytes of all.
  std::vector<size_t> kv_offsets() const {
    std::vector<size_t> offsets = {0};
    for (int layer = 0; layer < layers; ++layer) offsets.push_back(offsets.back() + kv_layer_bytes(layer));
    return offsets;
  }
};

// The largest of a count by layer.
inline size_t most(const std::vector<int>& counts) {
  return counts.empty() ? 0 : size_t(*std::max_element(counts.begin(), counts.end()));
}

struct EngineMemory {
  size_t kv_cache = 0, scratch = 0;  // bytes
};

}  // namespace edge_moe
