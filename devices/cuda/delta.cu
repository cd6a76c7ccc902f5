// The convolution and the recurrence of gated delta nets and Mamba-2; scalar.cpp defines the bits.
//
// Tokens are computed one after the other, so only channels, and columns of states, are computed side by side.
#include "delta.h"
#include "lanes.cuh"

namespace edge_moe::cuda {

namespace {

constexpr int kThreads = 128;

// Each thread computes one channel.
EDGE_MOE_KERNEL(kThreads)
convolve_kernel(float* values, const float* weights, Taps taps, StateBuffers states, Span span) {
  const int channel = int(blockIdx.x * kThreads + threadIdx.x), channels = taps.channels, last = taps.kernel - 1;
  const int past = last * taps.apart;
  if (channel >= channels) return;
  const float* before = states.before();
  const float* inputs = before ? before + taps.at + channel : nullptr;
  float* next = states.after() + taps.at + channel;
  float* x = values + size_t(span.first) * channels + channel;
  const auto input = [&](int t) {
    return t >= 0 ? x[size_t(t) * channels] : inputs ? inputs[size_t(t + past) * channels] : 0.0f;
  };
  for (int t = span.count - past; t < span.count; ++t) next[size_t(t - span.count + past) * channels] = input(t);
  for (int t = span.count - 1; t >= 0; --t) {
    float sum = weights[size_t(last) * channels + channel] * x[size_t(t) * channels];
    for (int at = 1; at <= last && (inputs || t >= at * taps.apart); ++at)
      sum = fmaf(weights[size_t(last - at) * channels + channel], input(t - at * taps.apart), sum);
    if (taps.bias) sum = sum + taps.bias[channel];
    x[size_t(t) * channels] = taps.silu ? gated(sum, 1.0f, {Gate::kSilu}) : sum;
  }
}

// Each warp scales a query or a key of one token; the last one computes the token's write and decay. Of Mamba-2 there
// is only this one.
EDGE_MOE_KERNEL(kWarp)
inputs_kernel(float* qkv, float* write, float* decay, const float* bias, const float* rate, RecurrentNet net,
              Span span) {
  const int lane = int(threadIdx.x), vector = int(blockIdx.x), n = net.head_dim;
  const size_t token = size_t(span.first) + blockIdx.y;
  if (net.mamba || vector == 2 * net.kv_heads) {
    for (int head = lane; head < net.heads; head += kWarp) {
      const size_t at = token * net.heads + head;
      if (net.mamba) {
        write[at] = step_of(decay[at], bias[head], net.least_step);
        decay[at] = left_after(write[at], rate[head]);
        continue;
      }
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
delta_kernel(const float* qkv, const float* write, const float* decay, RecurrentNet net, StateBuffers states, Span span,
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
    const float* row = qkv + token * net.channels();
    __syncwarp();
    for (int i = lane; i < n; i += kWarp)
      q[i] = row[net.q_at + kv_head * n + i], k[i] = row[net.k_at + kv_head * n + i];
    __syncwarp();
    const float value = row[net.v_at + head * net.v_dim + (is_there ? column : 0)];
    const float left = decay[gate];
    float known = 0.0f, sum = 0.0f;
    EDGE_MOE_UNROLL_8
    for (int i = 0; i < n; ++i) {
      const float decayed = s[i * kWarp] * left;
      s[i * kWarp] = decayed;
      known = fmaf(decayed, k[i], known);
    }
    const float change = (net.mamba ? value : value - known) * write[gate];
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

// Each warp computes the heads of one token that share a key.
EDGE_MOE_KERNEL(kWarp)
mamba_outputs_kernel(const float* qkv, const float* gate, const float* skip, const float* weight, float eps,
                     RecurrentNet net, Span span, float* out) {
  const int lane = int(threadIdx.x), n = net.heads / net.kv_heads * net.v_dim, first = int(blockIdx.x) * n;
  const size_t token = size_t(span.first) + blockIdx.y, at = token * net.heads * net.v_dim + first;
  const float* value = qkv + token * net.channels() + net.v_at + first;
  for (int i = lane; i < n; i += kWarp) {
    const float y = out[at + i] + skip[(first + i) / net.v_dim] * value[i];
    out[at + i] = gated(gate[at + i], y, {Gate::kSilu});
  }
  __syncwarp();
  const float inverse = inverse_norm(out + at, n, eps);
  __syncwarp();
  for (int i = lane; i < n; i += kWarp) out[at + i] = out[at + i] * inverse * weight[first + i];
}

}  // namespace

void convolve(float* x, const float* weights, const Taps& taps, const StateBuffers& states, const Span& span,
              Stream stream) {
  EDGE_MOE_LAUNCH(convolve_kernel, dim3(pieces(size_t(taps.channels), kThreads)), dim3(kThreads), 0, stream, x, weights,
                  taps, states, span);
}

void delta_inputs(float* qkv, float* write, float* decay, const float* bias, const float* rate, const RecurrentNet& net,
                  const Span& span, Stream stream) {
  EDGE_MOE_LAUNCH(inputs_kernel, dim3(unsigned(net.mamba ? 1 : 2 * net.kv_heads + 1), unsigned(span.count)),
                  dim3(kWarp), 0, stream, qkv, write, decay, bias, rate, net, span);
}

void delta_rule(const float* qkv, const float* write, const float* decay, const RecurrentNet& net,
                const StateBuffers& states, const Span& span, float* out, Stream stream) {
  const size_t bytes = size_t(net.head_dim) * (kWarp + 2) * sizeof(float);
  EDGE_MOE_LAUNCH(delta_kernel, dim3(unsigned(net.heads), pieces(size_t(net.v_dim), kWarp)), dim3(kWarp), bytes, stream,
                  qkv, write, decay, net, states, span, out);
}

void mamba_outputs(const float* qkv, const float* gate, const float* skip, const float* weight, float eps,
                   const RecurrentNet& net, const Span& span, float* out, Stream stream) {
  EDGE_MOE_LAUNCH(mamba_outputs_kernel, dim3(unsigned(net.kv_heads), unsigned(span.count)), dim3(kWarp), 0, stream, qkv,
                  gate, skip, weight, eps, net, span, out);
}

}  // namespace edge_moe::cuda
