// The pieces of a block of memory; see layer_scratch.h.
#include "layer_scratch.h"

#include <algorithm>

namespace edge_moe {

void carve(Carver& carver, const EngineConfig& c, size_t queries, size_t index_queries, LayerScratch& s) {
  const size_t chunk = c.chunk, pairs = chunk * most(c.top_k);
  const auto widest = [&](auto count) { return c.most_of(count); };
  using A = AttentionConfig;
  const size_t kv_dim = widest([](const A& a) {
    return a.kv_rank ? a.latent_cached() : a.has_keys() || a.shared_rows ? a.kv_dim() : 0;
  });
  const size_t hidden = std::max({pairs * c.expert_hidden, chunk * c.shared_hidden, chunk * most(c.dense)});
  const bool mixes = c.streams > 1;
  carver.carve(s.x, chunk * c.width());
  for (float** wide : {&s.wide, &s.gates}) carver.carve(*wide, mixes || !c.ngrams.empty() ? chunk * c.width() : 0);
  carver.carve(s.low, mixes ? chunk * (c.hyper() ? c.streams * (c.streams + 2) : c.mix_rank) : 0);
  carver.carve(s.shares, mixes ? chunk * c.shares() : 0);
  carver.carve(s.normed, chunk * c.dim);
  carver.carve(s.q, chunk * widest([](const A& a) { return a.has_state() ? a.conv_channels() : a.q_dim(); }));
  carver.carve(s.k, chunk * kv_dim);
  carver.carve(s.v, chunk * widest([](const A& a) { return a.has_keys() ? a.kv_dim() : 0; }));
  carver.carve(s.attended, chunk * widest([](const A& a) { return a.heads * a.v_dim; }));
  carver.carve(s.scores, queries * c.score_positions());
  carver.carve(s.gate, hidden);
  carver.carve(s.up, hidden);
  carver.carve(s.down, pairs * c.dim);
  carver.carve(s.shared, c.shared_hidden || most(c.dense) ? chunk * c.dim : 0);
  carver.carve(s.shared_gate, chunk);
  carver.carve(s.sum, c.sums_experts() ? chunk * c.dim : 0);
  carver.carve(s.logits, size_t(c.logits_rows) * c.vocab);
  s.rope.resize(c.attentions.size());
  for (size_t kind = 0; kind < s.rope.size(); ++kind) {
    const size_t angles = size_t(c.context) * (c.attentions[kind].rope_dim / 2);
    carver.carve(s.rope[kind].cos, angles);
    carver.carve(s.rope[kind].sin, angles);
  }
  carver.carve(s.received, chunk * widest([](const A& a) { return a.has_keys() ? a.heads : 0; }));
  carver.carve(s.ahead_normed, c.dim);
  const auto gated = [](const A& a) { return a.output_gate || a.recurrent() ? a.heads * a.v_dim : 0; };
  carver.carve(s.o_gate, chunk * widest(gated));
  carver.carve(s.write, chunk * widest([](const A& a) { return a.recurrent() ? a.write_values() : 0; }));
  carver.carve(s.decay, chunk * widest([](const A& a) { return a.has_state() ? a.heads : 0; }));
  if (c.index_most()) {
    carver.carve(s.index_q, chunk * widest([](const A& a) { return a.index_heads * a.index_dim; }));
    carver.carve(s.index_k, chunk * widest([](const A& a) { return a.index_dim; }));
    carver.carve(s.index_weights, chunk * widest([](const A& a) { return a.has_keys() ? 0 : a.index_heads; }));
    carver.carve(s.index_scores, index_queries * c.key_positions());
    carver.carve(s.chosen, chunk * c.index_most());
    carver.carve(s.chosen_counts, chunk);
  }
  if (c.has_shared_rows()) {
    const auto columns = [](const A& a) { return a.pool_overlaps ? 2 : 1; };
    for (float** its : {&s.pool_values, &s.pool_gates})
      carver.carve(*its, chunk * widest([&](const A& a) { return a.pool_rate ? columns(a) * a.head_dim : 0; }));
    for (float** its : {&s.index_values, &s.index_gates})
      carver.carve(*its, chunk * widest([&](const A& a) { return a.shared_rows ? 2 * a.index_values() : 0; }));
    carver.carve(s.grouped, chunk * widest([](const A& a) { return a.out_groups * a.out_rank; }));
  }
  if (!c.has_latents() && !c.has_shared_rows()) return;
  carver.carve(s.q_latent, chunk * widest([](const A& a) { return a.q_rank; }));
  carver.carve(s.absorbed, queries * widest([](const A& a) { return a.kv_rank ? a.latent_cached() : 0; }));
  carver.carve(s.mixed, queries * widest([](const A& a) { return a.shared_rows ? a.head_dim : a.kv_rank; }));
}

}  // namespace edge_moe
