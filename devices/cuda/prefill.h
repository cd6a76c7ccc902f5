// Products of many tokens on tensor cores: see prefill.cu. Pointers are the device's.
#pragma once

#include "decode.h"

namespace edge_moe::cuda {

// A matrix on some vectors: y[(first_out + t) * rows + row] for t in [0, count).
struct ProductJob {
  Matrix matrix;           // of a width below 16
  const int32_t* vectors;  // (count,): which vector token t is; null: vector first_vector + t
  int first_vector, count, first_out;
};

// All of `jobs`, whose matrices have `rows` rows and which have at most `most` tokens each.
void products(const ProductJob* jobs, int count, int rows, int most, const VectorBuffer& x, float* y, Stream stream);

}  // namespace edge_moe::cuda
