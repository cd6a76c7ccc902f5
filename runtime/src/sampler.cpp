// Sampling; see sampler.h.
#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>

namespace edge_moe {

static constexpr int kColumn = 64;      // values that share one maximum; it is compared first
static constexpr int kDrawn = 512;      // weights that share one sum; the draw picks one of these blocks first
static constexpr float kNever = -1e4f;  // its exponential, and that of anything lower, is 0
static constexpr float kEdges[] = {1e-2f, 1e-4f, 0};  // relative to the largest weight: top-p ignores weights below an
                                                      // edge if those above it reach the share

namespace {

// The maximum, in sixteen lanes, which compilers keep in registers.
float max_of(std::span<const float> values) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -INFINITY);
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
  for (; i < values.size(); ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

double sum_of(std::span<const float> values) {
  double lanes[kLanes] = {}, sum = 0;
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += double(values[i + j]);
  for (; i < values.size(); ++i) lanes[0] += double(values[i]);
  for (double lane : lanes) sum += lane;
  return sum;
}

std::span<const float> column_of(std::span<const float> values, size_t column) {
  return values.subspan(column * kColumn, std::min<size_t>(kColumn, values.size() - column * kColumn));
}

std::vector<float> maxima_of(std::span<const float> values) {
  std::vector<float> maxima((values.size() + kColumn - 1) / kColumn);
  for (size_t column = 0; column < maxima.size(); ++column) maxima[column] = max_of(column_of(values, column));
  return maxima;
}

// Indices, ascending, of the values at or above an edge. maxima: of columns of kColumn values.
std::vector<int32_t> at_least(float edge, std::span<const float> values, const std::vector<float>& maxima) {
  std::vector<int32_t> found;
  for (size_t column = 0; column < maxima.size(); ++column) {
    if (!(maxima[column] >= edge)) continue;
    const auto its = column_of(values, column);
    for (size_t i = 0; i < its.size(); ++i)
      if (its[i] >= edge) found.push_back(int32_t(column * kColumn + i));
  }
  return found;
}

int32_t first_largest(std::span<const float> values) {
  const std::vector<float> maxima = maxima_of(values);
  const float most = max_of(maxima);
  for (size_t column = 0; column < maxima.size(); ++column)
    if (maxima[column] == most)
      for (size_t i = column * kColumn; i < values.size(); ++i)
        if (values[i] == most) return int32_t(i);
  return 0;  // all are NaN
}

}  // namespace

Sampler::Sampler(Sampling options, std::span<const int32_t> prompt, const Kernels& kernels)
    : options_(std::move(options)), kernels_(kernels), random_(options_.seed) {
  if (options_.repetition_penalty != 1)
    for (int32_t token : prompt) counts_.try_emplace(token, 0);
}

int32_t Sampler::operator()(std::span<const float> logits) { return choose(adjusted(logits)); }

int32_t Sampler::choose(std::span<const float> adjusted) {
  const int32_t token = options_.temperature == 0 ? first_largest(adjusted) : draw(adjusted);
  if (remembers()) ++counts_[token];
  return token;
}

Drawn Sampler::with_logprobs(std::span<const float> logits, int count) {
  logits = adjusted(logits);
  const float top = max_of(logits);
  weights_.assign(logits.begin(), logits.end());
  for (float& weight : weights_) weight = weight - top > kNever ? weight - top : kNever;
  kernels_.softmax(weights_.data(), 0, int(weights_.size()), kNoSink);
  const double log_sum = double(top) - std::log(double(max_of(weights_)));  // the likeliest token has 1 / sum
  const auto logprob = [&](int32_t token) { return Logprob{token, double(logits[token]) - log_sum}; };
  Drawn drawn;
  if (count > 0)
    for (int32_t token : largest(logits, std::min(count, int(logits.size()))))
      drawn.likeliest.push_back(logprob(token));
  std::stable_sort(drawn.likeliest.begin(), drawn.likeliest.end(),
                   [](const Logprob& a, const Logprob& b) { return a.value > b.value; });
  const int32_t token = choose(logits);
  drawn.token = logprob(token);
  return drawn;
}

// Logits after bias and penalties.
std::span<const float> Sampler::adjusted(std::span<const float> logits) {
  if (!remembers() && options_.logit_bias.empty()) return logits;
  logits_.assign(logits.begin(), logits.end());
  for (const auto& [token, bias] : options_.logit_bias) logits_.at(token) += bias;
  if (!options_.logit_bias.empty() && !std::isfinite(max_of(logits_)))
    throw std::invalid_argument("logit_bias leaves no token possible; forbid fewer");
  if (!remembers()) return logits_;
  for (const auto& [token, count] : counts_) {
    float& logit = logits_.at(token);
    logit = logit < 0 ? logit * options_.repetition_penalty : logit / options_.repetition_penalty;
    logit -= options_.presence_penalty * float(count > 0) + options_.frequency_penalty * float(count);
  }
  return logits_;
}

int32_t Sampler::draw(std::span<const float> logits) {
  const int vocab = int(logits.size());
  tokens_.clear();  // empty: all tokens
  if (0 < options_.top_k && options_.top_k < vocab) {
    tokens_ = largest(logits, options_.top_k);
    weights_.resize(tokens_.size());
    for (size_t i = 0; i < tokens_.size(); ++i) weights_[i] = logits[tokens_[i]];
  } else {
    weights_.assign(logits.begin(), logits.end());
  }
  const float top = max_of(weights_);
  const float scale = 1 / options_.temperature;
  for (float& weight : weights_) {
    const float exponent = (weight - top) * scale;
    weight = exponent > kNever ? exponent : kNever;  // also replaces NaN
  }
  kernels_.softmax(weights_.data(), 0, int(weights_.size()), kNoSink);
  if (options_.top_p < 1) keep(likeliest(weights_, options_.top_p));
  if (options_.min_p > 0) {
    const std::vector<float> maxima = maxima_of(weights_);
    keep(at_least(options_.min_p * max_of(maxima), weights_, maxima));
  }
  const size_t drawn = pick();
  return tokens_.empty() ? int32_t(drawn) : tokens_[drawn];
}

// Keep the remaining tokens at these places only.
void Sampler::keep(const std::vector<int32_t>& places) {
  std::vector<int32_t> tokens(places.size());
  for (size_t i = 0; i < places.size(); ++i) {
    tokens[i] = tokens_.empty() ? places[i] : tokens_[places[i]];
    weights_[i] = weights_[places[i]];
  }
  tokens_ = std::move(tokens);
  weights_.resize(places.size());
}

// Draw a place in proportion to its weight: first its block, then the place in the block.
size_t Sampler::pick() {
  const size_t count = weights_.size(), blocks = (count + kDrawn - 1) / kDrawn;
  const auto block_of = [&](size_t block) {
    return std::span(weights_).subspan(block * kDrawn, std::min<size_t>(kDrawn, count - block * kDrawn));
  };
  double total = 0;
  sums_.resize(blocks);
  for (size_t block = 0; block < blocks; ++block) {
    sums_[block] = total += sum_of(block_of(block));
  }
  const double at = double(random_() >> 11) * 0x1p-53 * total;
  const size_t block = std::min<size_t>(std::upper_bound(sums_.begin(), sums_.end(), at) - sums_.begin(), blocks - 1);
  double sum = block ? sums_[block - 1] : 0;
  size_t drawn = block * kDrawn;
  for (size_t i = block * kDrawn; i < std::min(count, (block + 1) * kDrawn); ++i) {
    if (weights_[i] > 0) drawn = i;
    if ((sum += weights_[i]) > at) break;
  }
  return drawn;
}

std::vector<int32_t> largest(std::span<const float> values, int count) {
  const std::vector<float> maxima = maxima_of(values);
  float edge = -INFINITY;
  if (maxima.size() > size_t(count)) {  // at least `count` values reach the count-th largest maximum
    std::vector<float> sorted = maxima;
    std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(), std::greater<float>());
    edge = sorted[count - 1];
  }
  std::vector<int32_t> among = at_least(edge, values, maxima);
  const auto before = [&](int32_t a, int32_t b) { return values[a] != values[b] ? values[a] > values[b] : a < b; };
  std::nth_element(among.begin(), among.begin() + count - 1, among.end(), before);
  among.resize(count);
  std::sort(among.begin(), among.end());
  return among;
}

// The weights above an edge that reaches the share are summed by their upper 16 bits, whose order is theirs; only those
// with the same upper bits as the last weight kept are sorted.
std::vector<int32_t> likeliest(std::span<const float> weights, double share) {
  const std::vector<float> maxima = maxima_of(weights);
  const double goal = share * sum_of(weights);
  const float most = max_of(maxima);
  const auto bucket_of = [&](int32_t i) { return std::bit_cast<uint32_t>(weights[i]) >> 16; };
  std::vector<int32_t> among;
  for (float edge : kEdges) {
    among = at_least(edge * most, weights, maxima);
    double sum = 0;
    for (int32_t i : among) sum += weights[i];
    if (sum >= goal) break;
  }
  std::vector<double> sums((std::bit_cast<uint32_t>(most) >> 16) + 1);
  for (int32_t i : among) sums[bucket_of(i)] += weights[i];
  size_t last = sums.size() - 1;  // the bucket in which the goal is reached
  double above = 0;               // the sum of the buckets above it
  while (last > 0 && above + sums[last] < goal) above += sums[last--];
  std::vector<int32_t> kept, tied;
  for (int32_t i : among) {
    if (bucket_of(i) > last) kept.push_back(i);
    if (bucket_of(i) == last) tied.push_back(i);
  }
  std::stable_sort(tied.begin(), tied.end(), [&](int32_t a, int32_t b) { return weights[a] > weights[b]; });
  for (size_t i = 0; i < tied.size() && (above < goal || kept.empty()); ++i) {
    kept.push_back(tied[i]);
    above += weights[tied[i]];
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace edge_moe
