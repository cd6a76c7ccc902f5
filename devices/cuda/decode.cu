// Products of one token: with a matrix of the trunk, and with all chosen experts of a layer in two launches.
#include <algorithm>

#include "batch.h"
#include "decode.h"
#include "packed.cuh"
#include "quantise.cuh"

namespace edge_moe::cuda {

namespace {

constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * kWarp;
constexpr int kFewRows = 4;    // of a warp, if a multiprocessor would otherwise get fewer than two blocks
constexpr int kMostWarps = 8;  // of a block in which each warp takes an expert
constexpr int kBlockWarps = kBlock / kWarpRows;
constexpr int kGateUpThreads = 2 * kBlockWarps * kWarp;

__device__ __forceinline__ WarpSteps& steps_of_warp(uint8_t* shared) {
  return reinterpret_cast<WarpSteps*>(shared)[threadIdx.x / kWarp];
}

__device__ __forceinline__ QuantisedVector vector_of(const VectorBuffer& x, size_t v) {
  const size_t blocks = x.blocks();
  return {x.codes + v * blocks * kBlock,
          x.lows + v * blocks * kBlock,
          x.two_planes + v * blocks,
          x.scales + v * blocks,
          {x.sums[0] + v * blocks * 2, x.sums[1] + v * blocks}};
}

EDGE_MOE_KERNEL(kThreads) quantise_kernel(const float* values, VectorBuffer into) {
  const int block = int(blockIdx.x * kWarps + threadIdx.x / kWarp);
  if (block * kBlock >= into.cols) return;
  quantise_block(values + size_t(blockIdx.y) * into.cols + block * kBlock, into.cols - block * kBlock, into,
                 blockIdx.y * into.blocks() + block);
}

template <int Rows>
EDGE_MOE_KERNEL(kThreads)
product_kernel(Batch<ProductJob> batch, VectorBuffer x) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  const ProductJob job = batch.jobs[blockIdx.z];
  const int first = int(blockIdx.x * kWarps + threadIdx.x / kWarp) * Rows, t = int(blockIdx.y);
  if (first >= job.matrix.rows || t >= job.count) return;
  const float sum = warp_rows<Rows>(job.matrix, first, vector_of(x, job.vector(t)), steps_of_warp(shared));
  const int lane = int(threadIdx.x) % kWarp;
  if (lane < Rows && first + lane < job.matrix.rows)
    job.y[t * job.stride + first + lane] = with_bias(job.matrix, first + lane, sum);
}

// Each block computes 64 rows of gate and of up of one expert, which are one block of inputs of down: half of the warps
// compute gate, the others up.
EDGE_MOE_KERNEL(kGateUpThreads)
gate_up_kernel(Batch<ExpertJob> batch, VectorBuffer x, VectorBuffer hidden, Activation activation) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  __shared__ float values[2][kBlock];
  const ExpertJob& job = batch.jobs[blockIdx.y];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, is_up = warp / kBlockWarps;
  const int row = warp % kBlockWarps * kWarpRows, first = int(blockIdx.x) * kBlock + row;
  float value = 0.0f;
  const Matrix& matrix = is_up ? job.up : job.gate;  // which may have no rows
  const int rows = matrix.rows;
  if (first < rows) value = warp_rows<kWarpRows>(matrix, first, vector_of(x, job.vector), steps_of_warp(shared));
  if (lane < kWarpRows) values[is_up][row + lane] = first + lane < rows ? with_bias(matrix, first + lane, value) : 0.0f;
  __syncthreads();
  const int thread = int(threadIdx.x);
  if (thread < kBlock) values[0][thread] = gated(values[0][thread], values[1][thread], activation);
  __syncthreads();
  if (warp == 0) quantise_block(values[0], kBlock, hidden, job.pair * hidden.blocks() + blockIdx.x);
}

// The warps of a block compute the same rows of down, each for one expert; then the token's experts are added in order
// of rank.
EDGE_MOE_KERNEL(kMostWarps* kWarp)
down_kernel(Batch<ExpertJob> batch, VectorBuffer hidden, float* down, RankedSum sum) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
  const int first = int(blockIdx.x) * kWarpRows, row = first + lane;
  const int rows = sum.dim;
  for (int i = int(threadIdx.x) / kWarp; i < batch.count; i += warps) {
    const Matrix matrix = batch.jobs[i].down;
    const size_t pair = size_t(batch.jobs[i].pair);
    const float value = warp_rows<kWarpRows>(matrix, first, vector_of(hidden, pair), steps_of_warp(shared));
    if (lane < kWarpRows && row < rows) down[pair * rows + row] = with_bias(matrix, row, value);
  }
  if (!sum.places) return;
  __syncthreads();
  if (threadIdx.x >= kWarpRows || row >= rows) return;
  float x = sum.x[row];
  for (int k = 0; k < sum.places; ++k)
    if (sum.pairs[k] >= 0) x = x + sum.weights[k] * down[size_t(sum.pairs[k]) * rows + row];
  sum.x[row] = x;
}

constexpr size_t kSharedOfWarp = sizeof(WarpSteps);

}  // namespace

void quantise(const float* values, int vectors, const VectorBuffer& into, Stream stream) {
  EDGE_MOE_LAUNCH(quantise_kernel, dim3(pieces(into.cols, kBlock * kWarps), unsigned(vectors)), dim3(kThreads), 0,
                  stream, values, into);
}

void product(const ProductJob* jobs, int count, const VectorBuffer& x, Stream stream) {
  in_batches(jobs, count, [&](const Batch<ProductJob>& batch, bool) {
    const dim3 grid = grid_of(batch, kWarps * kWarpRows), more = grid_of(batch, kWarps * kFewRows);
    if (!grid.x || !grid.y) return;
    constexpr size_t kShared = kWarps * kSharedOfWarp;
    if (grid.x * grid.y * grid.z < unsigned(2 * multiprocessors()))
      EDGE_MOE_LAUNCH(product_kernel<kFewRows>, more, dim3(kThreads), kShared, stream, batch, x);
    else
      EDGE_MOE_LAUNCH(product_kernel<kWarpRows>, grid, dim3(kThreads), kShared, stream, batch, x);
  });
}

void gate_up(const ExpertJob* jobs, int count, int rows, const VectorBuffer& x, const VectorBuffer& hidden,
             const Activation& activation, Stream stream) {
  in_batches(jobs, count, [&](const Batch<ExpertJob>& batch, bool) {
    if (batch.count)
      EDGE_MOE_LAUNCH(gate_up_kernel, dim3(pieces(rows, kBlock), unsigned(batch.count)), dim3(kGateUpThreads),
                      kGateUpThreads / kWarp * kSharedOfWarp, stream, batch, x, hidden, activation);
  });
}

void down(const ExpertJob* jobs, int count, const VectorBuffer& hidden, float* out, const RankedSum& sum,
          Stream stream) {
  in_batches(jobs, count, [&](const Batch<ExpertJob>& batch, bool last) {
    RankedSum then = sum;
    if (!last) then.places = 0;
    const unsigned warps = unsigned(std::clamp(batch.count, 1, kMostWarps));
    EDGE_MOE_LAUNCH(down_kernel, dim3(pieces(sum.dim, kWarpRows)), dim3(warps * kWarp), warps * kSharedOfWarp, stream,
                    batch, hidden, out, then);
  });
}

}  // namespace edge_moe::cuda
