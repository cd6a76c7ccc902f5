// Attention with keys and values for each KV head; attention over a latent is in latent_attention.cpp.
//
// A task processes up to kHeadQueries queries of one KV head together over its cache: the query heads that share it, of
// one token in decode and of a few in prefill, so that the cache is read from far memory once for all of them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../../devices/choice.h"
#include "../../devices/position_sums.h"
#include "cpu_math.h"
#include "key_block.h"
#include "rope.h"

namespace edge_moe {

void CpuMath::attention(int layer, const Step& step, bool received) {
  const int tokens = step.tokens;
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const LayerWeights& w = layers_[layer];
  const RopeTables& rope = s_.rope[c.attention_of[layer]];
  const int q_dim = a.q_dim(), kv_dim = a.kv_dim(), half = a.rope_dim / 2;
  const int apart = a.rope_span / 2;
  attention_norm(layer, tokens);

  // q k v
  const bool quantised = w.q.takes_rounded() || w.k.takes_rounded() || (w.v && w.v.takes_rounded()) ||
                         (w.o_gate && w.o_gate.takes_rounded()) ||
                         (w.index.q && w.index.q.takes_rounded());  // a bundle may mix widths
  Activations x = prepare(s_.normed, tokens, c.dim, s_.normed_q, quantised);
  matmuls(
      {{w.q, s_.q}, {w.k, s_.k}, {w.v, s_.v}, {w.o_gate, s_.o_gate}, {w.index.q, s_.index_q}, {w.index.k, s_.index_k}},
      x);
  auto add_bias = [&](float* vector, int n, const float* bias) {
    for (int i = 0; bias && i < n; ++i) vector[i] += bias[i];
  };
  auto clip = [&](float* vector, int n) {
    for (int i = 0; a.qkv_clip > 0 && i < n; ++i) vector[i] = std::clamp(vector[i], -a.qkv_clip, a.qkv_clip);
  };
  auto norm = [&](float* vector, int n, const float* weight) {
    const int step = a.qk_norm_full ? n : a.head_dim;
    for (int i = 0; weight && i < n; i += step) kernels_.rms_norm(vector + i, weight, c.norm_eps, vector + i, step);
  };

  // norms, rope, and into the KV cache; one task for the tokens that share key blocks
  const auto blocks = [](const TokenSpan& span) {
    return (span.position + span.count - 1) / kKeyBlock - span.position / kKeyBlock + 1;
  };
  run_spans(step, blocks, [&](const TokenSpan& span, int task, int) {
    const int block = span.position / kKeyBlock + task;
    const int begin = std::max(block * kKeyBlock - span.position, 0);
    const int end = std::min((block + 1) * kKeyBlock - span.position, span.count);
    for (int t = span.first + begin; t < span.first + end; ++t) {
      float *q = s_.q + size_t(t) * q_dim, *k = s_.k + size_t(t) * kv_dim, *v = s_.v + size_t(t) * kv_dim;
      if (a.keys_as_values) std::copy_n(k, kv_dim, v);
      add_bias(q, q_dim, w.q_bias), add_bias(k, kv_dim, w.k_bias), add_bias(v, kv_dim, w.v_bias);
      if (!a.norm_after_rope) norm(q, q_dim, w.q_norm), norm(k, kv_dim, w.k_norm);
      for (int i = 0; a.v_norm && i < kv_dim; i += a.head_dim)
        kernels_.rms_norm(v + i, s_.ones, c.norm_eps, v + i, a.head_dim);
      clip(q, q_dim), clip(k, kv_dim), clip(v, kv_dim);
      const int position = span.position + t - span.first;
      const float *cos = rope.cos + size_t(position) * half, *sin = rope.sin + size_t(position) * half;
      const auto turn = [&](float* x, int heads) {
        for (int head = 0; head < heads; ++head)
          rotate(x + head * a.head_dim, cos, sin, half, apart, a.rope_interleaved);
      };
      turn(q, a.heads), turn(k, a.kv_heads);
      if (a.norm_after_rope) norm(q, q_dim, w.q_norm), norm(k, kv_dim, w.k_norm);
      for (int head = 0; head < a.kv_heads; ++head) {
        float *key = k + head * a.head_dim, *value = v + head * a.head_dim;
        c.half_cache ? store<uint16_t>(span.sequence, layer, head, position, key, value)
                     : store<float>(span.sequence, layer, head, position, key, value);
      }
    }
  });

  if (a.index_heads) {
    store_block_keys(layer, step);
    choose_positions(layer, step);
  }

  // attention; one task for some heads that share a KV head, and some tokens; one if each has positions of its own
  const int shared_by = a.heads / a.kv_heads;
  const auto most_of = [&](const TokenSpan& span) {
    return a.is_sparse(span.position + span.count) ? 1 : std::max(1, kHeadQueries / shared_by);
  };
  const auto tiles_of = [&](const TokenSpan& span) { return (span.count - 1) / most_of(span) + 1; };
  int tiles = 0;
  for (const TokenSpan& span : step.spans) tiles += tiles_of(span);
  const int most_heads = a.kv_heads * tiles < pool_.threads() ? a.heads * tiles / pool_.threads() : shared_by;
  const int heads_a_task = std::clamp(most_heads, 1, std::min(shared_by, kHeadQueries));
  const int parts = (shared_by - 1) / heads_a_task + 1;
  const auto tasks = [&](const TokenSpan& span) { return tiles_of(span) * a.kv_heads * parts; };
  run_spans(step, tasks, [&](const TokenSpan& span, int task, int thread) {
    const int of_span = tiles_of(span), most_tokens = most_of(span), token = task % of_span * most_tokens;
    const int kv_head = task / of_span / parts;
    const int in_group = task / of_span % parts * heads_a_task;
    attend(layer, span, token, std::min(most_tokens, span.count - token), kv_head * shared_by + in_group,
           std::min(heads_a_task, shared_by - in_group), thread);
  });
  if (received) received_attention(layer, step);
  if (a.output_gate)
    pool_.run(tokens, [&](int t, int) {
      kernels_.gate_up(s_.o_gate + size_t(t) * q_dim, s_.attended + size_t(t) * q_dim, q_dim, {Gate::kSigmoid});
    });
  attention_output(layer, a.output_gate ? s_.o_gate : s_.attended, tokens);
}

// Attention of some heads that share a KV head, for some tokens of a span: from q to attended. Of several tokens, none
// attends to a choice of positions.
void CpuMath::attend(int layer, const TokenSpan& span, int first_token, int tokens, int first_head, int heads,
                     int thread) {
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const LayerWeights& w = layers_[layer];
  const size_t stride = c.key_positions();
  const int queries = heads * tokens;
  float* scores = s_.scores + size_t(thread) * kHeadQueries * stride;
  const Choice choice = a.index_top ? Choice{s_.chosen, s_.chosen_counts, a.index_most()} : Choice{};
  const int32_t* chosen = tokens == 1 ? choice.of(span.first + first_token) : nullptr;
  const int seen = span.position + first_token + 1,
            first_end = tokens == 1 ? choice.count(span.first + first_token, seen) : seen;
  KeyValues cache = cached(span.sequence, layer, first_head / (a.heads / a.kv_heads));
  if (chosen) cache = gathered(cache, chosen, first_end, thread);
  const float* q[kHeadQueries];
  float *out[kHeadQueries], *piece[kHeadQueries];
  for (int query = 0; query < queries; ++query) {
    const size_t row = size_t(span.first + first_token + query / heads) * a.heads + first_head + query % heads;
    q[query] = s_.q + row * a.head_dim;
    out[query] = s_.attended + row * a.head_dim;
    piece[query] = s_.piece + (size_t(thread) * kHeadQueries + query) * a.head_dim;
    std::fill_n(out[query], a.head_dim, 0.0f);
  }
  const auto end_of = [&](int token) { return first_end + token; };
  const auto begin_of = [&](int token) { return a.sliding_window ? std::max(0, end_of(token) - a.sliding_window) : 0; };
  in_runs(layer, cache, begin_of(0), end_of(tokens - 1), [&](const KeyValues& run, int from, int to) {
    kernels_.attend_scores(q, queries, run, from, to, a.head_dim, a.softmax_scale, scores, stride);
  });
  for (int query = 0; query < queries; ++query)
    kernels_.softmax(scores + query * stride, begin_of(query / heads), end_of(query / heads),
                     w.sink(first_head + query % heads));

  // positions that all tokens see, at once; before and after them, token by token those that only some see
  const int begin = begin_of(tokens - 1), end = std::max(begin, end_of(0));
  sum_positions(begin_of(0), end_of(tokens - 1), queries, a.head_dim, out, piece, [&](int first, int last, auto rows) {
    auto values = [&](int token, int count, int from, int to) {
      from = std::max(from, first), to = std::min(to, last);
      in_runs(layer, cache, from, to, [&](const KeyValues& run, int first, int last) {
        kernels_.attend_values(scores + token * heads * stride, stride, count * heads, run, first, last, a.head_dim,
                               rows + token * heads);
      });
    };
    for (int token = 0; token < tokens; ++token) values(token, 1, begin_of(token), std::min(begin, end_of(token)));
    values(0, tokens, begin, end);
    for (int token = 0; token < tokens; ++token) values(token, 1, end, end_of(token));
  });
}

// The keys and values of some positions, in ascending order, as those of positions 0, 1, 2...
KeyValues CpuMath::gathered(const KeyValues& cache, const int32_t* positions, int count, int thread) const {
  const size_t value = config_.kv_value_bytes(), dim = cache.stride, most = align_up(config_.index_most(), kKeyBlock);
  uint8_t* keys = s_.gathered + thread * 2 * most * dim * value;
  uint8_t* values = keys + most * dim * value;
  const uint8_t *from_keys = static_cast<const uint8_t*>(cache.keys),
                *from_values = static_cast<const uint8_t*>(cache.values);
  const auto place = [&](int position) {
    return (position / kKeyBlock * dim * kKeyBlock + position % kKeyBlock) * value;
  };
  for (int to = 0, run; to < count; to += run) {
    const int from = positions[to], room = kKeyBlock - std::max(from % kKeyBlock, to % kKeyBlock);
    for (run = 1; run < room && to + run < count && positions[to + run] == from + run;) ++run;
    if (run == kKeyBlock)
      std::memcpy(keys + place(to), from_keys + place(from), run * dim * value);
    else
      for (size_t i = 0; i < dim; ++i)
        std::memcpy(keys + place(to) + i * kKeyBlock * value, from_keys + place(from) + i * kKeyBlock * value,
                    run * value);
    std::memcpy(values + to * dim * value, from_values + from * dim * value, run * dim * value);
  }
  return {keys, values, dim, cache.half};
}

// Store a token's key and value of one KV head in the cache.
template <typename T>
void CpuMath::store(int sequence, int layer, int head, int position, const float* key, const float* value) {
  const KeyValues cache = cached(sequence, layer, head);
  const size_t dim = config_.attention(layer).head_dim, place = position % config_.cached_positions(layer);
  if (std::is_same_v<T, uint16_t>) note_overflow(sequence, key, dim), note_overflow(sequence, value, dim);
  T* values = static_cast<T*>(const_cast<void*>(cache.values)) + place * dim;
  store_key(static_cast<T*>(const_cast<void*>(cache.keys)), place, key, dim);
  std::transform(value, value + dim, values, as_cached<T>);
}

void CpuMath::note_overflow(int sequence, const float* values, size_t count) {
  float largest = 0;
  for (size_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
  if (largest >= kHalfOverflow) kv_overflow_.store(sequence, std::memory_order_relaxed);
}

// The attention that each of the chunk's tokens receives from itself and later tokens of the chunk, per head. Computed
// anew, head by head, so that the order of sums is fixed; only for prompts whose tokens are protected from pruning.
void CpuMath::received_attention(int layer, const Step& step) {
  const EngineConfig& c = config_;
  const AttentionConfig& a = c.attention(layer);
  const TokenSpan& span = step.spans.front();
  pool_.run(a.heads, [&](int head, int thread) {
    const KeyValues cache = cached(span.sequence, layer, head / (a.heads / a.kv_heads));
    float* received = s_.received + size_t(head) * c.chunk;
    float* scores = s_.scores + size_t(thread) * kHeadQueries * c.key_positions();
    std::fill_n(received, step.tokens, 0.0f);
    for (int t = 0; t < step.tokens; ++t) {
      const int end = span.position + t + 1, begin = a.sliding_window ? std::max(0, end - a.sliding_window) : 0;
      const float* q = s_.q + (size_t(t) * a.heads + head) * a.head_dim;
      in_runs(layer, cache, begin, end, [&](const KeyValues& run, int from, int to) {
        kernels_.attend_scores(&q, 1, run, from, to, a.head_dim, a.softmax_scale, scores, 0);
      });
      kernels_.softmax(scores, begin, end, layers_[layer].sink(head));
      for (int at = std::max(begin, span.position); at < end; ++at) received[at - span.position] += scores[at];
    }
  });
}

void CpuMath::attention_norm(int layer, int tokens) {
  const size_t dim = config_.dim;
  const LayerWeights& w = layers_[layer];
  if (w.attention_mix) return mixed(w.attention_norm, w.attention_mix, nullptr, tokens, s_.shares, s_.normed);
  pool_.run(tokens, [&](int t, int) { norm(w.attention_norm, s_.x + t * dim, s_.normed + t * dim); });
}

// Output projection of `values`, its norm and residual.
void CpuMath::attention_output(int layer, const float* values, int tokens) {
  const Matrix& o = layers_[layer].o;
  matmul(o, prepare(values, tokens, o.cols, s_.attended_q, o.takes_rounded()), s_.normed);
  add_to_residual(layers_[layer].attention_post_norm, s_.normed, tokens);
}

KeyValues CpuMath::cached(int sequence, int layer, int head) const {
  const AttentionConfig& a = config_.attention(layer);
  const size_t row = config_.kv_row_bytes(layer);
  uint8_t* keys = layer_cache(sequence, layer) + head * row;
  return {keys, keys + a.kv_heads * row, size_t(a.head_dim), config_.half_cache};
}

// Calls run(cache, from, to) for the parts of [begin, end) whose positions follow one another in memory. The cache of a
// part is addressed by position, too.
template <typename Run>
void CpuMath::in_runs(int layer, const KeyValues& cache, int begin, int end, const Run& run) const {
  const int room = int(config_.cached_positions(layer));
  for (int from = begin, to; from < end; from = to) {
    const int round = from / room * room;
    to = std::min(end, round + room);
    const size_t before = round * config_.kv_position_bytes(layer);
    run({static_cast<const uint8_t*>(cache.keys) - before, static_cast<const uint8_t*>(cache.values) - before,
         cache.stride, cache.half},
        from, to);
  }
}

// Keys are stored in blocks of positions, so whole blocks are copied of each row; of a window all of it.
void CpuMath::copy_positions(int from, int to, int positions) {
  const EngineConfig& c = config_;
  pool_.run(c.layers, [&](int layer, int) {
    c.each_kv_row(layer, positions, [&](size_t at, size_t bytes) {
      std::memcpy(layer_cache(to, layer) + at, layer_cache(from, layer) + at, bytes);
    });
  });
}

void CpuMath::save_windows(int sequence, int slot, int position) {
  each_window_block(config_, position, [&](int layer, size_t place, size_t at, size_t bytes) {
    std::memcpy(kept_windows(slot, layer) + at, layer_cache(sequence, layer) + place, bytes);
  });
}

void CpuMath::load_windows(int slot, int sequence, int position) {
  each_window_block(config_, position, [&](int layer, size_t place, size_t at, size_t bytes) {
    std::memcpy(layer_cache(sequence, layer) + place, kept_windows(slot, layer) + at, bytes);
  });
}

void CpuMath::copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

uint8_t* CpuMath::layer_cache(int sequence, int layer) const {
  return kv_arena_.data() + sequence * kv_offsets_.back() + kv_offsets_[layer];
}

uint8_t* CpuMath::kept_windows(int slot, int layer) const {
  return window_arena_.data() + slot * window_offsets_.back() + window_offsets_[layer];
}

}  // namespace edge_moe
