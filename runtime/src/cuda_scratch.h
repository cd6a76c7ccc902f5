// What an NVIDIA GPU works in when it computes a model: named pieces of one block of memory.
#pragma once

#include "../../devices/cuda/decode.h"
#include "layer_scratch.h"

namespace edge_moe {

struct CudaScratch : LayerScratch {
  float* routing_weights;            // (chunk, top_k): copies of Routing's, as those below
  int32_t *pair_of, *pair_token;     // (chunk, top_k)
  int32_t* positions;                // (sequences,): of each span, less the number of its first token
  std::vector<float*> query_scales;  // of each kind of attention, as AttentionConfig has them
  cuda::VectorBuffer normed_q, attended_q, hidden_q, q_latent_q, mixed_q;
};

// Pieces of memory that the host sees too.
struct CudaShared {
  int32_t *ids, *positions;  // (chunk,), (sequences,)
  float* logits;             // (logits_rows, vocab)
};

// Tokens whose attention is computed at once, so that its scores take little memory.
int attention_tokens(const EngineConfig& config);

// Set every pointer to its piece of `base` and return the bytes that all take; with null, only count them.
size_t carve_cuda(const EngineConfig& config, CudaScratch& s, uint8_t* base);
size_t carve_cuda(const EngineConfig& config, CudaShared& s, uint8_t* base);

}  // namespace edge_moe
