// The pieces of the scratch memory; see scratch.h.
#include "scratch.h"

#include <algorithm>

#include "carver.h"
#include "engine_config.h"

namespace edge_moe {

namespace {

void carve(Carver& carver, QuantisedBuffer& buffer, size_t vectors, size_t cols) {
  const size_t blocks = (cols + kBlock - 1) / kBlock;
  carver.carve(buffer.codes, vectors * blocks * kBlock);
  carver.carve(buffer.scales, vectors * blocks);
  carver.carve(buffer.sums[0], vectors * blocks * 2);
  carver.carve(buffer.sums[1], vectors * blocks);
  carver.carve(buffer.sums[2], vectors * ((blocks + 1) / 2));
}

}  // namespace

Activations activations(const float* values, const QuantisedBuffer& quantised, int cols, size_t first, int count) {
  Activations x;
  const size_t blocks = (cols + kBlock - 1) / kBlock;
  x.values = values + first * cols;
  x.codes = quantised.codes + first * blocks * kBlock;
  x.scales = quantised.scales + first * blocks;
  x.sums[0] = quantised.sums[0] + first * blocks * 2;
  x.sums[1] = quantised.sums[1] + first * blocks;
  x.sums[2] = quantised.sums[2] + first * ((blocks + 1) / 2);
  x.count = count;
  x.cols = cols;
  return x;
}

size_t carve_scratch(const EngineConfig& c, Scratch& s, uint8_t* base) {
  const size_t chunk = c.chunk, threads = c.threads, pairs = chunk * most(c.top_k);
  const size_t q_dim = size_t(c.heads) * c.head_dim, attended = size_t(c.heads) * c.v_dim;
  const size_t kv_dim = c.kv_rank ? c.latent_cached() : size_t(c.kv_heads) * c.head_dim;
  const size_t queries = threads * (c.kv_rank ? kLatentQueries : kHeadQueries);  // in attention at once
  const size_t widest = std::max({c.expert_hidden, c.shared_hidden, c.dense_hidden});
  const size_t hidden = std::max({pairs * c.expert_hidden, chunk * c.shared_hidden, chunk * c.dense_hidden});
  Carver carver(base);
  carver.carve(s.x, chunk * c.dim);
  carver.carve(s.normed, chunk * c.dim);
  carver.carve(s.q, chunk * q_dim);
  carver.carve(s.k, chunk * kv_dim);
  carver.carve(s.v, c.kv_rank ? 0 : chunk * kv_dim);
  carver.carve(s.attended, chunk * attended);
  carver.carve(s.scores, queries * c.key_positions());
  carver.carve(s.all_tokens, chunk);
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
  carve(carver, s.normed_q, chunk, c.dim);
  carve(carver, s.attended_q, chunk, attended);
  carve(carver, s.hidden_q, pairs, widest);
  if (c.kv_rank) {
    carver.carve(s.q_latent, chunk * c.q_rank);
    carver.carve(s.absorbed, queries * c.latent_cached());
    carver.carve(s.mixed, queries * c.kv_rank);
    carver.carve(s.rows, threads * kLatentRows * c.latent_cached());
    carve(carver, s.q_latent_q, chunk, c.q_rank);
    carve(carver, s.mixed_q, queries, c.kv_rank);
  }
  return carver.used();
}

}  // namespace edge_moe
