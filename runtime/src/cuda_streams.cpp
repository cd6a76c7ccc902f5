// A residual stream of several streams on a GPU, and embeddings of n-grams: launches the same steps as streams.cpp.
#include "cuda_math.h"

namespace edge_moe {

// y (count, dim) = the gated mean of the normed streams of tokens from `first` on, rounded to int8 as well if `into`
// has codes. shares (count, streams) gets each stream's share of what comes out, if it is not null.
void CudaMath::mixed(const Norm& its, const Mix& mix, int first, int count, float* shares, float* y,
                     const cuda::VectorBuffer& into) {
  const EngineConfig& c = config_;
  if (c.hyper()) return collapsed(its, mix, first, count, shares, y, into);
  const float part = 1.0f / float(c.streams);
  cuda::rms_norm(s_.x + first * c.width(), its.weight, c.norm_eps, count * c.streams, c.dim, s_.wide, {}, stream_,
                 c.streams);
  if (mix.down.takes_rounded()) cuda::quantise(s_.wide, count, s_.wide_q, stream_);
  const cuda::ProductJob jobs[] = {cuda::whole(mix.down, count, s_.low), cuda::whole(mix.share, count, shares)};
  multiply({jobs, shares ? 2u : 1u}, s_.wide, s_.wide_q);
  cuda::mix_inputs(s_.low, c.mix_rank, shares, c.streams, part, count, stream_);
  if (mix.up.takes_rounded()) cuda::quantise(s_.low, count, s_.low_q, stream_);
  multiply(mix.up, count, s_.gates, s_.low, s_.low_q);
  cuda::mix(s_.gates, s_.wide, count, c.dim, c.streams, part, y, stream_);
  if (into.codes) cuda::quantise(y, count, into, stream_);
}

// The same with hyper-connections: the norm of a weighted sum of the streams, and shares (count, shares()).
void CudaMath::collapsed(const Norm& its, const Mix& mix, int first, int count, float* shares, float* y,
                         const cuda::VectorBuffer& into) {
  const EngineConfig& c = config_;
  const float* x = s_.x + first * c.width();
  cuda::normed(x, c.norm_eps, count, int(c.width()), s_.wide, stream_);
  multiply(mix.weights, count, s_.low, s_.wide, {});
  cuda::collapse(x, s_.low, {mix.base, mix.scale, c.mix_eps, c.mix_iterations}, count, c.dim, c.streams, shares, y,
                 stream_);
  norm(its, y, count, y, into);
}

// x += factor * out, or each stream its share of that; with hyper-connections, its shares of all streams, too
void CudaMath::add_to_streams(const float* out, float factor, int tokens) {
  const EngineConfig& c = config_;
  if (c.streams == 1) return cuda::add_gated(s_.x, out, nullptr, factor, tokens, c.dim, stream_);
  if (c.hyper()) return cuda::add_mixed(s_.x, out, s_.shares, factor, tokens, c.dim, c.streams, stream_);
  cuda::add_shares(s_.x, out, s_.shares, factor, tokens, c.dim, c.streams, stream_);
}

void CudaMath::ngrams(int layer, const Step& step, const float* rows) {
  const EngineConfig& c = config_;
  const NGramConfig& its = *c.ngrams_of(layer);
  const NGramWeights& w = layers_[layer].ngrams;
  const cuda::VectorBuffer rows_q = s_.ngrams_q.of_length(its.inputs());
  const size_t width = c.width();
  if (w.key.takes_rounded() || w.value.takes_rounded()) cuda::quantise(rows, step.tokens, rows_q, stream_);
  const cuda::ProductJob jobs[] = {cuda::whole(w.key, step.tokens, s_.wide),
                                   cuda::whole(w.value, step.tokens, s_.normed)};
  multiply(jobs, rows, rows_q);
  cuda::gate_ngrams(s_.x, s_.normed, {w.key_norm, w.query_norm, w.conv_norm, c.norm_eps}, step.tokens, c.dim, c.streams,
                    s_.wide, s_.gates, stream_);
  const cuda::Taps taps = {its.conv_kernel, int(width), its.longest(), c.attention(layer).state_values(), true};
  for (size_t i = 0; i < step.spans.size(); ++i) {
    const cuda::Span span = {s_.positions + i, step.spans[i].first, step.spans[i].count, 0};
    cuda::convolve(s_.gates, w.conv, taps, state_buffers(layer, i), span, stream_);
  }
  cuda::add_sum(s_.x, s_.wide, s_.gates, step.tokens * width, stream_);
}

}  // namespace edge_moe
