// Scalar arithmetic that all devices share, with the same bits in a CPU's vectors and in a CUDA kernel.
//
// Static: sources compiled for different instruction sets include this, and must not share a compiled copy. Compiled
// without contraction (-ffp-contract=off, -fmad=false).
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define EDGE_MOE_BOTH __host__ __device__
#else
#define EDGE_MOE_BOTH
#endif

namespace edge_moe {

// A block of 64 inputs whose largest is more than 4 times their root mean square has two planes of codes. The KL
// divergence due to quantised inputs on SmolLM2-135M, and the share of blocks with two planes, by this threshold:
// without second planes 0.0074; 5 times 0.0009, 20 %; 4 times 0.0006, 33 %; 3.5 times 0.0003, 42 %. On Zen 4, products
// of a prompt take 1.24 times as long if a quarter of the blocks has two, 1.5 times if the blocks differ by token.
inline constexpr int kTwoPlanesBelow = 64 * 127 * 127 / (4 * 4);

EDGE_MOE_BOTH static inline float from_bfloat16(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

// Half of an E8M0 scale: 2^(exponent - 128), which a float holds as a subnormal for the smallest two.
EDGE_MOE_BOTH static inline float e8m0_half(uint8_t exponent) {
  const uint32_t bits = uint32_t(exponent) << 23, subnormal = 1u << 22, scale = bits > subnormal ? bits : subnormal;
  float result;
  memcpy(&result, &scale, 4);
  return result * 0.5f;
}

// An E2M1 value, given half of its scale; the sign of a zero is kept.
EDGE_MOE_BOTH static inline float e2m1_value(int code, float half) {
  const int low = code & 7, twice = low < 2 ? low : (2 + low % 2) << (low / 2 - 1);
  const float magnitude = half * float(twice);
  return code & 8 ? -magnitude : magnitude;
}

// exp(x) to about 2 ulp: x = n*ln2 + r, a polynomial in r, and n added to the exponent. This is not libm's because that
// differs between machines. Results below 2^-126 flush to zero.
EDGE_MOE_BOTH static inline float exp_lane(float x) {
  x = x > 88.0f ? 88.0f : x;
  float keep = x < -87.0f ? 0.0f : 1.0f;
  x = x < -87.0f ? -87.0f : x;
  float n = x * 1.44269504f + 12582912.0f;  // round to nearest by adding 1.5 * 2^23
  n = n - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return p * power * keep;
}

// How the products of gate and up become the input of down.
enum class Gate { kSilu, kGelu, kSigmoid, kClamped, kBilinear, kRelu2 };
struct Activation {
  Gate gate = Gate::kSilu;
  float alpha = 0, limit = 0, shift = 1;  // of kClamped
};

// silu(gate) * up; gelu(gate) * up, in its tanh form; sigmoid(gate) * up; of a gate of at most `limit` and an up within
// +-limit, gate * sigmoid(alpha * gate) * (up + shift); gate * up; or, of an MLP without a gate, relu(up)^2.
EDGE_MOE_BOTH static inline float gated(float gate, float up, const Activation& activation) {
  if (activation.gate == Gate::kSilu) return gate / (1.0f + exp_lane(-gate)) * up;
  if (activation.gate == Gate::kSigmoid) return up / (1.0f + exp_lane(-gate));
  if (activation.gate == Gate::kBilinear) return gate * up;
  if (activation.gate == Gate::kRelu2) return up > 0.0f ? up * up : 0.0f;
  if (activation.gate == Gate::kClamped) {
    const float limit = activation.limit;
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate / (1.0f + exp_lane(-(activation.alpha * gate))) * (up + activation.shift);
  }
  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u))
  const float u = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.0f + exp_lane(-2.0f * u)) * up;
}

// cap * tanh(x / cap)
EDGE_MOE_BOTH static inline float soft_cap(float x, float cap) {
  return cap - 2.0f * cap / (1.0f + exp_lane(2.0f * (x / cap)));
}

// In double: libm's functions differ between machines in the last bit, which rounding from double almost always hides.
EDGE_MOE_BOTH static inline float sigmoid(float x) { return float(1.0 / (1.0 + exp(-double(x)))); }

EDGE_MOE_BOTH static inline double softplus(double x) { return x > 40.0 ? x : log1p(exp(x)); }

// The share of a gated delta net's state that is left after a token: exp(-rate * softplus(input + bias)).
EDGE_MOE_BOTH static inline float decay_of(float input, float bias, float rate) {
  return float(exp(-double(rate) * softplus(double(input + bias))));
}

// The time step of a Mamba-2 head at a token, at least `least`, and the share of the state that is left after it.
EDGE_MOE_BOTH static inline float step_of(float input, float bias, float least) {
  const float step = float(softplus(double(input + bias)));
  return step < least ? least : step;
}
EDGE_MOE_BOTH static inline float left_after(float step, float rate) {
  return float(exp(-double(rate) * double(step)));
}

// The score of a router's expert: the root of the softplus of its logit.
EDGE_MOE_BOTH static inline float sqrt_softplus(float x) { return float(sqrt(softplus(double(x)))); }

// The sums of one dimension of a compressed row, a softmax of gates over tokens: the largest gate so far, and the sums
// of weights and of weighted values relative to it.
struct PoolSums {
  float top = -1e30f, weight = 0.0f, value = 0.0f;

  EDGE_MOE_BOTH void add(float gate, float its) {
    const float higher = gate > top ? gate : top, left = exp_lane(top - higher), share = exp_lane(gate - higher);
    weight = weight * left + share;
    value = value * left + share * its;
    top = higher;
  }
  EDGE_MOE_BOTH float mean() const { return value / weight; }
};

// What hyper-connections (arXiv 2512.24880) make of a token's products: how much of each stream goes into the input,
// `before`; how much of the output each stream gets, `after`; and how much of stream `from` goes to stream `to`,
// between[from * streams + to]: a softmax over `to`, whose columns and rows are made to sum to one in turn.
// products and base: (streams * (streams + 2),); scale: (3,), of the three kinds in this order.
EDGE_MOE_BOTH static inline void hyper_shares(const float* products, const float* base, const float* scale, int streams,
                                              int iterations, float eps, float* before, float* after, float* between) {
  for (int i = 0; i < streams; ++i) before[i] = sigmoid(products[i] * scale[0] + base[i]) + eps;
  products += streams, base += streams;
  if (!after) return;
  for (int i = 0; i < streams; ++i) after[i] = 2.0f * sigmoid(products[i] * scale[1] + base[i]);
  products += streams, base += streams;
  for (int from = 0; from < streams; ++from) {
    float* row = between + from * streams;
    float top = -INFINITY, sum = 0.0f;
    for (int to = 0; to < streams; ++to) {
      row[to] = products[from * streams + to] * scale[2] + base[from * streams + to];
      top = row[to] > top ? row[to] : top;
    }
    for (int to = 0; to < streams; ++to) sum += row[to] = float(exp(double(row[to] - top)));
    for (int to = 0; to < streams; ++to) row[to] = row[to] / sum + eps;
  }
  // Divide the values at first, first + step... of each of `streams` rows or columns, `apart` from one to the next.
  const auto normalise = [&](int step, int apart) {
    for (int line = 0; line < streams; ++line) {
      float sum = 0.0f;
      for (int i = 0; i < streams; ++i) sum += between[line * apart + i * step];
      for (int i = 0; i < streams; ++i) between[line * apart + i * step] /= sum + eps;
    }
  };
  normalise(streams, 1);
  for (int i = 1; i < iterations; ++i) normalise(1, streams), normalise(streams, 1);
}

// The gate of a stream's n-gram embedding, from the product of its key and the stream, both normed: the sigmoid of the
// root of its mean, with its sign.
EDGE_MOE_BOTH static inline float ngram_gate(float product, int dim) {
  const double mean = double(product) / sqrt(double(dim)), size = mean < 0 ? -mean : mean;
  const double root = sqrt(size > 1e-6 ? size : 1e-6);
  return sigmoid(float(mean > 0 ? root : mean < 0 ? -root : 0.0));
}

EDGE_MOE_BOTH static inline int nearest(float x) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(x);
#else
  return int(__builtin_nearbyintf(x));
#endif
}

// The int8 code of an input; 0 for one that is not finite, which is detected when logits are read. inverse: 127 / the
// largest |input| of the block.
EDGE_MOE_BOTH static inline int input_code(float input, float inverse) {
  const float scaled = input * inverse;
  return scaled >= -127.5f && scaled <= 127.5f ? nearest(scaled) : 0;
}

// Whether a block of inputs has lows, given the sum of the squares of its codes. A block of zeros and inputs that are
// not finite has none.
EDGE_MOE_BOTH static inline bool two_planes(int squares) { return squares > 0 && squares < kTwoPlanesBelow; }

// The remainder of an input after its code, in 1/256 of the code's step, at most 127.
EDGE_MOE_BOTH static inline int low_code(float input, float inverse) {
  const float scaled = input * inverse;
  if (!(scaled >= -127.5f && scaled <= 127.5f)) return 0;
  const int low = nearest((scaled - float(nearest(scaled))) * 256.0f);
  return low < 127 ? low : 127;
}

}  // namespace edge_moe
