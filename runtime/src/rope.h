// Rotary position: cos and sin of the angles of every position, and how a vector is turned by them.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

namespace edge_moe {

// cos, sin: (count, frequencies), of positions from `first` on, times scale. An angle is a float32 product, as
// transformers has it.
inline void fill_rope(std::span<const float> frequency, float scale, int first, int count, float* cos, float* sin) {
  for (int position = first; position < first + count; ++position)
    for (size_t i = 0; i < frequency.size(); ++i) {
      const double angle = frequency[i] * float(position);
      *cos++ = float(std::cos(angle)) * scale;
      *sin++ = float(std::sin(angle)) * scale;
    }
}

// Turn the `half` pairs of x by the angles of one position: (i, i + half), or (2i, 2i + 1) if interleaved.
inline void rotate(float* x, const float* cos, const float* sin, int half, bool interleaved) {
  const int step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  for (int i = 0; i < half; ++i) {
    float &a = x[i * step], &b = x[i * step + apart];
    const float turned = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = turned;
  }
}

}  // namespace edge_moe
