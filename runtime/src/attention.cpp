// Attention with keys and values for each KV head; attention over a latent is in latent_attention.cpp.
#include <algorithm>
#include <cstring>

#include "engine.h"
#include "rope.h"

namespace edge_moe {

void Engine::attention(int layer, int tokens) {
  const EngineConfig& c = config_;
  const LayerWeights& w = layers_[layer];
  const int q_dim = c.heads * c.head_dim, kv_dim = c.kv_heads * c.head_dim, half = c.rope_dim / 2;
  attention_norm(layer, tokens);

  // q k v
  const bool quantised = std::min({w.q.width, w.k.width, w.v.width}) < 16;  // a bundle may mix widths
  Activations x = prepare(s_.normed, tokens, c.dim, s_.normed_q, quantised);
  matmul(w.q, x, s_.q);
  matmul(w.k, x, s_.k);
  matmul(w.v, x, s_.v);
  auto add_bias = [&](float* vector, int n, const float* bias) {
    for (int i = 0; bias && i < n; ++i) vector[i] += bias[i];
  };
  auto clip = [&](float* vector, int n) {
    for (int i = 0; c.qkv_clip > 0 && i < n; ++i) vector[i] = std::clamp(vector[i], -c.qkv_clip, c.qkv_clip);
  };
  auto norm = [&](float* vector, int n, const float* weight) {
    const int step = c.qk_norm_full ? n : c.head_dim;
    for (int i = 0; weight && i < n; i += step) kernels_.rms_norm(vector + i, weight, c.norm_eps, vector + i, step);
  };

  // norms of q and k, rope, and into the KV cache
  pool_.run(tokens, [&](int t, int) {
    float *q = s_.q + size_t(t) * q_dim, *k = s_.k + size_t(t) * kv_dim, *v = s_.v + size_t(t) * kv_dim;
    add_bias(q, q_dim, w.q_bias), add_bias(k, kv_dim, w.k_bias), add_bias(v, kv_dim, w.v_bias);
    norm(q, q_dim, w.q_norm), norm(k, kv_dim, w.k_norm);
    clip(q, q_dim), clip(k, kv_dim), clip(v, kv_dim);
    const size_t position = position_ + t;
    const float *cos = s_.cos + position * half, *sin = s_.sin + position * half;
    for (int head = 0; head < c.heads; ++head) rotate(q + head * c.head_dim, cos, sin, half, false);
    for (int head = 0; head < c.kv_heads; ++head) {
      rotate(k + head * c.head_dim, cos, sin, half, false);
      const size_t at = position * c.head_dim, bytes = c.head_dim * sizeof(float);
      std::memcpy(cached(keys_, layer, head) + at, k + head * c.head_dim, bytes);
      std::memcpy(cached(values_, layer, head) + at, v + head * c.head_dim, bytes);
    }
  });

  // attention, one task a token and head
  pool_.run(tokens * c.heads, [&](int task, int thread) {
    const int t = task / c.heads, head = task % c.heads, kv_head = head / (c.heads / c.kv_heads);
    const int end = position_ + t + 1;
    const int begin = c.sliding_window ? std::max(0, end - c.sliding_window) : 0;
    kernels_.attend(s_.q + size_t(t) * q_dim + head * c.head_dim, cached(keys_, layer, kv_head),
                    cached(values_, layer, kv_head), begin, end, c.head_dim, c.softmax_scale,
                    s_.scores + size_t(thread) * c.context, s_.attended + size_t(t) * q_dim + head * c.head_dim);
  });
  if (prune_.protect > 0 && tokens > 1) received_attention(layer, tokens);
  attention_output(layer, tokens);
}

// How much attention each of the chunk's tokens receives from those at and after it in the chunk, by head. Done anew,
// head by head, so that sums have one order; it is only for prompts whose tokens are protected from pruning.
void Engine::received_attention(int layer, int tokens) {
  const EngineConfig& c = config_;
  pool_.run(c.heads, [&](int head, int thread) {
    const int kv_head = head / (c.heads / c.kv_heads);
    float *received = s_.received + size_t(head) * c.chunk, *scores = s_.scores + size_t(thread) * c.context;
    std::fill_n(received, tokens, 0.0f);
    for (int t = 0; t < tokens; ++t) {
      const int end = position_ + t + 1, begin = c.sliding_window ? std::max(0, end - c.sliding_window) : 0;
      const float* q = s_.q + (size_t(t) * c.heads + head) * c.head_dim;
      for (int at = begin; at < end; ++at) {
        const float* k = cached(keys_, layer, kv_head) + size_t(at) * c.head_dim;
        float dot = 0;
        for (int i = 0; i < c.head_dim; ++i) dot += q[i] * k[i];
        scores[at] = dot * c.softmax_scale;
      }
      kernels_.softmax(scores + begin, end - begin);
      for (int at = std::max(begin, position_); at < end; ++at) received[at - position_] += scores[at];
    }
  });
}

void Engine::attention_norm(int layer, int tokens) {
  const size_t dim = config_.dim;
  const float* weight = layers_[layer].attention_norm;
  pool_.run(tokens, [&](int t, int) {
    kernels_.rms_norm(s_.x + t * dim, weight, config_.norm_eps, s_.normed + t * dim, int(dim));
  });
}

// Output projection and residual.
void Engine::attention_output(int layer, int tokens) {
  const Matrix& o = layers_[layer].o;
  matmul(o, prepare(s_.attended, tokens, o.cols, s_.attended_q, o.width < 16), s_.normed);
  add_to_residual(s_.normed, tokens);
}

float* Engine::cached(float* cache, int layer, int head) const {
  return cache + (size_t(layer) * config_.kv_heads + head) * config_.context * config_.head_dim;
}

}  // namespace edge_moe
