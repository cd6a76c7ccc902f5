// Gated delta nets, Mamba-2 and short convolutions: layers whose sequences have a state of fixed size in place of
// cached keys and values.
//
// Tokens pass through the convolution and the recurrence one after the other, so results do not depend on how a prompt
// is split. A task takes a key head, with the heads that share it, or some channels through all tokens of a span, so
// the states that it works on stay in its core's cache.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../../devices/lane_math.h"
#include "cpu_math.h"

namespace edge_moe {

static constexpr int kChannels = 256;  // of a task of a short convolution

void CpuMath::recurrence(int layer, const Step& step) {
  const int tokens = step.tokens;
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const LayerWeights& w = layers_[layer];
  attention_norm(layer, tokens);
  const bool quantised = w.qkv.takes_rounded() || w.o_gate.takes_rounded() || w.write.takes_rounded();
  const Activations x = prepare(s_.normed, tokens, c.dim, s_.normed_q, quantised);
  matmuls(
      {{w.qkv, a.has_state() ? s_.q : s_.attended}, {w.o_gate, s_.o_gate}, {w.write, s_.write}, {w.decay, s_.decay}},
      x);
  if (a.has_state())
    run_spans(
        step, [&](const TokenSpan&) { return a.kv_heads; },
        [&](const TokenSpan& span, int kv_head, int) { heads_of_key(layer, span, kv_head); });
  else
    run_spans(
        step, [&](const TokenSpan&) { return (a.v_dim + kChannels - 1) / kChannels; },
        [&](const TokenSpan& span, int task, int) {
          convolve_channels(layer, span, task * kChannels, std::min((task + 1) * kChannels, a.v_dim));
        });
  attention_output(layer, s_.o_gate, tokens);
}

// Some channels of a span's short convolution: from its inputs and their factors to the input of o, in s_.o_gate.
void CpuMath::convolve_channels(int layer, const TokenSpan& span, int begin, int end) {
  const AttentionConfig& a = config_.attention(layer);
  const size_t channels = a.v_dim, first = span.first * channels;
  const float* from = span.state < 0 ? nullptr : state(span.state, layer);
  const Convolution conv = {
      layers_[layer].conv, from, state(span.next_state, layer), a.conv_kernel, a.v_dim, channels, false};
  const auto multiply = [&](float* x, const float* factors) {
    for (int t = 0; t < span.count; ++t)
      kernels_.gate_up(x + first + t * channels + begin, factors + first + t * channels + begin, end - begin,
                       {Gate::kBilinear});
  };
  multiply(s_.attended, s_.write);
  kernels_.convolve(conv, s_.attended + first, span.count, begin, end);
  multiply(s_.o_gate, s_.attended);
}

// Some heads of a span, those that share a key head: from q k v and the gates to the input of o, in s_.o_gate.
void CpuMath::heads_of_key(int layer, const TokenSpan& span, int kv_head) {
  const AttentionConfig& a = config_.attention(layer);
  const LayerWeights& w = layers_[layer];
  const bool mamba = a.recurrence == Recurrence::kMamba;
  const int n = a.head_dim, shared = a.heads / a.kv_heads, first_head = kv_head * shared;
  const size_t channels = a.conv_channels(), heads = a.heads, values = heads * a.v_dim, states = heads * n * a.v_dim;
  const float* from = span.state < 0 ? nullptr : state(span.state, layer);
  float* to = state(span.next_state, layer);
  float* qkv = s_.q + span.first * channels;
  const int q = a.q_at() + kv_head * n, k = a.k_at() + kv_head * n, v = a.v_at() + first_head * a.v_dim;

  // convolution
  const Convolution conv = {
      w.conv, from ? from + states : nullptr, to + states, a.conv_kernel, int(channels), channels, true, w.conv_bias};
  for (const auto& [begin, count] : {std::pair{q, n}, {k, n}, {v, shared * a.v_dim}})
    kernels_.convolve(conv, qkv, span.count, begin, begin + count);

  // unit keys and queries, of delta nets; write and decay
  const float query_scale = 1.0f / std::sqrt(float(n));
  for (int t = 0; t < span.count; ++t) {
    float* row = qkv + t * channels;
    if (!mamba) kernels_.l2_norm(row + q, kKeyEps, query_scale, row + q, n);
    if (!mamba) kernels_.l2_norm(row + k, kKeyEps, 1.0f, row + k, n);
    for (int head = first_head; head < first_head + shared; ++head) {
      float &write = s_.write[(span.first + t) * heads + head], &decay = s_.decay[(span.first + t) * heads + head];
      if (mamba) {
        write = step_of(decay, w.decay_bias[head], a.least_step), decay = left_after(write, w.decay_rate[head]);
        continue;
      }
      write = sigmoid(write), decay = decay_of(decay, w.decay_bias[head], w.decay_rate[head]);
    }
  }

  // the states; of delta nets each head's norm, and the gate; of Mamba-2 the skipped value, and the gate
  for (int head = first_head; head < first_head + shared; ++head) {
    const size_t gates = span.first * heads + head, state = size_t(head) * n * a.v_dim;
    float* out = s_.attended + span.first * values + size_t(head) * a.v_dim;
    const DeltaHead its = {qkv + q,
                           qkv + k,
                           qkv + v + (head - first_head) * a.v_dim,
                           s_.write + gates,
                           s_.decay + gates,
                           out,
                           channels,
                           heads,
                           values,
                           span.count,
                           n,
                           a.v_dim,
                           !mamba};
    kernels_.delta_rule(its, from ? from + state : nullptr, to + state);
    for (int t = 0; t < span.count; ++t) {
      const float* value = qkv + t * channels + v + (head - first_head) * a.v_dim;
      if (mamba)
        kernels_.add_scaled(out + t * values, value, w.skip[head], a.v_dim);
      else
        kernels_.rms_norm(out + t * values, w.o_norm, config_.norm_eps, out + t * values, a.v_dim);
      kernels_.gate_up(s_.o_gate + (span.first + t) * values + size_t(head) * a.v_dim, out + t * values, a.v_dim,
                       {a.gate});
    }
  }

  // the norm of all of them, of Mamba-2
  const size_t first = size_t(first_head) * a.v_dim;
  for (int t = span.first; mamba && t < span.first + span.count; ++t) {
    float* y = s_.o_gate + t * values + first;
    kernels_.rms_norm(y, w.o_norm + first, config_.norm_eps, y, shared * a.v_dim);
  }
}

float* CpuMath::state(int buffer, int layer) const {
  return reinterpret_cast<float*>(state_arena_.data() + buffer * state_offsets_.back() + state_offsets_[layer]);
}

uint8_t* CpuMath::state_buffer(int buffer) const { return reinterpret_cast<uint8_t*>(state(buffer, 0)); }

void CpuMath::copy_state(int from, int to) { std::memcpy(state(to, 0), state(from, 0), state_offsets_.back()); }

}  // namespace edge_moe
