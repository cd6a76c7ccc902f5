// Launches of attention to rows that are key and value of all heads, and of compressed rows: see rows.cu. Pointers are
// device pointers.
#pragma once

#include "delta.h"
#include "index.h"
#include "latent.h"

namespace edge_moe::cuda {

// See AttentionConfig.
struct RowHeads {
  int heads, head_dim, rope_dim, index_heads, index_dim;  // no index_heads: there is no indexer
  float norm_eps, softmax_scale;
  bool interleaved;
};

// cos, sin: (context, rope_dim / 2). norm: (head_dim,), of a token's row.
struct RowTables {
  const float *cos, *sin, *norm;
};

struct RowCache {
  void* rows;        // (places of the window, then compressed rows, head_dim)
  int places;        // of the window
  size_t positions;  // the length of a row of scores
  bool half;
};

// Norm and RoPE of a span's queries q (tokens, heads, head_dim), which are also scaled, and of its rows (tokens,
// head_dim), which are cached; RoPE of the indexer's queries index_q (tokens, index_heads, index_dim).
void store_rows(float* q, float* rows, float* index_q, const RowTables& tables, const RowHeads& heads,
                const RowCache& cache, const Span& span, Stream stream);

// Compressed rows, or the keys of their indexer; see PoolWeights.
struct Pool {
  const float *bias, *norm;
  float norm_eps;
  int dim, rate;
  bool overlaps;
  size_t at;  // of its sums in the layer's part of a state buffer

  EDGE_MOE_BOTH int columns() const { return overlaps ? 2 * dim : dim; }
};

// Adds a span's tokens to the sums in the state. Where a row ends at a token, it is written to the first `dim` of the
// token's values (tokens, columns), with its norm and RoPE, and cached: as row places + n of `cache`, or as key n of
// `keys` if `cache` is empty.
void pool_rows(float* values, const float* gates, const Pool& pool, const RowTables& tables, int rope_dim,
               bool interleaved, const StateBuffers& states, const RowCache& cache, const IndexCache& keys,
               const Span& span, Stream stream);

// attended (groups, tokens, heads of a group, head_dim) of a span's tokens, from q and the cache, which already has
// their own rows. sinks: (heads,). mixed: buffer (span.count, heads, head_dim); scores: buffer (span.count, heads,
// cache.positions).
void attend_rows(const float* q, const float* sinks, const RowTables& tables, const RowHeads& heads, int groups,
                 int tokens, const RowCache& cache, const RowChoice& choice, const Span& span, float* scores,
                 float* mixed, float* attended, Stream stream);

}  // namespace edge_moe::cuda
