// Launches of the kernels of a residual stream of several streams, and of embeddings of n-grams: see streams.cu. The
// streams of a token lie one after the other. Pointers are device pointers.
#pragma once

#include "layer.h"

namespace edge_moe::cuda {

// y (tokens, streams, dim) = x (tokens, dim) for each stream.
void repeat(const float* x, int tokens, int dim, int streams, float* y, Stream stream);

// low (tokens, rank) = silu(part * low), and shares (tokens, streams) = 2 * sigmoid(part * shares); shares may be null.
void mix_inputs(float* low, int rank, float* shares, int streams, float part, int tokens, Stream stream);

// y (tokens, dim) = the sum over streams, in order, of part * sigmoid(gates) * x; gates, x: (tokens, streams, dim).
void mix(const float* gates, const float* x, int tokens, int dim, int streams, float part, float* y, Stream stream);

// x (tokens, streams, dim) += shares (tokens, streams) * factor * y (tokens, dim)
void add_shares(float* x, const float* y, const float* shares, float factor, int tokens, int dim, int streams,
                Stream stream);

// y (vectors, n) = x / sqrt(mean(x^2) + eps), of any length.
void normed(const float* x, float eps, int vectors, int n, float* y, Stream stream);

// See hyper_shares().
struct HyperMix {
  const float *base, *scale;
  float eps;
  int iterations;
};

// y (tokens, dim) = the sum of a token's streams x (tokens, streams, dim), weighted as its products (tokens, mixes)
// tell; shares (tokens, streams * (streams + 1)): what each stream gets of the output, and then of each stream; null
// where there are only products for the sum.
void collapse(const float* x, const float* products, const HyperMix& mix, int tokens, int dim, int streams,
              float* shares, float* y, Stream stream);

// x (tokens, streams, dim) = the streams mixed by `shares`, plus each one's share of factor * y (tokens, dim).
void add_mixed(float* x, const float* y, const float* shares, float factor, int tokens, int dim, int streams,
               Stream stream);

// The norms of embeddings of n-grams, (streams, dim) each.
struct NGramNorms {
  const float *key, *query, *conv;
  float eps;
};

// keys (tokens, streams, dim) = each stream's gate times values (tokens, dim), given the keys; normed: the norm of
// that. x (tokens, streams, dim): the residual stream.
void gate_ngrams(const float* x, const float* values, const NGramNorms& norms, int tokens, int dim, int streams,
                 float* keys, float* normed, Stream stream);

// x (n,) += a + b
void add_sum(float* x, const float* a, const float* b, size_t n, Stream stream);

}  // namespace edge_moe::cuda
