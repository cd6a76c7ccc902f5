// Sampling a token from a row of logits: logit bias, penalties, temperature, top-k, top-p, min-p, and the draw.
//
// The order is transformers': each of top-k, top-p and min-p applies to the tokens that the one before it kept.
// Arithmetic is float32 over the vocabulary and double in sums, with the same results on every machine; a draw from
// 152,000 logits takes 0.1 to 0.2 ms.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../../devices/kernels.h"

namespace edge_moe {

// A token and its log probability, before temperature, top-k, top-p and min-p.
struct Logprob {
  int32_t token;
  double value;
};

// A drawn token, and the requested number of likeliest tokens in descending order.
struct Drawn {
  Logprob token;
  std::vector<Logprob> likeliest;
};

// The options that runtime/sampling.py describes and validates.
struct Sampling {
  float temperature = 0;  // 0: the most likely token
  float top_p = 1, min_p = 0;
  int top_k = 0;  // 0: all
  float repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  std::vector<std::pair<int32_t, float>> logit_bias;
  uint64_t seed = 0;
};

// The sampler of one answer. Its draws depend only on the options, the prompt and the logits.
class Sampler {
 public:
  // prompt: tokens that the repetition penalty counts, besides those of the answer.
  Sampler(Sampling options, std::span<const int32_t> prompt, const Kernels& kernels);

  // Sample the next token and append it to the answer. Throws std::invalid_argument if the logit bias leaves no token
  // possible.
  int32_t operator()(std::span<const float> logits);

  // The same, with the log probabilities of the token and of the `count` likeliest tokens, after bias and penalties.
  Drawn with_logprobs(std::span<const float> logits, int count);

 private:
  bool remembers() const {
    return options_.repetition_penalty != 1 || options_.presence_penalty != 0 || options_.frequency_penalty != 0;
  }
  std::span<const float> adjusted(std::span<const float> logits);
  int32_t choose(std::span<const float> adjusted);
  int32_t draw(std::span<const float> logits);
  void keep(const std::vector<int32_t>& places);
  size_t pick();

  Sampling options_;
  const Kernels& kernels_;
  std::mt19937_64 random_;
  std::unordered_map<int32_t, int> counts_;  // of tokens in the answer; 0 for a token of the prompt only
  std::vector<float> logits_, weights_;      // after bias and penalties; of the remaining tokens
  std::vector<int32_t> tokens_;              // the remaining tokens
  std::vector<double> sums_;
};

// Indices, ascending, of the `count` largest values; ties go to the lower index.
std::vector<int32_t> largest(std::span<const float> values, int count);

// Indices, ascending, of the fewest weights whose sum reaches `share` of the sum of all; ties go to the lower index.
// weights: none negative, not all 0.
std::vector<int32_t> likeliest(std::span<const float> weights, double share);

}  // namespace edge_moe
