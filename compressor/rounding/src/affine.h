// The search for codes, scale and bias of one group of weights, shared by both quantisers.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace edge_moe {

inline constexpr int kMostGroup = 128;

// weight = scale * code + bias, scale and bias exact in bfloat16.
struct Affine {
  float scale = 0, bias = 0;
  float error = INFINITY;  // sum of importance * (unit * (weight - scale*code - bias))^2
};

// Finds the best of several ranges for n weights (a multiple of 16, at most kMostGroup), refined by least squares;
// without `search` it takes the whole range, plain round to nearest. importance: (n,). Writes n integer codes.
Affine fit_group(const float* w, const float* importance, int n, int width, bool search, float* codes);

// The code nearest to `value`.
inline float nearest_code(float value, float scale, float bias, float top_code) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to nearest even
  if (scale == 0.0f) return 0.0f;
  float code = (value - bias) / scale;
  code = !(code > 0.0f) ? 0.0f : code > top_code ? top_code : code;
  return (code + kRound) - kRound;
}

// Writes n codes into a zeroed row from bit `first_bit` on, in the order of devices/format.h.
template <typename Code>
void pack_codes(const Code* codes, int n, int width, uint8_t* out, size_t first_bit) {
  for (int i = 0; i < n; ++i) {
    const size_t bit = first_bit + size_t(i) * width;
    const uint32_t value = uint32_t(codes[i]) << (bit % 8);
    out[bit / 8] |= uint8_t(value);
    if (bit % 8 + width > 8) out[bit / 8 + 1] |= uint8_t(value >> 8);
  }
}

// float32 to bfloat16, round to nearest even, and back.
uint16_t to_bfloat16(float value);
float from_bfloat16(uint16_t value);

}  // namespace edge_moe
