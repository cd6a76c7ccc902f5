// Conversion between float and IEEE half precision, the default type of the KV cache: round to nearest, ties to even.
// A GPU's instructions give the same bits, except for the payload of a NaN.
//
// Static: sources compiled for different instruction sets include this, and must not share a compiled copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "lane_math.h"

namespace edge_moe {

EDGE_MOE_BOTH static inline float half_to_float(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(half));
  return converted;
#else
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {  // infinity and NaN
    bits = 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = (rest << 13) + ((127 - 15) << 23);
  } else {  // subnormal: a multiple of 2^-24
    const float value = float(rest) * 0x1p-24f;
    memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float value;
  memcpy(&value, &bits, 4);
  return value;
#endif
}

// The smallest magnitude that rounds to infinity: half a step above the largest half, 65504.
constexpr float kHalfOverflow = 65520.0f;

EDGE_MOE_BOTH static inline uint16_t float_to_half(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t converted;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(converted) : "f"(value));
  return converted;
#else
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // kHalfOverflow
  if (bits < 0x38800000) {                       // below the smallest normal half: adding 0.5 rounds at 2^-24
    float sum;
    memcpy(&sum, &bits, 4);
    sum += 0.5f;
    memcpy(&bits, &sum, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  bits -= (127 - 15) << 23;
  return sign | uint16_t((bits + 0xfff + (bits >> 13 & 1)) >> 13);
#endif
}

}  // namespace edge_moe
