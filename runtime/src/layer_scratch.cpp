// The pieces of a block of memory; see layer_scratch.h.
#include "layer_scratch.h"

#include <algorithm>

namespace edge_moe {

void carve(Carver& carver, const EngineConfig& c, size_t queries, LayerScratch& s) {
  const size_t chunk = c.chunk, pairs = chunk * most(c.top_k);
  const auto widest = [&](auto count) { return c.most_of(count); };
  using A = AttentionConfig;
  const size_t kv_dim = widest([](const A& a) { return a.kv_rank ? a.latent_cached() : a.kv_dim(); });
  const size_t hidden = std::max({pairs * c.expert_hidden, chunk * c.shared_hidden, chunk * c.dense_hidden});
  carver.carve(s.x, chunk * c.dim);
  carver.carve(s.normed, chunk * c.dim);
  carver.carve(s.q, chunk * widest([](const A& a) { return a.q_dim(); }));
  carver.carve(s.k, chunk * kv_dim);
  carver.carve(s.v, chunk * widest([](const A& a) { return a.kv_rank ? 0 : a.kv_dim(); }));
  carver.carve(s.attended, chunk * widest([](const A& a) { return a.heads * a.v_dim; }));
  carver.carve(s.scores, queries * c.key_positions());
  carver.carve(s.gate, hidden);
  carver.carve(s.up, hidden);
  carver.carve(s.down, pairs * c.dim);
  carver.carve(s.shared, c.shared_hidden || c.dense_hidden ? chunk * c.dim : 0);
  carver.carve(s.shared_gate, chunk);
  carver.carve(s.logits, size_t(c.logits_rows) * c.vocab);
  s.rope.resize(c.attentions.size());
  for (size_t kind = 0; kind < s.rope.size(); ++kind) {
    const size_t angles = size_t(c.context) * (c.attentions[kind].rope_dim / 2);
    carver.carve(s.rope[kind].cos, angles);
    carver.carve(s.rope[kind].sin, angles);
  }
  carver.carve(s.received, chunk * widest([](const A& a) { return a.kv_rank ? 0 : a.heads; }));
  carver.carve(s.ahead_normed, c.dim);
  if (!c.has_latents()) return;
  carver.carve(s.q_latent, chunk * widest([](const A& a) { return a.q_rank; }));
  carver.carve(s.absorbed, queries * widest([](const A& a) { return a.kv_rank ? a.latent_cached() : 0; }));
  carver.carve(s.mixed, queries * widest([](const A& a) { return a.kv_rank; }));
}

}  // namespace edge_moe
