// The forward pass of a Mixture-of-Experts transformer over a bundle: trunk in memory, experts through the cache.
//
// Everything is allocated when an Engine is made: `engine_memory` says how much, so a plan can be drawn up first.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "expert_cache.h"
#include "router.h"
#include "threads.h"
#include "trunk.h"

namespace edge_moe {

// runtime/config.py's ModelConfig, field for field, and how this run is sized.
struct EngineConfig {
  int layers = 0, dim = 0, vocab = 0;
  int heads = 0, kv_heads = 0, head_dim = 0;
  int expert_hidden = 0;
  std::vector<int> experts, top_k;  // (layers,): of each layer; 0 in one without experts
  bool renormalise = false;
  int activation = 0;  // Kernels::gate_up
  float norm_eps = 1e-6f;
  double rope_theta = 1e4, rope_factor = 1;
  bool qk_norm_full = false;  // one norm over all heads at once, else per head; weights absent: none
  float qkv_clip = 0;         // 0: off
  int sliding_window = 0;     // 0: all
  int shared_hidden = 0, dense_hidden = 0;

  int context = 0;      // positions in the KV cache
  int chunk = 0;        // most tokens of one forward()
  int logits_rows = 1;  // most rows of logits of one forward()
  int threads = 1;
};

struct EngineMemory {
  size_t kv_cache = 0, scratch = 0;  // bytes
};
EngineMemory engine_memory(const EngineConfig& config);

struct EngineStats {
  uint64_t tokens = 0;        // through forward()
  uint64_t experts_used = 0;  // (token, layer, expert) triples computed
  uint64_t moe_tokens = 0;    // (token, layer) pairs routed
};

struct LayerWeights {
  const float *attention_norm, *mlp_norm;  // (dim,)
  Matrix q, k, v, o;
  const float *q_bias, *k_bias, *v_bias;  // null: none
  const float *q_norm, *k_norm;           // (head_dim,) or all heads; null: none
  Matrix router;                          // (experts, dim) float32; empty in a layer without experts
  Matrix shared_router;                   // (1, dim) float32; empty: no shared expert
  ExpertWeights shared, dense;
};

// (vectors, cols) float inputs rounded to int8; see Activations.
struct QuantisedBuffer {
  int8_t* codes;
  float *scales, *sums[3];
};

struct Scratch {
  float *x, *normed, *q, *k, *v, *attended;        // (chunk, ...)
  float* scores;                                   // (threads, context)
  float *router_logits, *routing_weights;          // (chunk, experts), (chunk, top_k): the most of any layer
  int32_t *routed, *pair_of, *pair_token;          // (chunk, top_k): expert ids; pair of (token, k); token of a pair
  int32_t *all_tokens, *first_pair;                // (chunk,); (experts+1,)
  float *gate, *up, *down, *shared, *shared_gate;  // (pairs, hidden) twice, (pairs, dim), (chunk, dim), (chunk,)
  float* logits;                                   // (logits_rows, vocab)
  float *cos, *sin;                                // (context, head_dim/2)
  QuantisedBuffer normed_q, attended_q, hidden_q;
};

class Engine {
 public:
  Engine(const EngineConfig& config, Trunk trunk, ExpertStore store, int slots, int readers, const Kernels& kernels);

  enum class Want { kNothing, kLast, kAll };

  // Run `tokens` (at most `chunk`, each below vocab) at positions [position(), ...) and return the logits wanted:
  // (rows, vocab), valid until the next call. On an error the position is what it was before.
  std::span<const float> forward(std::span<const int32_t> tokens, Want want);

  int position() const { return position_; }
  void rewind(int position);  // forget positions from `position` on

  const EngineConfig& config() const { return config_; }
  const ExpertCache& cache() const { return cache_; }
  const ExpertStore& store() const { return store_; }
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

  void attention(int layer, int tokens);
  void route_tokens(int layer, int tokens);
  void experts(int layer, int tokens);
  void run_jobs(float* out);
  void add_to_residual(const float* out, int tokens);
  void matmul(const Matrix& matrix, const Activations& x, float* y);
  Activations prepare(const float* values, int count, int cols, const QuantisedBuffer& into, bool quantised);
  void quantise_vector(const float* values, int cols, const QuantisedBuffer& into, int vector);
  void add_tasks(const Job& job, const Matrix* matrix, int count, int piece);
  float* cached(float* cache, int layer, int head) const;

  EngineConfig config_;
  const Kernels& kernels_;
  Trunk trunk_;
  ExpertStore store_;
  ExpertCache cache_;
  ThreadPool pool_;
  Matrix embedding_, head_;
  const float* output_norm_;
  std::vector<LayerWeights> layers_;
  std::vector<int> first_record_;  // (layers,): the store's number of a layer's expert 0
  Arena kv_arena_, scratch_arena_;
  float *keys_, *values_;  // (layers, kv_heads, context, head_dim)
  Scratch s_;
  int position_ = 0;
  EngineStats stats_;
  std::vector<Job> jobs_;
  std::vector<Task> tasks_;
  std::vector<int> pending_;  // records acquired and not yet computed, by expert
};

}  // namespace edge_moe
