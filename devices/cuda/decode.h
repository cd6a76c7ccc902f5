// Launches of the kernels that multiply one token, or a few one by one: see decode.cu. Pointers are device pointers;
// jobs are read before a launch returns.
#pragma once

#include "../kernels.h"
#include "../lane_math.h"
#include "device.h"

namespace edge_moe::cuda {

inline constexpr int kMostPlaces = 32;  // maximum experts of one token

// Vectors quantised to int8 in blocks of 64, like Quantised but without sums over 128.
struct VectorBuffer {
  int8_t *codes, *lows;  // (vectors, blocks, 64)
  uint8_t* two_planes;   // (vectors, blocks)
  float* scales;         // (vectors, blocks)
  float* sums[2];        // (vectors, blocks*2), (vectors, blocks)
  int cols;

  EDGE_MOE_BOTH size_t blocks() const { return size_t(cols + kBlock - 1) / kBlock; }

  VectorBuffer of_length(int cols) const {  // the same memory for vectors of this length, at most the one now
    VectorBuffer buffer = *this;
    buffer.cols = cols;
    return buffer;
  }
  VectorBuffer from(size_t vector) const {  // the vectors from this one on
    const size_t at = vector * blocks();
    return {
        codes + at * kBlock, lows + at * kBlock, two_planes + at, scales + at, {sums[0] + 2 * at, sums[1] + at}, cols};
  }
};

// A matrix times some vectors: y[t * stride + row] = matrix[row] . the vector of t, for t in [0, count).
struct ProductJob {
  Matrix matrix;
  float* y;
  size_t stride;
  const int32_t* vectors;  // (count,): the vector of each t; null: first + t * step
  int first, step, count;

  EDGE_MOE_BOTH size_t vector(int t) const { return size_t(vectors ? vectors[t] : first + t * step); }
};

// A whole matrix times vectors [0, count), to y (count, rows).
inline ProductJob whole(const Matrix& matrix, int count, float* y) {
  return {matrix, y, size_t(matrix.rows), nullptr, 0, 1, count};
}

// One expert for one token: inputs are vector `vector`, results go to row `pair` of `hidden` and of `down`.
struct ExpertJob {
  Matrix gate, up, down;
  int vector, pair;
};

// x (dim,) += the weighted rows of `down` of a token's experts in order of rank; a pair of -1 was pruned. places: 0
// leaves x unchanged.
struct RankedSum {
  float* x;
  int places, dim;
  float weights[kMostPlaces];
  int pairs[kMostPlaces];
};

// Quantises vectors (vectors, into.cols) to int8.
void quantise(const float* values, int vectors, const VectorBuffer& into, Stream stream);

// Computes jobs of widths below 16, token by token.
void product(const ProductJob* jobs, int count, const VectorBuffer& x, Stream stream);

// hidden[pair] = gated(gate . x, up . x, activation), quantised to int8, for `count` experts with `rows` rows.
void gate_up(const ExpertJob* jobs, int count, int rows, const VectorBuffer& x, const VectorBuffer& hidden,
             const Activation& activation, Stream stream);

// out[pair] (dim,) = down . hidden[pair] for `count` experts, each with its own widths; then the sum, if places > 0.
void down(const ExpertJob* jobs, int count, const VectorBuffer& hidden, float* out, const RankedSum& sum,
          Stream stream);

}  // namespace edge_moe::cuda
