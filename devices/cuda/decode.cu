// Products of one token: a matrix of the trunk, and all chosen experts of a layer in two launches.
#include <algorithm>

#include "decode.h"
#include "packed.cuh"
#include "quantise.cuh"

namespace edge_moe::cuda {

namespace {

constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * kWarp;
constexpr int kMostWarps = 8;  // of a block, of which each takes an expert

__device__ __forceinline__ int* dots_of_warp(uint8_t* shared) {
  return reinterpret_cast<int*>(shared) + threadIdx.x / kWarp * kWarpDots;
}

__device__ __forceinline__ QuantisedVector vector_of(const VectorBuffer& x, int vector) {
  const size_t blocks = x.blocks(), v = size_t(vector);
  return {x.codes + v * blocks * kBlock, x.scales + v * blocks, {x.sums[0] + v * blocks * 2, x.sums[1] + v * blocks}};
}

EDGE_MOE_KERNEL(kThreads) quantise_kernel(const float* values, VectorBuffer into) {
  const int block = int(blockIdx.x * kWarps + threadIdx.x / kWarp);
  if (block * kBlock >= into.cols) return;
  quantise_block(values + size_t(blockIdx.y) * into.cols + block * kBlock, into.cols - block * kBlock, into,
                 blockIdx.y * into.blocks() + block);
}

EDGE_MOE_KERNEL(kThreads) product_kernel(Matrix m, VectorBuffer x, float* y) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  const int first = int(blockIdx.x * kWarps + threadIdx.x / kWarp) * kWarpRows;
  if (first >= m.rows) return;
  const float sum = warp_rows(m, first, vector_of(x, int(blockIdx.y)), dots_of_warp(shared));
  const int lane = int(threadIdx.x) % kWarp;
  if (lane < kWarpRows && first + lane < m.rows) y[size_t(blockIdx.y) * m.rows + first + lane] = sum;
}

// A block's threads take 64 rows of gate and of up of one expert, which are one block of inputs of down.
EDGE_MOE_KERNEL(kThreads)
gate_up_kernel(const ExpertJob* jobs, VectorBuffer x, VectorBuffer hidden, int activation) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  __shared__ float values[kWarps * kWarpRows];
  static_assert(kWarps * kWarpRows == kBlock);
  const ExpertJob& job = jobs[blockIdx.y];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int first = int(blockIdx.x) * kBlock + warp * kWarpRows, rows = job.gate.rows;
  const QuantisedVector input = vector_of(x, job.vector);
  float value = 0.0f;
  if (first < rows) {
    float gate = 0.0f, up = 0.0f;
    EDGE_MOE_NO_UNROLL
    for (int which = 0; which < 2; ++which) {  // one after the other: half the code and fewer registers
      gate = up;
      up = warp_rows(which ? job.up : job.gate, first, input, dots_of_warp(shared));
    }
    if (lane < kWarpRows && first + lane < rows) value = gated(gate, up, activation);
  }
  if (lane < kWarpRows) values[warp * kWarpRows + lane] = value;
  __syncthreads();
  if (warp) return;
  quantise_block(values, kBlock, hidden, job.pair * hidden.blocks() + blockIdx.x);
}

// A block's warps take the same rows of down, each of an expert; then the token's experts are added in order of rank.
EDGE_MOE_KERNEL(kMostWarps* kWarp)
down_kernel(const ExpertJob* jobs, int count, VectorBuffer hidden, float* down, RankedSum sum) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
  const int first = int(blockIdx.x) * kWarpRows, row = first + lane;
  const int rows = sum.dim;
  for (int i = int(threadIdx.x) / kWarp; i < count; i += warps) {
    const ExpertJob& job = jobs[i];
    const float value = warp_rows(job.down, first, vector_of(hidden, job.pair), dots_of_warp(shared));
    if (lane < kWarpRows && row < rows) down[size_t(job.pair) * rows + row] = value;
  }
  if (!sum.places) return;
  __syncthreads();
  if (threadIdx.x >= kWarpRows || row >= rows) return;
  float x = sum.x[row];
  for (int k = 0; k < sum.places; ++k)
    if (sum.pair_of[k] >= 0) x = x + sum.weights[k] * down[size_t(sum.pair_of[k]) * rows + row];
  sum.x[row] = x;
}

constexpr size_t kSharedOfWarp = kWarpDots * sizeof(int);

}  // namespace

void quantise(const float* values, int vectors, const VectorBuffer& into, Stream stream) {
  EDGE_MOE_LAUNCH(quantise_kernel, dim3(pieces(into.cols, kBlock * kWarps), unsigned(vectors)), dim3(kThreads), 0,
                  stream, values, into);
}

void product(const Matrix& matrix, const VectorBuffer& x, int vectors, float* y, Stream stream) {
  EDGE_MOE_LAUNCH(product_kernel, dim3(pieces(matrix.rows, kWarps * kWarpRows), unsigned(vectors)), dim3(kThreads),
                  kWarps * kSharedOfWarp, stream, matrix, x, y);
}

void gate_up(const ExpertJob* jobs, int count, int rows, const VectorBuffer& x, const VectorBuffer& hidden,
             int activation, Stream stream) {
  EDGE_MOE_LAUNCH(gate_up_kernel, dim3(pieces(rows, kBlock), unsigned(count)), dim3(kThreads), kWarps * kSharedOfWarp,
                  stream, jobs, x, hidden, activation);
}

void down(const ExpertJob* jobs, int count, const VectorBuffer& hidden, float* out, const RankedSum& sum,
          Stream stream) {
  const unsigned warps = unsigned(std::clamp(count, 1, kMostWarps));
  EDGE_MOE_LAUNCH(down_kernel, dim3(pieces(sum.dim, kWarpRows)), dim3(warps * kWarp), warps * kSharedOfWarp, stream,
                  jobs, count, hidden, out, sum);
}

}  // namespace edge_moe::cuda
