// The rules of pruning; see prune.h.
#include "prune.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace edge_moe {

namespace {

constexpr float kLeastShare = 1e-6f;  // lower bound of shares in a mask router's logarithms
constexpr double kMostLogLoss = 80;   // upper bound of a log loss: exp of it is still a float

}  // namespace

int kept_by_ratio(const float* weights, int top_k, float threshold) {
  const float least = threshold * weights[0];
  int kept = 1;
  while (kept < top_k && weights[kept] >= least) ++kept;
  return kept;
}

int kept_by_share(const float* weights, int top_k, float threshold) {
  const float least = threshold * std::accumulate(weights, weights + top_k, 0.0f);
  float before = weights[0];
  int kept = 1;
  for (; kept < top_k && before < least; ++kept) before += weights[kept];
  return kept;
}

int kept_by_router(const MaskRouter& router, bool losses, float* values, const float* weights, int top_k, float price) {
  const float sum = std::accumulate(weights, weights + top_k, 0.0f);
  for (int kept = 1; kept <= top_k; ++kept) {
    const float* row = router.of_weights + (kept - 1) * (2 * top_k + 1);
    float value = values[kept - 1] + row[2 * top_k];
    for (int k = 0; k < top_k; ++k) {
      const float share = std::max(weights[k] / sum, kLeastShare);
      // in double: float functions of libm differ in the last bit between machines; a rounded double hardly ever does
      value += row[k] * float(std::log(double(share))) + row[top_k + k] * share;
    }
    if (losses) value = kept == top_k ? 0.0f : -float(std::exp(std::min(double(value), kMostLogLoss)));
    values[kept - 1] = value - price * float(kept);
  }
  int best = top_k;
  for (int kept = top_k - 1; kept > 0; --kept)  // ties go to the larger count
    if (values[kept - 1] > values[best - 1]) best = kept;
  return best;
}

float keep_first(int kept, int top_k, bool renormalise, int32_t* ids, float* weights) {
  const float all = std::accumulate(weights, weights + top_k, 0.0f);
  const float left = std::accumulate(weights, weights + kept, 0.0f);
  std::fill(ids + kept, ids + top_k, -1);
  std::fill(weights + kept, weights + top_k, 0.0f);
  if (!(left < all)) return 0;
  if (renormalise)
    for (int k = 0; k < kept; ++k) weights[k] *= all / left;
  return 1 - left / all;
}

void protect_most(const float* importance, int tokens, float share, int32_t* order, uint8_t* protects) {
  const int count = std::min(tokens, int(std::ceil(double(share) * tokens)));
  std::iota(order, order + tokens, 0);
  std::partial_sort(order, order + count, order + tokens, [&](int a, int b) {
    return importance[a] != importance[b] ? importance[a] > importance[b] : a < b;
  });
  std::fill(protects, protects + tokens, 0);
  for (int i = 0; i < count; ++i) protects[order[i]] = 1;
}

}  // namespace edge_moe
