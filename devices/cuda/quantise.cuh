// Quantising a block of inputs to int8, by a warp.
#pragma once

#include "decode.h"
#include "lanes.cuh"

namespace edge_moe::cuda {

// inputs: the first `count` of the block's 64, the others are zeros; at: the index of the block in `into`.
__device__ __forceinline__ void quantise_block(const float* inputs, int count, const VectorBuffer& into, size_t at) {
  const int lane = int(threadIdx.x) % kWarp;
  float in[2];
  for (int half = 0; half < 2; ++half) {
    const int i = half * kWarp + lane;
    in[half] = i < count ? inputs[i] : 0.0f;
  }
  const float top = warp_top(fmaxf(fmaxf(fabsf(in[0]), fabsf(in[1])), 0.0f));
  const float inverse = top > 0.0f ? 127.0f / top : 0.0f, scale = top / 127.0f;
  const int codes[2] = {input_code(in[0], inverse), input_code(in[1], inverse)};
  const bool two = two_planes(warp_sum(codes[0] * codes[0] + codes[1] * codes[1]));
  int sums[2];  // of each half, in steps of the lows
  for (int half = 0; half < 2; ++half) {
    const int low = two ? low_code(in[half], inverse) : 0;
    into.codes[at * kBlock + half * kWarp + lane] = int8_t(codes[half]);
    into.lows[at * kBlock + half * kWarp + lane] = int8_t(low);
    sums[half] = warp_sum(codes[half] * 256 + low);
  }
  if (lane) return;
  into.two_planes[at] = two;
  into.scales[at] = scale;
  into.sums[0][2 * at] = scale * (float(sums[0]) * kLowStep);
  into.sums[0][2 * at + 1] = scale * (float(sums[1]) * kLowStep);
  into.sums[1][at] = scale * (float(sums[0] + sums[1]) * kLowStep);
}

}  // namespace edge_moe::cuda
