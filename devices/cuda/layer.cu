// Norms, embeddings, the router's products, sums of experts, RoPE and the KV cache; scalar.cpp defines the bits.
#include "batch.h"
#include "lanes.cuh"
#include "layer.h"
#include "quantise.cuh"
#include "values.cuh"

namespace edge_moe::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kNormThreads = 512;  // for one vector
constexpr int kAhead = 16;         // weights that a lane loads at a time

// ---- norms, embeddings, float products

// The block's vector, where `into` has codes.
__device__ __forceinline__ void quantise_normed(const float* values, int n, const VectorBuffer& into) {
  if (!into.codes) return;
  __syncthreads();
  EDGE_MOE_NO_UNROLL
  for (int block = int(threadIdx.x) / kWarp; block * kBlock < n; block += kNormThreads / kWarp)
    quantise_block(values + block * kBlock, n - block * kBlock, into, blockIdx.x * into.blocks() + block);
}

EDGE_MOE_KERNEL(kNormThreads)
rms_norm_kernel(const float* x, const float* weights, int weight_rows, float eps, int n, float* y, VectorBuffer into) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  const float *from = x + size_t(blockIdx.x) * n, *weight = weights + size_t(int(blockIdx.x) % weight_rows) * n;
  for (int i = int(threadIdx.x); i < n; i += kNormThreads) values[i] = from[i];
  __syncthreads();
  const float inverse = inverse_norm(values, n, eps);  // computed by every warp
  __syncthreads();
  for (int i = int(threadIdx.x); i < n; i += kNormThreads) {
    values[i] = values[i] * inverse * weight[i];
    y[size_t(blockIdx.x) * n + i] = values[i];
  }
  quantise_normed(values, n, into);
}

EDGE_MOE_KERNEL(kNormThreads)
layer_norm_kernel(const float* x, const float* weight, const float* bias, float eps, int n, float* y,
                  VectorBuffer into) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  const float* from = x + size_t(blockIdx.x) * n;
  for (int i = int(threadIdx.x); i < n; i += kNormThreads) values[i] = from[i];
  __syncthreads();
  const Moments of = moments(values, n, eps);
  __syncthreads();
  for (int i = int(threadIdx.x); i < n; i += kNormThreads) {
    values[i] = (values[i] - of.mean) * of.inverse * weight[i] + bias[i];
    y[size_t(blockIdx.x) * n + i] = values[i];
  }
  quantise_normed(values, n, into);
}

EDGE_MOE_KERNEL(kThreads) embed_kernel(Matrix m, const int32_t* ids, float scale, float* y) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i >= m.cols) return;
  y[size_t(blockIdx.y) * m.cols + i] = scale * weight_at(m, size_t(ids[blockIdx.y]), i);
}

// Sixteen lanes compute a row, so a warp computes two.
EDGE_MOE_KERNEL(kThreads) float_product_kernel(Batch<ProductJob> batch, const float* x) {
  const ProductJob job = batch.jobs[blockIdx.z];
  const Matrix m = job.matrix;
  const int half = int(blockIdx.x * kThreads + threadIdx.x) / kLanes, row = half < m.rows ? half : m.rows - 1;
  const int t = int(blockIdx.y);
  if (t >= job.count || int(blockIdx.x) * (kThreads / kLanes) >= m.rows) return;
  const float* values = x + job.vector(t) * m.cols;
  const size_t first = size_t(row) * m.cols;
  const bool is_half = m.codec == Codec::kBfloat16;
  float sum = 0.0f;
  const auto add = [&](uint32_t bits, int i) {
    if (is_half) bits <<= 16;
    float weight;
    memcpy(&weight, &bits, 4);
    sum = fmaf(weight, values[i], sum);
  };
  int i = int(threadIdx.x) % kLanes;
  for (Raw<kAhead> some; i + (kAhead - 1) * kLanes < m.cols; i += kAhead * kLanes) {
    some.load(m.codes, is_half, first + i, kLanes);
    EDGE_MOE_UNROLL
    for (int j = 0; j < kAhead; ++j) add(some.bits[j], i + j * kLanes);
  }
  for (Raw<1> one; i < m.cols; i += kLanes) one.load(m.codes, is_half, first + i, 0), add(one.bits[0], i);
  sum = fold_lanes(sum);
  if (threadIdx.x % kLanes == 0 && half < m.rows) job.y[t * job.stride + row] = with_bias(m, row, sum);
}

EDGE_MOE_KERNEL(kThreads) add_bias_kernel(float* x, const float* bias, int n) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i < n) x[size_t(blockIdx.y) * n + i] = x[size_t(blockIdx.y) * n + i] + bias[i];
}

// Each warp computes a block of 64 values.
EDGE_MOE_KERNEL(kThreads)
activate_kernel(Batch<Rows> batch, float* gate, const float* up, int n, Activation activation, VectorBuffer into) {
  const int block = int(blockIdx.x * kWarps + threadIdx.x / kWarp), first = block * kBlock;
  if (first >= n || int(blockIdx.y) >= batch.jobs[blockIdx.z].count) return;
  const size_t row = size_t(batch.jobs[blockIdx.z].first) + blockIdx.y, at = row * n + first;
  const int count = n - first < kBlock ? n - first : kBlock;
  for (int i = int(threadIdx.x) % kWarp; i < count; i += kWarp)
    gate[at + i] = gated(gate[at + i], up[at + i], activation);
  __syncwarp();
  if (into.codes) quantise_block(gate + at, count, into, row * into.blocks() + block);
}

EDGE_MOE_KERNEL(kThreads)
ranked_sum_kernel(float* x, const float* down, const float* weights, const int32_t* pairs, int places, int dim) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i >= dim) return;
  const size_t token = blockIdx.y;
  float sum = x[token * dim + i];
  for (size_t at = token * places; at < (token + 1) * places; ++at)
    if (pairs[at] >= 0) sum = sum + weights[at] * down[size_t(pairs[at]) * dim + i];
  x[token * dim + i] = sum;
}

EDGE_MOE_KERNEL(kThreads) add_gated_kernel(float* x, const float* y, const float* gates, float scale, int dim) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i >= dim) return;
  const size_t at = size_t(blockIdx.y) * dim + i;
  x[at] = x[at] + (gates ? sigmoid(gates[blockIdx.y]) * scale : scale) * y[at];
}

EDGE_MOE_KERNEL(kThreads) fill_kernel(float* x, float value, size_t n) {
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) x[i] = value;
}

EDGE_MOE_KERNEL(kThreads) scale_kernel(float* x, float factor, size_t n) {
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) x[i] = x[i] * factor;
}

// ---- keys and values

// Each warp stores one head of one token: those of q, then those of k with their values.
EDGE_MOE_KERNEL(kWarp)
store_keys_kernel(Projections p, Heads heads, LayerCache cache, Span span) {
  const int lane = int(threadIdx.x), n = heads.head_dim, half = heads.rope_dim / 2;
  const bool is_key = int(blockIdx.x) >= heads.heads;
  const int head = is_key ? int(blockIdx.x) - heads.heads : int(blockIdx.x);
  const size_t token = size_t(span.first) + blockIdx.y, at = size_t(*span.position + int(token));
  const size_t row = (token * (is_key ? heads.kv_heads : heads.heads) + head) * n;
  float* x = (is_key ? p.k : p.q) + row;
  const float* bias = is_key ? p.k_bias : p.q_bias;
  const float* weight = is_key ? p.k_norm : p.q_norm;
  auto limited = [&](float value) {
    return heads.clip > 0 ? value < -heads.clip ? -heads.clip : heads.clip < value ? heads.clip : value : value;
  };

  if (bias)
    for (int i = lane; i < n; i += kWarp) x[i] = x[i] + bias[head * n + i];
  __syncwarp();
  const auto norm = [&] {
    const float inverse = inverse_norm(x, n, heads.norm_eps);
    for (int i = lane; i < n; i += kWarp) x[i] = x[i] * inverse * weight[i];
    __syncwarp();
  };
  if (weight && !heads.norm_after_rope) norm();
  for (int i = lane; i < n; i += kWarp) x[i] = limited(x[i]);
  __syncwarp();
  const int step = heads.interleaved ? 2 : 1, apart = heads.interleaved ? 1 : heads.rope_span / 2;
  for (int i = lane; i < half; i += kWarp) {
    const float cos = p.cos[at * half + i], sin = p.sin[at * half + i], a = x[i * step], b = x[i * step + apart];
    x[i * step] = a * cos - b * sin;
    x[i * step + apart] = b * cos + a * sin;
  }
  __syncwarp();
  if (weight && heads.norm_after_rope) norm();
  if (!is_key) return;
  __syncwarp();
  float* v = p.v + row;
  if (p.v_bias)
    for (int i = lane; i < n; i += kWarp) v[i] = v[i] + p.v_bias[head * n + i];
  __syncwarp();
  if (heads.v_norm) {
    const float inverse = inverse_norm(v, n, heads.norm_eps);
    for (int i = lane; i < n; i += kWarp) v[i] = v[i] * inverse;
    __syncwarp();
  }
  const size_t room = size_t(head) * cache.places * n, place = at % cache.places;
  for (int i = lane; i < n; i += kWarp) {
    put(cache.keys, cache.half, room + (place / kKeyBlock * n + i) * kKeyBlock + place % kKeyBlock, x[i]);
    put(cache.values, cache.half, room + place * n + i, limited(v[i]));
  }
}

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, int vectors, int n, float* y, const VectorBuffer& into,
              Stream stream, int weight_rows) {
  EDGE_MOE_LAUNCH(rms_norm_kernel, dim3(unsigned(vectors)), dim3(kNormThreads), size_t(n) * sizeof(float), stream, x,
                  weight, weight_rows, eps, n, y, into);
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int vectors, int n, float* y,
                const VectorBuffer& into, Stream stream) {
  EDGE_MOE_LAUNCH(layer_norm_kernel, dim3(unsigned(vectors)), dim3(kNormThreads), size_t(n) * sizeof(float), stream, x,
                  weight, bias, eps, n, y, into);
}

void embed(const Matrix& matrix, const int32_t* ids, int count, float scale, float* y, Stream stream) {
  EDGE_MOE_LAUNCH(embed_kernel, dim3(pieces(matrix.cols, kThreads), unsigned(count)), dim3(kThreads), 0, stream, matrix,
                  ids, scale, y);
}

void float_product(const ProductJob* jobs, int count, const float* x, Stream stream) {
  in_batches(jobs, count, [&](const Batch<ProductJob>& batch, bool) {
    const dim3 grid = grid_of(batch, kThreads / kLanes);
    if (grid.x && grid.y) EDGE_MOE_LAUNCH(float_product_kernel, grid, dim3(kThreads), 0, stream, batch, x);
  });
}

void add_bias(float* x, const float* bias, int vectors, int n, Stream stream) {
  EDGE_MOE_LAUNCH(add_bias_kernel, dim3(pieces(n, kThreads), unsigned(vectors)), dim3(kThreads), 0, stream, x, bias, n);
}

void activate(const Rows* rows, int count, float* gate, const float* up, int n, const Activation& activation,
              const VectorBuffer& into, Stream stream) {
  in_batches(rows, count, [&](const Batch<Rows>& batch, bool) {
    int most = 0;
    for (int i = 0; i < batch.count; ++i) most = std::max(most, batch.jobs[i].count);
    if (most)
      EDGE_MOE_LAUNCH(activate_kernel, dim3(pieces(n, kBlock * kWarps), unsigned(most), unsigned(batch.count)),
                      dim3(kThreads), 0, stream, batch, gate, up, n, activation, into);
  });
}

void ranked_sum(float* x, const float* down, const float* weights, const int32_t* pairs, int tokens, int places,
                int dim, Stream stream) {
  EDGE_MOE_LAUNCH(ranked_sum_kernel, dim3(pieces(dim, kThreads), unsigned(tokens)), dim3(kThreads), 0, stream, x, down,
                  weights, pairs, places, dim);
}

void add_gated(float* x, const float* y, const float* gates, float scale, int tokens, int dim, Stream stream) {
  EDGE_MOE_LAUNCH(add_gated_kernel, dim3(pieces(dim, kThreads), unsigned(tokens)), dim3(kThreads), 0, stream, x, y,
                  gates, scale, dim);
}

void fill(float* x, float value, size_t n, Stream stream) {
  EDGE_MOE_LAUNCH(fill_kernel, dim3(pieces(n, kThreads)), dim3(kThreads), 0, stream, x, value, n);
}

void scale(float* x, float factor, size_t n, Stream stream) {
  EDGE_MOE_LAUNCH(scale_kernel, dim3(pieces(n, kThreads)), dim3(kThreads), 0, stream, x, factor, n);
}

void store_keys(const Projections& p, const Heads& heads, const LayerCache& cache, const Span& span, Stream stream) {
  EDGE_MOE_LAUNCH(store_keys_kernel, dim3(unsigned(heads.heads + heads.kv_heads), unsigned(span.count)), dim3(kWarp), 0,
                  stream, p, heads, cache, span);
}

}  // namespace edge_moe::cuda
