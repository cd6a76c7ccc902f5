// The forward pass of a Mixture-of-Experts transformer over a bundle: trunk in memory, experts through the cache.
//
// Everything is allocated when an Engine is made: `engine_memory` says how much, so a plan can be drawn up first.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "expert_cache.h"
#include "prefetch.h"
#include "prune.h"
#include "router.h"
#include "scratch.h"
#include "threads.h"
#include "trunk.h"

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

  int context = 0;         // positions in the KV cache
  bool half_cache = true;  // keys and values, or latents, in half precision, else floats
  int chunk = 0;           // most tokens of one forward()
  int logits_rows = 1;     // most rows of logits of one forward()
  int threads = 1;
};

// The largest of a count by layer.
inline size_t most(const std::vector<int>& counts) {
  return counts.empty() ? 0 : size_t(*std::max_element(counts.begin(), counts.end()));
}

struct EngineMemory {
  size_t kv_cache = 0, scratch = 0;  // bytes
};
EngineMemory engine_memory(const EngineConfig& config);

struct EngineStats {
  uint64_t tokens = 0;        // through forward()
  uint64_t experts_used = 0;  // (token, layer, expert) triples computed
  uint64_t moe_tokens = 0;    // (token, layer) pairs routed
  double dropped_weight = 0;  // share of routing weight that pruning took away, summed over those pairs
};

struct LayerWeights {
  const float *attention_norm, *mlp_norm;  // (dim,)
  Matrix q, k, v, o;                       // over a latent, q is q_b and there is no k and v
  const float *q_bias, *k_bias, *v_bias;   // null: none
  const float *q_norm, *k_norm;            // (head_dim,) or all heads; null: none
  Matrix q_a, kv_a, kv_b;                  // attention over a latent
  const float *q_a_norm, *kv_a_norm;       // (q_rank,), (kv_rank,)
  Matrix router;                           // (experts, dim) float32; empty in a layer without experts
  const float* router_bias;                // (experts,); null: none
  Matrix shared_router;                    // (1, dim) float32; empty: the shared expert has no gate
  ExpertWeights shared, dense;
};

class Engine {
 public:
  // The mask routers of a rule: of each layer (top_k, dim + 2 * top_k + 1) values, or none; no layers: there are none.
  using MaskRouters = std::vector<std::span<const float>>;

  Engine(const EngineConfig& config, Trunk trunk, ExpertStore store, size_t slot_bytes, int readers,
         const Kernels& kernels, const MaskRouters& otp = {}, const MaskRouters& loss = {});

  enum class Want { kNothing, kLast, kAll };

  // Run `tokens` (at most `chunk`, each below vocab) at positions [position(), ...) and return the logits wanted:
  // (rows, vocab), valid until the next call. On an error the position is what it was before.
  std::span<const float> forward(std::span<const int32_t> tokens, Want want);

  // Reading ahead of the next layer while one is computed, where it pays; off or on, results are the same.
  void set_prefetch(bool on) { may_prefetch_ = on; }

  // Which experts tokens keep from now on. What is in the KV cache stays as it was computed.
  void set_prune(PruneRule rule);

  int position() const { return position_; }
  void rewind(int position);  // forget positions from `position` on

  const EngineConfig& config() const { return config_; }
  const ExpertCache& cache() const { return cache_; }
  const ExpertStore& store() const { return store_; }
  ExpertStore& store() { return store_; }
  EngineStats stats() const { return stats_; }
  const char* kernels_name() const { return kernels_.name; }

 private:
  // One gated MLP on some tokens: inputs normed[tokens[i]], outputs down[first + i].
  struct Job {
    ExpertWeights weights;
    const int32_t* tokens;
    int count, first, record;
  };
  struct Task {
    const Job* job;
    const Matrix* matrix;  // null: the activation
    int begin, end;        // rows of the matrix, or pairs of the job
  };

  LayerWeights layer_weights(int layer) const;
  std::vector<MaskRouter> load_mask_routers(const MaskRouters& from, Arena& arena) const;
  void attention(int layer, int tokens);
  void attend(int layer, int first_token, int tokens, int first_head, int heads, int thread);
  void latent_attention(int layer, int tokens);
  void attend_latent(int layer, int first_token, int tokens, int first_head, int heads, int thread);
  void attention_norm(int layer, int tokens);
  void attention_output(int layer, int tokens);
  void received_attention(int layer, int tokens);
  void route_tokens(int layer, int tokens);
  void prune_tokens(int layer, int tokens);
  void experts(int layer, int tokens);
  void prefetch_next(int layer);
  RouterRule router_rule(int layer) const;
  void run_jobs(float* out);
  void add_to_residual(const float* out, int tokens);
  void matmul(const Matrix& matrix, const Activations& x, float* y);
  Activations prepare(const float* values, int count, int cols, const QuantisedBuffer& into, bool quantised);
  void quantise_vector(const float* values, int cols, const QuantisedBuffer& into, int vector);
  void add_tasks(const Job& job, const Matrix* matrix, int count, int piece);
  KeyValues cached(int layer, int head) const;
  template <typename T>
  void store(int layer, int head, int position, const float* key, const float* value);
  uint8_t* cached_latents(int layer) const;

  EngineConfig config_;
  const Kernels& kernels_;
  Trunk trunk_;
  ExpertStore store_;
  ExpertCache cache_;
  ThreadPool pool_;
  Matrix embedding_, head_;
  const float* output_norm_;
  std::vector<LayerWeights> layers_;
  PruneRule prune_;
  Arena otp_arena_, loss_arena_;
  std::vector<MaskRouter> otp_, loss_;  // (layers,), or none
  std::vector<int> first_record_;       // (layers,): the store's number of a layer's expert 0
  Arena kv_arena_, scratch_arena_;
  uint8_t *keys_,
      *values_;  // (layers, kv_heads), each as KeyValues; over latents keys_ alone (layers, context, cached)
  Scratch s_;
  int position_ = 0;
  bool may_prefetch_ = true, prefetch_ = false;  // allowed; for this token
  PrefetchGate gate_;
  EngineStats stats_;
  std::vector<Job> jobs_;
  std::vector<Task> tasks_;
  std::vector<int> pending_;  // records acquired and not yet computed, by expert
};

}  // namespace edge_moe
