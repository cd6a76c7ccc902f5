// Routing of one token; see router.h.
#include "router.h"

namespace edge_moe {

void route(const Kernels& kernels, const RouterRule& rule, float* logits, int experts, int top_k, int32_t* ids,
           float* weights) {
  kernels.softmax(logits, experts);
  int chosen = 0;
  for (int expert = 0; expert < experts; ++expert) {  // insertion into the sorted best so far
    float value = logits[expert];
    if (chosen == top_k && !(value > weights[top_k - 1])) continue;
    int at = chosen < top_k ? chosen++ : top_k - 1;
    for (; at > 0 && value > weights[at - 1]; --at) {
      weights[at] = weights[at - 1];
      ids[at] = ids[at - 1];
    }
    weights[at] = value;
    ids[at] = expert;
  }
  if (!rule.renormalise) return;
  float sum = 0.0f;
  for (int k = 0; k < top_k; ++k) sum += weights[k];
  for (int k = 0; k < top_k; ++k) weights[k] /= sum;
}

}  // namespace edge_moe
