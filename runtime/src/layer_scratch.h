// The working memory of any device when it computes a model, as pieces of one block.
#pragma once

#include <vector>

#include "carver.h"
#include "engine_config.h"

namespace edge_moe {

struct RopeTables {
  float *cos, *sin;  // (context, rope_dim/2)
};

// `queries`: how many attention computes at once; `index_queries`: how many an indexer does.
struct LayerScratch {
  float *x, *normed, *q, *k, *v, *attended;        // (chunk, ...)
  float* scores;                                   // (queries, score_positions())
  float *gate, *up, *down, *shared, *shared_gate;  // (pairs, hidden) twice, (pairs, dim), (chunk, dim), (chunk,)
  float *wide, *gates, *low, *shares;              // (chunk, width) twice, (chunk, mix_rank), (chunk, shares())
  float* sum;                                      // (chunk, dim): of the experts, with EngineConfig::sums_experts
  float* logits;                                   // (logits_rows, vocab)
  std::vector<RopeTables> rope;                    // of each kind of attention
  float* received;                                 // (heads, chunk): attention received from the chunk's tokens
  float* ahead_normed;                             // (dim,)
  float* o_gate;                                   // (chunk, inputs of o); then the gated inputs of o

  // Only for recurrences. q, k and v of those with a state are in q, (chunk, conv_channels); what a short convolution
  // passes over is in attended.
  float *write, *decay;  // (chunk, write_values), (chunk, heads)

  // Only for attention over a latent or shared rows.
  float *q_latent, *absorbed, *mixed;  // (chunk, q_rank), (queries, kv_rank + rope_dim), (queries, kv_rank or head_dim)

  // Only for shared rows. values and gates: the products of compressed rows, and of their indexer's keys.
  float *pool_values, *pool_gates, *index_values, *index_gates;  // (chunk, n * head_dim) and (chunk, n * index_dim)
  float* grouped;                                                // (chunk, out_groups * out_rank)

  // Only for an indexer.
  float *index_q, *index_k,
      *index_weights;               // (chunk, index_heads * index_dim), (chunk, index_dim), (chunk, index_heads)
  float* index_scores;              // (queries of the indexer, context in whole key blocks)
  int32_t *chosen, *chosen_counts;  // (chunk, index_most()), (chunk,): see Choice
};

void carve(Carver& carver, const EngineConfig& config, size_t queries, size_t index_queries, LayerScratch& s);

}  // namespace edge_moe
