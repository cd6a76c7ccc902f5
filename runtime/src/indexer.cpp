// The indexer of sparse attention: which positions each query attends to; see runtime/layers/indexer.py.
//
// Scores are computed for kIndexTokens queries at a time, each in parts of positions for the threads to share, so that
// they take as much memory as those of attention at any length of a prompt. Keys are cached in the type of the latents:
// a LayerNorm keeps them far from what halves cannot hold, and DeepSeek itself scores with keys in FP8.
#include <algorithm>
#include <utility>

#include "choose.h"
#include "cpu_math.h"
#include "key_block.h"
#include "rope.h"

namespace edge_moe {

namespace {

constexpr int kIndexKeys = 256;  // of a task

// From the numbers of blocks, ascending, to the positions in them and those after the last whole block before `end`.
void expand_blocks(int32_t* chosen, int count, int block, int end) {
  for (int i = 0; i < end % block; ++i) chosen[count * block + i] = end - end % block + i;
  for (int at = count - 1; at >= 0; --at)  // backwards, in place
    for (int i = block - 1, first = chosen[at] * block; i >= 0; --i) chosen[at * block + i] = first + i;
}

}  // namespace

// Rotate a token's queries of the indexer; norm and rotate its key, and store that in the cache.
void CpuMath::store_index_key(int layer, const TokenSpan& span, int in_span) {
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const IndexerWeights& w = layers_[layer].index;
  const RopeTables& rope = s_.rope[c.attention_of[layer]];
  const size_t t = size_t(span.first) + in_span, position = size_t(span.position) + in_span, dim = a.index_dim;
  const int half = a.rope_dim / 2;
  const float *cos = rope.cos + position * half, *sin = rope.sin + position * half;
  float *q = s_.index_q + t * a.index_heads * dim, *k = s_.index_k + t * dim;
  for (int head = 0; head < a.index_heads; ++head) rotate(q + head * dim, cos, sin, half, half, a.index_interleaved);
  kernels_.layer_norm(k, w.k_norm, w.k_norm_bias, a.index_norm_eps, k, int(dim));
  rotate(k, cos, sin, half, half, a.index_interleaved);
  cache_index_key(layer, span.sequence, position, k);
}

// Norm and rotate the queries of an indexer of blocks; sum the keys of each block and, where it ends, norm and rotate
// their mean and store it in the cache.
void CpuMath::store_block_keys(int layer, const Step& step) {
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const IndexerWeights& w = layers_[layer].index;
  const RopeTables& rope = s_.rope[c.attention_of[layer]];
  const size_t dim = a.index_dim, half = a.rope_dim / 2;
  const auto turn = [&](float* x, int position) {
    rotate(x, rope.cos + position * half, rope.sin + position * half, int(half), int(half), a.index_interleaved);
  };
  const auto count = [](const TokenSpan& span) { return span.count; };
  run_spans(step, count, [&](const TokenSpan& span, int in_span, int) {
    float* q = s_.index_q + size_t(span.first + in_span) * a.index_heads * dim;
    for (int head = 0; head < a.index_heads; ++head, q += dim) {
      kernels_.rms_norm(q, w.q_norm, a.index_norm_eps, q, int(dim));
      turn(q, span.position + in_span);
    }
  });
  const auto once = [](const TokenSpan&) { return 1; };
  run_spans(step, once, [&](const TokenSpan& span, int, int) {
    float *sum = state(span.next_state, layer), *keys = s_.index_k + span.first * dim;
    if (span.state < 0)
      std::fill_n(sum, dim, 0.0f);
    else
      std::copy_n(state(span.state, layer), dim, sum);
    for (int position = span.position; position < span.position + span.count; ++position, keys += dim) {
      if (position % a.index_block == 0) std::fill_n(sum, dim, 0.0f);
      kernels_.add_scaled(sum, keys, 1.0f, int(dim));
      if ((position + 1) % a.index_block) continue;
      for (size_t i = 0; i < dim; ++i) keys[i] = sum[i] / float(a.index_block);
      kernels_.rms_norm(keys, w.k_norm, a.index_norm_eps, keys, int(dim));
      turn(keys, position + 1 - a.index_block);
      cache_index_key(layer, span.sequence, position / a.index_block, keys);
    }
  });
}

// Store the key of a block in the cache.
void CpuMath::cache_index_key(int layer, int sequence, size_t place, const float* key) {
  const size_t dim = config_.attention(layer).index_dim;
  uint8_t* keys = index_keys(sequence, layer);
  if (!config_.half_cache) return store_key(reinterpret_cast<float*>(keys), place, key, dim);
  note_overflow(sequence, key, dim);
  store_key(reinterpret_cast<uint16_t*>(keys), place, key, dim);
}

// Set s_.chosen and s_.chosen_counts of all tokens.
void CpuMath::choose_positions(int layer, const Step& step) {
  const AttentionConfig& a = config_.attention(layer);
  IndexQuery queries[kIndexTokens];
  int count = 0;
  for (const TokenSpan& span : step.spans)
    for (int t = 0; t < span.count; ++t) {
      const int token = span.first + t, end = span.position + t + 1;
      s_.chosen_counts[token] = a.is_sparse(end) ? a.index_count(end) : 0;
      if (a.is_sparse(end)) queries[count++] = {token, span.sequence, end};
      if (count == kIndexTokens) choose_positions(layer, {queries, size_t(std::exchange(count, 0))});
    }
  if (count) choose_positions(layer, {queries, size_t(count)});
}

void CpuMath::choose_positions(int layer, std::span<const IndexQuery> queries) {
  const AttentionConfig& a = config_.attention(layer);
  const size_t positions = config_.key_positions();
  const int count = int(queries.size());
  int longest = 0;
  for (const IndexQuery& query : queries) longest = std::max(longest, query.end / a.index_block);
  pool_.run((longest - 1) / kIndexKeys * count + count, [&](int i, int thread) {
    const IndexQuery& query = queries[i % count];
    const int begin = i / count * kIndexKeys, end = std::min(begin + kIndexKeys, query.end / a.index_block);
    if (begin < end) index_scores(layer, query, begin, end, s_.index_scores + i % count * positions, thread);
  });
  pool_.run(count, [&](int i, int thread) {
    const int blocks = queries[i].end / a.index_block;
    int32_t* chosen = s_.chosen + size_t(queries[i].token) * a.index_most();
    choose_top(s_.index_scores + i * positions, blocks, a.index_top, s_.index_keys + thread * positions, chosen);
    if (a.index_block > 1 && !a.shared_rows) expand_blocks(chosen, a.index_top, a.index_block, queries[i].end);
  });
}

// The scores of the keys of [begin, end) for one query.
void CpuMath::index_scores(int layer, const IndexQuery& query, int begin, int end, float* scores, int thread) {
  const AttentionConfig& a = config_.attention(layer);
  const size_t positions = config_.key_positions(), heads = a.index_heads;
  float* of_heads = s_.scores + size_t(thread) * kLatentQueries * positions;
  const float *q = s_.index_q + query.token * heads * a.index_dim, *weights = s_.index_weights + query.token * heads;
  const KeyValues cache = {index_keys(query.sequence, layer), nullptr, 0, config_.half_cache};
  std::fill(scores + begin, scores + end, 0.0f);
  for (int first = 0; first < a.index_heads; first += kLatentQueries) {
    const int some = std::min(kLatentQueries, a.index_heads - first);
    const float* of_head[kLatentQueries];
    for (int i = 0; i < some; ++i) of_head[i] = q + size_t(first + i) * a.index_dim;
    kernels_.attend_scores(of_head, some, cache, begin, end, a.index_dim, a.index_scale, of_heads, positions);
    for (int i = 0; i < some; ++i)
      kernels_.add_positive(scores + begin, of_heads + i * positions + begin,
                            layers_[layer].index.weights ? weights[first + i] : 1.0f, end - begin);
  }
}

uint8_t* CpuMath::index_keys(int sequence, int layer) const {
  return layer_cache(sequence, layer) + config_.index_keys_offset(layer);
}

}  // namespace edge_moe
