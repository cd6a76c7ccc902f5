// What the processor works in when it computes a model: named pieces of one block of memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../devices/kernels.h"
#include "layer_scratch.h"

namespace edge_moe {

inline constexpr int kHeadQueries = 16;    // that one thread takes over a KV head's cache at a time
inline constexpr int kLatentQueries = 16;  // that one thread takes over the latents at a time
inline constexpr int kLatentRows = 8;      // latents, or rows of kv_b as floats, that it does so with

struct Scratch : LayerScratch {
  int32_t* all_tokens;  // (chunk,)
  float* piece;         // (queries, head_dim or kv_rank): attention's sums over some positions
  Quantised normed_q, attended_q, hidden_q;

  // Attention over a latent alone.
  float* rows;  // (threads, kLatentRows, kv_rank + rope_dim)
  Quantised q_latent_q, mixed_q;
};

// `count` vectors from the `first` on, in both forms.
Activations activations(const float* values, const Quantised& quantised, int cols, size_t first, int count);

// Set every pointer of `s` to its piece of `base` and return the bytes that all take; with null, only count them.
size_t carve_scratch(const EngineConfig& config, Scratch& s, uint8_t* base);

}  // namespace edge_moe
