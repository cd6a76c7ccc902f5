// What a model is and how one run of it is sized.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "../../devices/format.h"
#include "../../devices/kernels.h"

namespace edge_moe {

// runtime/config.py's ModelConfig, field for field, and how this run is sized.
struct EngineConfig {
  int layers = 0, dim = 0, vocab = 0;
  int heads = 0, kv_heads = 0;
  int head_dim = 0;  // of queries and keys; the last rope_dim of them are turned by position
  int v_dim = 0;     // of values
  int rope_dim = 0;
  int expert_hidden = 0;
  std::vector<int> experts, top_k;  // (layers,): of each layer; 0 in one without experts
  int activation = 0;               // Kernels::gate_up
  float norm_eps = 1e-6f;
  std::vector<float> rope_frequency;  // (rope_dim/2,) radians a position
  float rope_scale = 1;               // of cos and sin
  float softmax_scale = 1;            // of the products of queries and keys
  bool qk_norm_full = false;          // one norm over all heads at once, else per head; weights absent: none
  float qkv_clip = 0;                 // 0: off
  int sliding_window = 0;             // 0: all
  int shared_hidden = 0, dense_hidden = 0;

  // Keys and values from one latent a token, which is all that is cached, instead of kv_heads of each.
  int kv_rank = 0;  // size of the latent; 0: none
  int q_rank = 0;   // of the queries' own; 0: they come straight from the input
  bool rope_interleaved = false;
  float latent_norm_eps = 1e-6f;
  int latent_cached() const { return kv_rank + rope_dim; }
  size_t key_positions() const { return align_up(context, kKeyBlock); }

  // The router's rule; see RouterRule.
  bool sigmoid_score = false, renormalise = false, group_top2sum = false;
  float router_scale = 1;
  int groups = 1, top_groups = 1;
  std::vector<std::vector<int>> expert_groups;  // (layers, experts): the group of each; empty where there is one

  int sequences = 1;       // that there is a KV cache for
  int context = 0;         // positions in each
  bool half_cache = true;  // keys and values, or latents, in half precision, else floats
  int chunk = 0;           // most tokens of one step()
  int logits_rows = 1;     // most rows of logits of one step()
  int threads = 1;
  bool spin = true;  // threads that have nothing to do spin for some microseconds before they sleep

  // Of one sequence: rows of positions, of each layer its latents, or of each KV head its keys and then, of all,
  // values.
  size_t kv_cache_bytes() const { return kv_rows() * key_positions() * kv_position_bytes(); }
  size_t kv_rows() const { return size_t(layers) * (kv_rank ? 1 : 2 * kv_heads); }
  size_t kv_position_bytes() const {
    return size_t(kv_rank ? latent_cached() : head_dim) * (half_cache ? sizeof(uint16_t) : sizeof(float));
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
