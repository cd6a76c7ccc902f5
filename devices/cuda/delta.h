// Launches of the kernels of layers with a convolution and a recurrence: see delta.cu. Pointers are device pointers.
#pragma once

#include "layer.h"

namespace edge_moe::cuda {

// The sizes of a gated delta net, of Mamba-2, or of a short convolution, whose head_dim is 0; see AttentionConfig.
struct RecurrentNet {
  int heads, kv_heads, head_dim, v_dim, conv_kernel;
  int q_at, k_at, v_at;  // where these begin in a token's channels
  bool mamba = false;    // Mamba-2, else a gated delta net
  float least_step = 0;  // of Mamba-2

  EDGE_MOE_BOTH int kv_dim() const { return kv_heads * head_dim; }
  EDGE_MOE_BOTH int channels() const { return 2 * kv_dim() + heads * v_dim; }
  EDGE_MOE_BOTH size_t state_values() const { return size_t(heads) * head_dim * v_dim; }
};

// A layer's part of the state buffers: the states of the heads, then the convolution's past inputs. of_span: the
// numbers of the buffers before and after a span, in device memory so that one graph serves all; -1: zeros.
struct StateBuffers {
  float* first;   // of buffer 0
  size_t stride;  // from one buffer to the next one
  const int32_t* of_span;

  EDGE_MOE_BOTH const float* before() const { return of_span[0] < 0 ? nullptr : first + size_t(of_span[0]) * stride; }
  EDGE_MOE_BOTH float* after() const { return first + size_t(of_span[1]) * stride; }
};

// A convolution; see Convolution. Its past inputs are in the layer's part of a state buffer, from value `at` on.
struct Taps {
  int kernel, channels, apart;
  size_t at;
  bool silu;
  const float* bias = nullptr;  // (channels,); null: none
};

// x (tokens, channels) of a span = its convolution with weights (kernel, channels) plus the bias, or the silu of that.
void convolve(float* x, const float* weights, const Taps& taps, const StateBuffers& states, const Span& span,
              Stream stream);

// For a span's tokens: scales the queries and keys in qkv to unit length, queries times head_dim^-0.5, and applies the
// functions of write and decay (tokens, heads) to these; of Mamba-2, turns what time steps are computed from, in decay,
// into write and decay. bias, rate: (heads,).
void delta_inputs(float* qkv, float* write, float* decay, const float* bias, const float* rate, const RecurrentNet& net,
                  const Span& span, Stream stream);

// out (tokens, heads, v_dim) of a span's tokens: what Kernels::delta_rule computes.
void delta_rule(const float* qkv, const float* write, const float* decay, const RecurrentNet& net,
                const StateBuffers& states, const Span& span, float* out, Stream stream);

// The input of Mamba-2's output projection, in out (tokens, heads, v_dim): out plus each head's skip (heads,) times its
// value, times the silu of gate, like out, and an RMSNorm of the heads that share a key, weight (heads, v_dim).
void mamba_outputs(const float* qkv, const float* gate, const float* skip, const float* weight, float eps,
                   const RecurrentNet& net, const Span& span, float* out, Stream stream);

}  // namespace edge_moe::cuda
