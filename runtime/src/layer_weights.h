// A layer's part of the trunk.
#pragma once

#include "engine_config.h"
#include "expert_store.h"
#include "trunk.h"

namespace edge_moe {

// A norm of the residual stream, or of what it gets.
struct Norm {
  const float *weight, *bias;  // (width,); bias null: an RMSNorm, else a LayerNorm; weight null: there is none
};

// The gates of a residual stream of several streams: what attention, MLP or head gets of it, and each stream's share of
// what comes out. Empty if there is one stream.
struct Mix {
  Matrix down, up;  // (rank, width), (width, rank)
  Matrix share;     // (streams, width) float32; empty before the head
  // Of hyper-connections, in place of these: (mixes, width) float32, and the bias and factors of its products. There
  // are streams * (streams + 2) mixes and 3 factors; before the head, streams and 1.
  Matrix weights = {};
  const float *base = nullptr, *scale = nullptr;

  explicit operator bool() const { return down || weights; }
};

// Of compressed rows, or of the keys of their indexer; n is 1, or 2 if they overlap.
struct PoolWeights {
  Matrix values = {}, gate = {};                 // (n * dim, model's dim)
  const float *bias = nullptr, *norm = nullptr;  // (pool_rate, n * dim), (dim,)
};

// The weights of a layer's embeddings of n-grams.
struct NGramWeights {
  Matrix key, value;                               // (width, inputs), (dim, inputs)
  const float *key_norm, *query_norm, *conv_norm;  // (width,), of each stream
  const float* conv;                               // (conv_kernel, width)
};

// Of a layer's indexer, if it has one.
struct IndexerWeights {
  Matrix q, k, weights;  // (heads * dim, q_rank or model's dim), (dim, model's dim), over latents (heads, model's dim)
  const float *q_norm, *k_norm, *k_norm_bias;  // (dim,) each: over latents a LayerNorm of the keys, else two RMSNorms
  PoolWeights pool = {};                       // in place of k and norms, of compressed rows
};

struct LayerWeights {
  Mix attention_mix, mlp_mix;
  NGramWeights ngrams;
  Norm attention_norm, mlp_norm;
  // Only with EngineConfig::post_norms: RMSNorms of what the residual stream gets.
  Norm attention_post_norm, mlp_post_norm;
  // Only with EngineConfig::own_norms: of the inputs of the router and of the shared expert, for which mlp_norm is that
  // of the routed experts alone, and of the sum of routed experts and the output of the shared expert.
  Norm router_norm, shared_norm, experts_post_norm, shared_post_norm;
  float layer_scale;                      // 1 without EngineConfig::layer_scale
  Matrix q, k, v, o;                      // with a latent, q is q_b, and k and v are empty; v where it is k's product
  const float *q_bias, *k_bias, *v_bias;  // null: none
  const float *q_norm, *k_norm;           // (head_dim,) or all heads; null: none
  Matrix o_gate;                          // (as o's inputs, dim), of attention with an output gate and of recurrences
  Matrix qkv, write, decay;               // of a recurrence: (conv_channels, dim), (write_values, dim), (heads, dim)
  const float *conv, *conv_bias;          // (conv_kernel, conv_channels), (conv_channels,); bias null: none
  const float *decay_bias, *decay_rate;   // (heads,) twice
  const float* skip;                      // (heads,), of Mamba-2
  const float* o_norm;                    // (v_dim,); of Mamba-2 (heads, v_dim)
  const float* sinks;                     // (heads,) logits; null: none
  Matrix q_a, kv_a, kv_b;                 // attention over a latent; of shared rows kv_a is their projection
  const float *q_a_norm, *kv_a_norm;      // (q_rank,), (kv_rank,)
  Matrix o_a;                             // (out_groups * out_rank, inputs of a group), of shared rows
  PoolWeights pool;
  IndexerWeights index;
  Matrix router;             // (experts, dim) float32; empty in a layer without experts
  const float* router_bias;  // (experts,); null: none
  Matrix shared_router;      // (1, dim) float32; empty: the shared expert is not gated
  ExpertWeights shared, dense;

  float sink(int head) const { return sinks ? sinks[head] : kNoSink; }  // see Kernels::softmax
  const Norm& before_router() const { return router_norm.weight ? router_norm : mlp_norm; }
};

// Throws DamagedFile if the trunk lacks a tensor that the configuration requires.
LayerWeights layer_weights(const EngineConfig& config, const Trunk& trunk, int layer);

// The weights before and after the layers.
struct EndWeights {
  Matrix embedding, head;  // the same matrix if they are tied
  Norm output_norm;
  Mix output_mix;
};
EndWeights end_weights(const EngineConfig& config, const Trunk& trunk);

// `count` rows of a matrix as a matrix.
Matrix rows_of(const Matrix& matrix, int first, int count);

}  // namespace edge_moe
