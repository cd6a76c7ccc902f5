// Attention over latents (MLA), as in runtime/src/latent_attention.cpp: queries are transformed so that they apply to
// latents directly, and the weighted sum is over latents. The same over other rows that are key and value of all heads.
// scalar.cpp defines the bits.
#include "latent.h"
#include "values.cuh"

namespace edge_moe::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kHalves = kThreads / kLanes;  // half warps of a block; each takes one position at a time
constexpr int kPositions = 8 * kHalves;     // of a block
constexpr int kTokensAtOnce = 8;            // that share a loaded weight of kv_b
constexpr int kHeadsAtOnce = 8;             // that share a loaded latent
constexpr int kAhead = 8;                   // values that a thread loads at a time

// Each warp stores one head of one token, or the token's latent.
EDGE_MOE_KERNEL(kWarp)
store_latents_kernel(float* q, float* latents, const float* norm, const float* cos, const float* sin, LatentHeads heads,
                     LatentCache cache, Span span) {
  const int lane = int(threadIdx.x), half = heads.rope_dim / 2, head = int(blockIdx.x);
  const size_t token = size_t(span.first) + blockIdx.y, at = size_t(*span.position + int(token));
  const bool is_latent = head == heads.heads;
  float* x = is_latent ? latents + token * heads.cached() : q + (token * heads.heads + head) * heads.head_dim;
  float* turned = x + (is_latent ? heads.rank : heads.nope_dim());
  const int step = heads.interleaved ? 2 : 1, apart = heads.interleaved ? 1 : half;
  for (int i = lane; i < half; i += kWarp) {
    const float c = cos[at * half + i], s = sin[at * half + i], a = turned[i * step], b = turned[i * step + apart];
    turned[i * step] = a * c - b * s;
    turned[i * step + apart] = b * c + a * s;
  }
  if (!is_latent) return;
  __syncwarp();
  const float inverse = inverse_norm(x, heads.rank, heads.norm_eps);
  const size_t row = at * heads.cached();
  for (int i = lane; i < heads.cached(); i += kWarp)
    put(cache.latents, cache.half, row + i, i < heads.rank ? x[i] * inverse * norm[i] : x[i]);
}

// Each thread computes one column of kv_b's rows of one head, for some tokens.
EDGE_MOE_KERNEL(kThreads)
absorb_kernel(const float* q, Matrix kv_b, LatentHeads heads, Span span, float* absorbed) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  float* scaled = reinterpret_cast<float*>(shared);  // (kTokensAtOnce, head_dim)
  const int head = int(blockIdx.y), first = int(blockIdx.z) * kTokensAtOnce;
  const int count = span.count - first < kTokensAtOnce ? span.count - first : kTokensAtOnce;
  const int n = heads.head_dim, nope = heads.nope_dim(), i = int(blockIdx.x * kThreads + threadIdx.x);
  for (int at = int(threadIdx.x); at < kTokensAtOnce * n; at += kThreads) {
    const size_t token = size_t(span.first) + first + at / n;
    const float scale =
        heads.query_scales && at / n < count
            ? heads.softmax_scale * heads.query_scales[(*span.position + int(token)) / heads.query_context]
            : heads.softmax_scale;
    scaled[at] = at / n < count ? q[(token * heads.heads + head) * n + at % n] * scale : 0.0f;
  }
  __syncthreads();
  if (i >= heads.cached()) return;
  float sums[kTokensAtOnce] = {};
  if (i < heads.rank) {
    const size_t row = size_t(head) * (nope + heads.v_dim);
    EDGE_MOE_UNROLL_4
    for (int d = 0; d < nope; ++d) {
      const float weight = weight_at(kv_b, row + d, i);
      EDGE_MOE_UNROLL
      for (int t = 0; t < kTokensAtOnce; ++t) sums[t] = sums[t] + scaled[t * n + d] * weight;
    }
  } else {
    EDGE_MOE_UNROLL
    for (int t = 0; t < kTokensAtOnce; ++t) sums[t] = scaled[t * n + nope + i - heads.rank];
  }
  EDGE_MOE_UNROLL
  for (int t = 0; t < kTokensAtOnce; ++t)
    if (t < count) absorbed[((size_t(first) + t) * heads.heads + head) * heads.cached() + i] = sums[t];
}

// Each half warp computes one position at a time, for some heads of one token.
template <typename Rows>
EDGE_MOE_KERNEL(kThreads)
latent_scores_kernel(const float* absorbed, LatentHeads heads, LatentCache cache, Span span, Rows rows, float* scores) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  float* queries = reinterpret_cast<float*>(shared);  // (kHeadsAtOnce, cached)
  const int cols = heads.cached(), first = int(blockIdx.y) * kHeadsAtOnce, token = span.first + int(blockIdx.z);
  const int end = rows.count(token, end_of(span, int(blockIdx.z)));
  const auto seen = rows.seen(token, end_of(span, int(blockIdx.z)));
  const int count = heads.heads - first < kHeadsAtOnce ? heads.heads - first : kHeadsAtOnce;
  const size_t row = size_t(blockIdx.z) * heads.heads + first;
  const int begin = int(blockIdx.x) * kPositions, lane = int(threadIdx.x) % kLanes;
  if (begin >= end) return;
  for (int i = int(threadIdx.x); i < kHeadsAtOnce * cols; i += kThreads)
    queries[i] = i / cols < count ? absorbed[row * cols + i] : 0.0f;
  __syncthreads();
  for (int step = 0; step < kPositions; step += kHalves) {
    const int at = begin + step + int(threadIdx.x) / kLanes, there = at < end ? at : end - 1;
    const size_t from = seen[there];
    float sums[kHeadsAtOnce] = {};
    const int count_of_lane = (cols - lane + kLanes - 1) / kLanes;
    each_value<kAhead>(cache.latents, cache.half, from * cols + lane, kLanes, count_of_lane, [&](int i, float value) {
      EDGE_MOE_UNROLL
      for (int head = 0; head < kHeadsAtOnce; ++head)
        sums[head] = fmaf(value, queries[head * cols + lane + i * kLanes], sums[head]);
    });
    EDGE_MOE_UNROLL
    for (int head = 0; head < kHeadsAtOnce; ++head) {
      const float sum = fold_lanes(sums[head]);
      if (lane == 0 && at < end && head < count) scores[(row + head) * cache.positions + at] = sum;
    }
  }
}

// Each thread computes one value of the latents for some heads of one token; positions are added as in position_sums.h.
template <typename Rows>
EDGE_MOE_KERNEL(kThreads)
mix_kernel(const float* weights, LatentHeads heads, LatentCache cache, Span span, Rows rows, float* mixed) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x), first = int(blockIdx.y) * kHeadsAtOnce;
  if (i >= heads.rank) return;
  const int cols = heads.cached(), token = span.first + int(blockIdx.z);
  const int end = rows.count(token, end_of(span, int(blockIdx.z)));
  const auto seen = rows.seen(token, end_of(span, int(blockIdx.z)));
  const size_t row = size_t(blockIdx.z) * heads.heads + first;
  const int count = heads.heads - first < kHeadsAtOnce ? heads.heads - first : kHeadsAtOnce;
  for (int from = 0, to; from < end; from = to) {
    to = end_of_piece(from, end);
    float sums[kHeadsAtOnce] = {};
    const auto add = [&](int j, float value) {
      EDGE_MOE_UNROLL
      for (int head = 0; head < kHeadsAtOnce; ++head)
        sums[head] = fmaf(head < count ? weights[(row + head) * cache.positions + from + j] : 0.0f, value, sums[head]);
    };
    if (seen.consecutive())
      each_value<kAhead>(cache.latents, cache.half, size_t(from) * cols + i, cols, to - from, add);
    else
      each_of_rows<kAhead>(
          cache.latents, cache.half, [&](int j) { return seen[from + j]; }, size_t(cols), i, to - from, add);
    EDGE_MOE_UNROLL
    for (int head = 0; head < kHeadsAtOnce; ++head) {
      if (head >= count) continue;
      float* y = mixed + (row + head) * heads.rank + i;
      *y = from ? *y + sums[head] : sums[head];
    }
  }
}

template <typename Rows>
void mix_any(const float* queries, const float* sinks, int most, const LatentHeads& heads, const LatentCache& cache,
             const Span& span, const Rows& rows, float* scores, float* mixed, Stream stream) {
  const unsigned all = unsigned(span.count), parts = pieces(size_t(heads.heads), kHeadsAtOnce);
  EDGE_MOE_LAUNCH(latent_scores_kernel<Rows>, dim3(pieces(size_t(most), kPositions), parts, all), dim3(kThreads),
                  size_t(kHeadsAtOnce) * heads.cached() * sizeof(float), stream, queries, heads, cache, span, rows,
                  scores);
  Heads of_softmax{};
  of_softmax.heads = heads.heads, of_softmax.sinks = sinks;
  softmax(of_softmax, cache.positions, span, rows, scores, stream);
  EDGE_MOE_LAUNCH(mix_kernel<Rows>, dim3(pieces(size_t(heads.rank), kThreads), parts, all), dim3(kThreads), 0, stream,
                  scores, heads, cache, span, rows, mixed);
}

}  // namespace

void store_latents(float* q, float* latents, const float* norm, const float* cos, const float* sin,
                   const LatentHeads& heads, const LatentCache& cache, const Span& span, Stream stream) {
  EDGE_MOE_LAUNCH(store_latents_kernel, dim3(unsigned(heads.heads + 1), unsigned(span.count)), dim3(kWarp), 0, stream,
                  q, latents, norm, cos, sin, heads, cache, span);
}

void attend_latents(const float* q, const Matrix& kv_b, const LatentHeads& heads, const LatentCache& cache,
                    const Span& span, const Choice& choice, float* absorbed, float* scores, float* mixed,
                    Stream stream) {
  const unsigned blocks = pieces(unsigned(span.count), kTokensAtOnce);
  EDGE_MOE_LAUNCH(absorb_kernel, dim3(pieces(size_t(heads.cached()), kThreads), unsigned(heads.heads), blocks),
                  dim3(kThreads), size_t(kTokensAtOnce) * heads.head_dim * sizeof(float), stream, q, kv_b, heads, span,
                  absorbed);
  const int most = choice.positions && choice.most <= span.most ? choice.most : span.most + 1;
  mix_any(absorbed, nullptr, most, heads, cache, span, choice, scores, mixed, stream);
}

void mix_rows(const float* queries, const float* sinks, const LatentHeads& heads, const LatentCache& cache,
              const Span& span, const RowChoice& choice, float* scores, float* mixed, Stream stream) {
  const int end = span.most + 1, chosen = choice.compressed.positions ? choice.compressed.most : end;
  const int compressed = choice.rate ? end / choice.rate : 0;
  const int most = (compressed < chosen ? compressed : chosen) + (end < choice.window ? end : choice.window);
  mix_any(queries, sinks, most, heads, cache, span, choice, scores, mixed, stream);
}

}  // namespace edge_moe::cuda
