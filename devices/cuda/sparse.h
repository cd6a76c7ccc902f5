// Launches of attention with keys and values for each KV head to the positions that an indexer of blocks chooses: see
// sparse.cu. Pointers are device pointers.
#pragma once

#include "delta.h"
#include "index.h"

namespace edge_moe::cuda {

// The norms of an indexer of blocks and the tables of its rotation; see Projections.
struct BlockIndex {
  const float *q_norm, *k_norm, *cos, *sin;
};

// Norm and RoPE of a span's queries q (tokens, heads, dim); sums the keys k (tokens, dim) of each block in the state,
// and caches the normed and rotated mean of each that is whole.
void store_block_keys(float* q, float* k, const BlockIndex& index, const IndexHeads& heads, const IndexCache& cache,
                      const StateBuffers& states, const Span& span, Stream stream);

// attend() of layer.h, to the positions that are chosen for each token of the span.
void attend_chosen(const float* q, const Heads& heads, const LayerCache& cache, const Span& span, const Choice& choice,
                   float* scores, float* attended, Stream stream);

}  // namespace edge_moe::cuda
