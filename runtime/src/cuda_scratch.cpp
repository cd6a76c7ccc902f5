// The pieces of a GPU's working memory; see cuda_scratch.h.
#include "cuda_scratch.h"

#include <algorithm>

namespace edge_moe {

namespace {

constexpr int kTokensAtOnce = 16;         // maximum in attention
constexpr size_t kMostScores = 2u << 20;  // maximum of scores; the tokens at once are reduced to stay below it

void carve(Carver& carver, cuda::VectorBuffer& buffer, size_t vectors, size_t cols) {
  buffer.cols = int(cols);
  const size_t blocks = vectors * buffer.blocks();
  carver.carve(buffer.codes, blocks * kBlock);
  carver.carve(buffer.lows, blocks * kBlock);
  carver.carve(buffer.two_planes, blocks);
  carver.carve(buffer.scales, blocks);
  carver.carve(buffer.sums[0], blocks * 2);
  carver.carve(buffer.sums[1], blocks);
}

size_t most_heads(const EngineConfig& c) {
  return c.most_of([](const AttentionConfig& a) { return a.recurrent() ? 0 : a.heads; });
}

}  // namespace

int attention_tokens(const EngineConfig& c) {
  const size_t scores = std::max<size_t>(1, most_heads(c) * c.score_positions());
  return std::min({int(std::max<size_t>(1, kMostScores / scores)), kTokensAtOnce, c.chunk});
}

size_t carve_cuda(const EngineConfig& c, CudaScratch& s, uint8_t* base) {
  const size_t chunk = c.chunk, pairs = chunk * most(c.top_k), queries = size_t(attention_tokens(c)) * most_heads(c);
  // Hidden vectors have up to three lengths: reserve the maximum number of blocks.
  const auto blocks = [](size_t cols) { return (cols + kBlock - 1) / kBlock; };
  const size_t hidden_blocks =
      std::max({pairs * blocks(c.expert_hidden), chunk * blocks(c.shared_hidden), chunk * blocks(most(c.dense))});
  using A = AttentionConfig;
  Carver carver(base);
  carve(carver, c, queries, size_t(attention_tokens(c)), s);
  carver.carve(s.routing_weights, pairs);
  carver.carve(s.pair_of, pairs);
  carver.carve(s.pair_token, pairs);
  carver.carve(s.positions, c.sequences);
  carver.carve(s.states, 2 * size_t(c.sequences));
  carve(carver, s.normed_q, chunk, c.dim);
  const auto attended = [](const A& a) { return std::max(a.heads * a.v_dim, a.out_groups * a.out_rank); };
  carve(carver, s.attended_q, chunk, c.most_of(attended));
  carve(carver, s.hidden_q, hidden_blocks, kBlock);
  carve(carver, s.wide_q, c.mix_rank ? chunk : 0, c.width());
  carve(carver, s.low_q, c.mix_rank ? chunk : 0, c.mix_rank);
  carve(carver, s.ngrams_q, c.ngrams.empty() ? 0 : chunk, c.ngram_inputs());
  if (c.has_latents() || c.has_shared_rows()) {
    const auto inputs = [](const A& a) { return a.out_groups ? a.heads * a.head_dim / a.out_groups : 0; };
    carve(carver, s.grouped_q, chunk * c.most_of([](const A& a) { return a.out_groups; }), c.most_of(inputs));
    carve(carver, s.q_latent_q, chunk, c.most_of([](const A& a) { return a.q_rank; }));
    carve(carver, s.mixed_q, queries, c.most_of([](const A& a) { return a.kv_rank; }));
    s.query_scales.resize(c.attentions.size());
    for (size_t kind = 0; kind < c.attentions.size(); ++kind)
      carver.carve(s.query_scales[kind], c.attentions[kind].query_scales.size());
  }
  return carver.used();
}

size_t carve_cuda(const EngineConfig& c, CudaShared& s, uint8_t* base) {
  Carver carver(base);
  carver.carve(s.ids, c.chunk);
  carver.carve(s.positions, c.sequences);
  carver.carve(s.states, 2 * size_t(c.sequences));
  carver.carve(s.logits, size_t(c.logits_rows) * c.vocab);
  return carver.used();
}

}  // namespace edge_moe
