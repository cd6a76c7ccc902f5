// Reading single values of a matrix of any width and of the KV cache, and the positions that a token sees.
#pragma once

#include "../half.h"
#include "../position_sums.h"
#include "lanes.cuh"
#include "layer.h"

namespace edge_moe::cuda {

// The weight in column i of a row.
__device__ __forceinline__ float weight_at(const Matrix& m, size_t row, int i) {
  const size_t at = row * m.cols + i;
  if (m.codec == Codec::kFloat32) return reinterpret_cast<const float*>(m.codes)[at];
  if (m.codec == Codec::kBfloat16) return from_bfloat16(reinterpret_cast<const uint16_t*>(m.codes)[at]);
  const uint8_t* codes = m.codes + row * (size_t(m.cols) * m.width / 8);
  const int bit = i * m.width, low = bit % 8;
  int code = codes[bit / 8];
  if (low + m.width > 8) code |= codes[bit / 8 + 1] << 8;
  code = code >> low & ((1 << m.width) - 1);
  const size_t group = row * (m.cols / m.group) + i / m.group;
  if (m.codec == Codec::kMxfp4) return e2m1_value(code, e8m0_half(m.exponents()[group]));
  return from_bfloat16(m.scales[group]) * float(code) + from_bfloat16(m.biases[group]);
}

__device__ __forceinline__ void put(void* to, bool half, size_t at, float value) {
  if (half)
    static_cast<uint16_t*>(to)[at] = float_to_half(value);
  else
    static_cast<float*>(to)[at] = value;
}

__device__ __forceinline__ float get(const void* from, bool half, size_t at) {
  return half ? half_to_float(static_cast<const uint16_t*>(from)[at]) : static_cast<const float*>(from)[at];
}

// `Count` values, `step` apart, as stored: all loads are issued before the first is waited for, which happens in
// as_float().
template <int Count>
struct Raw {
  uint32_t bits[Count];
  bool half;

  __device__ __forceinline__ void load(const void* from, bool is_half, size_t at, size_t step) {
    half = is_half;
    if (half) {
      EDGE_MOE_UNROLL
      for (int i = 0; i < Count; ++i) bits[i] = static_cast<const uint16_t*>(from)[at + i * step];
    } else {
      EDGE_MOE_UNROLL
      for (int i = 0; i < Count; ++i) bits[i] = static_cast<const uint32_t*>(from)[at + i * step];
    }
  }
  __device__ __forceinline__ float as_float(int i) const {
    if (half) return half_to_float(uint16_t(bits[i]));
    float value;
    memcpy(&value, &bits[i], 4);
    return value;
  }
};

// Calls add(i, value) for `count` values in order, with `Ahead` loads in flight at a time.
template <int Ahead, typename Add>
__device__ __forceinline__ void each_value(const void* from, bool half, size_t at, size_t step, int count,
                                           const Add& add) {
  int i = 0;
  for (Raw<Ahead> some; i + Ahead <= count; i += Ahead) {
    some.load(from, half, at + size_t(i) * step, step);
    EDGE_MOE_UNROLL
    for (int j = 0; j < Ahead; ++j) add(i + j, some.as_float(j));
  }
  for (; i < count; ++i) add(i, get(from, half, at + size_t(i) * step));
}

// The same for column `column` of some rows of `stride` values: row_of(i) for i in [0, count).
template <int Ahead, typename Rows, typename Add>
__device__ __forceinline__ void each_of_rows(const void* from, bool half, const Rows& row_of, size_t stride, int column,
                                             int count, const Add& add) {
  int i = 0;
  for (Raw<Ahead> some; i + Ahead <= count; i += Ahead) {
    some.half = half;
    EDGE_MOE_UNROLL
    for (int j = 0; j < Ahead; ++j) {
      const size_t at = size_t(row_of(i + j)) * stride + column;
      some.bits[j] = half ? static_cast<const uint16_t*>(from)[at] : static_cast<const uint32_t*>(from)[at];
    }
    EDGE_MOE_UNROLL
    for (int j = 0; j < Ahead; ++j) add(i + j, some.as_float(j));
  }
  for (; i < count; ++i) add(i, get(from, half, size_t(row_of(i)) * stride + column));
}

// The end, exclusive, of the positions that token `token` of a span sees.
__device__ __forceinline__ int end_of(const Span& span, int token) { return *span.position + span.first + token + 1; }

}  // namespace edge_moe::cuda
