// Attention on a GPU: launches the same steps as attention.cpp and latent_attention.cpp.
#include <algorithm>

#include "cuda_math.h"

namespace edge_moe {

// x += attention of the normed x. most: in a pass of one span, upper bound of its positions; -1: the last position.
void CudaMath::attention(int layer, const Step& step, bool received, int most) {
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  if (!c.has_attention(layer)) return;
  block_input(layers_[layer].attention_norm, layers_[layer].attention_mix, step.tokens);
  if (a.recurrent()) return recurrence(layer, step);
  if (a.shared_rows) return row_attention(layer, step, most);
  if (a.kv_rank)
    latent_project(layer, step.tokens);
  else
    project(layer, step.tokens);
  const int at_once = attention_tokens(c);
  for (size_t i = 0; i < step.spans.size(); ++i) {
    const TokenSpan& its = step.spans[i];
    const int last = most >= 0 ? most : its.position + its.count - 1;
    store_keys(layer, its.sequence, i, {s_.positions + i, its.first, its.count, last});
    for (int done = 0; done < its.count; done += at_once) {
      const int count = std::min(at_once, its.count - done);
      const cuda::Span span = {s_.positions + i, its.first + done, count, last - (its.count - done - count)};
      if (a.index_heads) choose_positions(layer, its.sequence, span);
      if (a.kv_rank) {
        attend_latents(layer, its.sequence, span);
        continue;
      }
      if (a.index_heads) {
        cuda::attend_chosen(s_.q, heads(layer), cache(its.sequence, layer), span, choice(a), s_.scores, s_.attended,
                            stream_);
        continue;
      }
      cuda::attend(s_.q, heads(layer), cache(its.sequence, layer), span, s_.scores, s_.attended, stream_);
      if (received)
        cuda::add_received(s_.scores, heads(layer), c.key_positions(), span, s_.received, size_t(c.chunk), stream_);
    }
  }
  attention_output(layer, step.tokens, s_.attended);
}

// The gate of what is attended, if there is one, output projection and residual.
void CudaMath::attention_output(int layer, int tokens, float* attended) {
  const EngineConfig& c = config_;
  const LayerWeights& w = layers_[layer];
  const cuda::VectorBuffer quantised = s_.attended_q.of_length(w.o.cols);
  const bool gates = w.o_gate && c.attention(layer).recurrence != Recurrence::kMamba;  // which has gated it already
  if (gates) {
    const cuda::Rows rows = {0, tokens};
    const Recurrence recurrence = c.attention(layer).recurrence;
    const Activation activation = {recurrence == Recurrence::kDeltaNet    ? c.attention(layer).gate
                                   : recurrence == Recurrence::kShortConv ? Gate::kBilinear
                                                                          : Gate::kSigmoid};
    cuda::activate(&rows, 1, s_.o_gate, attended, w.o.cols, activation,
                   w.o.takes_rounded() ? quantised : cuda::VectorBuffer{}, stream_);
  } else if (w.o.takes_rounded()) {
    cuda::quantise(attended, tokens, quantised, stream_);
  }
  multiply(w.o, tokens, s_.normed, gates ? s_.o_gate : attended, quantised);
  add_to_residual(w.attention_post_norm, s_.normed, tokens);
}

// x += a gated delta net, Mamba-2 or a short convolution of the normed x; see recurrence.cpp.
void CudaMath::recurrence(int layer, const Step& step) {
  const AttentionConfig& a = config_.attention(layer);
  const LayerWeights& w = layers_[layer];
  const bool mamba = a.recurrence == Recurrence::kMamba;
  const cuda::RecurrentNet net = {a.heads,  a.kv_heads, a.head_dim, a.v_dim, a.conv_kernel,
                                  a.q_at(), a.k_at(),   a.v_at(),   mamba,   a.least_step};
  float* convolved = a.has_state() ? s_.q : s_.attended;
  cuda::ProductJob jobs[4] = {cuda::whole(w.qkv, step.tokens, convolved),
                              cuda::whole(w.o_gate, step.tokens, s_.o_gate)};
  size_t count = 2;
  if (w.write) jobs[count++] = cuda::whole(w.write, step.tokens, s_.write);
  if (w.decay) jobs[count++] = cuda::whole(w.decay, step.tokens, s_.decay);
  multiply({jobs, count}, s_.normed, s_.normed_q);
  const cuda::Rows rows = {0, step.tokens};
  if (!a.has_state()) cuda::activate(&rows, 1, convolved, s_.write, a.v_dim, {Gate::kBilinear}, {}, stream_);
  for (size_t i = 0; i < step.spans.size(); ++i) {
    const TokenSpan& its = step.spans[i];
    const cuda::Span span = {s_.positions + i, its.first, its.count, 0};
    const cuda::StateBuffers states = state_buffers(layer, i);
    const cuda::Taps taps = {a.conv_kernel, net.channels(), 1, net.state_values(), a.has_state(), w.conv_bias};
    cuda::convolve(convolved, w.conv, taps, states, span, stream_);
    if (!a.has_state()) continue;
    cuda::delta_inputs(s_.q, s_.write, s_.decay, w.decay_bias, w.decay_rate, net, span, stream_);
    cuda::delta_rule(s_.q, s_.write, s_.decay, net, states, span, s_.attended, stream_);
    if (mamba)
      cuda::mamba_outputs(s_.q, s_.o_gate, w.skip, w.o_norm, config_.norm_eps, net, span, s_.attended, stream_);
  }
  if (a.recurrence == Recurrence::kDeltaNet)
    cuda::rms_norm(s_.attended, w.o_norm, config_.norm_eps, step.tokens * a.heads, a.v_dim, s_.attended, {}, stream_);
  attention_output(layer, step.tokens, s_.attended);
}

// q k v
void CudaMath::project(int layer, int tokens) {
  const LayerWeights& w = layers_[layer];
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  cuda::ProductJob jobs[6] = {cuda::whole(w.q, tokens, s_.q), cuda::whole(w.k, tokens, s_.k)};
  size_t count = 2;
  if (w.v) jobs[count++] = cuda::whole(w.v, tokens, s_.v);
  if (w.o_gate) jobs[count++] = cuda::whole(w.o_gate, tokens, s_.o_gate);
  if (a.index_heads) {
    jobs[count++] = cuda::whole(w.index.q, tokens, s_.index_q);
    jobs[count++] = cuda::whole(w.index.k, tokens, s_.index_k);
  }
  multiply({jobs, count}, s_.normed, s_.normed_q);
  if (a.keys_as_values) cuda::copy(s_.v, s_.k, size_t(tokens) * a.kv_dim() * sizeof(float), stream_);
  if (!a.qk_norm_full) return;
  const auto norm = [&](float* x, const float* bias, const float* weight, int n) {  // over all heads at once
    if (bias) cuda::add_bias(x, bias, tokens, n, stream_);
    if (weight) cuda::rms_norm(x, weight, c.norm_eps, tokens, n, x, {}, stream_);
  };
  norm(s_.q, w.q_bias, w.q_norm, a.heads * a.head_dim);
  norm(s_.k, w.k_bias, w.k_norm, a.kv_heads * a.head_dim);
}

// Store the keys and values of a span, or its latents, in the cache; rotate the queries.
void CudaMath::store_keys(int layer, int sequence, size_t number, const cuda::Span& span) {
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const LayerWeights& w = layers_[layer];
  const RopeTables& rope = s_.rope[c.attention_of[layer]];
  if (a.index_heads && !a.kv_rank)
    cuda::store_block_keys(s_.index_q, s_.index_k, {w.index.q_norm, w.index.k_norm, rope.cos, rope.sin},
                           index_heads(layer), index_cache(sequence, layer), state_buffers(layer, number), span,
                           stream_);
  else if (a.index_heads)
    cuda::store_index_keys(s_.index_q, s_.index_k, w.index.k_norm, w.index.k_norm_bias, rope.cos, rope.sin,
                           index_heads(layer), index_cache(sequence, layer), span, stream_);
  if (a.kv_rank)
    return cuda::store_latents(s_.q, s_.k, w.kv_a_norm, rope.cos, rope.sin, latent_heads(layer),
                               latent_cache(sequence, layer), span, stream_);
  cuda::Projections p = {s_.q, s_.k, s_.v, w.q_bias, w.k_bias, w.v_bias, w.q_norm, w.k_norm, rope.cos, rope.sin};
  if (a.qk_norm_full) p.q_bias = p.k_bias = p.q_norm = p.k_norm = nullptr;  // done by project()
  cuda::store_keys(p, heads(layer), cache(sequence, layer), span, stream_);
}

// Project to queries, with or without a latent of their own, and to latents.
void CudaMath::latent_project(int layer, int tokens) {
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const LayerWeights& w = layers_[layer];
  const cuda::ProductJob jobs[] = {a.q_rank ? cuda::whole(w.q_a, tokens, s_.q_latent) : cuda::whole(w.q, tokens, s_.q),
                                   cuda::whole(w.kv_a, tokens, s_.k), cuda::whole(w.index.k, tokens, s_.index_k),
                                   cuda::whole(w.index.weights, tokens, s_.index_weights)};
  multiply({jobs, size_t(a.index_heads ? 4 : 2)}, s_.normed, s_.normed_q);
  if (a.q_rank) {
    cuda::rms_norm(s_.q_latent, w.q_a_norm, a.latent_norm_eps, tokens, a.q_rank, s_.q_latent, s_.q_latent_q, stream_);
    const cuda::ProductJob of_latent[] = {cuda::whole(w.q, tokens, s_.q), cuda::whole(w.index.q, tokens, s_.index_q)};
    multiply({of_latent, size_t(a.index_heads ? 2 : 1)}, s_.q_latent, s_.q_latent_q);
  }
}

// Set s_.chosen and s_.chosen_counts of a span's tokens. Launched at any position: whether a token sees more than it
// may choose is decided on the GPU, as a graph serves many positions.
void CudaMath::choose_positions(int layer, int sequence, const cuda::Span& span) {
  const AttentionConfig& a = config_.attention(layer);
  cuda::index_scores(s_.index_q, layers_[layer].index.weights ? s_.index_weights : nullptr, index_heads(layer),
                     index_cache(sequence, layer), span, a.index_top, s_.index_scores, stream_);
  cuda::choose_top(s_.index_scores, config_.key_positions(), span, a.index_top, a.index_block, !a.shared_rows,
                   s_.chosen, s_.chosen_counts, stream_);
}

void CudaMath::attend_latents(int layer, int sequence, const cuda::Span& span) {
  const AttentionConfig& a = config_.attention(layer);
  const Matrix& kv_b = layers_[layer].kv_b;
  const cuda::LatentHeads heads = latent_heads(layer);
  cuda::attend_latents(s_.q, kv_b, heads, latent_cache(sequence, layer), span, choice(a), s_.absorbed, s_.scores,
                       s_.mixed, stream_);
  // values from each head's sums of latents
  if (kv_b.takes_rounded()) cuda::quantise(s_.mixed, span.count * a.heads, s_.mixed_q, stream_);
  const size_t stride = size_t(a.heads) * a.v_dim;
  products_.clear();
  for (int head = 0; head < a.heads; ++head) {
    const Matrix values = rows_of(kv_b, head * (heads.nope_dim() + a.v_dim) + heads.nope_dim(), a.v_dim);
    float* out = s_.attended + span.first * stride + size_t(head) * a.v_dim;
    products_.push_back({values, out, stride, nullptr, head, a.heads, span.count});
  }
  multiply(products_, s_.mixed, s_.mixed_q);
}

cuda::Heads CudaMath::heads(int layer) const {
  const AttentionConfig& a = config_.attention(layer);
  return {a.heads,           a.kv_heads, a.head_dim,          a.rope_dim,       a.rope_span,
          config_.norm_eps,  a.qkv_clip, a.softmax_scale,     a.sliding_window, a.rope_interleaved,
          a.norm_after_rope, a.v_norm,   layers_[layer].sinks};
}

// The positions that choose_positions() has chosen.
Choice CudaMath::choice(const AttentionConfig& a) const {
  return a.index_top ? Choice{s_.chosen, s_.chosen_counts, a.index_most()} : Choice{};
}

// A layer's part of the state buffers, for a span of the step.
cuda::StateBuffers CudaMath::state_buffers(int layer, size_t span) const {
  return {reinterpret_cast<float*>(states_.data() + state_offsets_[layer]), state_offsets_.back() / sizeof(float),
          s_.states + 2 * span};
}

cuda::LatentHeads CudaMath::latent_heads(int layer) const {
  const AttentionConfig& a = config_.attention(layer);
  const float* scales = a.query_scales.empty() ? nullptr : s_.query_scales[config_.attention_of[layer]];
  return {a.heads,           a.head_dim,      a.rope_dim,         a.v_dim, a.kv_rank,
          a.latent_norm_eps, a.softmax_scale, a.rope_interleaved, scales,  a.query_context};
}

cuda::LayerCache CudaMath::cache(int sequence, int layer) const {
  const EngineConfig& c = config_;
  uint8_t* keys = layer_cache(sequence, layer);
  return {keys, keys + c.attention(layer).kv_heads * c.kv_row_bytes(layer), c.cached_positions(layer), c.half_cache,
          c.key_positions()};
}

cuda::LatentCache CudaMath::latent_cache(int sequence, int layer) const {
  return {layer_cache(sequence, layer), config_.key_positions(), config_.half_cache};
}

cuda::IndexHeads CudaMath::index_heads(int layer) const {
  const AttentionConfig& a = config_.attention(layer);
  return {a.index_heads, a.index_dim, a.rope_dim, a.index_norm_eps, a.index_scale, a.index_interleaved, a.index_block};
}

cuda::IndexCache CudaMath::index_cache(int sequence, int layer) const {
  return {layer_cache(sequence, layer) + config_.index_keys_offset(layer), config_.key_positions(), config_.half_cache};
}

uint8_t* CudaMath::layer_cache(int sequence, int layer) const {
  return kv_cache_.data() + sequence * kv_offsets_.back() + kv_offsets_[layer];
}

void CudaMath::copy_positions(int from, int to, int positions) {
  const EngineConfig& c = config_;
  for (int layer = 0; layer < c.layers; ++layer) {
    c.each_kv_row(layer, positions, [&](size_t at, size_t bytes) {
      cuda::copy(layer_cache(to, layer) + at, layer_cache(from, layer) + at, bytes, stream_);
    });
  }
  cuda::wait(stream_);
}

void CudaMath::copy_state(int from, int to) { copy(state_buffer(to), state_buffer(from), state_offsets_.back()); }

uint8_t* CudaMath::state_buffer(int buffer) const { return states_.data() + buffer * state_offsets_.back(); }

void CudaMath::copy(void* to, const void* from, size_t bytes) {
  cuda::copy(to, from, bytes, stream_);
  cuda::wait(stream_);
}

void CudaMath::save_windows(int sequence, int slot, int position) {
  each_window_block(config_, position, [&](int layer, size_t place, size_t at, size_t bytes) {
    cuda::copy(kept_windows(slot, layer) + at, layer_cache(sequence, layer) + place, bytes, stream_);
  });
  cuda::wait(stream_);
}

void CudaMath::load_windows(int slot, int sequence, int position) {
  each_window_block(config_, position, [&](int layer, size_t place, size_t at, size_t bytes) {
    cuda::copy(layer_cache(sequence, layer) + place, kept_windows(slot, layer) + at, bytes, stream_);
  });
  cuda::wait(stream_);
}

uint8_t* CudaMath::kept_windows(int slot, int layer) const {
  return windows_.data() + slot * window_offsets_.back() + window_offsets_[layer];
}

}  // namespace edge_moe
