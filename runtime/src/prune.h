// Which of its chosen experts a token keeps: the heaviest few, by one of several rules. What a rule needs is calibrated
// by compressor/pruning/prune.py; runtime/reference.py has the same rules to read beside these.
#pragma once

#include <cstdint>
#include <vector>

#include "../../devices/kernels.h"

namespace edge_moe {

enum class Prune {
  kOff,
  kRatio,  // experts whose weight is at least threshold x the heaviest
  kShare,  // the fewest whose weights reach threshold x the weights' sum
  kOtp,    // the count with the best score, a count's price taken off
  kLoss,   // the count with the least expected loss and price together
};

// What one request asks for.
struct PruneRule {
  Prune kind = Prune::kOff;
  std::vector<float> threshold;  // (layers,): ratio, 0 keeps all; share, 1 keeps all
  float price = 0;               // of an expert, for mask routers
  float protect = 0;             // share of a prompt's tokens that keep all, those that receive most attention
};

// One layer's mask router: for each count of experts kept, 1 to top_k, a linear form of the token: x, the logarithms of
// its weights' shares of their sum, these shares, and 1. It is the count's score, or the logarithm of its loss (of
// which all top_k have none, so that their row is not read). float32.
struct MaskRouter {
  Matrix of_input;                    // (top_k, dim)
  const float* of_weights = nullptr;  // (top_k, 2 * top_k + 1)
  explicit operator bool() const { return bool(of_input); }
};

// How many of a token's experts a rule keeps, at least one. weights: (top_k,), heaviest first, 0 where there is none.
int kept_by_ratio(const float* weights, int top_k, float threshold);
int kept_by_share(const float* weights, int top_k, float threshold);
// values: (top_k,), what the mask router makes of x alone; overwritten. losses: whether they are logarithms of losses.
int kept_by_router(const MaskRouter& router, bool losses, float* values, const float* weights, int top_k, float price);

// Take away all but the first `kept`: ids -1, weights 0. Where the model renormalises, those kept are scaled to the sum
// that all had. Returns the share of the weights' sum that was taken away.
float keep_first(int kept, int top_k, bool renormalise, int32_t* ids, float* weights);

// protects: (tokens,), 1 for the tokens of most importance, a share of them rounded up; of equals the earlier.
// importance: (tokens,). order: room for `tokens` numbers.
void protect_most(const float* importance, int tokens, float share, int32_t* order, uint8_t* protects);

}  // namespace edge_moe
