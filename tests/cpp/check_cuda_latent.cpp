// Attention over a latent against the steps of runtime/src/latent_attention.cpp by scalar.cpp.
#include <algorithm>

#include "../../devices/cuda/latent.h"
#include "../../devices/half.h"
#include "../../devices/position_sums.h"
#include "../../runtime/src/rope.h"
#include "check_cuda.h"

namespace {

constexpr int kGrowing = 50;  // positions with one scale of queries

struct Shape {
  int heads, nope_dim, rope_dim, v_dim, rank, width, group;
  bool half, interleaved;
  bool grows = false;  // queries by position
  int top = 0;         // positions that are chosen for a token that sees more; 0: all
};

// Queries of one head against latents: keys^T q, and beside them their part with position.
Floats absorbed_by(const Shape& s, const Matrix& kv_b, const float* q, int head, float scale) {
  Floats out(size_t(s.rank) + s.rope_dim, 0.0f), row(static_cast<size_t>(s.rank));
  for (int d = 0; d < s.nope_dim; ++d) {
    kScalarKernels.dequantise_row(kv_b, head * (s.nope_dim + s.v_dim) + d, row.data());
    kScalarKernels.add_scaled(out.data(), row.data(), q[d] * scale, s.rank);
  }
  for (int i = 0; i < s.rope_dim; ++i) out[s.rank + i] = q[s.nope_dim + i] * scale;
  return out;
}

void check_attention(const Shape& s, int position, int tokens) {
  const int head_dim = s.nope_dim + s.rope_dim, cached = s.rank + s.rope_dim, turned = s.rope_dim / 2;
  const size_t room = align_up(position + tokens, kKeyBlock);
  const float scale = 0.11f;
  const Floats frequency = floats(turned), norm = floats(s.rank);
  Floats cos(room * turned), sin(room * turned);
  fill_rope(frequency, 1.0f, 0, int(room), cos.data(), sin.data());
  const int rows = s.heads * (s.nope_dim + s.v_dim);
  const Packed packed(rows, s.rank, s.width < 16 ? s.width : 8, s.group);
  const Floats values = floats(size_t(rows) * s.rank);
  Matrix kv_b = packed.matrix;
  if (s.width == 32) kv_b = float_matrix(values.data(), kv_b.rows, kv_b.cols);

  Floats latents(room * cached), q = floats(size_t(tokens) * s.heads * head_dim),
                                 fresh = floats(size_t(tokens) * cached);
  Values<uint16_t> halves(latents.size()), got_halves;
  for (size_t i = 0; i < size_t(position) * cached; ++i) {
    halves[i] = float_to_half(floats(1)[0]);
    latents[i] = half_to_float(halves[i]);
  }
  got_halves = halves;
  Floats got_latents = latents, got_q = q, got_fresh = fresh;

  for (int t = 0; t < tokens; ++t) {
    const size_t at = size_t(position) + t;
    float* latent = &fresh[size_t(t) * cached];
    for (int head = 0; head < s.heads; ++head)
      rotate(&q[(size_t(t) * s.heads + head) * head_dim + s.nope_dim], &cos[at * turned], &sin[at * turned], turned,
             turned, s.interleaved);
    rotate(latent + s.rank, &cos[at * turned], &sin[at * turned], turned, turned, s.interleaved);
    kScalarKernels.rms_norm(latent, norm.data(), 1e-6f, latent, s.rank);
    for (int i = 0; i < cached; ++i) {
      halves[at * cached + i] = float_to_half(latent[i]);
      latents[at * cached + i] = s.half ? half_to_float(halves[at * cached + i]) : latent[i];
    }
  }
  Floats growth(room / kGrowing + 1);
  for (size_t i = 0; i < growth.size(); ++i) growth[i] = 1.0f + 0.3f * float(i);
  Values<int32_t> chosen(size_t(tokens) * s.top), counts(tokens, 0);
  Floats gathered(latents.size());
  const auto choose = [&](int t) {  // every second or third position
    counts[t] = s.top;
    for (int i = 0; i < s.top; ++i) {
      chosen[size_t(t) * s.top + i] = i * (position + t + 1) / s.top;
      std::copy_n(&latents[size_t(chosen[size_t(t) * s.top + i]) * cached], cached, &gathered[size_t(i) * cached]);
    }
  };
  Floats scores(room), piece(s.rank), want(size_t(tokens) * s.heads * s.rank, 0.0f), got(want.size(), NAN);
  for (int t = 0; t < tokens; ++t) {
    const bool is_sparse = s.top && position + t + 1 > s.top;
    if (is_sparse) choose(t);
    const Floats& seen = is_sparse ? gathered : latents;
    for (int head = 0; head < s.heads; ++head) {
      const size_t query = size_t(t) * s.heads + head;
      const float grown = s.grows ? scale * growth[(position + t) / kGrowing] : scale;
      const Floats absorbed = absorbed_by(s, kv_b, &q[query * head_dim], head, grown);
      const Matrix keys = float_matrix(seen.data(), is_sparse ? s.top : position + t + 1, cached);
      Activations x;
      x.values = absorbed.data(), x.count = 1, x.cols = cached;
      kScalarKernels.matmul(keys, x, scores.data(), 0, 0, keys.rows);
      kScalarKernels.softmax(scores.data(), 0, keys.rows, kNoSink);
      float *sum = &want[query * s.rank], *into = piece.data();
      sum_positions(0, keys.rows, 1, s.rank, &sum, &into, [&](int from, int to, float* const* sums) {
        kScalarKernels.attend_values(&scores[from], 0, 1,
                                     {nullptr, &seen[size_t(from) * cached], size_t(cached), false}, 0, to - from,
                                     s.rank, sums);
      });
    }
  }

  const Values<int32_t> at = {position};
  cuda::LatentHeads heads = {s.heads, head_dim, s.rope_dim, s.v_dim, s.rank, 1e-6f, scale, s.interleaved, nullptr, 1};
  if (s.grows) heads.query_scales = growth.data(), heads.query_context = kGrowing;
  const cuda::LatentCache cache = {s.half ? static_cast<void*>(got_halves.data()) : got_latents.data(), room, s.half};
  const auto span = [&](int first, int count) { return cuda::Span{at.data(), first, count, position + first + count}; };
  cuda::store_latents(got_q.data(), got_fresh.data(), norm.data(), cos.data(), sin.data(), heads, cache,
                      span(0, tokens), nullptr);
  const Choice choice = s.top ? Choice{chosen.data(), counts.data(), s.top} : Choice{};
  Floats absorbed(size_t(tokens) * s.heads * cached), room_for_scores(size_t(tokens) * s.heads * room);
  for (int first = 0; first < tokens; first += 11)
    cuda::attend_latents(got_q.data(), kv_b, heads, cache, span(first, std::min(11, tokens - first)), choice,
                         absorbed.data(), room_for_scores.data(), &got[size_t(first) * s.heads * s.rank], nullptr);
  const std::string what = std::to_string(s.heads) + " heads, rank " + std::to_string(s.rank) + ", " +
                           std::to_string(s.width) + " bits, " + std::to_string(tokens) + " tokens at " +
                           std::to_string(position) + (s.top ? ", a choice of " + std::to_string(s.top) : "");
  compare(what + ", q", got_q, q);
  if (s.half)
    compare(what + ", latents", got_halves, halves);
  else
    compare(what + ", latents", got_latents, latents);
  compare(what + ", mixed", got, want);
}

}  // namespace

void check_latent() {
  for (auto [position, tokens] : {std::pair{0, 1}, std::pair{3, 14}, std::pair{150, 1}, std::pair{60, 12}}) {
    check_attention({3, 16, 8, 16, 64, 4, 32, true, true}, position, tokens);
    check_attention({9, 32, 16, 24, 96, 3, 32, false, false}, position, tokens);
    check_attention({8, 16, 32, 16, 128, 32, 64, true, true}, position, tokens);
    check_attention({3, 16, 8, 16, 64, 4, 32, true, true, true}, position, tokens);
    check_attention({9, 16, 8, 16, 64, 4, 32, true, true, false, 10}, position, tokens);
    check_attention({3, 16, 8, 16, 64, 32, 32, false, true, false, 67}, position, tokens);
  }
  for (auto [position, tokens] : {std::pair{2 * kSumPositions, 1}, std::pair{kSumPositions - 5, 12}})
    check_attention({2, 16, 8, 16, 32, 4, 32, true, true}, position, tokens);
}
