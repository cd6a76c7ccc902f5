// A residual stream of several streams, and embeddings of n-grams, as in runtime/src/streams.cpp; scalar.cpp defines
// the bits.
#include "lanes.cuh"
#include "streams.h"

namespace edge_moe::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kMostStreams = 16;

EDGE_MOE_KERNEL(kThreads) repeat_kernel(const float* x, int dim, int streams, float* y) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i >= dim) return;
  const float value = x[size_t(blockIdx.y) * dim + i];
  for (int s = 0; s < streams; ++s) y[(size_t(blockIdx.y) * streams + s) * dim + i] = value;
}

EDGE_MOE_KERNEL(kThreads) mix_inputs_kernel(float* low, int rank, float* shares, int streams, float part) {
  const size_t token = blockIdx.y;
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i < rank) low[token * rank + i] = gated(low[token * rank + i] * part, 1.0f, {Gate::kSilu});
  if (shares && i < streams) shares[token * streams + i] = 2.0f * sigmoid(shares[token * streams + i] * part);
}

EDGE_MOE_KERNEL(kThreads)
mix_kernel(const float* gates, const float* x, int dim, int streams, float part, float* y) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i >= dim) return;
  float sum = 0.0f;
  for (int s = 0; s < streams; ++s) {
    const size_t at = (size_t(blockIdx.y) * streams + s) * dim + i;
    sum = sum + part * gated(gates[at], x[at], {Gate::kSigmoid});
  }
  y[size_t(blockIdx.y) * dim + i] = sum;
}

EDGE_MOE_KERNEL(kThreads)
add_shares_kernel(float* x, const float* y, const float* shares, float factor, int dim, int streams) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i >= dim) return;
  const float value = y[size_t(blockIdx.y) * dim + i];
  for (int s = 0; s < streams; ++s) {
    const size_t stream = size_t(blockIdx.y) * streams + s;
    x[stream * dim + i] = x[stream * dim + i] + shares[stream] * factor * value;
  }
}

// Each warp computes one stream of one token.
EDGE_MOE_KERNEL(kWarp)
gate_ngrams_kernel(const float* x, const float* values, NGramNorms norms, int dim, int streams, float* keys,
                   float* normed) {
  const int lane = int(threadIdx.x);
  const size_t of_norm = size_t(blockIdx.x) * dim, at = size_t(blockIdx.y) * streams * dim + of_norm;
  const float *stream = x + at, *value = values + size_t(blockIdx.y) * dim;
  float *key = keys + at, *query = normed + at;
  const float of_key = inverse_norm(key, dim, norms.eps), of_query = inverse_norm(stream, dim, norms.eps);
  __syncwarp();
  for (int i = lane; i < dim; i += kWarp) {
    key[i] = key[i] * of_key * norms.key[of_norm + i];
    query[i] = stream[i] * of_query * norms.query[of_norm + i];
  }
  __syncwarp();
  float product = 0.0f;
  for (int i = lane % kLanes; i < dim; i += kLanes) product = fmaf(key[i], query[i], product);
  const float gate = ngram_gate(fold_lanes(product), dim);
  __syncwarp();
  for (int i = lane; i < dim; i += kWarp) key[i] = gate * value[i];
  __syncwarp();
  const float of_gated = inverse_norm(key, dim, norms.eps);
  for (int i = lane; i < dim; i += kWarp) query[i] = key[i] * of_gated * norms.conv[of_norm + i];
}

// Each block computes one vector; all of its warps sum the same squares.
EDGE_MOE_KERNEL(kThreads) normed_kernel(const float* x, float eps, int n, float* y) {
  const size_t at = size_t(blockIdx.x) * n;
  const float inverse = inverse_norm(x + at, n, eps);
  for (int i = int(threadIdx.x); i < n; i += kThreads) y[at + i] = x[at + i] * inverse;
}

// Each block computes a part of one token's sum; each finds the weights, and the first one keeps the shares.
EDGE_MOE_KERNEL(kThreads)
collapse_kernel(const float* x, const float* products, HyperMix mix, int dim, int streams, float* shares, float* y) {
  __shared__ float before[kMostStreams], after[kMostStreams], between[kMostStreams * kMostStreams];
  const int i = int(blockIdx.x * kThreads + threadIdx.x), thread = int(threadIdx.x), all = streams * (streams + 1);
  const size_t token = blockIdx.y;
  if (thread == 0)
    hyper_shares(products + token * (shares ? all + streams : streams), mix.base, mix.scale, streams, mix.iterations,
                 mix.eps, before, shares ? after : nullptr, between);
  __syncthreads();
  if (shares && blockIdx.x == 0)
    for (int at = thread; at < all; at += kThreads)
      shares[token * all + at] = at < streams ? after[at] : between[at - streams];
  if (i >= dim) return;
  float sum = 0.0f;
  for (int s = 0; s < streams; ++s) sum = sum + before[s] * x[(token * streams + s) * dim + i];
  y[token * dim + i] = sum;
}

EDGE_MOE_KERNEL(kThreads)
add_mixed_kernel(float* x, const float* y, const float* shares, float factor, int dim, int streams) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i >= dim) return;
  EDGE_MOE_DYNAMIC_SHARED(shared);
  float* old = reinterpret_cast<float*>(shared) + threadIdx.x;  // (streams, kThreads)
  const size_t token = blockIdx.y;
  const float value = y[token * dim + i], *after = shares + token * streams * (streams + 1), *between = after + streams;
  float* stream = x + token * streams * dim + i;
  for (int s = 0; s < streams; ++s) old[s * kThreads] = stream[size_t(s) * dim];
  for (int to = 0; to < streams; ++to) {
    float sum = 0.0f;
    for (int from = 0; from < streams; ++from) sum = sum + between[from * streams + to] * old[from * kThreads];
    stream[size_t(to) * dim] = sum + after[to] * factor * value;
  }
}

EDGE_MOE_KERNEL(kThreads) add_sum_kernel(float* x, const float* a, const float* b, size_t n) {
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) x[i] = x[i] + (a[i] + b[i]);
}

}  // namespace

void repeat(const float* x, int tokens, int dim, int streams, float* y, Stream stream) {
  EDGE_MOE_LAUNCH(repeat_kernel, dim3(pieces(size_t(dim), kThreads), unsigned(tokens)), dim3(kThreads), 0, stream, x,
                  dim, streams, y);
}

void mix_inputs(float* low, int rank, float* shares, int streams, float part, int tokens, Stream stream) {
  const size_t most = size_t(rank > streams ? rank : streams);
  EDGE_MOE_LAUNCH(mix_inputs_kernel, dim3(pieces(most, kThreads), unsigned(tokens)), dim3(kThreads), 0, stream, low,
                  rank, shares, streams, part);
}

void mix(const float* gates, const float* x, int tokens, int dim, int streams, float part, float* y, Stream stream) {
  EDGE_MOE_LAUNCH(mix_kernel, dim3(pieces(size_t(dim), kThreads), unsigned(tokens)), dim3(kThreads), 0, stream, gates,
                  x, dim, streams, part, y);
}

void add_shares(float* x, const float* y, const float* shares, float factor, int tokens, int dim, int streams,
                Stream stream) {
  EDGE_MOE_LAUNCH(add_shares_kernel, dim3(pieces(size_t(dim), kThreads), unsigned(tokens)), dim3(kThreads), 0, stream,
                  x, y, shares, factor, dim, streams);
}

void normed(const float* x, float eps, int vectors, int n, float* y, Stream stream) {
  EDGE_MOE_LAUNCH(normed_kernel, dim3(unsigned(vectors)), dim3(kThreads), 0, stream, x, eps, n, y);
}

void collapse(const float* x, const float* products, const HyperMix& mix, int tokens, int dim, int streams,
              float* shares, float* y, Stream stream) {
  EDGE_MOE_LAUNCH(collapse_kernel, dim3(pieces(size_t(dim), kThreads), unsigned(tokens)), dim3(kThreads), 0, stream, x,
                  products, mix, dim, streams, shares, y);
}

void add_mixed(float* x, const float* y, const float* shares, float factor, int tokens, int dim, int streams,
               Stream stream) {
  EDGE_MOE_LAUNCH(add_mixed_kernel, dim3(pieces(size_t(dim), kThreads), unsigned(tokens)), dim3(kThreads),
                  size_t(streams) * kThreads * sizeof(float), stream, x, y, shares, factor, dim, streams);
}

void gate_ngrams(const float* x, const float* values, const NGramNorms& norms, int tokens, int dim, int streams,
                 float* keys, float* normed, Stream stream) {
  EDGE_MOE_LAUNCH(gate_ngrams_kernel, dim3(unsigned(streams), unsigned(tokens)), dim3(kWarp), 0, stream, x, values,
                  norms, dim, streams, keys, normed);
}

void add_sum(float* x, const float* a, const float* b, size_t n, Stream stream) {
  EDGE_MOE_LAUNCH(add_sum_kernel, dim3(pieces(n, kThreads)), dim3(kThreads), 0, stream, x, a, b, n);
}

}  // namespace edge_moe::cuda
