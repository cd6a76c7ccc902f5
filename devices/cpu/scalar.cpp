// The definition of every CPU kernel, in portable C++; the other instruction sets reproduce its bits.
#include <cmath>
#include <cstring>
#include <iterator>

#include "../half.h"
#include "../kernels.h"
#include "../lane_math.h"

namespace edge_moe {
namespace scalar {

constexpr int kRegister = 4;

#include "vector_ops.inl"

// Code i of a row, which is one little-endian bit stream.
inline int code_at(const uint8_t* row, int i, int width) {
  size_t bit = size_t(i) * width;
  int low = int(bit % 8);
  int value = row[bit / 8];
  if (low + width > 8) value |= row[bit / 8 + 1] << 8;
  return (value >> low) & ((1 << width) - 1);
}

float as_weight(uint16_t value) { return from_bfloat16(value); }
float as_weight(float value) { return value; }

template <Codec C>
float dot_packed(const Matrix& m, int row, const Activations& x, int vector) {
  const uint8_t* codes = m.codes + codes_bytes(row, m.cols, m.width);
  const int groups = m.cols / m.group;
  const Quantised q = x.quantised.from(size_t(vector), x.cols);
  const float* x_sums = q.group_sums(m.group);

  const int part = m.group < kBlock ? m.group : kBlock;  // number of inputs that share both scales
  float sum = 0.0f;
  for (int group = 0; group < groups; ++group) {
    const size_t at = size_t(row) * groups + group;
    const float scale = C == Codec::kMxfp4 ? e8m0_half(m.exponents()[at]) : from_bfloat16(m.scales[at]);
    const float bias = C == Codec::kMxfp4 ? -kE2m1Zero * scale : from_bfloat16(m.biases[at]);
    sum = std::fma(bias, x_sums[group], sum);
    for (int first = group * m.group; first < (group + 1) * m.group; first += part) {
      const int block = first / kBlock;
      int of_codes = 0, of_lows = 0;
      for (int i = first; i < first + part; ++i) {
        const int stored = code_at(codes, i, m.width), code = C == Codec::kMxfp4 ? kE2m1[stored] : stored;
        of_codes += code * q.codes[i];
        of_lows += code * q.lows[i];
      }
      float dot = float(of_codes);
      if (q.two_planes[block]) dot = std::fma(float(of_lows), kLowStep, dot);
      sum = std::fma(dot, scale * q.scales[block], sum);
    }
  }
  return sum;
}

template <typename T>
float dot_float(const Matrix& m, int row, const Activations& x, int vector) {
  const float* values = x.values + size_t(vector) * x.cols;
  const T* weights = reinterpret_cast<const T*>(m.codes) + size_t(row) * m.cols;
  float lanes[kLanes] = {};
  for (int i = 0; i < m.cols; ++i) lanes[i % kLanes] = std::fma(as_weight(weights[i]), values[i], lanes[i % kLanes]);
  return fold(lanes);
}

// One value for each row and token, by a function of these.
template <float (*Dot)(const Matrix&, int, const Activations&, int)>
void product(const Matrix& m, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end) {
  for (int row = row_begin; row < row_end; ++row)
    for (int token = 0; token < x.count; ++token)
      y[token * y_stride + row] = Dot(m, row, x, x.rows ? x.rows[token] : token);
}

void quantise(const float* x, int cols, const Quantised& to) {
  const int blocks = (cols + kBlock - 1) / kBlock;
  for (int block = 0; block < blocks; ++block) {
    const int count = cols - block * kBlock < kBlock ? cols - block * kBlock : kBlock;
    const float* in = x + block * kBlock;
    int8_t *codes = to.codes + block * kBlock, *lows = to.lows + block * kBlock;
    float top = 0.0f;
    for (int i = 0; i < count; ++i) top = std::fabs(in[i]) > top ? std::fabs(in[i]) : top;
    const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
    int squares = 0, sums[2] = {};
    for (int i = 0; i < kBlock; ++i) {
      codes[i] = int8_t(i < count ? input_code(in[i], inverse) : 0);
      squares += codes[i] * codes[i];
    }
    const bool two = two_planes(squares);
    for (int i = 0; i < kBlock; ++i) {
      lows[i] = int8_t(two && i < count ? low_code(in[i], inverse) : 0);
      sums[i / 32] += codes[i] * 256 + lows[i];
    }
    store_block(to, block, two, top / 127.0f, sums);
  }
  pair_sums(to, blocks);
}

void dequantise_affine(const Matrix& m, int row, float* y) {
  const uint8_t* codes = m.codes + codes_bytes(row, m.cols, m.width);
  const int groups = m.cols / m.group;
  for (int i = 0; i < m.cols; ++i) {
    size_t group = size_t(row) * groups + i / m.group;
    y[i] = from_bfloat16(m.scales[group]) * float(code_at(codes, i, m.width)) + from_bfloat16(m.biases[group]);
  }
}

void dequantise_mxfp4(const Matrix& m, int row, float* y) {
  const uint8_t *codes = m.codes + codes_bytes(row, m.cols, m.width), *exponents = m.exponents();
  const size_t first = size_t(row) * (m.cols / m.group);
  for (int i = 0; i < m.cols; ++i)
    y[i] = e2m1_value(code_at(codes, i, m.width), e8m0_half(exponents[first + i / m.group]));
}

template <typename T>
void dequantise_floats(const Matrix& m, int row, float* y) {
  const T* weights = reinterpret_cast<const T*>(m.codes) + size_t(row) * m.cols;
  for (int i = 0; i < m.cols; ++i) y[i] = as_weight(weights[i]);
}

template <typename T>
float score_at(const float* q, const T* keys, int position, int head_dim) {
  const T* key = keys + size_t(position / kKeyBlock) * head_dim * kKeyBlock + position % kKeyBlock;
  float sum = 0.0f;
  for (int d = 0; d < head_dim; ++d) sum = std::fma(q[d], as_float(key[size_t(d) * kKeyBlock]), sum);
  return sum;
}

void attend_scores(const float* const* q, int queries, const KeyValues& cache, int begin, int end, int head_dim,
                   float scale, float* scores, size_t scores_stride) {
  const int first = begin / kKeyBlock * kKeyBlock, last = (end + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  for (int query = 0; query < queries; ++query)
    for (int at = first; at < last; ++at)
      scores[query * scores_stride + at] =
          scale * (cache.half ? score_at(q[query], static_cast<const uint16_t*>(cache.keys), at, head_dim)
                              : score_at(q[query], static_cast<const float*>(cache.keys), at, head_dim));
}

template <typename T>
void add_values(const T* values, float weight, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = std::fma(weight, as_float(values[i]), out[i]);
}

void attend_values(const float* weights, size_t weights_stride, int queries, const KeyValues& cache, int begin, int end,
                   int n, float* const* out) {
  for (int query = 0; query < queries; ++query)
    for (int at = begin; at < end; ++at) {
      const float weight = weights[query * weights_stride + at];
      if (cache.half)
        add_values(static_cast<const uint16_t*>(cache.values) + at * cache.stride, weight, out[query], n);
      else
        add_values(static_cast<const float*>(cache.values) + at * cache.stride, weight, out[query], n);
    }
}

void delta_rule(const DeltaHead& head, const float* from, float* to) { delta_from(head, from, to, 0); }

void widen(const uint16_t* halves, float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = half_to_float(halves[i]);
}

constexpr CodecKernels affine(int width) {
  return {Codec::kAffine, width, product<dot_packed<Codec::kAffine>>, dequantise_affine};
}

constexpr CodecKernels kCodecKernels[] = {
    affine(1),
    affine(2),
    affine(3),
    affine(4),
    affine(5),
    affine(6),
    affine(8),
    {Codec::kBfloat16, 16, product<dot_float<uint16_t>>, dequantise_floats<uint16_t>},
    {Codec::kFloat32, 32, product<dot_float<float>>, dequantise_floats<float>},
    {Codec::kMxfp4, 4, product<dot_packed<Codec::kMxfp4>>, dequantise_mxfp4},
};

}  // namespace scalar

const Kernels kScalarKernels = {"scalar",         scalar::kCodecKernels, int(std::size(scalar::kCodecKernels)),
                                scalar::quantise, scalar::rms_norm,      scalar::layer_norm,
                                scalar::gate_up,  scalar::attend_scores, scalar::attend_values,
                                scalar::l2_norm,  scalar::convolve,      scalar::delta_rule,
                                scalar::widen,    scalar::add_scaled,    scalar::add_positive,
                                scalar::softmax};

}  // namespace edge_moe
