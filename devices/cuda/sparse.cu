// Block-sparse attention, as in runtime/src/indexer.cpp and attention.cpp; scalar.cpp defines the bits.
#include "sparse.h"
#include "values.cuh"

namespace edge_moe::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kHeadsAtOnce = 8;  // of one KV head, that share a loaded key or value
constexpr int kAhead = 16;       // values that a thread loads at a time

// The norm and the rotation of a vector, by a warp.
__device__ __forceinline__ void norm_and_turn(float* x, const float* norm, const BlockIndex& index,
                                              const IndexHeads& heads, int position) {
  const int lane = int(threadIdx.x), half = heads.rope_dim / 2;
  __syncwarp();
  const float inverse = inverse_norm(x, heads.dim, heads.norm_eps);
  __syncwarp();
  for (int i = lane; i < heads.dim; i += kWarp) x[i] = x[i] * inverse * norm[i];
  __syncwarp();
  const int step = heads.interleaved ? 2 : 1, apart = heads.interleaved ? 1 : half;
  for (int i = lane; i < half; i += kWarp) {
    const size_t at = size_t(position) * half + i;
    const float c = index.cos[at], s = index.sin[at], a = x[i * step], b = x[i * step + apart];
    x[i * step] = a * c - b * s;
    x[i * step + apart] = b * c + a * s;
  }
  __syncwarp();
}

EDGE_MOE_KERNEL(kWarp) block_queries_kernel(float* q, BlockIndex index, IndexHeads heads, Span span) {
  const size_t token = size_t(span.first) + blockIdx.y;
  norm_and_turn(q + (token * heads.heads + blockIdx.x) * heads.dim, index.q_norm, index, heads,
                *span.position + int(token));
}

// One warp takes a span's keys one after the other.
EDGE_MOE_KERNEL(kWarp)
block_keys_kernel(float* k, BlockIndex index, IndexHeads heads, IndexCache cache, StateBuffers states, Span span) {
  const int lane = int(threadIdx.x), n = heads.dim;
  const float* before = states.before();
  float* sum = states.after();
  for (int i = lane; i < n; i += kWarp) sum[i] = before ? before[i] : 0.0f;
  for (int t = span.first; t < span.first + span.count; ++t) {
    const int position = *span.position + t;
    float* key = k + size_t(t) * n;
    for (int i = lane; i < n; i += kWarp) sum[i] = (position % heads.block ? sum[i] : 0.0f) + key[i];
    if ((position + 1) % heads.block) continue;
    for (int i = lane; i < n; i += kWarp) key[i] = sum[i] / float(heads.block);
    norm_and_turn(key, index.k_norm, index, heads, position + 1 - heads.block);
    const size_t block = position / heads.block, place = block / kKeyBlock * n * kKeyBlock + block % kKeyBlock;
    for (int i = lane; i < n; i += kWarp) put(cache.keys, cache.half, place + size_t(i) * kKeyBlock, key[i]);
  }
}

// Some heads of one KV head, for one token of a span. Grids have KV heads and groups of heads in y, tokens in z.
struct Group {
  int kv_head, first_head, count, token, end;
  const int32_t* chosen;
};

EDGE_MOE_BOTH inline int parts_of(const Heads& heads) {
  return (heads.heads / heads.kv_heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
}

__device__ __forceinline__ Group group_of(const Heads& heads, const Span& span, const Choice& choice) {
  const int shared_by = heads.heads / heads.kv_heads, parts = parts_of(heads);
  const int kv_head = int(blockIdx.y) / parts, part = int(blockIdx.y) % parts * kHeadsAtOnce;
  const int token = span.first + int(blockIdx.z);
  return {kv_head,
          kv_head * shared_by + part,
          shared_by - part < kHeadsAtOnce ? shared_by - part : kHeadsAtOnce,
          token,
          choice.count(token, end_of(span, int(blockIdx.z))),
          choice.of(token)};
}

// Each thread computes one position.
EDGE_MOE_KERNEL(kThreads)
chosen_scores_kernel(const float* q, Heads heads, LayerCache cache, Span span, Choice choice, float* scores) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);  // (head_dim, kHeadsAtOnce)
  const Group group = group_of(heads, span, choice);
  const int n = heads.head_dim, at = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (int(blockIdx.x) * kThreads >= group.end) return;
  for (int i = int(threadIdx.x); i < kHeadsAtOnce * n; i += kThreads) {
    const size_t row = size_t(group.token) * heads.heads + group.first_head + i / n;
    values[i % n * kHeadsAtOnce + i / n] = i / n < group.count ? q[row * n + i % n] : 0.0f;
  }
  __syncthreads();
  if (at >= group.end) return;
  const int place = group.chosen ? group.chosen[at] : at;
  const size_t key =
      size_t(group.kv_head) * cache.places * n + size_t(place / kKeyBlock) * n * kKeyBlock + place % kKeyBlock;
  float sums[kHeadsAtOnce] = {};
  each_value<kAhead>(cache.keys, cache.half, key, kKeyBlock, n, [&](int d, float value) {
    EDGE_MOE_UNROLL
    for (int head = 0; head < kHeadsAtOnce; ++head)
      sums[head] = fmaf(values[d * kHeadsAtOnce + head], value, sums[head]);
  });
  EDGE_MOE_UNROLL
  for (int head = 0; head < kHeadsAtOnce; ++head)
    if (head < group.count)
      scores[(size_t(blockIdx.z) * heads.heads + group.first_head + head) * cache.positions + at] =
          heads.softmax_scale * sums[head];
}

// Each thread computes one dimension; positions are added as in position_sums.h.
EDGE_MOE_KERNEL(kThreads)
chosen_values_kernel(const float* weights, Heads heads, LayerCache cache, Span span, Choice choice, float* attended) {
  const Group group = group_of(heads, span, choice);
  const int n = heads.head_dim, d = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (d >= n) return;
  const size_t room = size_t(group.kv_head) * cache.places * n,
               row = size_t(blockIdx.z) * heads.heads + group.first_head;
  const void* values = static_cast<const uint8_t*>(cache.values) + room * (cache.half ? 2 : 4);
  float totals[kHeadsAtOnce] = {};
  for (int from = 0, to; from < group.end; from = to) {
    to = end_of_piece(from, group.end);
    float sums[kHeadsAtOnce] = {};
    const auto add = [&](int j, float value) {
      EDGE_MOE_UNROLL
      for (int head = 0; head < kHeadsAtOnce; ++head)
        if (head < group.count)
          sums[head] = fmaf(weights[(row + head) * cache.positions + from + j], value, sums[head]);
    };
    if (group.chosen)
      each_of_rows<kAhead>(
          values, cache.half, [&](int i) { return group.chosen[from + i]; }, size_t(n), d, to - from, add);
    else
      each_value<kAhead>(values, cache.half, size_t(from) * n + d, n, to - from, add);
    EDGE_MOE_UNROLL
    for (int head = 0; head < kHeadsAtOnce; ++head) totals[head] = from ? totals[head] + sums[head] : sums[head];
  }
  EDGE_MOE_UNROLL
  for (int head = 0; head < kHeadsAtOnce; ++head)
    if (head < group.count)
      attended[(size_t(group.token) * heads.heads + group.first_head + head) * n + d] = totals[head];
}

}  // namespace

void store_block_keys(float* q, float* k, const BlockIndex& index, const IndexHeads& heads, const IndexCache& cache,
                      const StateBuffers& states, const Span& span, Stream stream) {
  EDGE_MOE_LAUNCH(block_queries_kernel, dim3(unsigned(heads.heads), unsigned(span.count)), dim3(kWarp), 0, stream, q,
                  index, heads, span);
  EDGE_MOE_LAUNCH(block_keys_kernel, dim3(1), dim3(kWarp), 0, stream, k, index, heads, cache, states, span);
}

void attend_chosen(const float* q, const Heads& heads, const LayerCache& cache, const Span& span, const Choice& choice,
                   float* scores, float* attended, Stream stream) {
  const unsigned groups = unsigned(heads.kv_heads * parts_of(heads)), tokens = unsigned(span.count);
  EDGE_MOE_LAUNCH(chosen_scores_kernel, dim3(pieces(size_t(span.most) + 1, kThreads), groups, tokens), dim3(kThreads),
                  size_t(kHeadsAtOnce) * heads.head_dim * sizeof(float), stream, q, heads, cache, span, choice, scores);
  softmax(heads, cache.positions, span, choice, scores, stream);
  EDGE_MOE_LAUNCH(chosen_values_kernel, dim3(pieces(size_t(heads.head_dim), kThreads), groups, tokens), dim3(kThreads),
                  0, stream, scores, heads, cache, span, choice, attended);
}

}  // namespace edge_moe::cuda
