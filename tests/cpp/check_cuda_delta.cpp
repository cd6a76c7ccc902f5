// The convolution and the recurrence of gated delta nets and of Mamba-2 against scalar.cpp.
#include "../../devices/cuda/delta.h"
#include "check_cuda.h"

namespace {

cuda::RecurrentNet net_of(int heads, int kv_heads, int head_dim, int v_dim, int conv_kernel, bool mamba = false) {
  cuda::RecurrentNet net = {heads, kv_heads, head_dim, v_dim, conv_kernel, 0, 0, 0, mamba, 0.7f};
  net.q_at = mamba ? heads * v_dim + net.kv_dim() : 0;
  net.k_at = mamba ? heads * v_dim : net.kv_dim();
  net.v_at = mamba ? 0 : 2 * net.kv_dim();
  return net;
}

// Tokens after `before` others, whose state is there, or at the beginning.
void check_net(const cuda::RecurrentNet& net, int tokens, bool after_others, bool silu) {
  const size_t channels = net.channels(), values = size_t(net.heads) * net.v_dim, states = net.state_values();
  const size_t of_head = size_t(net.head_dim) * net.v_dim, past = (net.conv_kernel - 1) * channels;
  const int first = 2, shared = net.heads / net.kv_heads;  // the span does not begin with the pass
  const Floats weights = floats(net.conv_kernel * channels), bias = floats(net.heads);
  const Floats conv_bias = floats(channels), skip = floats(net.heads), norm = floats(values);
  Floats rate = floats(net.heads), buffers = floats(3 * (states + past));
  for (float& value : rate) value = std::fabs(value) + 0.1f;
  Floats qkv = floats((first + tokens) * channels), write = floats((first + tokens) * net.heads);
  Floats decay = floats(write.size()), gate = floats((first + tokens) * values),
         out = floats((first + tokens) * values);
  Floats got_qkv = qkv, got_write = write, got_decay = decay, got_out = out, got_buffers = buffers;

  const float* from = after_others ? &buffers[states + past] : nullptr;  // the second buffer
  float* to = &buffers[2 * (states + past)];
  const Convolution conv = {
      weights.data(), from ? from + states : nullptr,        to + states, net.conv_kernel, int(channels), channels,
      silu,           net.mamba ? conv_bias.data() : nullptr};
  kScalarKernels.convolve(conv, &qkv[first * channels], tokens, 0, int(channels));
  for (int t = first; t < first + tokens; ++t) {
    for (int vector = 0; !net.mamba && vector < 2 * net.kv_heads; ++vector) {
      float* x = &qkv[t * channels + size_t(vector) * net.head_dim];
      const float scale = vector < net.kv_heads ? 1.0f / std::sqrt(float(net.head_dim)) : 1.0f;
      kScalarKernels.l2_norm(x, kKeyEps, scale, x, net.head_dim);
    }
    for (int head = 0; head < net.heads; ++head) {
      const size_t at = size_t(t) * net.heads + head;
      if (net.mamba) {
        write[at] = step_of(decay[at], bias[head], net.least_step), decay[at] = left_after(write[at], rate[head]);
        continue;
      }
      write[at] = sigmoid(write[at]), decay[at] = decay_of(decay[at], bias[head], rate[head]);
    }
  }
  for (int head = 0; head < net.heads; ++head) {
    const float* row = &qkv[first * channels];
    const size_t place = size_t(first) * net.heads + head;
    const DeltaHead its = {row + net.q_at + head / shared * net.head_dim,
                           row + net.k_at + head / shared * net.head_dim,
                           row + net.v_at + head * net.v_dim,
                           &write[place],
                           &decay[place],
                           &out[place * net.v_dim],
                           channels,
                           size_t(net.heads),
                           values,
                           tokens,
                           net.head_dim,
                           net.v_dim,
                           !net.mamba};
    kScalarKernels.delta_rule(its, from ? from + head * of_head : nullptr, to + head * of_head);
  }
  for (int t = first; net.mamba && t < first + tokens; ++t) {
    for (int head = 0; head < net.heads; ++head) {
      float* y = &out[t * values + size_t(head) * net.v_dim];
      kScalarKernels.add_scaled(y, &qkv[t * channels + net.v_at + size_t(head) * net.v_dim], skip[head], net.v_dim);
    }
    for (size_t i = t * values; i < (t + 1) * values; ++i) out[i] = gated(gate[i], out[i], {Gate::kSilu});
    const int of_key = shared * net.v_dim;
    for (int key = 0; key < net.kv_heads; ++key) {
      float* y = &out[t * values + size_t(key) * of_key];
      kScalarKernels.rms_norm(y, &norm[size_t(key) * of_key], 1e-5f, y, of_key);
    }
  }

  const Values<int32_t> position = {5}, numbers = {after_others ? 1 : -1, 2};
  const cuda::Span span = {position.data(), first, tokens, 0};
  const cuda::StateBuffers at = {got_buffers.data(), states + past, numbers.data()};
  const cuda::Taps taps = {net.conv_kernel,    net.channels(), 1,
                           net.state_values(), silu,           net.mamba ? conv_bias.data() : nullptr};
  cuda::convolve(got_qkv.data(), weights.data(), taps, at, span, nullptr);
  cuda::delta_inputs(got_qkv.data(), got_write.data(), got_decay.data(), bias.data(), rate.data(), net, span, nullptr);
  cuda::delta_rule(got_qkv.data(), got_write.data(), got_decay.data(), net, at, span, got_out.data(), nullptr);
  if (net.mamba)
    cuda::mamba_outputs(got_qkv.data(), gate.data(), skip.data(), norm.data(), 1e-5f, net, span, got_out.data(),
                        nullptr);
  const std::string what = (net.mamba ? std::string("Mamba-2 of ") : "delta net of ") + std::to_string(net.heads) +
                           " heads of " + std::to_string(net.head_dim) + " by " + std::to_string(net.v_dim) + ", " +
                           std::to_string(tokens) + " tokens" + (after_others ? " after others" : "");
  compare(what + ", q k v", got_qkv, qkv);
  compare(what + ", write", got_write, write);
  compare(what + ", decay", got_decay, decay);
  compare(what + ", values", got_out, out);
  compare(what + ", states", got_buffers, buffers);
}

}  // namespace

void check_delta() {
  for (int tokens : {1, 2, 9, 40})
    for (bool after_others : {false, true}) {
      check_net(net_of(6, 2, 24, 16, 4), tokens, after_others, true);
      check_net(net_of(3, 3, 16, 40, 3), tokens, after_others, false);
      check_net(net_of(2, 1, 128, 128, 4), tokens, after_others, true);
      check_net(net_of(4, 4, 7, 33, 1), tokens, after_others, true);
      check_net(net_of(6, 2, 24, 16, 4, true), tokens, after_others, true);
      check_net(net_of(4, 1, 128, 33, 4, true), tokens, after_others, true);
    }
}
