// Attention to rows that are key and value of all heads at once: the rows of a window and, before it, compressed rows,
// all of them or those that an indexer chooses; see runtime/layers/compressed.py.
//
// A query numbers what it attends to from 0: first compressed rows, then the window, both ascending. So a task takes
// some heads of one token, and what a token gets does not depend on the other tokens of its step.
#include <algorithm>
#include <cstring>

#include "../../devices/choice.h"
#include "../../devices/half.h"
#include "attend_rows.h"
#include "rope.h"

namespace edge_moe {

static constexpr int kPoolDims = 64;  // of a task of compressed rows

void CpuMath::row_attention(int layer, const Step& step) {
  const int tokens = step.tokens;
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const LayerWeights& w = layers_[layer];
  const RopeTables& rope = s_.rope[c.attention_of[layer]];
  const int half = a.rope_dim / 2;
  attention_norm(layer, tokens);

  // queries, of the indexer too, and what rows are made of
  const bool pooled = a.pool_rate, indexed = a.index_heads;
  const bool rounded = w.q_a.takes_rounded() || w.kv_a.takes_rounded() ||
                       (pooled && (w.pool.values.takes_rounded() || w.pool.gate.takes_rounded()));
  matmuls({{w.q_a, s_.q_latent},
           {w.kv_a, s_.k},
           {w.pool.values, s_.pool_values},
           {w.pool.gate, s_.pool_gates},
           {w.index.pool.values, s_.index_values},
           {w.index.pool.gate, s_.index_gates},
           {w.index.weights, s_.index_weights}},
          prepare(s_.normed, tokens, c.dim, s_.normed_q, rounded));
  pool_.run(tokens, [&](int t, int) {
    float* latent = s_.q_latent + size_t(t) * a.q_rank;
    kernels_.rms_norm(latent, w.q_a_norm, c.norm_eps, latent, a.q_rank);
  });
  const bool of_latents = w.q.takes_rounded() || (indexed && w.index.q.takes_rounded());
  matmuls({{w.q, s_.q}, {w.index.q, s_.index_q}}, prepare(s_.q_latent, tokens, a.q_rank, s_.q_latent_q, of_latents));

  // norms, rope, and the window's rows into the KV cache
  const auto count = [](const TokenSpan& span) { return span.count; };
  run_spans(step, count, [&](const TokenSpan& span, int in_span, int) {
    const size_t t = size_t(span.first) + in_span, position = size_t(span.position) + in_span;
    const float *cos = rope.cos + position * half, *sin = rope.sin + position * half;
    const auto turn = [&](float* x, int dim) {
      rotate(x + dim - a.rope_dim, cos, sin, half, half, a.rope_interleaved);
    };
    for (int head = 0; head < a.heads; ++head) {
      float* q = s_.q + (t * a.heads + head) * a.head_dim;
      kernels_.rms_norm(q, s_.ones, c.norm_eps, q, a.head_dim);
      turn(q, a.head_dim);
      for (int i = 0; i < a.head_dim; ++i) q[i] *= a.softmax_scale;
    }
    for (int head = 0; head < a.index_heads; ++head)
      turn(s_.index_q + (t * a.index_heads + head) * a.index_dim, a.index_dim);
    float* row = s_.k + t * a.head_dim;
    kernels_.rms_norm(row, w.kv_a_norm, c.norm_eps, row, a.head_dim);
    turn(row, a.head_dim);
    store_row(span.sequence, layer_cache(span.sequence, layer), position % c.cached_positions(layer), row, a.head_dim);
  });

  // compressed rows, and their choice
  if (pooled) pool_rows(w.pool, step, layer, 0, a.head_dim, a.pool_overlaps, s_.pool_values, s_.pool_gates);
  if (indexed)
    pool_rows(w.index.pool, step, layer, a.pool_values(), a.index_dim, true, s_.index_values, s_.index_gates);
  const auto each_row = [&](const auto& store) {
    run_spans(step, count, [&](const TokenSpan& span, int in_span, int) {
      const int position = span.position + in_span;
      if ((position + 1) % a.pool_rate == 0) store(span, size_t(span.first) + in_span, position / a.pool_rate);
    });
  };
  const auto finish = [&](float* row, const float* norm, int dim, int place) {
    const size_t angles = size_t(place) * a.pool_rate * half;
    kernels_.rms_norm(row, norm, c.norm_eps, row, dim);
    rotate(row + dim - a.rope_dim, rope.cos + angles, rope.sin + angles, half, half, a.rope_interleaved);
  };
  if (pooled)
    each_row([&](const TokenSpan& span, size_t t, int place) {
      float* row = s_.pool_values + t * w.pool.values.rows;
      finish(row, w.pool.norm, a.head_dim, place);
      store_row(span.sequence, layer_cache(span.sequence, layer) + c.pool_offset(layer), place, row, a.head_dim);
    });
  if (indexed) {
    each_row([&](const TokenSpan& span, size_t t, int place) {
      float* key = s_.index_values + t * w.index.pool.values.rows;
      finish(key, w.index.pool.norm, a.index_dim, place);
      cache_index_key(layer, span.sequence, place, key);
    });
    choose_positions(layer, step);
  }

  // attention: tasks of some heads of a token, which are in one group
  const int of_group = a.heads / a.out_groups;
  const int heads_a_task = std::clamp(a.heads * tokens / pool_.threads(), 1, std::min(kLatentQueries, of_group));
  const int parts = (of_group - 1) / heads_a_task + 1;
  const auto tasks = [&](const TokenSpan& span) { return span.count * a.out_groups * parts; };
  run_spans(step, tasks, [&](const TokenSpan& span, int task, int thread) {
    const int in_group = task % parts * heads_a_task, group = task / parts % a.out_groups;
    attend_shared(layer, step, span, task / parts / a.out_groups, group * of_group + in_group,
                  std::min(heads_a_task, of_group - in_group), thread);
  });
  grouped_output(layer, tokens);
}

// The sums of a layer's compressed rows, or of its indexer's keys, over the tokens of a step. Where a row ends at a
// token, it is written to the first `dim` of the token's values. at: of the sums in the layer's state, those of the row
// that the next token belongs to and then, if rows overlap, those of the row after it.
void CpuMath::pool_rows(const PoolWeights& w, const Step& step, int layer, size_t at, int dim, bool overlaps,
                        float* values, const float* gates) {
  const int rate = config_.attention(layer).pool_rate, parts = (dim + kPoolDims - 1) / kPoolDims;
  const int columns = overlaps ? 2 * dim : dim, own = columns - dim;  // a token's columns of the row that it ends in
  const auto tasks = [&](const TokenSpan&) { return parts; };
  run_spans(step, tasks, [&](const TokenSpan& span, int part, int) {
    const float* from = span.state < 0 ? nullptr : state(span.state, layer) + at;
    float* to = state(span.next_state, layer) + at;
    for (int i = part * kPoolDims; i < std::min((part + 1) * kPoolDims, dim); ++i) {
      const auto sums_at = [&](const float* sums) { return PoolSums{sums[i], sums[dim + i], sums[2 * dim + i]}; };
      PoolSums its = from ? sums_at(from) : PoolSums{}, next = from && overlaps ? sums_at(from + 3 * dim) : PoolSums{};
      for (int t = span.first; t < span.first + span.count; ++t) {
        const int in_row = (span.position + t - span.first) % rate;
        float* value = values + size_t(t) * columns;
        const float *gate = gates + size_t(t) * columns, *bias = w.bias + size_t(in_row) * columns;
        its.add(gate[own + i] + bias[own + i], value[own + i]);
        if (overlaps) next.add(gate[i] + bias[i], value[i]);
        if (in_row + 1 == rate) value[i] = its.mean(), its = std::exchange(next, {});
      }
      const auto keep = [&](const PoolSums& sums, float* there) {
        there[i] = sums.top, there[dim + i] = sums.weight, there[2 * dim + i] = sums.value;
      };
      keep(its, to);
      if (overlaps) keep(next, to + 3 * dim);
    }
  });
}

// Attention of some heads of one token: from q to attended, which is (out_groups, tokens, heads of a group, head_dim).
void CpuMath::attend_shared(int layer, const Step& step, const TokenSpan& span, int in_span, int first_head, int heads,
                            int thread) {
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const RopeTables& rope = s_.rope[c.attention_of[layer]];
  const int dim = a.head_dim, half = a.rope_dim / 2, end = span.position + in_span + 1;
  const size_t t = size_t(span.first) + in_span, row_bytes = c.kv_position_bytes(layer);
  const Choice choice = a.index_top ? Choice{s_.chosen, s_.chosen_counts, a.index_most()} : Choice{};
  const RowChoice all = {choice, a.pool_rate, a.sliding_window, int(c.cached_positions(layer))};
  const RowChoice::Seen seen = all.seen(int(t), end);
  const int count = all.count(int(t), end);
  const uint8_t* cache = layer_cache(span.sequence, layer);
  float* floats = s_.rows + size_t(thread) * kLatentRows * dim;
  const auto rows = [&](int first, int some) -> const float* {
    for (int i = 0; i < some; ++i) {
      const uint8_t* row = cache + seen[first + i] * row_bytes;
      if (c.half_cache)
        kernels_.widen(reinterpret_cast<const uint16_t*>(row), floats + size_t(i) * dim, dim);
      else
        std::memcpy(floats + size_t(i) * dim, row, row_bytes);
    }
    return floats;
  };
  const int of_group = a.heads / a.out_groups, group = first_head / of_group;
  float* out[kLatentQueries];
  for (int i = 0; i < heads; ++i)
    out[i] = s_.attended + ((size_t(group) * step.tokens + t) * of_group + first_head % of_group + i) * dim;
  attend_rows(
      s_.q + (t * a.heads + first_head) * dim, heads, dim, dim, count, [&](int) { return count; }, rows,
      layers_[layer].sinks + first_head, out, thread);

  // Values are rotated by their positions, so the sum is turned back by the query's.
  const float *cos = rope.cos + size_t(end - 1) * half, *sin = rope.sin + size_t(end - 1) * half;
  for (int i = 0; i < heads; ++i) rotate_back(out[i] + dim - a.rope_dim, cos, sin, half, half, a.rope_interleaved);
}

// Each group's part of the output projection, and the rest of it.
void CpuMath::grouped_output(int layer, int tokens) {
  const AttentionConfig& a = config_.attention(layer);
  const Matrix& o_a = layers_[layer].o_a;
  const int rank = a.out_rank, groups = a.out_groups, rows = std::min(64, rank), pieces = (rank + rows - 1) / rows;
  prepare(s_.attended, groups * tokens, o_a.cols, s_.grouped_q, o_a.takes_rounded());
  pool_.run(groups * pieces, [&](int i, int) {
    const int group = i / pieces, begin = i % pieces * rows;
    kernels_.matmul(rows_of(o_a, group * rank, rank),
                    activations(s_.attended, s_.grouped_q, o_a.cols, size_t(group) * tokens, tokens),
                    s_.grouped + group * rank, size_t(groups) * rank, begin, std::min(begin + rows, rank));
  });
  attention_output(layer, s_.grouped, tokens);
}

// Store a row of n values in the KV cache.
void CpuMath::store_row(int sequence, uint8_t* rows, size_t place, const float* row, size_t n) {
  if (!config_.half_cache) {
    std::copy_n(row, n, reinterpret_cast<float*>(rows) + place * n);
    return;
  }
  note_overflow(sequence, row, n);
  std::transform(row, row + n, reinterpret_cast<uint16_t*>(rows) + place * n, float_to_half);
}

}  // namespace edge_moe
