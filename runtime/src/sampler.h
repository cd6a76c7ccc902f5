// From a row of logits to one token: logit bias, penalties, temperature, top-k, top-p, min-p, and the draw.
//
// The order is transformers': each of top-k, top-p and min-p looks at what the one before it left. Arithmetic is
// float32 over the vocabulary and double in sums, the same on every machine; a draw from 152,000 logits takes a tenth
// of a millisecond or two.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../../devices/kernels.h"

namespace edge_moe {

// A token and the logarithm of its probability, before temperature and what leaves tokens out.
struct Logprob {
  int32_t token;
  double value;
};

// A drawn token, and of as many tokens as were asked for, the likeliest ones, likeliest first.
struct Drawn {
  Logprob token;
  std::vector<Logprob> likeliest;
};

// runtime/sampling.py says what each is and refuses values out of range.
struct Sampling {
  float temperature = 0;  // 0: the most likely token
  float top_p = 1, min_p = 0;
  int top_k = 0;  // 0: all
  float repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  std::vector<std::pair<int32_t, float>> logit_bias;
  uint64_t seed = 0;
};

// One answer's sampler. Its draws depend on the options, the prompt and the logits alone.
class Sampler {
 public:
  // prompt: tokens that the repetition penalty counts besides those of the answer.
  Sampler(Sampling options, std::span<const int32_t> prompt, const Kernels& kernels);

  // The next token, which is part of the answer from then on. Throws std::invalid_argument when a logit bias leaves no
  // token possible.
  int32_t operator()(std::span<const float> logits);

  // The same, with its probability and those of the `count` likeliest tokens, after bias and penalties.
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
  std::unordered_map<int32_t, int> counts_;  // of tokens in the answer; 0 for one of the prompt alone
  std::vector<float> logits_, weights_;      // after bias and penalties; of the tokens that are left
  std::vector<int32_t> tokens_;              // those tokens
  std::vector<double> sums_;
};

// Indices, ascending, of the `count` largest values; ties go to the lower index.
std::vector<int32_t> largest(std::span<const float> values, int count);

// Indices, ascending, of the fewest weights whose sum reaches `share` of the sum of all; ties go to the lower index.
// weights: none negative, not all 0.
std::vector<int32_t> likeliest(std::span<const float> weights, double share);

}  // namespace edge_moe
