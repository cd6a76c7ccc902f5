// Attention over a latent: a small vector per token from which the keys and values of all heads could be expanded.
//
// Keys and values are not expanded, in prefill or in decode. With k = K c and v = V c for the latent c of a token, q .
// k = (K^T q) . c, and a weighted sum of v is V times that sum of c: each head projects its query to the latents,
// attends to them, and projects the sum of latents to its values. So decode reads kv_rank + rope_dim floats per
// position and expands none of them. Expanding would reduce prefill to a third of the products (at DeepSeek-V3's
// sizes), but sum in another order: a prompt split elsewhere would give other bits.
//
// All heads read the same latents, so a task processes kLatentQueries queries together. One by one, each would read a
// context larger than the second-level cache from farther away: with 2,000 tokens of 576 floats and 16 heads, on one
// thread of a 2.8 GHz Xeon, prefill would take 1.8 times as long, decode 1.5 times.
#include <algorithm>

#include "../../devices/choice.h"
#include "../../devices/half.h"
#include "attend_rows.h"
#include "rope.h"

namespace edge_moe {

void CpuMath::latent_attention(int layer, const Step& step) {
  const int tokens = step.tokens;
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const LayerWeights& w = layers_[layer];
  const RopeTables& rope = s_.rope[c.attention_of[layer]];
  const int q_dim = a.q_dim(), nope_dim = a.head_dim - a.rope_dim, half = a.rope_dim / 2;
  const size_t cached = a.latent_cached();
  attention_norm(layer, tokens);

  // queries, with or without a latent of their own, and the values to cache
  const Matrix& first = a.q_rank ? w.q_a : w.q;
  Activations x = prepare(s_.normed, tokens, c.dim, s_.normed_q,
                          first.takes_rounded() || w.kv_a.takes_rounded() || (w.index.k && w.index.k.takes_rounded()));
  matmuls({{first, a.q_rank ? s_.q_latent : s_.q},
           {w.kv_a, s_.k},
           {w.index.k, s_.index_k},
           {w.index.weights, s_.index_weights}},
          x);
  if (a.q_rank) {
    pool_.run(tokens, [&](int t, int) {
      float* q_latent = s_.q_latent + size_t(t) * a.q_rank;
      kernels_.rms_norm(q_latent, w.q_a_norm, a.latent_norm_eps, q_latent, a.q_rank);
    });
    const bool quantised = w.q.takes_rounded() || (w.index.q && w.index.q.takes_rounded());
    matmuls({{w.q, s_.q}, {w.index.q, s_.index_q}}, prepare(s_.q_latent, tokens, a.q_rank, s_.q_latent_q, quantised));
  }

  // norm of the latent, rope, and into the KV cache
  const auto count = [](const TokenSpan& span) { return span.count; };
  run_spans(step, count, [&](const TokenSpan& span, int in_span, int) {
    const size_t t = size_t(span.first) + in_span, position = size_t(span.position) + in_span;
    float *q = s_.q + t * q_dim, *latent = s_.k + t * cached;
    const float *cos = rope.cos + position * half, *sin = rope.sin + position * half;
    for (int head = 0; head < a.heads; ++head)
      rotate(q + head * a.head_dim + nope_dim, cos, sin, half, half, a.rope_interleaved);
    rotate(latent + a.kv_rank, cos, sin, half, half, a.rope_interleaved);
    kernels_.rms_norm(latent, w.kv_a_norm, a.latent_norm_eps, latent, a.kv_rank);
    store_row(span.sequence, layer_cache(span.sequence, layer), position, latent, cached);
    if (a.index_heads) store_index_key(layer, span, in_span);
  });
  if (a.index_heads) choose_positions(layer, step);

  // attention; one task for some tokens of a head, or for some heads if there are few tokens or each has positions of
  // its own
  const auto is_sparse = [&](const TokenSpan& span) { return a.is_sparse(span.position + span.count); };
  const auto most_tokens = [&](const TokenSpan& span) { return is_sparse(span) ? 1 : kLatentQueries; };
  const auto heads_a_task = [&](const TokenSpan& span) {
    const int at_once = is_sparse(span) ? tokens : int(step.spans.size());
    return std::clamp(a.heads * at_once / pool_.threads(), 1, kLatentQueries / std::min(span.count, most_tokens(span)));
  };
  const auto tiles = [&](const TokenSpan& span) { return (span.count - 1) / most_tokens(span) + 1; };
  const auto tasks = [&](const TokenSpan& span) { return ((a.heads - 1) / heads_a_task(span) + 1) * tiles(span); };
  run_spans(step, tasks, [&](const TokenSpan& span, int task, int thread) {
    const int token = task % tiles(span) * most_tokens(span), head = task / tiles(span) * heads_a_task(span);
    attend_latent(layer, span, token, std::min(most_tokens(span), span.count - token), head,
                  std::min(heads_a_task(span), a.heads - head), thread);
  });
  attention_output(layer, s_.attended, tokens);
}

// Attention of some heads for some tokens of a span: from q to attended. Of several tokens, none attends to a choice of
// positions.
void CpuMath::attend_latent(int layer, const TokenSpan& span, int first_token, int tokens, int first_head, int heads,
                            int thread) {
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const Matrix& kv_b = layers_[layer].kv_b;
  const int rank = a.kv_rank, nope_dim = a.head_dim - a.rope_dim, queries = heads * tokens;
  const size_t cached = a.latent_cached(), first_query = size_t(thread) * kLatentQueries;
  float *absorbed = s_.absorbed + first_query * cached, *mixed = s_.mixed + first_query * rank;
  float* rows = s_.rows + size_t(thread) * kLatentRows * cached;
  const uint8_t* latents = layer_cache(span.sequence, layer);
  const size_t first_row = size_t(span.first) + first_token;
  auto scale_of = [&](int t) { return a.softmax_scale * a.query_scale(span.position + first_token + t); };
  auto rows_of_head = [&](int head) { return (first_head + head) * (nope_dim + a.v_dim); };

  // queries projected to latents, keys^T q, followed by their rotated part
  for (int head = 0; head < heads; ++head) {
    const Matrix keys = rows_of(kv_b, rows_of_head(head), nope_dim);
    const size_t q_stride = size_t(a.heads) * a.head_dim;
    const float* q = s_.q + first_row * q_stride + (first_head + head) * a.head_dim;
    float* out = absorbed + head * tokens * cached;
    for (int t = 0; t < tokens; ++t) {
      std::fill_n(out + t * cached, rank, 0.0f);
      for (int i = 0; i < a.rope_dim; ++i) out[t * cached + rank + i] = q[t * q_stride + nope_dim + i] * scale_of(t);
    }
    for (int row = 0; row < nope_dim; row += kLatentRows) {
      const int count = std::min(kLatentRows, nope_dim - row);
      for (int i = 0; i < count; ++i) kernels_.dequantise_row(keys, row + i, rows + i * rank);
      for (int t = 0; t < tokens; ++t)
        for (int i = 0; i < count; ++i)
          kernels_.add_scaled(out + t * cached, rows + i * rank, q[t * q_stride + row + i] * scale_of(t), rank);
    }
  }

  // attention: each query sees the positions up to its own, or its choice of them, which are numbered from 0 below
  const Choice choice = a.index_top ? Choice{s_.chosen, s_.chosen_counts, a.index_top} : Choice{};
  const int32_t* chosen = tokens == 1 ? choice.of(int(first_row)) : nullptr;
  const int end = tokens == 1 ? choice.count(int(first_row), span.position + first_token + 1)
                              : span.position + first_token + tokens;
  auto end_of = [&](int query) { return end - tokens + query % tokens + 1; };
  auto latents_from = [&](int position, int count) -> const float* {
    const float* floats = reinterpret_cast<const float*>(latents);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(latents);
    if (!chosen && !c.half_cache) return floats + position * cached;
    if (!chosen) kernels_.widen(halves + position * cached, rows, count * int(cached));
    for (int i = 0; chosen && i < count; ++i) {
      const size_t from = chosen[position + i] * cached;
      c.half_cache ? kernels_.widen(halves + from, rows + i * cached, int(cached))
                   : void(std::copy_n(floats + from, cached, rows + i * cached));
    }
    return rows;
  };
  float* out[kLatentQueries];
  for (int query = 0; query < queries; ++query) out[query] = mixed + query * rank;
  attend_rows(absorbed, queries, int(cached), rank, end, end_of, latents_from, nullptr, out, thread);

  // projected to values
  for (int head = 0; head < heads; ++head) {
    const Matrix values = rows_of(kv_b, rows_of_head(head) + nope_dim, a.v_dim);
    const size_t first = first_query + head * tokens, v_stride = size_t(a.heads) * a.v_dim;
    for (int t = 0; values.takes_rounded() && t < tokens; ++t)
      quantise_vector(s_.mixed + (first + t) * rank, rank, s_.mixed_q, int(first) + t);
    kernels_.matmul(values, activations(s_.mixed, s_.mixed_q, rank, first, tokens),
                    s_.attended + first_row * v_stride + (first_head + head) * a.v_dim, v_stride, 0, a.v_dim);
  }
}

}  // namespace edge_moe
