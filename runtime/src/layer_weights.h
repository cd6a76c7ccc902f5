// A layer's part of the trunk.
#pragma once

#include "engine_config.h"
#include "expert_store.h"
#include "trunk.h"

namespace edge_moe {

// A norm of the residual stream.
struct Norm {
  const float *weight, *bias;  // (dim,); bias null: an RMSNorm, else a LayerNorm
};

struct LayerWeights {
  Norm attention_norm, mlp_norm;
  Matrix q, k, v, o;                      // over a latent, q is q_b and there is no k and v
  const float *q_bias, *k_bias, *v_bias;  // null: none
  const float *q_norm, *k_norm;           // (head_dim,) or all heads; null: none
  Matrix q_a, kv_a, kv_b;                 // attention over a latent
  const float *q_a_norm, *kv_a_norm;      // (q_rank,), (kv_rank,)
  Matrix router;                          // (experts, dim) float32; empty in a layer without experts
  const float* router_bias;               // (experts,); null: none
  Matrix shared_router;                   // (1, dim) float32; empty: the shared expert has no gate
  ExpertWeights shared, dense;
};

// Throws DamagedFile where the trunk lacks something that the configuration asks for.
LayerWeights layer_weights(const EngineConfig& config, const Trunk& trunk, int layer);

// What stands before and after the layers.
struct EndWeights {
  Matrix embedding, head;  // one matrix where they are tied
  Norm output_norm;
};
EndWeights end_weights(const EngineConfig& config, const Trunk& trunk);

// `count` rows of a matrix as one of their own.
Matrix rows_of(const Matrix& matrix, int first, int count);

}  // namespace edge_moe
