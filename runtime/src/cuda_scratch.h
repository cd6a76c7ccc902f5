// The working memory of an NVIDIA GPU when it computes a model: named pieces of one block.
#pragma once

#include "../../devices/cuda/decode.h"
#include "layer_scratch.h"

namespace edge_moe {

struct CudaScratch : LayerScratch {
  float* routing_weights;            // (chunk, top_k): copies of Routing's, as are the two below
  int32_t *pair_of, *pair_token;     // (chunk, top_k)
  int32_t* positions;                // (sequences,): position of each span minus the index of its first token
  int32_t* states;                   // (sequences, 2): the state buffers before and after each span
  std::vector<float*> query_scales;  // of each kind of attention; see AttentionConfig
  cuda::VectorBuffer normed_q, attended_q, hidden_q, q_latent_q, mixed_q, wide_q, low_q, ngrams_q, grouped_q;
};

// Pieces of memory that the host accesses too.
struct CudaShared {
  int32_t *ids, *positions;  // (chunk,), (sequences,)
  int32_t* states;           // (sequences, 2)
  float* logits;             // (logits_rows, vocab)
};

// The number of tokens whose attention is computed at once, limited so that the scores take little memory.
int attention_tokens(const EngineConfig& config);

// Set every pointer to its piece of `base` and return the bytes that all take; with null, only count them.
size_t carve_cuda(const EngineConfig& config, CudaScratch& s, uint8_t* base);
size_t carve_cuda(const EngineConfig& config, CudaShared& s, uint8_t* base);

}  // namespace edge_moe
