// GPTQ and its refinement for one group of columns; compressor/rounding/gptq.py iterates over the groups and computes
// the products between them.
//
// Both minimise tr(E H E^T), E = weights - rounded weights (rows, cols), H the second moment of the matrix's inputs.
// Rows are independent: they are split over `threads`, and the result does not depend on the number of threads.
#pragma once

#include <cstdint>

namespace edge_moe {

// One group of columns of a matrix; row r of every array is at r * n.
struct GroupColumns {
  int rows, n;             // n columns, at most kMostGroup, a multiple of 16
  float* weights;          // (rows, n) to be rounded; refine_group() does not read them
  uint8_t* codes;          // (rows, n)
  float *scales, *biases;  // (rows,), exact in bfloat16
};

// GPTQ (arXiv 2210.17323): chooses scale and bias for the group, then rounds column by column and propagates each error
// to the columns after it. factor: (n, n), the group's diagonal block of the upper triangular R with H^-1 = R^T R.
// errors: (rows, n), out; errors * R[group, after] is to be subtracted from the columns after the group.
void gptq_group(const GroupColumns& group, int width, const float* factor, float* errors, int threads);

// Lowers the objective with everything outside the group fixed, in `rounds` rounds: least squares for scale and bias
// under H, then each code in turn. gradient: (rows, n), the group's columns of E H.
// moment: (n, n), the group's diagonal block of H. change: (rows, n), out, the change of E.
void refine_group(const GroupColumns& group, int width, const float* gradient, const float* moment, int rounds,
                  float* change, int threads);

}  // namespace edge_moe
