// The CPU kernels: what a layer of the model asks of an instruction set, as one table of functions.
//
// Every instruction set gives the same bits. So the order of each float operation is part of the contract, and
// scalar.cpp is its definition. A product with a packed matrix is exact in integers over the inputs that share both
// scales, and one running sum over these: instruction sets may add the integers up in any order. Other sums are kept in
// 16 lanes (lane = position modulo 16) and folded in halves at the end. A multiply-add is fused where the contract says
// fma and nowhere else. A row of a product never depends on the other rows or tokens of the call, so threads may
// split rows and prompts may be cut into chunks without changing one bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace edge_moe {

inline constexpr int kBlock = 64;     // inputs that share one activation scale
inline constexpr int kLanes = 16;     // partial sums of every float reduction
inline constexpr int kKeyBlock = 16;  // positions of the KV cache whose keys lie together

// A weight matrix (rows, cols) as format.h lays it out.
struct Matrix {
  const uint8_t* codes = nullptr;    // packed codes; bfloat16 or float32 values at width 16 or 32
  const uint16_t* scales = nullptr;  // bfloat16 (rows, cols/group)
  const uint16_t* biases = nullptr;  // bfloat16 (rows, cols/group)
  int rows = 0, cols = 0;
  int width = 0;
  int group = 0;

  explicit operator bool() const { return codes != nullptr; }
};

// Input vectors of a product, once as they are and once rounded to int8 in blocks of 64.
// `blocks` is ceil(cols/64); codes past cols are zero.
struct Activations {
  const float* values = nullptr;  // (vectors, cols)
  const int8_t* codes = nullptr;  // (vectors, blocks*64)
  const float* scales = nullptr;  // (vectors, blocks)
  // Sums of scale*code over each weight group of 32, 64 and 128 inputs: what a group's bias is multiplied by.
  const float* sums[3] = {};      // (vectors, blocks*2), (vectors, blocks), (vectors, (blocks+1)/2)
  const int32_t* rows = nullptr;  // (count,) vector of each token; null: token t is vector t
  int count = 0;                  // tokens
  int cols = 0;

  int blocks() const { return (cols + kBlock - 1) / kBlock; }

  // A vector's sums over groups of 32, 64 or 128.
  const float* group_sums(int group, size_t vector) const {
    if (group == 32) return sums[0] + vector * 2 * blocks();
    if (group == 64) return sums[1] + vector * blocks();
    return sums[2] + vector * ((blocks() + 1) / 2);
  }
};

// One KV head's cache. Keys lie in blocks of kKeyBlock positions, (blocks, head_dim, kKeyBlock), so that a register of
// them is one dimension of as many positions; values as (positions, stride).
struct KeyValues {
  const void *keys, *values;
  size_t stride;  // in values
  bool half;      // half precision, else floats
};

// Output strides are in floats. All sizes are in elements.
struct Kernels {
  const char* name;

  // y[t*y_stride + row] = matrix[row] . x[t] for rows [row_begin, row_end) and every token t.
  // Width < 16: for each group, sum = fma(bias, sum of inputs, sum), then for each of its blocks (a group of 32: for
  // itself) sum = fma(float(integer dot), scale_w * scale_x, sum).
  void (*matmul)(const Matrix& matrix, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end);

  // Round one vector to int8 blocks and sum the blocks; see Activations.
  void (*quantise)(const float* x, int cols, int8_t* codes, float* scales, float* sums32, float* sums64,
                   float* sums128);

  // y = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, float* y, int n);

  // gate = activation(gate) * up; activation: 0 silu, 1 gelu (tanh form)
  void (*gate_up)(float* gate, const float* up, int n, int activation);

  // scores[query*scores_stride + position] = scale * q[query] . key, for the positions of all key blocks that [begin,
  // end) touches; scores must reach so far. One sum over head_dim: sum = fma(q, key, sum).
  void (*attend_scores)(const float* const* q, int queries, const KeyValues& cache, int begin, int end, int head_dim,
                        float scale, float* scores, size_t scores_stride);

  // out[query] += the weighted sum of values [begin, end), n floats: out = fma(weight, value, out), position by
  // position.
  void (*attend_values)(const float* weights, size_t weights_stride, int queries, const KeyValues& cache, int begin,
                        int end, int n, float* const* out);

  // y = halves as floats
  void (*widen)(const uint16_t* halves, float* y, int n);

  // y += weight * x
  void (*add_scaled)(float* y, const float* x, float weight, int n);

  // x = softmax(x) over [begin, end)
  void (*softmax)(float* x, int begin, int end);

  // One row of a matrix as float32.
  void (*dequantise_row)(const Matrix& matrix, int row, float* y);
};

// The tables that this binary has and this machine can run, best first; scalar is always the last.
const Kernels* const* available_kernels(int* count);

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels, kAvx512Kernels;    // on x86-64 only
extern const Kernels kNeonKernels, kNeonI8mmKernels;  // on 64-bit Arm only

}  // namespace edge_moe
