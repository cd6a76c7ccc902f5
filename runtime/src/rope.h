// Rotary position embedding: cos and sin of the angles of each position, and the rotation of a vector.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

namespace edge_moe {

// Fill cos and sin, (count, frequencies), for positions from `first` on, times scale. An angle is a float32 product, as
// in transformers.
inline void fill_rope(std::span<const float> frequency, float scale, int first, int count, float* cos, float* sin) {
  for (int position = first; position < first + count; ++position)
    for (size_t i = 0; i < frequency.size(); ++i) {
      const double angle = frequency[i] * float(position);
      *cos++ = float(std::cos(angle)) * scale;
      *sin++ = float(std::sin(angle)) * scale;
    }
}

// Rotate `pairs` pairs of x by the angles of one position: (i, i + half), or (2i, 2i + 1) if interleaved.
inline void rotate(float* x, const float* cos, const float* sin, int pairs, int half, bool interleaved) {
  const int step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  for (int i = 0; i < pairs; ++i) {
    float &a = x[i * step], &b = x[i * step + apart];
    const float turned = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = turned;
  }
}

// The opposite rotation.
inline void rotate_back(float* x, const float* cos, const float* sin, int pairs, int half, bool interleaved) {
  const int step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  for (int i = 0; i < pairs; ++i) {
    float &a = x[i * step], &b = x[i * step + apart];
    const float turned = a * cos[i] + b * sin[i];
    b = b * cos[i] - a * sin[i];
    a = turned;
  }
}

}  // namespace edge_moe
