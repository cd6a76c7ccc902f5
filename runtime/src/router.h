// From router logits to chosen experts and their routing weights.
#pragma once

#include <cstdint>

#include "../../devices/kernels.h"

namespace edge_moe {

struct RouterRule {
  bool renormalise = false;  // the chosen weights are scaled to sum to one
};

// logits: (experts,), overwritten by the softmax over all experts -> ids, weights: (top_k,), heaviest first. Of equal
// weights the lower expert number is taken.
void route(const Kernels& kernels, const RouterRule& rule, float* logits, int experts, int top_k, int32_t* ids,
           float* weights);

}  // namespace edge_moe
