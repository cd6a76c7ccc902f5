// A residual stream of several streams and embeddings of n-grams against the steps of runtime/src/streams.cpp by
// scalar.cpp.
#include <tuple>

#include "../../devices/cuda/delta.h"
#include "../../devices/cuda/streams.h"
#include "check_cuda.h"

namespace {

constexpr float kEps = 1e-6f;

std::string name_of(const char* what, int tokens, int dim, int streams) {
  return std::string(what) + " of " + std::to_string(tokens) + " tokens, " + std::to_string(streams) + " streams of " +
         std::to_string(dim);
}

void check_mix(int tokens, int dim, int streams, int rank, bool shared) {
  const size_t width = size_t(dim) * streams;
  const float part = 1.0f / float(streams);
  const auto name = [&](const char* what) { return name_of(what, tokens, dim, streams); };

  // each stream's norm
  const Floats x = floats(tokens * width), weight = floats(width);
  Floats want(x.size()), got(x.size());
  for (size_t at = 0; at < x.size(); at += dim)
    kScalarKernels.rms_norm(&x[at], &weight[at % width], kEps, &want[at], dim);
  cuda::rms_norm(x.data(), weight.data(), kEps, tokens * streams, dim, got.data(), {}, nullptr, streams);
  compare(name("norms"), got, want);

  // gates of low rank, and shares
  Floats low = floats(size_t(tokens) * rank), shares = floats(size_t(tokens) * streams), got_low = low;
  Floats got_shares = shares;
  for (float& value : low) value = gated(value * part, 1.0f, {Gate::kSilu});
  if (shared)
    for (float& value : shares) value = 2.0f * sigmoid(value * part);
  cuda::mix_inputs(got_low.data(), rank, shared ? got_shares.data() : nullptr, streams, part, tokens, nullptr);
  compare(name("gates"), got_low, low);
  compare(name("shares"), got_shares, shares);

  // the gated mean
  const Floats gates = floats(x.size());
  Floats products = gates, mean(size_t(tokens) * dim, 0.0f), got_mean(mean.size());
  kScalarKernels.gate_up(products.data(), x.data(), int(products.size()), {Gate::kSigmoid});
  for (size_t at = 0; at < x.size(); at += dim)
    kScalarKernels.add_scaled(&mean[at / width * dim], &products[at], part, dim);
  cuda::mix(gates.data(), x.data(), tokens, dim, streams, part, got_mean.data(), nullptr);
  compare(name("mean"), got_mean, mean);

  // what comes out, to each stream
  Floats after = x, got_after = x;
  for (size_t s = 0; s < shares.size(); ++s)
    kScalarKernels.add_scaled(&after[s * dim], &mean[s / streams * dim], shares[s] * 0.7f, dim);
  cuda::add_shares(got_after.data(), mean.data(), shares.data(), 0.7f, tokens, dim, streams, nullptr);
  compare(name("streams"), got_after, after);

  Floats repeated(x.size()), got_repeated(x.size());
  for (size_t at = 0; at < x.size(); at += dim) std::copy_n(&mean[at / width * dim], dim, &repeated[at]);
  cuda::repeat(mean.data(), tokens, dim, streams, got_repeated.data(), nullptr);
  compare(name("copies"), got_repeated, repeated);
}

void check_ngrams(int tokens, int dim, int streams) {
  const size_t width = size_t(dim) * streams;
  const Floats x = floats(tokens * width), values = floats(size_t(tokens) * dim);
  const Floats key_norm = floats(width), query_norm = floats(width), conv_norm = floats(width);
  Floats keys = floats(x.size()), normed(x.size()), got_keys = keys, got_normed = normed;
  for (size_t at = 0; at < x.size(); at += dim) {
    const size_t of_norm = at % width;
    kScalarKernels.rms_norm(&keys[at], &key_norm[of_norm], kEps, &keys[at], dim);
    kScalarKernels.rms_norm(&x[at], &query_norm[of_norm], kEps, &normed[at], dim);
    Activations query;
    query.values = &normed[at], query.count = 1, query.cols = dim;
    float product;
    kScalarKernels.matmul(float_matrix(&keys[at], 1, dim), query, &product, 1, 0, 1);
    const float gate = ngram_gate(product, dim);
    for (int i = 0; i < dim; ++i) keys[at + i] = gate * values[at / width * dim + i];
    kScalarKernels.rms_norm(&keys[at], &conv_norm[of_norm], kEps, &normed[at], dim);
  }
  cuda::gate_ngrams(x.data(), values.data(), {key_norm.data(), query_norm.data(), conv_norm.data(), kEps}, tokens, dim,
                    streams, got_keys.data(), got_normed.data(), nullptr);
  compare(name_of("gated values", tokens, dim, streams), got_keys, keys);
  compare(name_of("their norms", tokens, dim, streams), got_normed, normed);

  Floats sum = x, got_sum = x;
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += keys[i] + normed[i];
  cuda::add_sum(got_sum.data(), keys.data(), normed.data(), sum.size(), nullptr);
  compare(name_of("sums", tokens, dim, streams), got_sum, sum);
}

// A convolution whose inputs are some tokens apart, whose past inputs follow other values in the state.
void check_convolution(int tokens, int channels, int kernel, int apart, bool after_others) {
  const int first = 1, at = 5, past = (kernel - 1) * apart;
  const size_t buffer = at + size_t(past) * channels;
  const Floats weights = floats(size_t(kernel) * channels);
  Floats x = floats(size_t(first + tokens) * channels), got = x, buffers = floats(3 * buffer), got_buffers = buffers;
  const float* from = after_others ? &buffers[buffer + at] : nullptr;
  const Convolution conv = {weights.data(), from, &buffers[2 * buffer + at], kernel, channels, size_t(channels), true,
                            nullptr,        apart};
  kScalarKernels.convolve(conv, &x[first * channels], tokens, 0, channels);
  const Values<int32_t> position = {3}, numbers = {after_others ? 1 : -1, 2};
  cuda::convolve(got.data(), weights.data(), {kernel, channels, apart, size_t(at), true},
                 {got_buffers.data(), buffer, numbers.data()}, {position.data(), first, tokens, 0}, nullptr);
  const std::string what = "convolution of " + std::to_string(kernel) + " inputs, " + std::to_string(apart) +
                           " apart, over " + std::to_string(tokens) + " tokens";
  compare(what, got, x);
  compare(what + ", state", got_buffers, buffers);
}

// Hyper-connections: what goes in, and the streams after what comes out.
void check_hyper(int tokens, int dim, int streams, bool shared) {
  const size_t width = size_t(dim) * streams, all = size_t(streams) * (streams + 1);
  const size_t mixes = shared ? all + streams : streams;
  const auto name = [&](const char* what) { return name_of(what, tokens, dim, streams); };
  const Floats x = floats(tokens * width), products = floats(tokens * mixes), base = floats(mixes), scale = floats(3);
  const Floats ones(width, 1.0f), y = floats(size_t(tokens) * dim);
  Floats normed(x.size()), sum(y.size(), 0.0f), shares(tokens * all), next(x.size(), 0.0f), before(all);
  Floats got_normed(x.size()), got_sum(y.size()), got_shares(shares.size()), got_next = x;
  for (int t = 0; t < tokens; ++t) {
    kScalarKernels.rms_norm(&x[t * width], ones.data(), kEps, &normed[t * width], int(width));
    float *after = &shares[t * all], *between = after + streams;
    hyper_shares(&products[t * mixes], base.data(), scale.data(), streams, 20, kEps, before.data(),
                 shared ? after : nullptr, between);
    for (int from = 0; from < streams; ++from)
      kScalarKernels.add_scaled(&sum[size_t(t) * dim], &x[t * width + size_t(from) * dim], before[from], dim);
    for (int to = 0; shared && to < streams; ++to) {
      float* out = &next[t * width + size_t(to) * dim];
      for (int from = 0; from < streams; ++from)
        kScalarKernels.add_scaled(out, &x[t * width + size_t(from) * dim], between[from * streams + to], dim);
      kScalarKernels.add_scaled(out, &y[size_t(t) * dim], after[to] * 0.7f, dim);
    }
  }
  cuda::normed(x.data(), kEps, tokens, int(width), got_normed.data(), nullptr);
  cuda::collapse(x.data(), products.data(), {base.data(), scale.data(), kEps, 20}, tokens, dim, streams,
                 shared ? got_shares.data() : nullptr, got_sum.data(), nullptr);
  compare(name("norms of all streams"), got_normed, normed);
  compare(name("sums of streams"), got_sum, sum);
  if (!shared) return;
  cuda::add_mixed(got_next.data(), y.data(), shares.data(), 0.7f, tokens, dim, streams, nullptr);
  compare(name("shares of hyper-connections"), got_shares, shares);
  compare(name("streams of hyper-connections"), got_next, next);
}

}  // namespace

void check_streams() {
  for (auto [tokens, dim, streams] : {std::tuple{1, 40, 2}, std::tuple{5, 130, 3}, std::tuple{3, 256, 4}}) {
    check_mix(tokens, dim, streams, 12, true);
    check_mix(tokens, dim, streams, 200, false);
    check_ngrams(tokens, dim, streams);
    check_hyper(tokens, dim, streams, true);
    check_hyper(tokens, dim, streams, false);
  }
  for (bool after_others : {false, true})
    for (auto [tokens, kernel, apart] : {std::tuple{1, 4, 3}, std::tuple{7, 4, 3}, std::tuple{20, 3, 2}})
      check_convolution(tokens, 150, kernel, apart, after_others);
}
