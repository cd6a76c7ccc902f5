// Launches of what a layer does besides products of packed matrices: see layer.cu. Pointers are the device's.
#pragma once

#include "decode.h"

namespace edge_moe::cuda {

// y (vectors, n) = x / sqrt(mean(x^2) + eps) * weight, and rounded to int8 where `into` has codes. y may be x.
void rms_norm(const float* x, const float* weight, float eps, int vectors, int n, float* y, const VectorBuffer& into,
              Stream stream);

// y += x, n values
void add(float* y, const float* x, size_t n, Stream stream);

// y (count, cols): rows ids[i] of a matrix of any width
void embed(const Matrix& matrix, const int32_t* ids, int count, float* y, Stream stream);

// y (vectors, rows) = x (vectors, cols) . matrix of bfloat16 or float32 (width 16 or 32)
void float_product(const Matrix& matrix, const float* x, int vectors, float* y, Stream stream);

// Keys and values of one layer, each KV head's as KeyValues has them, one after the other.
struct LayerCache {
  void *keys, *values;
  size_t positions;  // room of each, in whole key blocks
  bool half;
};

// What attention is told about heads; see EngineConfig.
struct Heads {
  int heads, kv_heads, head_dim, rope_dim;
  float norm_eps, clip, softmax_scale;
  int sliding_window;
};

// Projections of the tokens at positions [position, position + tokens), which are changed in place; weights null: none.
struct Projections {
  float *q, *k, *v;                       // (tokens, heads * head_dim), (tokens, kv_heads * head_dim) twice
  const float *q_bias, *k_bias, *v_bias;  // as wide as those
  const float *q_norm, *k_norm;           // (head_dim,): of each head
  const float *cos, *sin;                 // (context, rope_dim / 2)
};

// Biases, norms, limits and turns of q and k; keys and values into the cache.
void store_keys(const Projections& p, const Heads& heads, const LayerCache& cache, int position, int tokens,
                Stream stream);

// attended (tokens, heads, head_dim) from q and the cache, which has the tokens' own keys already. scores: room for
// (tokens, heads, cache.positions).
void attend(const float* q, const Heads& heads, const LayerCache& cache, int position, int tokens, float* scores,
            float* attended, Stream stream);

}  // namespace edge_moe::cuda
