// The working memory of the processor when it computes a model: named pieces of one block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../devices/kernels.h"
#include "layer_scratch.h"

namespace edge_moe {

inline constexpr int kHeadQueries = 16;    // processed together by one task over a KV head's cache
inline constexpr int kLatentQueries = 16;  // processed together by one task over the latents
inline constexpr int kIndexTokens = 16;    // whose positions are chosen at a time
inline constexpr int kLatentRows = 8;      // latents, or rows of kv_b as floats, per step of such a task

struct Scratch : LayerScratch {
  int32_t* all_tokens;  // (chunk,)
  float* piece;         // (queries, head_dim or kv_rank): attention's sums over a range of positions
  float* ones;  // (head_dim,), (width,) or (mix_rank,): the weights of a norm without weights, the factors of gates
  Quantised normed_q, attended_q, hidden_q;
  Quantised wide_q, low_q, ngrams_q;  // of LayerScratch::wide and low, and of the rows of n-grams

  // Only for attention over a latent or shared rows.
  float* rows;        // (threads, kLatentRows, kv_rank + rope_dim or head_dim)
  uint8_t* gathered;  // (threads, 2, index_most() in whole key blocks, head_dim): keys, values of a choice of positions
  uint32_t* index_keys;  // (threads, context in whole key blocks): a buffer of choose_top()
  Quantised q_latent_q, mixed_q;
  Quantised grouped_q;  // the inputs of o_a: (groups, chunk, heads of a group * head_dim)
};

size_t ones_of(const EngineConfig& config);  // the length of Scratch::ones

// Vectors [first, first + count), as floats and quantised.
Activations activations(const float* values, const Quantised& quantised, int cols, size_t first, int count);

// Set every pointer of `s` to its piece of `base` and return the bytes that all take; with null, only count them.
size_t carve_scratch(const EngineConfig& config, Scratch& s, uint8_t* base);

}  // namespace edge_moe
