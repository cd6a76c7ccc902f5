// A residual stream of several streams, and the embeddings of n-grams that are added to it. The streams of a token lie
// one after the other, (streams, dim); see runtime/layers/streams.py, hyper.py and ngrams.py.
#include <algorithm>
#include <cmath>

#include "../../devices/lane_math.h"
#include "cpu_math.h"

namespace edge_moe {

// y (count, dim) = the gated mean of the normed streams of some tokens. tokens: their numbers in the pass; null: the
// first ones. shares (count, streams) gets each stream's share of what comes out, if it is not null.
void CpuMath::mixed(const Norm& its, const Mix& mix, const int32_t* tokens, int count, float* shares, float* y) {
  const EngineConfig& c = config_;
  if (c.hyper()) return collapsed(its, mix, tokens, count, shares, y);
  const size_t dim = c.dim, width = c.width(), rank = c.mix_rank;
  const float part = 1.0f / float(c.streams);
  pool_.run(count, [&](int i, int) {
    const float* x = s_.x + (tokens ? tokens[i] : i) * width;
    for (size_t at = 0; at < width; at += dim)
      kernels_.rms_norm(x + at, its.weight + at, c.norm_eps, s_.wide + i * width + at, c.dim);
    if (mix.down.takes_rounded()) quantise_vector(s_.wide + i * width, int(width), s_.wide_q, i);
  });
  const Activations wide = activations(s_.wide, s_.wide_q, int(width), 0, count);
  if (shares)
    matmuls({{mix.down, s_.low}, {mix.share, shares}}, wide);
  else
    matmul(mix.down, wide, s_.low);
  pool_.run(count, [&](int i, int) {
    float* low = s_.low + i * rank;
    for (size_t r = 0; r < rank; ++r) low[r] *= part;
    kernels_.gate_up(low, s_.ones, c.mix_rank, {Gate::kSilu});
    if (mix.up.takes_rounded()) quantise_vector(low, c.mix_rank, s_.low_q, i);
    for (int s = 0; shares && s < c.streams; ++s) {
      float& share = shares[i * c.streams + s];
      share = 2.0f * sigmoid(share * part);
    }
  });
  matmul(mix.up, activations(s_.low, s_.low_q, c.mix_rank, 0, count), s_.gates);
  pool_.run(count, [&](int i, int) {
    float *gates = s_.gates + i * width, *out = y + i * dim;
    kernels_.gate_up(gates, s_.wide + i * width, int(width), {Gate::kSigmoid});
    std::fill_n(out, dim, 0.0f);
    for (size_t at = 0; at < width; at += dim) kernels_.add_scaled(out, gates + at, part, c.dim);
  });
}

// The same with hyper-connections: y (count, dim) = the norm of the weighted sum of the streams. shares (count,
// shares()) gets what each stream gets of the output, and then of each stream.
void CpuMath::collapsed(const Norm& its, const Mix& mix, const int32_t* tokens, int count, float* shares, float* y) {
  const EngineConfig& c = config_;
  const size_t dim = c.dim, width = c.width(), streams = c.streams, mixes = mix.weights.rows;
  const auto stream = [&](int i) { return s_.x + (tokens ? tokens[i] : i) * width; };
  pool_.run(count,
            [&](int i, int) { kernels_.rms_norm(stream(i), s_.ones, c.norm_eps, s_.wide + i * width, int(width)); });
  float_matmul(mix.weights, s_.wide, count, s_.low);
  pool_.run(count, [&](int i, int) {
    float* after = shares ? shares + i * c.shares() : nullptr;
    float *before = s_.wide + i * width, *out = y + i * dim;
    hyper_shares(s_.low + i * mixes, mix.base, mix.scale, c.streams, c.mix_iterations, c.mix_eps, before, after,
                 shares ? after + streams : nullptr);
    std::fill_n(out, dim, 0.0f);
    for (size_t s = 0; s < streams; ++s) kernels_.add_scaled(out, stream(i) + s * dim, before[s], c.dim);
    norm(its, out, out);
  });
}

void CpuMath::ngrams(int layer, const Step& step, const float* rows) {
  const EngineConfig& c = config_;
  const NGramConfig& its = *c.ngrams_of(layer);
  const NGramWeights& w = layers_[layer].ngrams;
  const size_t dim = c.dim, width = c.width();

  // keys of all streams, in s_.wide, and one value
  const bool rounded = w.key.takes_rounded() || w.value.takes_rounded();
  const Activations x = prepare(rows, step.tokens, its.inputs(), s_.ngrams_q, rounded);
  matmuls({{w.key, s_.wide}, {w.value, s_.normed}}, x);

  // each stream's gate; the gated values go to s_.wide, and normed to s_.gates
  pool_.run(step.tokens, [&](int t, int) {
    const float* value = s_.normed + t * dim;
    for (size_t at = 0; at < width; at += dim) {
      float *key = s_.wide + t * width + at, *query = s_.gates + t * width + at;
      kernels_.rms_norm(key, w.key_norm + at, c.norm_eps, key, c.dim);
      kernels_.rms_norm(s_.x + t * width + at, w.query_norm + at, c.norm_eps, query, c.dim);
      const float gate = ngram_gate(product(key, query), c.dim);
      for (size_t i = 0; i < dim; ++i) key[i] = gate * value[i];
      kernels_.rms_norm(key, w.conv_norm + at, c.norm_eps, query, c.dim);
    }
  });

  // the convolution, and both to the residual stream
  const int piece = 256, pieces = int((width + piece - 1) / piece);
  run_spans(
      step, [&](const TokenSpan&) { return pieces; },
      [&](const TokenSpan& span, int i, int) {
        const size_t before = c.attention(layer).state_values();
        const float* from = span.state < 0 ? nullptr : state(span.state, layer) + before;
        float* to = state(span.next_state, layer) + before;
        const Convolution conv = {w.conv, from, to, its.conv_kernel, int(width), width, true, nullptr, its.longest()};
        const int begin = i * piece, end = std::min(begin + piece, int(width));
        kernels_.convolve(conv, s_.gates + span.first * width, span.count, begin, end);
        for (int t = span.first; t < span.first + span.count; ++t)
          for (size_t at = t * width + begin; at < t * width + end; ++at) s_.x[at] += s_.wide[at] + s_.gates[at];
      });
}

// The product of two vectors of the residual stream's size, summed as every product with a matrix of floats is.
float CpuMath::product(const float* a, const float* b) const {
  Activations x;
  x.values = b, x.count = 1, x.cols = config_.dim;
  float y;
  kernels_.matmul(float_matrix(a, 1, config_.dim), x, &y, 1, 0, 1);
  return y;
}

}  // namespace edge_moe
