// The pieces of a block of memory; see layer_scratch.h.
#include "layer_scratch.h"

#include <algorithm>

namespace edge_moe {

void carve(Carver& carver, const EngineConfig& c, size_t queries, LayerScratch& s) {
  const size_t chunk = c.chunk, pairs = chunk * most(c.top_k);
  const size_t kv_dim = c.kv_rank ? c.latent_cached() : size_t(c.kv_heads) * c.head_dim;
  const size_t hidden = std::max({pairs * c.expert_hidden, chunk * c.shared_hidden, chunk * c.dense_hidden});
  carver.carve(s.x, chunk * c.dim);
  carver.carve(s.normed, chunk * c.dim);
  carver.carve(s.q, chunk * c.heads * c.head_dim);
  carver.carve(s.k, chunk * kv_dim);
  carver.carve(s.v, c.kv_rank ? 0 : chunk * kv_dim);
  carver.carve(s.attended, chunk * c.heads * c.v_dim);
  carver.carve(s.scores, queries * c.key_positions());
  carver.carve(s.gate, hidden);
  carver.carve(s.up, hidden);
  carver.carve(s.down, pairs * c.dim);
  carver.carve(s.shared, c.shared_hidden || c.dense_hidden ? chunk * c.dim : 0);
  carver.carve(s.shared_gate, chunk);
  carver.carve(s.logits, size_t(c.logits_rows) * c.vocab);
  carver.carve(s.cos, size_t(c.context) * (c.rope_dim / 2));
  carver.carve(s.sin, size_t(c.context) * (c.rope_dim / 2));
  carver.carve(s.received, c.kv_rank ? 0 : chunk * c.heads);
  carver.carve(s.ahead_normed, c.dim);
  if (!c.kv_rank) return;
  carver.carve(s.q_latent, chunk * c.q_rank);
  carver.carve(s.absorbed, queries * c.latent_cached());
  carver.carve(s.mixed, queries * c.kv_rank);
}

}  // namespace edge_moe
