// Block-sparse attention against the steps of runtime/src/indexer.cpp and attention.cpp by scalar.cpp: keys of blocks,
// their scores, the choice of positions, and attention to these.
#include <numeric>
#include <tuple>

#include "../../devices/cuda/sparse.h"
#include "../../devices/position_sums.h"
#include "../../runtime/src/key_block.h"
#include "../../runtime/src/rope.h"
#include "check_cuda.h"

namespace {

constexpr float kEps = 1e-6f, kScale = 0.3f;

Values<uint16_t> halves_of(const Floats& values) {
  Values<uint16_t> halves(values.size());
  std::transform(values.begin(), values.end(), halves.begin(), float_to_half);
  return halves;
}

// A span of tokens after `position` others, in a pass that begins with another token.
void check_index(const cuda::IndexHeads& heads, bool half, int position, int tokens, int top) {
  const int n = heads.dim, turned = heads.rope_dim / 2, first = 1, block = heads.block;
  const size_t room = align_up(position + tokens + block, kKeyBlock), all = first + tokens;
  const Floats q_norm = floats(n), k_norm = floats(n), frequency = floats(turned);
  Floats cos(room * turned), sin(room * turned);
  fill_rope(frequency, 1.0f, 0, int(room), cos.data(), sin.data());
  Floats q = floats(all * heads.heads * n), k = floats(all * n), keys = floats(room * n), states = floats(2 * n);
  Floats got_q = q, got_k = k, got_keys = keys, got_states = states;
  Values<uint16_t> halves = halves_of(keys), got_halves = halves;

  const auto turn = [&](float* x, const Floats& norm, int at) {
    kScalarKernels.rms_norm(x, norm.data(), kEps, x, n);
    rotate(x, &cos[size_t(at) * turned], &sin[size_t(at) * turned], turned, turned, heads.interleaved);
  };
  float* sum = &states[n];
  position ? void(std::copy_n(&states[0], n, sum)) : void(std::fill_n(sum, n, 0.0f));
  for (int t = 0; t < tokens; ++t) {
    const int at = position + t;
    for (int head = 0; head < heads.heads; ++head) turn(&q[(size_t(first + t) * heads.heads + head) * n], q_norm, at);
    if (at % block == 0) std::fill_n(sum, n, 0.0f);
    float* key = &k[size_t(first + t) * n];
    kScalarKernels.add_scaled(sum, key, 1.0f, n);
    if ((at + 1) % block) continue;
    for (int i = 0; i < n; ++i) key[i] = sum[i] / float(block);
    turn(key, k_norm, at + 1 - block);
    store_key(keys.data(), at / block, key, n);
    store_key(halves.data(), at / block, key, n);
  }
  const int most = top * block + block - 1;
  Floats scores(size_t(tokens) * room, 0.0f), of_head(room), got_scores = scores;
  Values<int32_t> chosen(all * most, -1), counts(all, -1), got_chosen = chosen, got_counts = counts;
  const KeyValues cache = {half ? static_cast<void*>(halves.data()) : keys.data(), nullptr, 0, half};
  for (int t = 0; t < tokens; ++t) {
    const int seen = position + t + 1, whole = seen / block;
    counts[first + t] = whole > top ? top * block + seen % block : 0;
    if (whole <= top) continue;
    float* its = &scores[t * room];
    for (int head = 0; head < heads.heads; ++head) {
      const float* query = &q[(size_t(first + t) * heads.heads + head) * n];
      kScalarKernels.attend_scores(&query, 1, cache, 0, whole, n, heads.scale, of_head.data(), 0);
      kScalarKernels.add_positive(its, of_head.data(), 1.0f, whole);
    }
    std::vector<int32_t> order(whole);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return its[a] > its[b]; });
    std::sort(order.begin(), order.begin() + top);
    int32_t* to = &chosen[size_t(first + t) * most];
    for (int i = 0; i < top; ++i)
      for (int j = 0; j < block; ++j) *to++ = order[i] * block + j;
    for (int at = whole * block; at < seen; ++at) *to++ = at;
  }

  const Values<int32_t> at = {position - first}, numbers = {position ? 0 : -1, 1};
  const cuda::IndexCache on_gpu = {half ? static_cast<void*>(got_halves.data()) : got_keys.data(), room, half};
  const cuda::Span span = {at.data(), first, tokens, position + tokens + 3};
  cuda::store_block_keys(got_q.data(), got_k.data(), {q_norm.data(), k_norm.data(), cos.data(), sin.data()}, heads,
                         on_gpu, {got_states.data(), size_t(n), numbers.data()}, span, nullptr);
  cuda::index_scores(got_q.data(), nullptr, heads, on_gpu, span, top, got_scores.data(), nullptr);
  cuda::choose_top(got_scores.data(), room, span, top, block, true, got_chosen.data(), got_counts.data(), nullptr);
  const std::string what = "index of blocks of " + std::to_string(block) + ", " + std::to_string(heads.heads) + " x " +
                           std::to_string(n) + ", " + std::to_string(tokens) + " tokens at " + std::to_string(position);
  compare(what + ", q", got_q, q);
  compare(what + ", state", got_states, states);
  if (half)
    compare(what + ", keys", got_halves, halves);
  else
    compare(what + ", keys", got_keys, keys);
  compare(what + ", scores", got_scores, scores);
  compare(what + ", chosen", got_chosen, chosen);
  compare(what + ", counts", got_counts, counts);
}

// Attention of some tokens, every second one to a choice of the positions, the others to all.
void check_attention(int query_heads, int kv_heads, int n, bool half, int position, int tokens) {
  const size_t room = align_up(position + tokens, kKeyBlock), row = size_t(query_heads) * n;
  const Floats keys = floats(kv_heads * room * n), values = floats(keys.size()), q = floats(tokens * row);
  const Values<uint16_t> half_keys = halves_of(keys), half_values = halves_of(values);
  Values<int32_t> chosen(size_t(tokens) * room, -1), counts(tokens, 0);
  for (int t = 0; t < tokens; t += 2) {
    for (int at = 0; at <= position + t; ++at)
      if (random_bits() % 3 == 0) chosen[t * room + counts[t]++] = at;
    if (!counts[t]) chosen[t * room] = 0, counts[t] = 1;
  }
  Floats want(tokens * row), got(want.size()), scores(size_t(tokens) * query_heads * room);
  for (int t = 0; t < tokens; ++t)
    for (int head = 0; head < query_heads; ++head) {
      const int kv_head = head / (query_heads / kv_heads), end = counts[t] ? counts[t] : position + t + 1;
      Floats its_keys(room * n), its_values(room * n);
      for (int i = 0; i < end; ++i) {
        const size_t at = size_t(counts[t] ? chosen[t * room + i] : i), of_head = kv_head * room * n;
        for (int d = 0; d < n; ++d) {
          const size_t key = of_head + at / kKeyBlock * n * kKeyBlock + size_t(d) * kKeyBlock + at % kKeyBlock;
          const size_t value = of_head + at * n + d, to = size_t(i) / kKeyBlock * n * kKeyBlock + i % kKeyBlock;
          its_keys[to + size_t(d) * kKeyBlock] = half ? half_to_float(half_keys[key]) : keys[key];
          its_values[size_t(i) * n + d] = half ? half_to_float(half_values[value]) : values[value];
        }
      }
      const KeyValues cache = {its_keys.data(), its_values.data(), size_t(n), false};
      const float* query = &q[t * row + size_t(head) * n];
      Floats weights(room), piece(n);
      float *out = &want[t * row + size_t(head) * n], *pieces = piece.data();
      std::fill_n(out, n, 0.0f);
      kScalarKernels.attend_scores(&query, 1, cache, 0, end, n, kScale, weights.data(), 0);
      kScalarKernels.softmax(weights.data(), 0, end, kNoSink);
      sum_positions(0, end, 1, n, &out, &pieces, [&](int from, int to, float* const* rows) {
        kScalarKernels.attend_values(weights.data(), 0, 1, cache, from, to, n, rows);
      });
    }
  cuda::Heads heads{};
  heads.heads = query_heads, heads.kv_heads = kv_heads, heads.head_dim = n, heads.softmax_scale = kScale;
  const cuda::LayerCache cache = {
      const_cast<void*>(half ? static_cast<const void*>(half_keys.data()) : keys.data()),
      const_cast<void*>(half ? static_cast<const void*>(half_values.data()) : values.data()), room, half, room};
  const Values<int32_t> at = {position};
  cuda::attend_chosen(q.data(), heads, cache, {at.data(), 0, tokens, position + tokens + 2},
                      {chosen.data(), counts.data(), int(room)}, scores.data(), got.data(), nullptr);
  compare("attention of " + std::to_string(query_heads) + " heads to a choice of " + std::to_string(position + tokens) +
              " positions",
          got, want);
}

}  // namespace

void check_sparse() {
  for (bool half : {true, false}) {
    for (auto [position, tokens] : {std::pair{0, 1}, std::pair{0, 70}, std::pair{37, 1}, std::pair{130, 50}}) {
      check_index({3, 16, 8, kEps, kScale, false, 4}, half, position, tokens, 8);
      check_index({9, 40, 20, kEps, kScale, true, 16}, half, position, tokens, 2);
    }
    for (auto [position, tokens] : {std::pair{0, 1}, std::pair{20, 9}, std::pair{300, 2}}) {
      check_attention(4, 2, 24, half, position, tokens);
      check_attention(20, 2, 136, half, position, tokens);
    }
  }
}
