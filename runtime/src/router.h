// From router logits to chosen experts and their routing weights.
#pragma once

#include <cstdint>

#include "engine_config.h"

namespace edge_moe {

// runtime/config.py's RouterConfig, with what one layer adds to it.
struct RouterRule {
  RouterScore score = RouterScore::kSoftmax;  // over all experts; kSigmoid: of each alone; kSparsemixer: see below
  float threshold = 0;                        // of kSparsemixer
  bool renormalise = false;                   // the chosen weights are scaled to sum to one
  float scale = 1;                            // of the weights, at last
  int groups = 1, top_groups = 1;             // only experts of the top_groups best groups are chosen
  bool group_top2sum = false;                 // a group is as good as its two best experts together, else as its best
  const float* bias = nullptr;    // (experts,) added to a score for the choice, not for the weight; null: none
  const int* group_of = nullptr;  // (experts,); null where there is one group
};

// kSparsemixer takes the expert of the largest logit, then that of the largest among the others, and so on. The weight
// of each is a softmax over those that were not taken before it and whose logit is at most `threshold` times max(its
// own size, the largest) below the largest.
//
// logits: (experts,), overwritten by the scores -> ids, weights: (top_k,), heaviest first. Of equals the lower number
// is taken. Where the groups chosen have fewer than top_k experts the last ids are -1, their weights 0.
// group_scores: room for 2 * groups floats.
void route(const Kernels& kernels, const RouterRule& rule, float* logits, int experts, int top_k, float* group_scores,
           int32_t* ids, float* weights);

}  // namespace edge_moe
