// The indexer of sparse attention against the steps of runtime/src/indexer.cpp by scalar.cpp, and the choice of
// positions against a stable sort.
#include <numeric>
#include <tuple>

#include "../../devices/cuda/index.h"
#include "../../runtime/src/key_block.h"
#include "../../runtime/src/rope.h"
#include "check_cuda.h"

namespace {

constexpr float kEps = 1e-6f, kScale = 0.3f;

void check_scores(const cuda::IndexHeads& heads, bool half, int position, int tokens, int top) {
  const int n = heads.dim, turned = heads.rope_dim / 2;
  const size_t room = align_up(position + tokens, kKeyBlock), values = room * n;
  const Floats norm = floats(n), norm_bias = floats(n), frequency = floats(turned);
  Floats cos(room * turned), sin(room * turned);
  fill_rope(frequency, 1.0f, 0, int(room), cos.data(), sin.data());
  Floats q = floats(size_t(tokens) * heads.heads * n), k = floats(size_t(tokens) * n), keys = floats(values);
  const Floats weights = floats(size_t(tokens) * heads.heads);
  Values<uint16_t> halves(values);
  std::transform(keys.begin(), keys.end(), halves.begin(), float_to_half);
  Floats got_q = q, got_k = k, got_keys = keys;
  Values<uint16_t> got_halves = halves;

  Floats want(size_t(tokens) * room, 0.0f), of_head(room);
  for (int t = 0; t < tokens; ++t) {
    const size_t at = size_t(position) + t;
    const float *c = &cos[at * turned], *s = &sin[at * turned];
    for (int head = 0; head < heads.heads; ++head)
      rotate(&q[(size_t(t) * heads.heads + head) * n], c, s, turned, turned, heads.interleaved);
    float* key = &k[size_t(t) * n];
    kScalarKernels.layer_norm(key, norm.data(), norm_bias.data(), kEps, key, n);
    rotate(key, c, s, turned, turned, heads.interleaved);
    store_key(halves.data(), at, key, n);
    store_key(keys.data(), at, key, n);
  }
  const KeyValues cache = {half ? static_cast<void*>(halves.data()) : keys.data(), nullptr, 0, half};
  for (int t = 0; t < tokens; ++t) {
    const int end = position + t + 1;
    for (int head = 0; head < heads.heads && end > top; ++head) {
      const size_t row = size_t(t) * heads.heads + head;
      const float* query = &q[row * n];
      kScalarKernels.attend_scores(&query, 1, cache, 0, end, n, heads.scale, of_head.data(), 0);
      kScalarKernels.add_positive(&want[t * room], of_head.data(), weights[row], end);
    }
  }

  const Values<int32_t> at = {position};
  const cuda::IndexCache on_gpu = {half ? static_cast<void*>(got_halves.data()) : got_keys.data(), room, half};
  const cuda::Span span = {at.data(), 0, tokens, position + tokens + 3};
  Floats got(want.size(), 0.0f);
  cuda::store_index_keys(got_q.data(), got_k.data(), norm.data(), norm_bias.data(), cos.data(), sin.data(), heads,
                         on_gpu, span, nullptr);
  cuda::index_scores(got_q.data(), weights.data(), heads, on_gpu, span, top, got.data(), nullptr);
  const std::string what = "indexer of " + std::to_string(heads.heads) + " x " + std::to_string(n) + ", " +
                           std::to_string(tokens) + " tokens at " + std::to_string(position);
  compare(what + ", q", got_q, q);
  if (half)
    compare(what + ", keys", got_halves, halves);
  else
    compare(what + ", keys", got_keys, keys);
  compare(what + ", scores", got, want);
}

// different: how many values the scores have; the fewer, the more ties.
void check_choice(int position, int tokens, int top, int different) {
  const size_t room = align_up(position + tokens, kKeyBlock);
  Floats scores = floats(size_t(tokens) * room);
  for (float& score : scores)
    if (different) score = std::trunc(score * float(different));
  Values<int32_t> want(size_t(tokens) * top, -1), got = want, counts(tokens, 0), got_counts(tokens, -1);
  for (int t = 0; t < tokens; ++t) {
    if (position + t + 1 <= top) continue;
    std::vector<int32_t> order(size_t(position) + t + 1);
    std::iota(order.begin(), order.end(), 0);
    const float* its = &scores[t * room];
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return its[a] > its[b]; });
    std::sort(order.begin(), order.begin() + top);
    std::copy_n(order.begin(), top, &want[size_t(t) * top]);
    counts[t] = top;
  }
  const Values<int32_t> at = {position};
  cuda::choose_top(scores.data(), room, {at.data(), 0, tokens, position + tokens}, top, 1, true, got.data(),
                   got_counts.data(), nullptr);
  const std::string what = std::to_string(top) + " of " + std::to_string(position + 1) + " positions, " +
                           std::to_string(different) + " values";
  compare(what, got, want);
  compare(what + ", counts", got_counts, counts);
}

}  // namespace

void check_index() {
  for (bool half : {true, false})
    for (auto [position, tokens] : {std::pair{0, 1}, std::pair{3, 14}, std::pair{150, 1}, std::pair{260, 12}}) {
      check_scores({3, 16, 8, kEps, kScale, true, 1}, half, position, tokens, 8);
      check_scores({19, 40, 40, kEps, kScale, false, 1}, half, position, tokens, 5);
      check_scores({8, 28, 12, kEps, kScale, false, 1}, half, position, tokens, 266);
    }
  for (int different : {0, 1, 3, 40})
    for (auto [position, tokens, top] : {std::tuple{0, 20, 7}, std::tuple{700, 3, 1}, std::tuple{5000, 2, 2048}})
      check_choice(position, tokens, top, different);
}
