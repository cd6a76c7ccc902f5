// The experts that each token of a chunk uses: router, pruning, and (token, expert) pairs sorted by expert.
#include <algorithm>
#include <numeric>

#include "carver.h"
#include "engine.h"

namespace edge_moe {

size_t carve_routing(const EngineConfig& c, Routing& r, uint8_t* base) {
  const size_t chunk = c.chunk, pairs = chunk * most(c.top_k), experts = most(c.experts);
  Carver carver(base);
  carver.carve(r.router_logits, chunk * experts);
  carver.carve(r.routing_weights, pairs);
  carver.carve(r.group_scores, c.groups > 1 ? size_t(c.threads) * 2 * c.groups : 0);
  carver.carve(r.routed, pairs);
  carver.carve(r.pair_of, pairs);
  carver.carve(r.pair_token, pairs);
  carver.carve(r.first_pair, experts + 1);
  for (float*& scores : r.mask_scores) carver.carve(scores, pairs);
  carver.carve(r.dropped, chunk);
  carver.carve(r.importance, chunk);
  carver.carve(r.by_importance, chunk);
  carver.carve(r.protects, chunk);
  carver.carve(r.ahead_logits, experts);
  carver.carve(r.ahead_weights, most(c.top_k));
  carver.carve(r.ahead_ids, most(c.top_k));
  return carver.used();
}

// The mask router of a rule; null if the rule needs none or the layer has none.
const MaskRouter* Engine::mask_router(int layer, Prune rule) const {
  const bool losses = rule == Prune::kLoss;
  if (!losses && rule != Prune::kOtp) return nullptr;
  const MaskRouter& router = (losses ? loss_ : otp_)[layer];
  return router ? &router : nullptr;
}

// Router logits -> routed, routing_weights; then (token, k) pairs sorted by expert: pair_of, pair_token, first_pair.
void Engine::route_tokens(int layer, const Step& step) {
  const EngineConfig& c = config_;
  const int tokens = step.tokens, experts = c.experts[layer], top_k = c.top_k[layer];
  pool_.run(tokens, [&](int t, int thread) {
    route(device_->host(), router_rule(layer, ids_[t]), r_.router_logits + size_t(t) * experts, experts, top_k,
          r_.group_scores + size_t(thread) * 2 * c.groups, r_.routed + t * top_k, r_.routing_weights + t * top_k);
  });
  check_wanted();
  for (const TokenSpan& span : step.spans) prune_tokens(layer, span, step.spans.size() == 1);
  const int places = tokens * top_k;  // entries of routed; -1 if empty
  std::fill(r_.first_pair, r_.first_pair + experts + 1, 0);
  for (int i = 0; i < places; ++i)
    if (r_.routed[i] >= 0) ++r_.first_pair[r_.routed[i] + 1];
  std::partial_sum(r_.first_pair, r_.first_pair + experts + 1, r_.first_pair);
  stats_.moe_tokens += tokens;
  stats_.experts_used += r_.first_pair[experts];
  for (const TokenSpan& span : step.spans) {
    SequenceStats& stats = sequences_[span.sequence].stats;
    stats.moe_tokens += span.count;
    const int32_t* routed = r_.routed + size_t(span.first) * top_k;
    stats.experts_used += std::count_if(routed, routed + size_t(span.count) * top_k, [](int32_t e) { return e >= 0; });
  }
  for (int i = 0; i < places; ++i) {
    if (r_.routed[i] < 0) continue;
    const int pair = r_.first_pair[r_.routed[i]]++;
    r_.pair_of[i] = pair;
    r_.pair_token[pair] = i / top_k;
  }
  for (int expert = experts; expert > 0; --expert) r_.first_pair[expert] = r_.first_pair[expert - 1];
  r_.first_pair[0] = 0;
}

size_t router_table_bytes(const EngineConfig& c) {
  size_t values = 0;
  for (int count : c.hashed) values += size_t(count) * c.vocab;
  return values * sizeof(int16_t);
}

RouterRule Engine::router_rule(int layer, int token_id) const {
  const EngineConfig& c = config_;
  RouterRule rule{c.router_score,  c.router_threshold, c.router_logits_scale, c.renormalise,
                  c.routing_scale, c.groups,           c.top_groups,          c.group_top2sum};
  rule.sum_eps = c.router_sum_eps;
  rule.bias = router_bias_[layer].empty() ? nullptr : router_bias_[layer].data();
  rule.expert_scale = expert_scale_[layer].empty() ? nullptr : expert_scale_[layer].data();
  rule.given_count = c.hashed[layer];
  if (rule.given_count) rule.given = router_table_[layer].data() + size_t(token_id) * rule.given_count;
  rule.group_of = c.groups > 1 ? c.expert_groups[layer].data() : nullptr;
  return rule;
}

// Prune experts from a span's routed and routing_weights by its sequence's rule. alone: it is the pass's only span.
void Engine::prune_tokens(int layer, const TokenSpan& span, bool alone) {
  const EngineConfig& c = config_;
  Sequence& sequence = sequences_[span.sequence];
  const PruneRule& rule = sequence.rule;
  if (rule.kind == Prune::kOff) return;
  const int top_k = c.top_k[layer];
  const bool losses = rule.kind == Prune::kLoss, learned = losses || rule.kind == Prune::kOtp;
  const bool protect = alone && rule.protect > 0 && span.count > 1;
  const float threshold = learned ? 0.0f : rule.threshold[layer];
  const MaskRouter* router = mask_router(layer, rule.kind);
  if (learned && !router) return;
  if (protect) protect_most(r_.importance, span.count, rule.protect, r_.by_importance, r_.protects);
  pool_.run(span.count, [&](int in_span, int) {
    const size_t t = size_t(span.first) + in_span;
    int32_t* ids = r_.routed + t * top_k;
    float* weights = r_.routing_weights + t * top_k;
    int kept = top_k;
    if (rule.kind == Prune::kRatio) kept = kept_by_ratio(weights, top_k, threshold);
    if (rule.kind == Prune::kShare) kept = kept_by_share(weights, top_k, threshold);
    if (learned) kept = kept_by_router(*router, losses, r_.mask_scores[losses] + t * top_k, weights, top_k, rule.price);
    if (protect && r_.protects[in_span]) kept = top_k;
    r_.dropped[t] = keep_first(kept, top_k, c.renormalise, ids, weights);
  });
  check_wanted();
  double dropped = 0;
  for (int t = span.first; t < span.first + span.count; ++t) dropped += r_.dropped[t];
  sequence.stats.dropped_weight += dropped;
  stats_.dropped_weight.store(stats_.dropped_weight.load() + dropped);
}

}  // namespace edge_moe
