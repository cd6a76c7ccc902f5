// Kernels for 64-bit Arm with dot products but without int8 matrix products (Apple M1, Jetson Orin).
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#include <iterator>
#include <utility>

#include "../half.h"
#include "../kernels.h"
#include "../lane_math.h"

namespace edge_moe {
namespace neon {

#include "neon.inl"

}  // namespace neon

const Kernels kNeonKernels = {"neon",         neon::kCodecKernels, int(std::size(neon::kCodecKernels)),
                              neon::quantise, neon::rms_norm,      neon::layer_norm,
                              neon::gate_up,  neon::attend_scores, neon::attend_values,
                              neon::l2_norm,  neon::convolve,      neon::delta_rule,
                              neon::widen,    neon::add_scaled,    neon::add_positive,
                              neon::softmax};

}  // namespace edge_moe
