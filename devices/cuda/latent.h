// Launches of attention over latents: see latent.cu. Pointers are device pointers.
#pragma once

#include "layer.h"

namespace edge_moe::cuda {

// See AttentionConfig. A latent and its RoPE part have `cached` values together.
struct LatentHeads {
  int heads, head_dim, rope_dim, v_dim, rank;
  float norm_eps, softmax_scale;
  bool interleaved;
  const float* query_scales;  // by position / query_context; null: 1
  int query_context;

  EDGE_MOE_BOTH int cached() const { return rank + rope_dim; }
  EDGE_MOE_BOTH int nope_dim() const { return head_dim - rope_dim; }
};

struct LatentCache {
  void* latents;     // (positions, cached)
  size_t positions;  // capacity, in whole key blocks
  bool half;
};

// Applies RoPE to q (tokens, heads, head_dim), norm and RoPE to latents (tokens, cached), and caches the latents.
void store_latents(float* q, float* latents, const float* norm, const float* cos, const float* sin,
                   const LatentHeads& heads, const LatentCache& cache, const Span& span, Stream stream);

// mixed (span.count, heads, rank) = the weighted sums of latents for each head of a span's tokens, with keys that kv_b
// makes of latents. choice: of each token of the pass. absorbed: buffer (span.count, heads, cached); scores: buffer
// (span.count, heads, cache.positions).
void attend_latents(const float* q, const Matrix& kv_b, const LatentHeads& heads, const LatentCache& cache,
                    const Span& span, const Choice& choice, float* absorbed, float* scores, float* mixed,
                    Stream stream);

// mixed (span.count, heads, rank) = the weighted sums of the rows that each of a span's tokens attends to, as attention
// of runtime/src/attend_rows.h. queries: (span.count, heads, rank), scaled; sinks: (heads,); of `heads`, only heads and
// rank are used; cache: rows in place of latents, whose positions are the length of a row of scores.
void mix_rows(const float* queries, const float* sinks, const LatentHeads& heads, const LatentCache& cache,
              const Span& span, const RowChoice& choice, float* scores, float* mixed, Stream stream);

}  // namespace edge_moe::cuda
