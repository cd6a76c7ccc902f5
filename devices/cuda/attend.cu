// Attention with keys and values for each KV head; scalar.cpp defines the bits.
//
// The order of sums does not depend on the length of the context, so a long context is split over positions and
// dimensions, not over parts of a sum. Queries of one KV head, from the heads that share it and from neighbouring
// tokens, are processed together; for one token alone the heads are split up if that occupies more of the GPU.
#include "batch.h"
#include "lanes.cuh"
#include "layer.h"
#include "values.cuh"

namespace edge_moe::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPrefillQueries = 16;  // at a time
constexpr int kDecodeQueries = 8;    // whose scores are computed at a time
constexpr int kTile = 32;            // positions whose weights are in shared memory
constexpr int kAhead = 64;           // positions whose values a thread loads at a time

__device__ __forceinline__ int first_seen(const Heads& heads, int end) {
  return heads.sliding_window && end > heads.sliding_window ? end - heads.sliding_window : 0;
}

// Queries of one KV head: from some of the heads that share it, for some tokens of a span.
struct Queries {
  int kv_head, first_head, heads, first_token, tokens, heads_at_once;

  EDGE_MOE_BOTH int token(int query) const { return first_token + query / heads_at_once; }
  EDGE_MOE_BOTH bool has(int query) const { return query / heads_at_once < tokens && query % heads_at_once < heads; }
  // The row of a query's scores in (span.count, heads).
  EDGE_MOE_BOTH size_t row(int query, int all_heads) const {
    return size_t(token(query)) * all_heads + first_head + query % heads_at_once;
  }
};

// How many heads of a KV head a block takes. Grids have KV heads and groups of heads in y, tokens in z.
EDGE_MOE_BOTH inline int heads_at_once(const Heads& heads, int most) {
  const int shared_by = heads.heads / heads.kv_heads;
  return shared_by < most ? shared_by : most;
}

dim3 grid_of(const Heads& heads, const Span& span, size_t blocks, int most) {
  const int at_once = heads_at_once(heads, most);
  const unsigned parts = pieces(size_t(heads.heads / heads.kv_heads), at_once);
  return dim3(unsigned(blocks), heads.kv_heads * parts, pieces(size_t(span.count), most / at_once));
}

__device__ __forceinline__ Queries queries_of(const Heads& heads, const Span& span, int most) {
  const int shared_by = heads.heads / heads.kv_heads, at_once = heads_at_once(heads, most);
  const int parts = (shared_by + at_once - 1) / at_once, tokens_at_once = most / at_once;
  const int kv_head = int(blockIdx.y) / parts, part = int(blockIdx.y) % parts * at_once;
  const int first = int(blockIdx.z) * tokens_at_once;
  return {kv_head,
          kv_head * shared_by + part,
          shared_by - part < at_once ? shared_by - part : at_once,
          first,
          span.count - first < tokens_at_once ? span.count - first : tokens_at_once,
          at_once};
}

// Each thread computes one position, for all queries of a block.
template <int Most, int Ahead>
EDGE_MOE_KERNEL(kThreads)
scores_kernel(const float* q, Heads heads, LayerCache cache, Span span, float* scores) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);  // (head_dim, Most)
  const Queries queries = queries_of(heads, span, Most);
  const int n = heads.head_dim, at = int(blockIdx.x) * kThreads + int(threadIdx.x);
  const int begin = first_seen(heads, end_of(span, queries.first_token));
  const int end = end_of(span, queries.first_token + queries.tokens - 1);
  if (int(blockIdx.x) * kThreads >= end || (int(blockIdx.x) + 1) * kThreads <= begin) return;
  for (int i = int(threadIdx.x); i < Most * n; i += kThreads) {
    const int query = i / n, d = i % n;
    const size_t row = queries.row(query, heads.heads) + size_t(span.first) * heads.heads;
    values[d * Most + query] = queries.has(query) ? q[row * n + d] : 0.0f;
  }
  __syncthreads();
  if (at >= end) return;
  const int place = at % int(cache.places);
  const size_t key =
      size_t(queries.kv_head) * cache.places * n + size_t(place / kKeyBlock) * n * kKeyBlock + place % kKeyBlock;
  float sums[Most] = {};
  each_value<Ahead>(cache.keys, cache.half, key, kKeyBlock, n, [&](int d, float value) {
    EDGE_MOE_UNROLL
    for (int query = 0; query < Most; ++query) sums[query] = fmaf(values[d * Most + query], value, sums[query]);
  });
  EDGE_MOE_UNROLL
  for (int query = 0; query < Most; ++query)
    if (queries.has(query))
      scores[queries.row(query, heads.heads) * cache.positions + at] = heads.softmax_scale * sums[query];
}

// Each block computes one head of one token.
template <typename Rows>
EDGE_MOE_KERNEL(kThreads)
softmax_kernel(Heads heads, size_t positions, Span span, Rows choice, float* scores) {
  __shared__ float of_warps[kWarps];
  __shared__ float total;
  float* x = scores + (size_t(blockIdx.y) * heads.heads + blockIdx.x) * positions;
  const int token = int(blockIdx.y), thread = int(threadIdx.x);
  const int end = choice.count(span.first + token, end_of(span, token)), begin = first_seen(heads, end);
  float top = x[begin];
  EDGE_MOE_UNROLL_4
  for (int i = begin + thread; i < end; i += kThreads) top = x[i] > top ? x[i] : top;
  top = warp_top(top);
  if (thread % kWarp == 0) of_warps[thread / kWarp] = top;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) top = of_warps[warp] > top ? of_warps[warp] : top;
  const float sink = heads.sinks ? heads.sinks[blockIdx.x] : kNoSink;
  top = sink > top ? sink : top;
  for (int i = begin + thread; i < end; i += kThreads) x[i] = exp_lane(x[i] - top);
  __syncthreads();
  if (thread < kWarp) {  // lanes follow the absolute position
    float sum = 0.0f;
    int i = begin / kLanes * kLanes + thread % kLanes;
    if (i < begin) i += kLanes;
    EDGE_MOE_UNROLL_8
    for (; i < end; i += kLanes) sum = sum + x[i];
    sum = fold_lanes(sum);
    if (thread == 0) total = sum + exp_lane(sink - top);
  }
  __syncthreads();
  const float inverse = 1.0f / total;
  for (int i = begin + thread; i < end; i += kThreads) x[i] = x[i] * inverse;
}

// Each thread computes one dimension of one head of one token; positions are added as in position_sums.h.
EDGE_MOE_KERNEL(kThreads)
value_kernel(const float* weights, Heads heads, LayerCache cache, Span span, float* attended) {
  __shared__ float tile[kAhead];
  const int thread = int(threadIdx.x), n = heads.head_dim, head = int(blockIdx.y), end = end_of(span, 0);
  const int d = int(blockIdx.x) * kThreads + thread, column = d < n ? d : 0, begin = first_seen(heads, end);
  const size_t room = size_t(head / (heads.heads / heads.kv_heads)) * cache.places * n + column;
  const float* weight = weights + size_t(head) * cache.positions;
  float total = 0.0f;
  for (int from = begin, to; from < end; from = to) {
    to = end_of_piece(from, end);
    float sum = 0.0f;
    for (int first = from, count; first < to; first += count) {
      const int left = cache.end_of_run(first, to) - first, place = first % int(cache.places);
      count = left < kAhead ? left : kAhead;
      Raw<kAhead> values;
      if (count == kAhead) values.load(cache.values, cache.half, room + size_t(place) * n, n);
      __syncthreads();
      if (thread < count) tile[thread] = weight[first + thread];
      __syncthreads();
      if (count == kAhead) {
        EDGE_MOE_UNROLL
        for (int i = 0; i < kAhead; ++i) sum = fmaf(tile[i], values.as_float(i), sum);
      } else {
        EDGE_MOE_UNROLL_8
        for (int i = 0; i < count; ++i)
          sum = fmaf(tile[i], get(cache.values, cache.half, room + size_t(place + i) * n), sum);
      }
    }
    total = from == begin ? sum : total + sum;
  }
  if (d < n) attended[(size_t(span.first) * heads.heads + head) * n + d] = total;
}

// The same for all queries of a block at once. If a query does not see a position that others see, its weight is zero,
// which leaves the sum unchanged while values are finite: no sum is the negative zero that adding zero would change.
EDGE_MOE_KERNEL(kThreads)
values_kernel(const float* weights, Heads heads, LayerCache cache, Span span, float* attended) {
  __shared__ float tile[kTile * kPrefillQueries];  // (positions, queries)
  const Queries queries = queries_of(heads, span, kPrefillQueries);
  const int n = heads.head_dim, thread = int(threadIdx.x), d = int(blockIdx.x) * kThreads + thread;
  const int begin = first_seen(heads, end_of(span, queries.first_token));
  const int end = end_of(span, queries.first_token + queries.tokens - 1);
  const size_t room = size_t(queries.kv_head) * cache.places * n + (d < n ? d : 0);
  float sums[kPrefillQueries] = {};
  auto keep = [&](bool more) {  // adds the sums of a piece to the result
    if (d >= n) return;
    EDGE_MOE_UNROLL
    for (int query = 0; query < kPrefillQueries; ++query) {
      if (!queries.has(query)) continue;
      float* y = attended + (queries.row(query, heads.heads) + size_t(span.first) * heads.heads) * n + d;
      *y = more ? *y + sums[query] : sums[query];
      sums[query] = 0.0f;
    }
  };
  bool more = false;
  const auto count_of = [&](int first) {
    const int stop = cache.end_of_run(first, end_of_piece(first, end));
    return stop - first < kTile ? stop - first : kTile;
  };
  const auto is_whole = [&](int first) { return first < end && count_of(first) == kTile; };
  Raw<kTile> values, next;  // the next tile is loaded while this one is added
  const auto load = [&](int first) {
    if (is_whole(first)) next.load(cache.values, cache.half, room + size_t(first % int(cache.places)) * n, n);
  };
  load(begin);
  for (int first = begin, count; first < end; first += count) {
    count = count_of(first);
    values = next;
    load(first + count);
    __syncthreads();
    for (int i = thread; i < kTile * kPrefillQueries; i += kThreads) {
      const int query = i / kTile, at = first + i % kTile, seen = end_of(span, queries.token(query));
      const bool sees = queries.has(query) && at < seen && at >= first_seen(heads, seen);
      tile[i % kTile * kPrefillQueries + query] =
          sees ? weights[queries.row(query, heads.heads) * cache.positions + at] : 0.0f;
    }
    __syncthreads();
    const auto add = [&](int i, float value) {
      EDGE_MOE_UNROLL
      for (int query = 0; query < kPrefillQueries; ++query)
        sums[query] = fmaf(tile[i * kPrefillQueries + query], value, sums[query]);
    };
    if (count == kTile) {
      EDGE_MOE_UNROLL
      for (int i = 0; i < kTile; ++i) add(i, values.as_float(i));
    } else {
      const size_t place = first % int(cache.places);
      for (int i = 0; i < count; ++i) add(i, get(cache.values, cache.half, room + (place + i) * n));
    }
    if (first + count == end_of_piece(first, end)) keep(more), more = true;
  }
}

// Each thread computes one token of the pass and one head; tokens of the span are added in order.
EDGE_MOE_KERNEL(kThreads)
received_kernel(const float* scores, Heads heads, size_t positions, Span span, float* received, size_t stride) {
  const int token = int(blockIdx.x * kThreads + threadIdx.x), head = int(blockIdx.y), at = *span.position + token;
  if (token >= span.first + span.count) return;
  float sum = token < span.first ? received[head * stride + token] : 0.0f;  // the sum over earlier spans
  for (int from = 0; from < span.count; ++from) {
    const int end = end_of(span, from);
    if (first_seen(heads, end) <= at && at < end)
      sum = sum + scores[(size_t(from) * heads.heads + head) * positions + at];
  }
  received[head * stride + token] = sum;
}

// Each thread computes one token: the sums are in double and in a fixed order.
EDGE_MOE_KERNEL(kWarp)
importance_kernel(const float* normed, const float* received, size_t stride, int heads, int tokens, int dim,
                  float* of_tokens) {
  const int token = int(blockIdx.x * kWarp + threadIdx.x);
  if (token >= tokens) return;
  double norm = 0, sum = 0;
  for (int i = 0; i < dim; ++i) norm += double(fabsf(normed[size_t(token) * dim + i]));
  for (int head = 0; head < heads; ++head) sum += double(received[head * stride + token]);
  of_tokens[token] = float(norm * sum / heads / (tokens - token));
}

}  // namespace

void softmax(const Heads& heads, size_t positions, const Span& span, const Choice& choice, float* scores,
             Stream stream) {
  EDGE_MOE_LAUNCH(softmax_kernel<Choice>, dim3(unsigned(heads.heads), unsigned(span.count)), dim3(kThreads), 0, stream,
                  heads, positions, span, choice, scores);
}

void softmax(const Heads& heads, size_t positions, const Span& span, const RowChoice& choice, float* scores,
             Stream stream) {
  EDGE_MOE_LAUNCH(softmax_kernel<RowChoice>, dim3(unsigned(heads.heads), unsigned(span.count)), dim3(kThreads), 0,
                  stream, heads, positions, span, choice, scores);
}

template <int Most, int Ahead>
static void scores(const float* q, const Heads& heads, const LayerCache& cache, const Span& span, float* scores,
                   Stream stream) {
  EDGE_MOE_LAUNCH((scores_kernel<Most, Ahead>), grid_of(heads, span, pieces(size_t(span.most) + 1, kThreads), Most),
                  dim3(kThreads), size_t(Most) * heads.head_dim * sizeof(float), stream, q, heads, cache, span, scores);
}

void attend(const float* q, const Heads& heads, const LayerCache& cache, const Span& span, float* scores,
            float* attended, Stream stream) {
  const unsigned blocks = pieces(size_t(heads.head_dim), kThreads);
  (span.count == 1 ? cuda::scores<kDecodeQueries, 32> : cuda::scores<kPrefillQueries, 16>)(q, heads, cache, span,
                                                                                           scores, stream);
  softmax(heads, cache.positions, span, Choice{}, scores, stream);
  if (span.count == 1)
    EDGE_MOE_LAUNCH(value_kernel, dim3(blocks, unsigned(heads.heads)), dim3(kThreads), 0, stream, scores, heads, cache,
                    span, attended);
  else
    EDGE_MOE_LAUNCH(values_kernel, grid_of(heads, span, blocks, kPrefillQueries), dim3(kThreads), 0, stream, scores,
                    heads, cache, span, attended);
}

void add_received(const float* scores, const Heads& heads, size_t positions, const Span& span, float* received,
                  size_t stride, Stream stream) {
  EDGE_MOE_LAUNCH(received_kernel, dim3(pieces(span.first + span.count, kThreads), unsigned(heads.heads)),
                  dim3(kThreads), 0, stream, scores, heads, positions, span, received, stride);
}

void importance(const float* normed, const float* received, size_t stride, int heads, int tokens, int dim,
                float* of_tokens, Stream stream) {
  EDGE_MOE_LAUNCH(importance_kernel, dim3(pieces(tokens, kWarp)), dim3(kWarp), 0, stream, normed, received, stride,
                  heads, tokens, dim, of_tokens);
}

}  // namespace edge_moe::cuda
