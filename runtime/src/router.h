// Routing: from router logits to the chosen experts and their routing weights.
#pragma once

#include <cstdint>

#include "engine_config.h"

namespace edge_moe {

// runtime/config.py's RouterConfig, and the parameters of one layer.
struct RouterRule {
  RouterScore score = RouterScore::kSoftmax;  // over all experts; kSparsemixer: see below; others: of each alone
  float threshold = 0;                        // of kSparsemixer
  float logits_scale = 1;                     // factor of the logits
  bool renormalise = false;                   // the chosen weights are scaled to sum to one
  float scale = 1;                            // factor of the final weights
  int groups = 1, top_groups = 1;             // only experts of the top_groups best groups are chosen
  bool group_top2sum = false;                 // a group scores the sum of its two best experts, else its best
  float sum_eps = 1e-20f;                     // added to the sum of the chosen weights that they are divided by
  const float* bias = nullptr;          // (experts,) added to a score for the choice, not for the weight; null: none
  const int* group_of = nullptr;        // (experts,); null if there is one group
  const float* expert_scale = nullptr;  // (experts,) factors of the final weights, which order them; null: none
  // The experts to choose from, ascending or not, -1: none; null: all. Their scores order them.
  const int16_t* given = nullptr;
  int given_count = 0;
};

// kSparsemixer chooses the expert with the largest logit, then the one with the largest logit of the others, and so on.
// Its weight is a softmax over the experts not chosen before it, without those whose logit is more than `threshold`
// times max(|logit|, largest) below the largest.
//
// logits: (experts,), overwritten by the scores -> ids, weights: (top_k,), by descending weight. Ties go to the lower
// index. If the chosen groups have fewer than top_k experts, the last ids are -1 with weight 0. group_scores: room for
// 2 * groups floats.
void route(const Kernels& kernels, const RouterRule& rule, float* logits, int experts, int top_k, float* group_scores,
           int32_t* ids, float* weights);

}  // namespace edge_moe
