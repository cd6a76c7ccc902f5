// Splitting work into blocks, and warp reductions: the maximum and the sum over a warp's lanes, and the sums over
// sixteen lanes that kernels.h defines.
#pragma once

#include "../kernels.h"
#include "../lane_math.h"
#include "simt.h"

namespace edge_moe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// The number of blocks for `count` items, `piece` per block.
inline unsigned pieces(size_t count, int piece) { return unsigned((count + piece - 1) / piece); }

// The grid for a batch of jobs: the maximum of row blocks, the maximum of tokens, and the number of jobs.
template <typename Jobs>
dim3 grid_of(const Jobs& batch, int rows_a_block) {
  int rows = 0, tokens = 0;
  for (int i = 0; i < batch.count; ++i) {
    rows = batch.jobs[i].matrix.rows > rows ? batch.jobs[i].matrix.rows : rows;
    tokens = batch.jobs[i].count > tokens ? batch.jobs[i].count : tokens;
  }
  return dim3(pieces(size_t(rows), rows_a_block), unsigned(tokens), unsigned(batch.count));
}

// A product of a matrix's row with what the matrix adds to it.
__device__ __forceinline__ float with_bias(const Matrix& m, int row, float product) {
  return m.output_bias ? product + m.output_bias[row] : product;
}

// float(value) for |value| < 2^22, by an addition to 1.5 * 2^23: per clock an Orin's multiprocessor converts 16 values,
// but adds 64 integers and 128 floats.
__device__ __forceinline__ float small_float(int value) {
  const int bits = value + 0x4b400000;
  float sum;
  memcpy(&sum, &bits, 4);
  return sum - 12582912.0f;
}

__device__ __forceinline__ float warp_top(float value) {
  for (int apart = kWarp / 2; apart; apart /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, apart));
  return value;
}

__device__ __forceinline__ int warp_sum(int value) {
  for (int apart = kWarp / 2; apart; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

// fold() of vector_ops.inl over the values of sixteen neighbouring lanes; each lane gets the result.
__device__ __forceinline__ float fold_lanes(float value) {
  for (int apart = kLanes / 2; apart; apart /= 2) value = value + __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

// 1 / sqrt(mean(x^2) + eps), computed by a whole warp, whose two halves compute the same.
__device__ __forceinline__ float inverse_norm(const float* x, int n, float eps) {
  float sum = 0.0f;
  EDGE_MOE_UNROLL_8
  for (int i = int(threadIdx.x) % kLanes; i < n; i += kLanes) sum = sum + x[i] * x[i];
  return 1.0f / sqrtf(fold_lanes(sum) / float(n) + eps);
}

// The mean of x and 1 / sqrt(variance + eps), likewise.
struct Moments {
  float mean, inverse;
};
__device__ __forceinline__ Moments moments(const float* x, int n, float eps) {
  float sum = 0.0f, squares = 0.0f;
  EDGE_MOE_UNROLL_8
  for (int i = int(threadIdx.x) % kLanes; i < n; i += kLanes) sum = sum + x[i];
  const float mean = fold_lanes(sum) / float(n);
  EDGE_MOE_UNROLL_8
  for (int i = int(threadIdx.x) % kLanes; i < n; i += kLanes) squares = squares + (x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / sqrtf(fold_lanes(squares) / float(n) + eps)};
}

}  // namespace edge_moe::cuda
