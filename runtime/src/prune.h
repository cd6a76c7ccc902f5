// Which of its chosen experts a token keeps: the heaviest few, by one of several rules. What a rule needs is calibrated
// by compressor/prune.py; runtime/reference.py has the same rules to read beside these.
#pragma once

#include <cstdint>
#include <vector>

#include "../../devices/kernels.h"

namespace edge_moe {

enum class Prune {
  kOff,
  kRatio,    // experts whose weight is at least threshold x the heaviest
  kShare,    // the fewest whose weights reach threshold x the weights' sum
  kLearned,  // as many as score best: mask_router . [x; weights over their sum; 1] - price x count
};

// What one request asks for.
struct PruneRule {
  Prune kind = Prune::kOff;
  std::vector<float> threshold;  // (layers,): ratio, 0 keeps all; share, 1 keeps all
  float price = 0;               // of an expert, in a mask router's scores
  float protect = 0;             // ratio: share of a prompt's tokens that keep all, those that receive most attention
};

// One layer's mask router: a score for each count of experts kept, 1 to top_k. In float32 for the kernels.
struct MaskRouter {
  Matrix of_input;                    // (top_k, dim)
  const float* of_weights = nullptr;  // (top_k, top_k + 1): of the weights over their sum, and the constant
  explicit operator bool() const { return bool(of_input); }
};

// How many of a token's experts a rule keeps, at least one. weights: (top_k,), heaviest first, 0 where there is none.
int kept_by_ratio(const float* weights, int top_k, float threshold);
int kept_by_share(const float* weights, int top_k, float threshold);
// scores: (top_k,), what the mask router makes of the input alone.
int kept_by_router(const MaskRouter& router, const float* scores, const float* weights, int top_k, float price);

// Take away all but the first `kept`: ids -1, weights 0. Where the model renormalises, those kept are scaled to the sum
// that all had. Returns the share of the weights' sum that was taken away.
float keep_first(int kept, int top_k, bool renormalise, int32_t* ids, float* weights);

// protects: (tokens,), 1 for the tokens of most importance, a share of them rounded up; of equals the earlier.
// importance: (tokens,). order: room for `tokens` numbers.
void protect_most(const float* importance, int tokens, float share, int32_t* order, uint8_t* protects);

}  // namespace edge_moe
