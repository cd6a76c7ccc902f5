// Pruning: which of its chosen experts a token keeps, always those with the largest weights.
// compressor/pruning/prune.py calibrates the rules; runtime/reference.py has the same rules in NumPy.
#pragma once

#include <cstdint>
#include <vector>

#include "../../devices/kernels.h"

namespace edge_moe {

enum class Prune {
  kOff,
  kRatio,  // experts whose weight is at least threshold x the largest weight
  kShare,  // the fewest experts whose weights reach threshold x the sum of weights
  kOtp,    // the count with the maximum of score minus price
  kLoss,   // the count with the minimum of expected loss plus price
};

// The pruning options of one request.
struct PruneRule {
  Prune kind = Prune::kOff;
  std::vector<float> threshold;  // (layers,): for ratio, 0 keeps all; for share, 1 keeps all
  float price = 0;               // per expert, for mask routers
  float protect = 0;             // share of a prompt's tokens that keep all experts: those that receive most attention
};

// One layer's mask router: for each count of experts kept, 1 to top_k, a linear function of the token's x, the
// logarithms of its weights' shares of their sum, these shares, and 1. Its value is the count's score or log loss;
// keeping all top_k has no loss, so that row is not read. float32.
struct MaskRouter {
  Matrix of_input;                    // (top_k, dim)
  const float* of_weights = nullptr;  // (top_k, 2 * top_k + 1)
  explicit operator bool() const { return bool(of_input); }
};

// The number of experts that a rule keeps, at least one. weights: (top_k,), descending, 0 for empty places.
int kept_by_ratio(const float* weights, int top_k, float threshold);
int kept_by_share(const float* weights, int top_k, float threshold);
// values: (top_k,), the product of of_input and x; overwritten. losses: whether the values are log losses, not scores.
int kept_by_router(const MaskRouter& router, bool losses, float* values, const float* weights, int top_k, float price);

// Remove all but the first `kept` experts: ids -1, weights 0. If the model renormalises, the kept weights are scaled to
// the sum of all. Returns the share of the weights' sum that was removed.
float keep_first(int kept, int top_k, bool renormalise, int32_t* ids, float* weights);

// Set protects, (tokens,), to 1 for the `share` of tokens, rounded up, with the largest importance, (tokens,); ties go
// to the earlier token. order: room for `tokens` numbers.
void protect_most(const float* importance, int tokens, float share, int32_t* order, uint8_t* protects);

}  // namespace edge_moe
