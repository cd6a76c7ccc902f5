// Kernels of scalar.cpp for Avx2.
#include <cmath>
#include <cstring>

#include "../kernels.h"

namespace edge_moe {
namespace avx2 {

#include "vector_ops.inl"

}  // namespace avx2

const Kernels kAvx2Kernels = {"avx2",        kScalarKernels.matmul, kScalarKernels.quantise, avx2::rms_norm,
                              avx2::gate_up, avx2::attend,            avx2::add_scaled,          avx2::softmax,
                              kScalarKernels.dequantise_row};

}  // namespace edge_moe
