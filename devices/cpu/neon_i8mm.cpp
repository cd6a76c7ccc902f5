// Kernels for 64-bit Arm with products of int8 matrices (Apple M2 and later, Jetson Thor).
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#include <iterator>
#include <utility>

#include "../half.h"
#include "../kernels.h"
#include "../lane_math.h"

namespace edge_moe {
namespace neon_i8mm {

#include "neon.inl"

}  // namespace neon_i8mm

const Kernels kNeonI8mmKernels = {
    "neon_i8mm",         neon_i8mm::kCodecKernels, int(std::size(neon_i8mm::kCodecKernels)),
    neon_i8mm::quantise, neon_i8mm::rms_norm,      neon_i8mm::layer_norm,
    neon_i8mm::gate_up,  neon_i8mm::attend_scores, neon_i8mm::attend_values,
    neon_i8mm::l2_norm,  neon_i8mm::convolve,      neon_i8mm::delta_rule,
    neon_i8mm::widen,    neon_i8mm::add_scaled,    neon_i8mm::add_positive,
    neon_i8mm::softmax};

}  // namespace edge_moe
