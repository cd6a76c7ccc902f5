// Launches of the indexer of sparse attention, and of the choice of positions: see index.cu. Pointers are device
// pointers.
#pragma once

#include "layer.h"

namespace edge_moe::cuda {

// See AttentionConfig.
struct IndexHeads {
  int heads, dim, rope_dim;
  float norm_eps, scale;
  bool interleaved;
  int block;  // positions that a key stands for
};

struct IndexCache {
  void* keys;        // (key blocks, dim, kKeyBlock)
  size_t positions;  // capacity, in whole key blocks
  bool half;
};

// Applies RoPE to the indexer's queries q (tokens, heads, dim), norm and RoPE to its keys k (tokens, dim), and caches
// the keys.
void store_index_keys(float* q, float* k, const float* norm, const float* norm_bias, const float* cos, const float* sin,
                      const IndexHeads& heads, const IndexCache& cache, const Span& span, Stream stream);

// scores (span.count, cache.positions) of the whole blocks that each token of a span sees, for tokens that see more
// than `top`. weights: (tokens, heads); null: all 1.
void index_scores(const float* q, const float* weights, const IndexHeads& heads, const IndexCache& cache,
                  const Span& span, int top, float* scores, Stream stream);

// Writes the positions of the `top` blocks with the highest scores (span.count, positions) of each token of a span, and
// those after the last whole block, to chosen (tokens, top * block + block - 1), in ascending order, and how many these
// are to counts (tokens,); 0 for a token that sees no more than `top` whole blocks. Ties go to the lower block. Without
// `expands`, writes the numbers of the blocks alone, to chosen (tokens, top).
void choose_top(const float* scores, size_t positions, const Span& span, int top, int block, bool expands,
                int32_t* chosen, int32_t* counts, Stream stream);

}  // namespace edge_moe::cuda
