// Launches of the kernels that multiply one token, or a few one by one: see decode.cu. Pointers are the device's.
#pragma once

#include "../kernels.h"
#include "../lane_math.h"
#include "simt.h"

namespace edge_moe::cuda {

// Vectors rounded to int8 in blocks of 64, as Activations has them, but for sums over 128.
struct VectorBuffer {
  int8_t* codes;   // (vectors, blocks, 64)
  float* scales;   // (vectors, blocks)
  float* sums[2];  // (vectors, blocks*2), (vectors, blocks)
  int cols;

  EDGE_MOE_BOTH size_t blocks() const { return size_t(cols + kBlock - 1) / kBlock; }
};

// One expert on one token: inputs of vector `vector`; what it gives to row `pair` of `hidden` and of `down`.
struct ExpertJob {
  Matrix gate, up, down;
  int vector, pair;
};

// x (dim,) += the weighted rows of `down` of a token's experts in order of rank; a pair of -1 was pruned. places: 0 to
// leave x alone.
struct RankedSum {
  float* x;
  const float* weights;  // (places,)
  const int* pair_of;    // (places,)
  int places, dim;
};

// Vectors (vectors, into.cols) of floats to int8.
void quantise(const float* values, int vectors, const VectorBuffer& into, Stream stream);

// y (vectors, rows) = x . matrix, of a width below 16
void product(const Matrix& matrix, const VectorBuffer& x, int vectors, float* y, Stream stream);

// hidden[pair] = activation(gate . x) * (up . x), rounded to int8, of `count` experts with `rows` rows.
void gate_up(const ExpertJob* jobs, int count, int rows, const VectorBuffer& x, const VectorBuffer& hidden,
             int activation, Stream stream);

// out[pair] (dim,) = down . hidden[pair] of `count` experts, each with its own widths; then the sum, if one is wanted.
void down(const ExpertJob* jobs, int count, const VectorBuffer& hidden, float* out, const RankedSum& sum,
          Stream stream);

}  // namespace edge_moe::cuda
