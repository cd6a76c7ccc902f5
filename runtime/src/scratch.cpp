// The pieces of the scratch memory; see scratch.h.
#include "scratch.h"

#include <algorithm>

namespace edge_moe {

namespace {

void carve(Carver& carver, Quantised& buffer, size_t vectors, size_t cols) {
  const size_t blocks = (cols + kBlock - 1) / kBlock;
  carver.carve(buffer.codes, vectors * blocks * kBlock);
  carver.carve(buffer.lows, vectors * blocks * kBlock);
  carver.carve(buffer.two_planes, vectors * blocks);
  carver.carve(buffer.scales, vectors * blocks);
  carver.carve(buffer.sums[0], vectors * blocks * 2);
  carver.carve(buffer.sums[1], vectors * blocks);
  carver.carve(buffer.sums[2], vectors * ((blocks + 1) / 2));
}

}  // namespace

Activations activations(const float* values, const Quantised& quantised, int cols, size_t first, int count) {
  Activations x;
  x.values = values + first * cols;
  x.quantised = quantised.from(first, cols);
  x.count = count;
  x.cols = cols;
  return x;
}

size_t ones_of(const EngineConfig& c) {
  const auto normed = [](const AttentionConfig& a) { return a.v_norm || a.shared_rows ? a.head_dim : 0; };
  return std::max(c.most_of(normed), c.hyper() ? c.width() : size_t(c.mix_rank));
}

size_t carve_scratch(const EngineConfig& c, Scratch& s, uint8_t* base) {
  const size_t chunk = c.chunk, threads = c.threads;
  using A = AttentionConfig;
  // maximum in attention at once
  const size_t queries = threads * c.most_of([](const A& a) { return a.has_keys() ? kHeadQueries : kLatentQueries; });
  const size_t widest = std::max({size_t(c.expert_hidden), size_t(c.shared_hidden), most(c.dense)});
  Carver carver(base);
  carve(carver, c, queries, std::min<size_t>(chunk, kIndexTokens), s);
  carver.carve(s.all_tokens, chunk);
  carver.carve(s.piece, queries * c.most_of([](const A& a) { return a.kv_rank ? a.kv_rank : a.head_dim; }));
  carver.carve(s.ones, ones_of(c));
  carve(carver, s.normed_q, chunk, c.dim);
  carve(carver, s.attended_q, chunk,
        c.most_of([](const A& a) { return std::max(a.heads * a.v_dim, a.out_groups * a.out_rank); }));
  carve(carver, s.hidden_q, chunk * most(c.top_k), widest);
  carve(carver, s.wide_q, c.mix_rank ? chunk : 0, c.width());
  carve(carver, s.low_q, c.mix_rank ? chunk : 0, c.mix_rank);
  carve(carver, s.ngrams_q, c.ngrams.empty() ? 0 : chunk, c.ngram_inputs());
  carver.carve(s.index_keys, c.index_most() ? threads * c.key_positions() : 0);
  const size_t gathered = c.most_of([](const A& a) { return a.has_keys() && a.index_top ? a.head_dim : 0; });
  carver.carve(s.gathered, threads * 2 * align_up(c.index_most(), kKeyBlock) * gathered * c.kv_value_bytes());
  if (c.has_latents() || c.has_shared_rows()) {
    const size_t cached = c.most_of([](const A& a) { return a.has_keys() ? 0 : int(a.cached_values()); });
    carver.carve(s.rows, threads * kLatentRows * cached);
    carve(carver, s.q_latent_q, chunk, c.most_of([](const A& a) { return a.q_rank; }));
    carve(carver, s.mixed_q, queries, c.most_of([](const A& a) { return a.kv_rank; }));
    const size_t groups = c.most_of([](const A& a) { return a.out_groups; });
    const auto inputs = [](const A& a) { return a.out_groups ? a.heads * a.head_dim / a.out_groups : 0; };
    carve(carver, s.grouped_q, chunk * groups, c.most_of(inputs));
  }
  return carver.used();
}

}  // namespace edge_moe
