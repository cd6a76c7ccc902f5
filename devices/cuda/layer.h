// Launches of a layer's kernels except products of packed matrices: see layer.cu and attend.cu. Pointers are device
// pointers.
#pragma once

#include "../choice.h"
#include "decode.h"

namespace edge_moe::cuda {

// y (vectors, n) = x / sqrt(mean(x^2) + eps) * weight, also quantised to int8 if `into` has codes. y may be x. weight:
// (weight_rows, n), which vectors use in turn.
void rms_norm(const float* x, const float* weight, float eps, int vectors, int n, float* y, const VectorBuffer& into,
              Stream stream, int weight_rows = 1);

// y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias, likewise.
void layer_norm(const float* x, const float* weight, const float* bias, float eps, int vectors, int n, float* y,
                const VectorBuffer& into, Stream stream);

// y (count, cols): rows ids[i] of a matrix of any width, times scale
void embed(const Matrix& matrix, const int32_t* ids, int count, float scale, float* y, Stream stream);

// Computes jobs of bfloat16 or float32 matrices (width 16 or 32) with x (vectors, cols).
void float_product(const ProductJob* jobs, int count, const float* x, Stream stream);

// x (vectors, n) += bias (n,)
void add_bias(float* x, const float* bias, int vectors, int n, Stream stream);

// Vectors [first, first + count).
struct Rows {
  int first, count;
};

// gate (vectors, n) = gated(gate, up, activation) for some rows, also quantised to int8 if `into` has codes.
void activate(const Rows* rows, int count, float* gate, const float* up, int n, const Activation& activation,
              const VectorBuffer& into, Stream stream);

// x (tokens, dim) += weights[t, k] * down[pairs[t, k]] for k in [0, places), in this order; a pair of -1 was pruned.
void ranked_sum(float* x, const float* down, const float* weights, const int32_t* pairs, int tokens, int places,
                int dim, Stream stream);

// x (tokens, dim) += scale * sigmoid(gates[t]) * y, or scale * y if gates is null.
void add_gated(float* x, const float* y, const float* gates, float scale, int tokens, int dim, Stream stream);

// x (n,) = value
void fill(float* x, float value, size_t n, Stream stream);

// x (n,) = x * factor
void scale(float* x, float factor, size_t n, Stream stream);

// Keys and values of one layer, one KV head after another, each in the layout of KeyValues.
struct LayerCache {
  void *keys, *values;
  size_t places;  // capacity of each head, in whole key blocks; position p is at place p % places
  bool half;
  size_t positions;  // of the whole context, in whole key blocks: the length of a row of scores

  // The end of the part of [from, end) whose positions follow one another in memory.
  EDGE_MOE_BOTH int end_of_run(int from, int end) const {
    const int to = from / int(places) * int(places) + int(places);
    return to < end ? to : end;
  }
};

// The parameters of attention heads; see AttentionConfig.
struct Heads {
  int heads, kv_heads, head_dim, rope_dim, rope_span;
  float norm_eps, clip, softmax_scale;
  int sliding_window;
  bool interleaved, norm_after_rope, v_norm;
  const float* sinks;  // (heads,), see Kernels::softmax; null: none
};

// Tokens [first, first + count) of a pass. Token t is at `*position` + t; this is in device memory so that one graph
// serves all positions. `most`: an upper bound of their positions.
struct Span {
  const int32_t* position;
  int first, count, most;
};

// Projections of a pass's tokens, which are changed in place; null weights are absent.
struct Projections {
  float *q, *k, *v;                       // (tokens, heads * head_dim), (tokens, kv_heads * head_dim) twice
  const float *q_bias, *k_bias, *v_bias;  // (heads * head_dim,), (kv_heads * head_dim,) twice
  const float *q_norm, *k_norm;           // (head_dim,), shared by all heads
  const float *cos, *sin;                 // (context, rope_dim / 2)
};

// Applies biases, norms, limits and RoPE to q and k, and stores keys and values in the cache.
void store_keys(const Projections& p, const Heads& heads, const LayerCache& cache, const Span& span, Stream stream);

// attended (tokens, heads, head_dim) of a span's tokens, from q and the cache, which already has their own keys.
// scores: a buffer of (span.count, heads, cache.positions), which has the softmax of the scores on return.
void attend(const float* q, const Heads& heads, const LayerCache& cache, const Span& span, float* scores,
            float* attended, Stream stream);

// Applies softmax to scores (span.count, heads, positions), over the positions that each token of a span sees, or as
// many as are chosen for it. choice: of each token of the pass.
void softmax(const Heads& heads, size_t positions, const Span& span, const Choice& choice, float* scores,
             Stream stream);
void softmax(const Heads& heads, size_t positions, const Span& span, const RowChoice& choice, float* scores,
             Stream stream);

// received (heads, stride) += the attention that the pass's tokens receive from the span's tokens, given the softmax of
// their scores from attend(). The span of token 0 starts from zero.
void add_received(const float* scores, const Heads& heads, size_t positions, const Span& span, float* received,
                  size_t stride, Stream stream);

// of_tokens (tokens,) = the sum of |normed| (tokens, dim), times the mean over heads of the attention received, divided
// by the number of tokens that could give it.
void importance(const float* normed, const float* received, size_t stride, int heads, int tokens, int dim,
                float* of_tokens, Stream stream);

}  // namespace edge_moe::cuda
