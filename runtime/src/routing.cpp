// Which experts each token of a chunk uses: the router, what pruning takes away, and the pairs sorted by expert.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine.h"

namespace edge_moe {

// Router logits -> routed, routing_weights; then (token, k) pairs sorted by expert: pair_of, pair_token, first_pair.
void Engine::route_tokens(int layer, int tokens) {
  const EngineConfig& c = config_;
  const int experts = c.experts[layer], top_k = c.top_k[layer];
  Activations x;
  x.values = s_.normed, x.count = tokens, x.cols = c.dim;
  matmul(layers_[layer].router, x, s_.router_logits);
  const RouterRule rule = router_rule(layer);
  pool_.run(tokens, [&](int t, int thread) {
    route(kernels_, rule, s_.router_logits + size_t(t) * experts, experts, top_k,
          s_.group_scores + size_t(thread) * 2 * c.groups, s_.routed + t * top_k, s_.routing_weights + t * top_k);
  });
  if (prune_.kind != Prune::kOff) prune_tokens(layer, tokens);
  const int places = tokens * top_k;  // some may be empty: -1
  std::fill(s_.first_pair, s_.first_pair + experts + 1, 0);
  for (int i = 0; i < places; ++i)
    if (s_.routed[i] >= 0) ++s_.first_pair[s_.routed[i] + 1];
  std::partial_sum(s_.first_pair, s_.first_pair + experts + 1, s_.first_pair);
  stats_.moe_tokens += tokens;
  stats_.experts_used += s_.first_pair[experts];
  for (int i = 0; i < places; ++i) {
    if (s_.routed[i] < 0) continue;
    const int pair = s_.first_pair[s_.routed[i]]++;
    s_.pair_of[i] = pair;
    s_.pair_token[pair] = i / top_k;
  }
  for (int expert = experts; expert > 0; --expert) s_.first_pair[expert] = s_.first_pair[expert - 1];
  s_.first_pair[0] = 0;
}

RouterRule Engine::router_rule(int layer) const {
  const EngineConfig& c = config_;
  RouterRule rule{c.sigmoid_score, c.renormalise, c.router_scale, c.groups, c.top_groups, c.group_top2sum};
  rule.bias = layers_[layer].router_bias;
  rule.group_of = c.groups > 1 ? c.expert_groups[layer].data() : nullptr;
  return rule;
}

// Takes away experts of routed and routing_weights by the request's rule.
void Engine::prune_tokens(int layer, int tokens) {
  const EngineConfig& c = config_;
  const int top_k = c.top_k[layer];
  const bool losses = prune_.kind == Prune::kLoss, learned = losses || prune_.kind == Prune::kOtp;
  const bool protect = prune_.protect > 0 && tokens > 1;
  const float threshold = learned ? 0.0f : prune_.threshold[layer];
  const MaskRouter router = !learned ? MaskRouter{} : losses ? loss_[layer] : otp_[layer];
  if (learned && !router) return;
  if (learned) {
    Activations x;
    x.values = s_.normed, x.count = tokens, x.cols = c.dim;
    matmul(router.of_input, x, s_.mask_scores);
  }
  if (protect) {
    pool_.run(tokens, [&](int t, int) {
      double norm = 0, received = 0;
      for (int i = 0; i < c.dim; ++i) norm += std::abs(s_.normed[size_t(t) * c.dim + i]);
      for (int head = 0; head < c.heads; ++head) received += s_.received[size_t(head) * c.chunk + t];
      s_.importance[t] = float(norm * received / c.heads / (tokens - t));
    });
    protect_most(s_.importance, tokens, prune_.protect, s_.by_importance, s_.protects);
  }
  pool_.run(tokens, [&](int t, int) {
    int32_t* ids = s_.routed + t * top_k;
    float* weights = s_.routing_weights + t * top_k;
    int kept = top_k;
    if (prune_.kind == Prune::kRatio) kept = kept_by_ratio(weights, top_k, threshold);
    if (prune_.kind == Prune::kShare) kept = kept_by_share(weights, top_k, threshold);
    if (learned) kept = kept_by_router(router, losses, s_.mask_scores + t * top_k, weights, top_k, prune_.price);
    if (protect && s_.protects[t]) kept = top_k;
    s_.dropped[t] = keep_first(kept, top_k, c.renormalise, ids, weights);
  });
  for (int t = 0; t < tokens; ++t) stats_.dropped_weight += s_.dropped[t];
}

}  // namespace edge_moe
