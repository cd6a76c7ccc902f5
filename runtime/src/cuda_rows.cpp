// Attention to rows that are key and value of all heads, on a GPU: launches the same steps as row_attention.cpp.
#include <algorithm>

#include "cuda_math.h"

namespace edge_moe {

// most: as for attention().
void CudaMath::row_attention(int layer, const Step& step, int most) {
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const LayerWeights& w = layers_[layer];
  const RopeTables& rope = s_.rope[c.attention_of[layer]];
  const cuda::RowHeads heads = row_heads(layer);
  const cuda::RowTables tables = {rope.cos, rope.sin, w.kv_a_norm};
  const cuda::Pool pool = {w.pool.bias, w.pool.norm, c.norm_eps, a.head_dim, a.pool_rate, a.pool_overlaps, 0};
  const PoolWeights& of_index = w.index.pool;
  const cuda::Pool index = {of_index.bias, of_index.norm, c.norm_eps, a.index_dim, a.pool_rate, true, a.pool_values()};
  row_projections(layer, step.tokens);
  const int at_once = attention_tokens(c), places = int(c.cached_positions(layer));
  const RowChoice seen = {choice(a), a.pool_rate, a.sliding_window, places};
  for (size_t i = 0; i < step.spans.size(); ++i) {
    const TokenSpan& its = step.spans[i];
    const int last = most >= 0 ? most : its.position + its.count - 1;
    const cuda::Span all = {s_.positions + i, its.first, its.count, last};
    const cuda::RowCache cache = row_cache(its.sequence, layer);
    cuda::store_rows(s_.q, s_.k, s_.index_q, tables, heads, cache, all, stream_);
    const auto pooled = [&](float* values, const float* gates, const cuda::Pool& pool, const cuda::RowCache& rows) {
      cuda::pool_rows(values, gates, pool, tables, a.rope_dim, a.rope_interleaved, state_buffers(layer, i), rows,
                      index_cache(its.sequence, layer), all, stream_);
    };
    if (a.pool_rate) pooled(s_.pool_values, s_.pool_gates, pool, cache);
    if (a.index_heads) pooled(s_.index_values, s_.index_gates, index, {});
    for (int done = 0; done < its.count; done += at_once) {
      const int count = std::min(at_once, its.count - done);
      const cuda::Span span = {s_.positions + i, its.first + done, count, last - (its.count - done - count)};
      if (a.index_heads) choose_positions(layer, its.sequence, span);
      cuda::attend_rows(s_.q, w.sinks, tables, heads, a.out_groups, step.tokens, cache, seen, span, s_.scores, s_.mixed,
                        s_.attended, stream_);
    }
  }

  // each group's part of the output projection, and the rest of it
  const cuda::VectorBuffer quantised = s_.grouped_q.of_length(w.o_a.cols);
  if (w.o_a.takes_rounded()) cuda::quantise(s_.attended, a.out_groups * step.tokens, quantised, stream_);
  products_.clear();
  for (int group = 0; group < a.out_groups; ++group)
    products_.push_back({rows_of(w.o_a, group * a.out_rank, a.out_rank), s_.grouped + group * a.out_rank,
                         size_t(a.out_groups) * a.out_rank, nullptr, group * step.tokens, 1, step.tokens});
  multiply(products_, s_.attended, quantised);
  attention_output(layer, step.tokens, s_.grouped);
}

// Queries, of the indexer too, and what rows are made of.
void CudaMath::row_projections(int layer, int tokens) {
  const AttentionConfig& a = config_.attention(layer);
  const LayerWeights& w = layers_[layer];
  cuda::ProductJob jobs[7] = {cuda::whole(w.q_a, tokens, s_.q_latent), cuda::whole(w.kv_a, tokens, s_.k)};
  size_t count = 2;
  const auto add = [&](const Matrix& matrix, float* y) { jobs[count++] = cuda::whole(matrix, tokens, y); };
  if (a.pool_rate) add(w.pool.values, s_.pool_values), add(w.pool.gate, s_.pool_gates);
  if (a.index_heads) {
    add(w.index.pool.values, s_.index_values), add(w.index.pool.gate, s_.index_gates);
    add(w.index.weights, s_.index_weights);
  }
  multiply({jobs, count}, s_.normed, s_.normed_q);
  cuda::rms_norm(s_.q_latent, w.q_a_norm, config_.norm_eps, tokens, a.q_rank, s_.q_latent, s_.q_latent_q, stream_);
  const cuda::ProductJob of_latent[] = {cuda::whole(w.q, tokens, s_.q), cuda::whole(w.index.q, tokens, s_.index_q)};
  multiply({of_latent, a.index_heads ? 2u : 1u}, s_.q_latent, s_.q_latent_q);
}

cuda::RowHeads CudaMath::row_heads(int layer) const {
  const AttentionConfig& a = config_.attention(layer);
  return {a.heads,     a.head_dim,       a.rope_dim,      a.index_heads,
          a.index_dim, config_.norm_eps, a.softmax_scale, a.rope_interleaved};
}

cuda::RowCache CudaMath::row_cache(int sequence, int layer) const {
  return {layer_cache(sequence, layer), int(config_.cached_positions(layer)), config_.score_positions(),
          config_.half_cache};
}

}  // namespace edge_moe
