// Reading ahead: the router of the next layer with experts, applied to this layer's input, predicts its experts, as the
// residual stream changes little from layer to layer. It is advice to the readers and can never change a result.
#include "engine.h"

namespace edge_moe {

// The layer with experts that has only attention, its own or that of a layer without an MLP, between these and the
// experts of `layer`; 0 if there is none.
int Engine::next_experts(int layer) const {
  int next = layer + 1;
  while (next < config_.layers && !config_.experts[next] && !config_.dense[next]) ++next;
  return next < config_.layers && config_.experts[next] ? next : 0;
}

void Engine::prefetch_for(int next) {
  const int top_k = config_.top_k[next];
  math_->ahead_logits(next, r_);
  route(device_->host(), router_rule(next, ids_[0]), r_.ahead_logits, config_.experts[next], top_k, r_.group_scores,
        r_.ahead_ids, r_.ahead_weights);
  for (int i = 0; i < top_k; ++i) r_.ahead_ids[i] += first_record_[next];
  residency_.read_ahead({r_.ahead_ids, size_t(top_k)});
}

}  // namespace edge_moe
