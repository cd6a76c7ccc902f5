// A block of inputs to int8, by a warp.
#pragma once

#include "decode.h"
#include "lanes.cuh"

namespace edge_moe::cuda {

// inputs: `count` of the block's 64, the others are zeros; at: the number of the block in `into`.
__device__ __forceinline__ void quantise_block(const float* inputs, int count, const VectorBuffer& into, size_t at) {
  const int lane = int(threadIdx.x) % kWarp;
  float in[2];
  for (int half = 0; half < 2; ++half) {
    const int i = half * kWarp + lane;
    in[half] = i < count ? inputs[i] : 0.0f;
  }
  const float top = warp_top(fmaxf(fmaxf(fabsf(in[0]), fabsf(in[1])), 0.0f));
  const float inverse = top > 0.0f ? 127.0f / top : 0.0f, scale = top / 127.0f;
  int sums[2];
  for (int half = 0; half < 2; ++half) {
    const int code = input_code(in[half], inverse);
    into.codes[at * kBlock + half * kWarp + lane] = int8_t(code);
    sums[half] = warp_sum(code);
  }
  if (lane) return;
  into.scales[at] = scale;
  into.sums[0][2 * at] = scale * float(sums[0]);
  into.sums[0][2 * at + 1] = scale * float(sums[1]);
  into.sums[1][at] = scale * float(sums[0] + sums[1]);
}

}  // namespace edge_moe::cuda
