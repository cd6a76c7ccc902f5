// Attention to rows that are key and value of all heads, and compressed rows, as in runtime/src/row_attention.cpp;
// scalar.cpp defines the bits.
#include "rows.h"
#include "values.cuh"

namespace edge_moe::cuda {

namespace {

constexpr int kThreads = 128;

// RoPE of the last dimensions of a vector, by a whole warp.
__device__ __forceinline__ void rotate_last(float* x, int dim, int rope_dim, bool interleaved, const float* cos,
                                            const float* sin, size_t position) {
  const int half = rope_dim / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  float* turned = x + dim - rope_dim;
  for (int i = int(threadIdx.x); i < half; i += kWarp) {
    const float c = cos[position * half + i], s = sin[position * half + i];
    const float a = turned[i * step], b = turned[i * step + apart];
    turned[i * step] = a * c - b * s;
    turned[i * step + apart] = b * c + a * s;
  }
}

// Each warp stores one head of one token, or one of its indexer's heads, or the token's row.
EDGE_MOE_KERNEL(kWarp)
store_rows_kernel(float* q, float* rows, float* index_q, RowTables tables, RowHeads heads, RowCache cache, Span span) {
  const int lane = int(threadIdx.x), head = int(blockIdx.x), n = heads.head_dim;
  const size_t token = size_t(span.first) + blockIdx.y, at = size_t(*span.position + int(token));
  if (head > heads.heads) {
    float* x = index_q + (token * heads.index_heads + head - heads.heads - 1) * heads.index_dim;
    return rotate_last(x, heads.index_dim, heads.rope_dim, heads.interleaved, tables.cos, tables.sin, at);
  }
  const bool is_row = head == heads.heads;
  float* x = is_row ? rows + token * n : q + (token * heads.heads + head) * n;
  const float inverse = inverse_norm(x, n, heads.norm_eps);
  __syncwarp();
  for (int i = lane; i < n; i += kWarp) x[i] = x[i] * inverse * (is_row ? tables.norm[i] : 1.0f);
  __syncwarp();
  rotate_last(x, n, heads.rope_dim, heads.interleaved, tables.cos, tables.sin, at);
  __syncwarp();
  const size_t row = at % cache.places * n;
  for (int i = lane; i < n; i += kWarp) {
    if (is_row)
      put(cache.rows, cache.half, row + i, x[i]);
    else
      x[i] = x[i] * heads.softmax_scale;
  }
}

// Each thread adds one dimension of all tokens of a span.
EDGE_MOE_KERNEL(kThreads)
pool_sums_kernel(float* values, const float* gates, Pool pool, StateBuffers states, Span span) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x), n = pool.dim;
  if (i >= n) return;
  const int columns = pool.columns(), own = columns - n;
  const float* from = states.before();
  float* to = states.after() + pool.at;
  const auto sums_at = [&](int first) {
    if (!from) return PoolSums{};
    const float* sums = from + pool.at + first + i;
    return PoolSums{sums[0], sums[n], sums[2 * n]};
  };
  PoolSums its = sums_at(0), next = pool.overlaps ? sums_at(3 * n) : PoolSums{};
  for (int t = span.first; t < span.first + span.count; ++t) {
    const int in_row = (*span.position + t) % pool.rate;
    float* value = values + size_t(t) * columns;
    const float *gate = gates + size_t(t) * columns, *bias = pool.bias + size_t(in_row) * columns;
    its.add(gate[own + i] + bias[own + i], value[own + i]);
    if (pool.overlaps) next.add(gate[i] + bias[i], value[i]);
    if (in_row + 1 == pool.rate) value[i] = its.mean(), its = next, next = PoolSums{};
  }
  const auto keep = [&](const PoolSums& sums, float* there) {
    there[i] = sums.top, there[n + i] = sums.weight, there[2 * n + i] = sums.value;
  };
  keep(its, to);
  if (pool.overlaps) keep(next, to + 3 * n);
}

// Each warp finishes the row that ends at one token, if one does.
EDGE_MOE_KERNEL(kWarp)
store_pooled_kernel(float* values, Pool pool, RowTables tables, int rope_dim, bool interleaved, RowCache cache,
                    IndexCache keys, Span span) {
  const int lane = int(threadIdx.x), n = pool.dim;
  const size_t token = size_t(span.first) + blockIdx.x, at = size_t(*span.position + int(token));
  if ((at + 1) % pool.rate) return;
  const size_t place = at / pool.rate;
  float* x = values + token * pool.columns();
  const float inverse = inverse_norm(x, n, pool.norm_eps);
  __syncwarp();
  for (int i = lane; i < n; i += kWarp) x[i] = x[i] * inverse * pool.norm[i];
  __syncwarp();
  rotate_last(x, n, rope_dim, interleaved, tables.cos, tables.sin, place * pool.rate);
  __syncwarp();
  const size_t row = (cache.places + place) * n, key = place / kKeyBlock * n * kKeyBlock + place % kKeyBlock;
  for (int i = lane; i < n; i += kWarp) {
    if (cache.rows)
      put(cache.rows, cache.half, row + i, x[i]);
    else
      put(keys.keys, keys.half, key + size_t(i) * kKeyBlock, x[i]);
  }
}

// Each warp turns one head of one token back by the token's position, and puts it in its group.
EDGE_MOE_KERNEL(kWarp)
turn_back_kernel(const float* mixed, RowTables tables, RowHeads heads, int groups, int tokens, Span span,
                 float* attended) {
  const int lane = int(threadIdx.x), head = int(blockIdx.x), n = heads.head_dim, of_group = heads.heads / groups;
  const size_t token = size_t(span.first) + blockIdx.y, at = size_t(*span.position + int(token));
  const float* x = mixed + (size_t(blockIdx.y) * heads.heads + head) * n;
  float* y = attended + ((size_t(head / of_group) * tokens + token) * of_group + head % of_group) * n;
  const int plain = n - heads.rope_dim, half = heads.rope_dim / 2;
  for (int i = lane; i < plain; i += kWarp) y[i] = x[i];
  const int step = heads.interleaved ? 2 : 1, apart = heads.interleaved ? 1 : half;
  for (int i = lane; i < half; i += kWarp) {
    const float c = tables.cos[at * half + i], s = tables.sin[at * half + i];
    const float a = x[plain + i * step], b = x[plain + i * step + apart];
    y[plain + i * step] = a * c + b * s;
    y[plain + i * step + apart] = b * c - a * s;
  }
}

}  // namespace

void store_rows(float* q, float* rows, float* index_q, const RowTables& tables, const RowHeads& heads,
                const RowCache& cache, const Span& span, Stream stream) {
  EDGE_MOE_LAUNCH(store_rows_kernel, dim3(unsigned(heads.heads + 1 + heads.index_heads), unsigned(span.count)),
                  dim3(kWarp), 0, stream, q, rows, index_q, tables, heads, cache, span);
}

void pool_rows(float* values, const float* gates, const Pool& pool, const RowTables& tables, int rope_dim,
               bool interleaved, const StateBuffers& states, const RowCache& cache, const IndexCache& keys,
               const Span& span, Stream stream) {
  EDGE_MOE_LAUNCH(pool_sums_kernel, dim3(pieces(size_t(pool.dim), kThreads)), dim3(kThreads), 0, stream, values, gates,
                  pool, states, span);
  EDGE_MOE_LAUNCH(store_pooled_kernel, dim3(unsigned(span.count)), dim3(kWarp), 0, stream, values, pool, tables,
                  rope_dim, interleaved, cache, keys, span);
}

void attend_rows(const float* q, const float* sinks, const RowTables& tables, const RowHeads& heads, int groups,
                 int tokens, const RowCache& cache, const RowChoice& choice, const Span& span, float* scores,
                 float* mixed, float* attended, Stream stream) {
  LatentHeads as_latents{};
  as_latents.heads = heads.heads, as_latents.rank = heads.head_dim;
  mix_rows(q + size_t(span.first) * heads.heads * heads.head_dim, sinks, as_latents,
           {cache.rows, cache.positions, cache.half}, span, choice, scores, mixed, stream);
  EDGE_MOE_LAUNCH(turn_back_kernel, dim3(unsigned(heads.heads), unsigned(span.count)), dim3(kWarp), 0, stream, mixed,
                  tables, heads, groups, tokens, span, attended);
}

}  // namespace edge_moe::cuda
