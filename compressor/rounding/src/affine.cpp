// The search for a group's scale and bias; see affine.h.
//
// Clipping a group's range trades a large error at the extremes for a finer step elsewhere. So several ranges about the
// middle are tried for each group, and the best is refined by alternating least squares (scale and bias for the codes,
// codes for the scale and bias). Scale and bias are rounded to bfloat16 before codes are chosen, so the measured error
// is that of the stored values.
#include "affine.h"

#include <algorithm>
#include <cstring>

namespace edge_moe {

namespace {

constexpr int kRangeSteps = 16;        // ranges to try, from the whole one down
constexpr int kRefinements = 4;        // maximum rounds of least squares from the best range
constexpr float kRound = 12582912.0f;  // as in nearest_code()

// The nearest codes for scale and bias rounded to bfloat16, and their error, in units of 1/unit squared.
Affine round_group(const float* w, const float* importance, int n, float top_code, float scale, float bias, float unit,
                   float* codes) {
  Affine a;
  a.scale = from_bfloat16(to_bfloat16(scale));
  a.bias = from_bfloat16(to_bfloat16(bias));
  float inverse = 1.0f / a.scale;
  if (!std::isfinite(inverse)) inverse = 0.0f;  // the scale is 0 or almost: only the bias counts
  float lanes[16] = {};
  for (int i = 0; i < n; i += 16)
    for (int j = 0; j < 16; ++j) {
      float code = (w[i + j] - a.bias) * inverse;
      code = code < 0.0f ? 0.0f : code > top_code ? top_code : code;
      code = (code + kRound) - kRound;
      codes[i + j] = code;
      const float miss = (w[i + j] - (a.scale * code + a.bias)) * unit;
      lanes[j] += importance[i + j] * (miss * miss);
    }
  a.error = 0;
  for (float lane : lanes) a.error += lane;
  return a;
}

}  // namespace

Affine fit_group(const float* w, const float* importance, int n, int width, bool search, float* best_codes) {
  const float top_code = float((1 << width) - 1);
  float low = w[0], high = w[0];
  for (int i = 1; i < n; ++i) low = std::min(low, w[i]), high = std::max(high, w[i]);
  int exponent;  // of the power of two that scales weights near one, so that squares neither overflow nor underflow
  std::frexp(std::max(-low, high), &exponent);
  const float unit = std::ldexp(1.0f, std::clamp(-exponent, -126, 126));
  float codes[kMostGroup];
  Affine best;
  auto consider = [&](float scale, float bias) {
    const Affine a = round_group(w, importance, n, top_code, scale, bias, unit, codes);
    if (!(a.error < best.error)) return false;
    best = a;
    std::memcpy(best_codes, codes, n * sizeof(float));
    return true;
  };
  const float narrowest = width == 1 ? 0.2f : width == 2 ? 0.5f : width == 3 ? 0.7f : 0.85f;
  const float middle = 0.5f * (low + high), range = high - low;
  for (int step = 0; step < (search ? kRangeSteps : 1); ++step) {
    const float part = 1.0f - (1.0f - narrowest) * float(step) / float(kRangeSteps - 1);
    consider(part * range / top_code, middle - 0.5f * part * range);
  }
  for (int round = 0; round < (search ? kRefinements : 0); ++round) {
    double sum = 0, sum_q = 0, sum_w = 0, sum_qq = 0, sum_qw = 0;
    for (int i = 0; i < n; ++i) {
      const double m = importance[i], q = best_codes[i], value = w[i];
      sum += m, sum_q += m * q, sum_w += m * value, sum_qq += m * q * q, sum_qw += m * q * value;
    }
    const double spread = sum * sum_qq - sum_q * sum_q;
    if (!(spread > 0)) break;
    const double scale = (sum * sum_qw - sum_q * sum_w) / spread;
    if (!consider(float(scale), float((sum_w - scale * sum_q) / sum))) break;
  }
  return best;
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

}  // namespace edge_moe
