// The CPU kernels: what a layer of the model asks of an instruction set, as one table of functions.
//
// Every instruction set gives the same bits. So the order of each float operation is part of the contract, and
// scalar.cpp is its definition. A product with a packed matrix is exact in integers over the inputs that share both
// scales, and one running sum over these: instruction sets may add the integers up in any order. Other sums are kept in
// 16 lanes (lane = position modulo 16) and folded in halves at the end. A multiply-add is fused where the contract says
// fma and nowhere else. A row of a product never depends on the other rows or tokens of the call, so threads may
// split rows and prompts may be cut into chunks without changing one bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace edge_moe {

inline constexpr int kBlock = 64;              // inputs that share one activation scale
inline constexpr float kLowStep = 1.0f / 256;  // of a low, in steps of a code
inline constexpr int kPlaneFlags = 16;         // flags of blocks that are read at a time
inline constexpr int kLanes = 16;              // partial sums of every float reduction
inline constexpr int kKeyBlock = 16;           // positions of the KV cache whose keys lie together

// A weight matrix (rows, cols) as format.h lays it out. Parts that its codec does not have are not read.
struct Matrix {
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;    // bfloat16 (rows, cols/group)
  const uint16_t* biases = nullptr;    // bfloat16 (rows, cols/group)
  const float* output_bias = nullptr;  // (rows,), added to each product; null: none
  int rows = 0, cols = 0;
  int width = 0;
  int group = 0;
  Codec codec = Codec::kAffine;

  explicit operator bool() const { return codes != nullptr; }
  bool takes_rounded() const { return traits(codec).input == InputForm::kRounded; }
};

// The matrix whose parts lie where the layout says, from `bytes` on.
inline Matrix matrix_at(const MatrixLayout& layout, const uint8_t* bytes) {
  Matrix m;
  m.codes = bytes + layout.parts[kCodes].offset;
  m.scales = reinterpret_cast<const uint16_t*>(bytes + layout.parts[kScales].offset);
  m.biases = reinterpret_cast<const uint16_t*>(bytes + layout.parts[kBiases].offset);
  if (layout.output_bias.bytes) m.output_bias = reinterpret_cast<const float*>(bytes + layout.output_bias.offset);
  m.rows = layout.rows, m.cols = layout.cols;
  m.codec = layout.encoding.codec, m.width = layout.encoding.width, m.group = layout.encoding.group;
  return m;
}

inline Matrix float_matrix(const float* values, int rows, int cols) {
  Matrix m;
  m.codes = reinterpret_cast<const uint8_t*>(values);
  m.rows = rows, m.cols = cols, m.width = 32, m.codec = Codec::kFloat32;
  return m;
}

// Vectors of inputs rounded to integers in blocks of 64: an input is its block's scale times (code + low / 256). Most
// blocks have one plane of int8 codes, and lows of zero. A block has a second plane, the lows, where its largest input
// is so far above the others that int8 codes would say little of these: see two_planes() in lane_math.h. That depends
// on the block alone, so bits do not depend on what is rounded with it.
// `blocks` is ceil(cols/64); codes past cols are zeros.
struct Quantised {
  int8_t* codes = nullptr;        // (vectors, blocks*64)
  int8_t* lows = nullptr;         // (vectors, blocks*64)
  uint8_t* two_planes = nullptr;  // (vectors, blocks): 1 where a block has lows; kPlaneFlags more may be read
  float* scales = nullptr;        // (vectors, blocks)
  // Sums of the inputs over each weight group of 32, 64 and 128: what a group's bias is multiplied by.
  float* sums[3] = {};  // (vectors, blocks*2), (vectors, blocks), (vectors, (blocks+1)/2)

  // From a vector on.
  Quantised from(size_t vector, int cols) const {
    const size_t blocks = (size_t(cols) + kBlock - 1) / kBlock, at = vector * blocks;
    return {codes + at * kBlock,
            lows + at * kBlock,
            two_planes + at,
            scales + at,
            {sums[0] + 2 * at, sums[1] + at, sums[2] + vector * ((blocks + 1) / 2)}};
  }

  // A vector's sums over groups of 32, 64 or 128.
  const float* group_sums(int group) const { return sums[group == 32 ? 0 : group == 64 ? 1 : 2]; }
};

// Input vectors of a product, once as they are and once rounded.
struct Activations {
  const float* values = nullptr;  // (vectors, cols)
  Quantised quantised;
  const int32_t* rows = nullptr;  // (count,) vector of each token; null: token t is vector t
  int count = 0;                  // tokens
  int cols = 0;

  int blocks() const { return (cols + kBlock - 1) / kBlock; }
  size_t vector(int token) const { return rows ? size_t(rows[token]) : size_t(token); }
};

// One KV head's cache. Keys lie in blocks of kKeyBlock positions, (blocks, head_dim, kKeyBlock), so that a register of
// them is one dimension of as many positions; values as (positions, stride).
struct KeyValues {
  const void *keys, *values;
  size_t stride;  // in values
  bool half;      // half precision, else floats
};

// The functions of an instruction set for matrices of one codec and width.
struct CodecKernels {
  Codec codec;
  int width;

  // y[t*y_stride + row] = matrix[row] . x[t] for rows [row_begin, row_end) and every token t, without the output bias.
  // Affine: for each group, sum = fma(bias, sum of inputs, sum), then for each of its blocks (a group of 32: for
  // itself) sum = fma(dot, scale_w * scale_x, sum). A dot is the integer one of the codes, as a float, or
  // fma(float(that of the lows), kLowStep, float(that of the codes)) where the block has two planes.
  // Others: 16 lanes of fma(weight, input, lane), folded.
  void (*product)(const Matrix& matrix, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end);

  // One row as float32.
  void (*dequantise_row)(const Matrix& matrix, int row, float* y);
};

// Output strides are in floats. All sizes are in elements.
struct Kernels {
  const char* name;
  const CodecKernels* codecs;  // what can be multiplied
  int codec_count;

  // Round one vector of cols inputs, to vector 0 of `to`. With scale = top / 127 of the largest |input|, a code is
  // input_code(input, 127 / top), and a low is what that left, by low_code.
  void (*quantise)(const float* x, int cols, const Quantised& to);

  // y = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, float* y, int n);

  // gate = activation(gate) * up; activation: 0 silu, 1 gelu (tanh form)
  void (*gate_up)(float* gate, const float* up, int n, int activation);

  // scores[query*scores_stride + position] = scale * q[query] . key, for the positions of all key blocks that [begin,
  // end) touches; scores must reach so far. One sum over head_dim: sum = fma(q, key, sum).
  void (*attend_scores)(const float* const* q, int queries, const KeyValues& cache, int begin, int end, int head_dim,
                        float scale, float* scores, size_t scores_stride);

  // out[query] += the weighted sum of values [begin, end), n floats: out = fma(weight, value, out), position by
  // position; who calls cuts many of them into pieces (position_sums.h).
  void (*attend_values)(const float* weights, size_t weights_stride, int queries, const KeyValues& cache, int begin,
                        int end, int n, float* const* out);

  // y = halves as floats
  void (*widen)(const uint16_t* halves, float* y, int n);

  // y += weight * x
  void (*add_scaled)(float* y, const float* x, float weight, int n);

  // x = softmax(x) over [begin, end)
  void (*softmax)(float* x, int begin, int end);

  // Those of a codec and width; null where there are none.
  const CodecKernels* find(Codec codec, int width) const {
    for (const CodecKernels* one = codecs; one != codecs + codec_count; ++one)
      if (one->codec == codec && one->width == width) return one;
    return nullptr;
  }

  // CodecKernels::product, and the output bias. Of a codec and width that find() finds.
  void matmul(const Matrix& matrix, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end) const {
    find(matrix.codec, matrix.width)->product(matrix, x, y, y_stride, row_begin, row_end);
    for (int t = 0; matrix.output_bias && t < x.count; ++t)
      for (int row = row_begin; row < row_end; ++row) y[t * y_stride + row] += matrix.output_bias[row];
  }

  void dequantise_row(const Matrix& matrix, int row, float* y) const {
    find(matrix.codec, matrix.width)->dequantise_row(matrix, row, y);
  }
};

// The tables that this binary has and this machine can run, best first; scalar is always the last.
const Kernels* const* available_kernels(int* count);

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels, kAvx512Kernels;    // on x86-64 only
extern const Kernels kNeonKernels, kNeonI8mmKernels;  // on 64-bit Arm only

}  // namespace edge_moe
