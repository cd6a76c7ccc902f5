// Routing of one token; see router.h.
#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "../../devices/lane_math.h"

namespace edge_moe {

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// The score that an expert is chosen by.
float worth(const RouterRule& rule, const float* scores, int expert) {
  return rule.bias ? scores[expert] + rule.bias[expert] : scores[expert];
}

// Set open, (groups,), to 1 for the top_groups best groups and 0 for the others. A group without experts is the worst.
void choose_groups(const RouterRule& rule, const float* scores, int experts, float* group_scores, float* open) {
  float *best = group_scores, *second = open;
  std::fill_n(best, rule.groups, kNone);
  std::fill_n(second, rule.groups, kNone);
  for (int expert = 0; expert < experts; ++expert) {
    const int group = rule.group_of[expert];
    const float value = worth(rule, scores, expert);
    if (value > best[group])
      second[group] = std::exchange(best[group], value);
    else if (value > second[group])
      second[group] = value;
  }
  for (int group = 0; group < rule.groups; ++group) {
    if (rule.group_top2sum && second[group] > kNone) best[group] += second[group];
    open[group] = 0;
  }
  for (int n = 0; n < rule.top_groups; ++n) {
    int top = -1;
    for (int group = 0; group < rule.groups; ++group)
      if (!open[group] && (top < 0 || best[group] > best[top])) top = group;
    open[top] = 1;
  }
}

// Insert (value, expert) into the `count` best so far, in descending order, of at most `room`; returns the new count.
// Ties stay in order of insertion.
int insert(float value, int expert, int room, int count, float* values, int32_t* ids) {
  if (count == room && !(value > values[room - 1])) return count;
  int at = count < room ? count : room - 1;
  for (; at > 0 && value > values[at - 1]; --at) {
    values[at] = values[at - 1];
    ids[at] = ids[at - 1];
  }
  values[at] = value;
  ids[at] = expert;
  return std::min(count + 1, room);
}

// ids, weights: (top_k,), as for route().
void sparsemixer(const float* logits, int experts, int top_k, float threshold, int32_t* ids, float* weights) {
  for (int k = 0; k < top_k; ++k) {
    const auto taken = [&](int expert) { return std::find(ids, ids + k, expert) != ids + k; };
    int best = -1;
    for (int expert = 0; expert < experts; ++expert)
      if (!taken(expert) && (best < 0 || logits[expert] > logits[best])) best = expert;
    const float top = logits[best];
    float sum = 0.0f;
    for (int expert = 0; expert < experts; ++expert) {
      const float size = std::max(std::abs(logits[expert]), top);
      if (!taken(expert) && !((top - logits[expert]) / size > threshold)) sum += exp_lane(logits[expert] - top);
    }
    ids[k] = best, weights[k] = 1.0f / sum;
  }
  for (int k = 1; k < top_k; ++k) insert(weights[k], ids[k], top_k, k, weights, ids);
}

}  // namespace

void route(const Kernels& kernels, const RouterRule& rule, float* logits, int experts, int top_k, float* group_scores,
           int32_t* ids, float* weights) {
  float* scores = logits;
  if (rule.logits_scale != 1)
    for (int expert = 0; expert < experts; ++expert) logits[expert] *= rule.logits_scale;
  if (rule.score == RouterScore::kSparsemixer) {
    sparsemixer(logits, experts, top_k, rule.threshold, ids, weights);
    for (int k = 0; k < top_k; ++k) weights[k] *= rule.scale;
    return;
  }
  if (rule.score == RouterScore::kSigmoid)
    for (int expert = 0; expert < experts; ++expert) scores[expert] = sigmoid(logits[expert]);
  else if (rule.score == RouterScore::kSqrtSoftplus)
    for (int expert = 0; expert < experts; ++expert) scores[expert] = sqrt_softplus(logits[expert]);
  else
    kernels.softmax(scores, 0, experts, kNoSink);

  // the best experts of the best groups
  float* open = group_scores + rule.groups;
  if (rule.groups > 1) choose_groups(rule, scores, experts, group_scores, open);
  int chosen = 0;
  if (rule.given)
    for (int i = 0; i < rule.given_count; ++i) {
      const int expert = rule.given[i];
      if (expert >= 0) chosen = insert(scores[expert], expert, top_k, chosen, weights, ids);
    }
  for (int expert = 0; !rule.given && expert < experts; ++expert)
    if (rule.groups == 1 || open[rule.group_of[expert]])
      chosen = insert(worth(rule, scores, expert), expert, top_k, chosen, weights, ids);

  // weights, in descending order
  if (rule.bias) {
    std::sort(ids, ids + chosen);
    for (int k = 0; k < chosen; ++k) insert(scores[ids[k]], ids[k], chosen, k, weights, ids);
  }
  std::fill(ids + chosen, ids + top_k, -1);
  std::fill(weights + chosen, weights + top_k, 0.0f);
  float sum = 0.0f;
  for (int k = 0; k < top_k; ++k) sum += weights[k];
  if (rule.renormalise)
    for (int k = 0; k < top_k; ++k) weights[k] /= sum + rule.sum_eps;
  for (int k = 0; k < top_k; ++k) weights[k] *= rule.scale;
  if (rule.expert_scale)
    for (int k = 0; k < chosen; ++k) insert(weights[k] * rule.expert_scale[ids[k]], ids[k], chosen, k, weights, ids);
}

}  // namespace edge_moe
