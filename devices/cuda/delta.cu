// The convolution and the recurrence of a gated delta net; scalar.cpp defines the bits.
//
// Tokens are computed one after the other, so only channels, and columns of states, are computed side by side.
#include "delta.h"
#include "lanes.cuh"

namespace edge_moe::cuda {

namespace {

constexpr int kThreads = 128;

// Each thread computes one channel.
EDGE_MOE_KERNEL(kThreads)
convolve_kernel(float* values, const float* weights, bool silu, DeltaNet net, StateBuffers states, Span span) {
  const int channel = int(blockIdx.x * kThreads + threadIdx.x), channels = net.channels(), past = net.conv_kernel - 1;
  if (channel >= channels) return;
  const float* before = states.before();
  const float* inputs = before ? before + net.state_values() + channel : nullptr;
  float* next = states.after() + net.state_values() + channel;
  float* x = values + size_t(span.first) * channels + channel;
  const auto input = [&](int t) {
    return t >= 0 ? x[size_t(t) * channels] : inputs ? inputs[size_t(t + past) * channels] : 0.0f;
  };
  for (int t = span.count - past; t < span.count; ++t) next[size_t(t - span.count + past) * channels] = input(t);
  for (int t = span.count - 1; t >= 0; --t) {
    float sum = weights[size_t(past) * channels + channel] * x[size_t(t) * channels];
    for (int at = 1; at <= past && (inputs || t >= at); ++at)
      sum = fmaf(weights[size_t(past - at) * channels + channel], input(t - at), sum);
    x[size_t(t) * channels] = silu ? gated(sum, 1.0f, {Gate::kSilu}) : sum;
  }
}

// Each warp scales a query or a key of one token; the last one computes the token's write and decay.
EDGE_MOE_KERNEL(kWarp)
inputs_kernel(float* qkv, float* write, float* decay, const float* bias, const float* rate, DeltaNet net, Span span) {
  const int lane = int(threadIdx.x), vector = int(blockIdx.x), n = net.head_dim;
  const size_t token = size_t(span.first) + blockIdx.y;
  if (vector == 2 * net.kv_heads) {
    for (int head = lane; head < net.heads; head += kWarp) {
      const size_t at = token * net.heads + head;
      write[at] = sigmoid(write[at]);
      decay[at] = decay_of(decay[at], bias[head], rate[head]);
    }
    return;
  }
  float* x = qkv + token * net.channels() + size_t(vector) * n;
  const float scale = vector < net.kv_heads ? 1.0f / sqrtf(float(n)) : 1.0f;
  float sum = 0.0f;
  for (int i = lane % kLanes; i < n; i += kLanes) sum = sum + x[i] * x[i];
  const float factor = scale / sqrtf(fold_lanes(sum) + kKeyEps);
  __syncwarp();
  for (int i = lane; i < n; i += kWarp) x[i] = x[i] * factor;
}

// Each warp takes 32 columns of one head's state through the tokens, in shared memory.
EDGE_MOE_KERNEL(kWarp)
delta_kernel(const float* qkv, const float* write, const float* decay, DeltaNet net, StateBuffers states, Span span,
             float* out) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x), n = net.head_dim, head = int(blockIdx.x), column = int(blockIdx.y) * kWarp + lane;
  const int kv_head = head / (net.heads / net.kv_heads);
  const bool is_there = column < net.v_dim;
  float* q = reinterpret_cast<float*>(shared);
  float* k = q + n;
  float* s = k + n + lane;  // (head_dim, kWarp)
  const size_t at = size_t(head) * n * net.v_dim + (is_there ? column : 0);
  const float* before = states.before();
  for (int i = 0; i < n; ++i) s[i * kWarp] = before ? before[at + size_t(i) * net.v_dim] : 0.0f;
  for (int t = 0; t < span.count; ++t) {
    const size_t token = size_t(span.first) + t, gate = token * net.heads + head;
    const float* row = qkv + token * net.channels() + kv_head * n;
    __syncwarp();
    for (int i = lane; i < n; i += kWarp) q[i] = row[i], k[i] = row[net.kv_dim() + i];
    __syncwarp();
    const float value = qkv[token * net.channels() + 2 * net.kv_dim() + head * net.v_dim + (is_there ? column : 0)];
    const float left = decay[gate];
    float known = 0.0f, sum = 0.0f;
    EDGE_MOE_UNROLL_8
    for (int i = 0; i < n; ++i) {
      const float decayed = s[i * kWarp] * left;
      s[i * kWarp] = decayed;
      known = fmaf(decayed, k[i], known);
    }
    const float change = (value - known) * write[gate];
    EDGE_MOE_UNROLL_8
    for (int i = 0; i < n; ++i) {
      const float changed = fmaf(k[i], change, s[i * kWarp]);
      s[i * kWarp] = changed;
      sum = fmaf(changed, q[i], sum);
    }
    if (is_there) out[gate * net.v_dim + column] = sum;
  }
  float* after = states.after();
  for (int i = 0; is_there && i < n; ++i) after[at + size_t(i) * net.v_dim] = s[i * kWarp];
}

}  // namespace

void convolve(float* x, const float* weights, bool silu, const DeltaNet& net, const StateBuffers& states,
              const Span& span, Stream stream) {
  EDGE_MOE_LAUNCH(convolve_kernel, dim3(pieces(size_t(net.channels()), kThreads)), dim3(kThreads), 0, stream, x,
                  weights, silu, net, states, span);
}

void delta_inputs(float* qkv, float* write, float* decay, const float* bias, const float* rate, const DeltaNet& net,
                  const Span& span, Stream stream) {
  EDGE_MOE_LAUNCH(inputs_kernel, dim3(unsigned(2 * net.kv_heads + 1), unsigned(span.count)), dim3(kWarp), 0, stream,
                  qkv, write, decay, bias, rate, net, span);
}

void delta_rule(const float* qkv, const float* write, const float* decay, const DeltaNet& net,
                const StateBuffers& states, const Span& span, float* out, Stream stream) {
  const size_t bytes = size_t(net.head_dim) * (kWarp + 2) * sizeof(float);
  EDGE_MOE_LAUNCH(delta_kernel, dim3(unsigned(net.heads), pieces(size_t(net.v_dim), kWarp)), dim3(kWarp), bytes, stream,
                  qkv, write, decay, net, states, span, out);
}

}  // namespace edge_moe::cuda
