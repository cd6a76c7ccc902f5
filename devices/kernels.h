// The CPU kernels: the functions that a layer of the model needs, as one table per instruction set.
//
// Every instruction set gives the same bits. So the order of float operations is part of the contract, which scalar.cpp
// defines. A product with a packed matrix is an exact integer sum over the inputs that share both scales, and one
// running float sum over these: the integers may be added in any order. Other sums are kept in 16 lanes (lane =
// position modulo 16) and folded in halves at the end. A multiply-add is fused where the contract says fma and nowhere
// else. A row of a product never depends on other rows or tokens of the call, so threads may split rows and prompts may
// be split into chunks without changing a bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "format.h"
#include "lane_math.h"

namespace edge_moe {

inline constexpr int kBlock = 64;              // inputs that share one activation scale
inline constexpr float kLowStep = 1.0f / 256;  // step of a low, relative to the step of a code
inline constexpr int kLanes = 16;              // partial sums of every float reduction
inline constexpr float kKeyEps = 1e-6f;        // added to the squared norms of a gated delta net's queries and keys
inline constexpr int kKeyBlock = 16;           // positions of the KV cache whose keys are interleaved
inline constexpr float kNoSink = -std::numeric_limits<float>::infinity();  // a logit without a share of a softmax

// A weight matrix (rows, cols) as defined in format.h. Parts that its codec does not have are not read.
struct Matrix {
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;    // bfloat16 (rows, cols/group); of kMxfp4 bytes, see exponents()
  const uint16_t* biases = nullptr;    // bfloat16 (rows, cols/group)
  const float* output_bias = nullptr;  // (rows,), added to each product; null: none
  int rows = 0, cols = 0;
  int width = 0;
  int group = 0;
  Codec codec = Codec::kAffine;

  explicit operator bool() const { return codes != nullptr; }
  EDGE_MOE_BOTH const uint8_t* exponents() const { return reinterpret_cast<const uint8_t*>(scales); }  // of kMxfp4
  bool takes_rounded() const { return traits(codec).input == InputForm::kRounded; }
};

// The matrix with the given layout, in the record or file at `bytes`.
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

// Vectors of inputs quantised in blocks of 64: an input is the block's scale times (code + low / 256). Most blocks have
// one plane of int8 codes, and lows of zero. A block has a second plane, the lows, if its largest input is so far above
// the others that int8 codes would hardly resolve them: see two_planes() in lane_math.h. This depends only on the
// block, so the bits do not depend on what else is quantised in the call. `blocks` is ceil(cols/64); codes past cols
// are zeros.
struct Quantised {
  int8_t* codes = nullptr;        // (vectors, blocks*64)
  int8_t* lows = nullptr;         // (vectors, blocks*64)
  uint8_t* two_planes = nullptr;  // (vectors, blocks): 1 if a block has lows
  float* scales = nullptr;        // (vectors, blocks)
  // Sums of the inputs over each weight group of 32, 64 and 128, the factors of the groups' biases.
  float* sums[3] = {};  // (vectors, blocks*2), (vectors, blocks), (vectors, (blocks+1)/2)

  // The vectors from `vector` on.
  Quantised from(size_t vector, int cols) const {
    const size_t blocks = (size_t(cols) + kBlock - 1) / kBlock, at = vector * blocks;
    return {codes + at * kBlock,
            lows + at * kBlock,
            two_planes + at,
            scales + at,
            {sums[0] + 2 * at, sums[1] + at, sums[2] + vector * ((blocks + 1) / 2)}};
  }

  // The first vector's sums over groups of 32, 64 or 128.
  const float* group_sums(int group) const { return sums[group == 32 ? 0 : group == 64 ? 1 : 2]; }
};

// The input vectors of a product, as floats and quantised.
struct Activations {
  const float* values = nullptr;  // (vectors, cols)
  Quantised quantised;
  const int32_t* rows = nullptr;  // (count,) vector of each token; null: token t is vector t
  int count = 0;                  // tokens
  int cols = 0;

  int blocks() const { return (cols + kBlock - 1) / kBlock; }
  size_t vector(int token) const { return rows ? size_t(rows[token]) : size_t(token); }
};

// Twice the values of E2M1 codes, plus kE2m1Zero: integers from 0 to 24.
inline constexpr uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
inline constexpr int kE2m1Zero = 12;

// The cache of one KV head. Keys are in blocks of kKeyBlock positions, (blocks, head_dim, kKeyBlock), so that a
// register holds one dimension of consecutive positions; values are (positions, stride).
struct KeyValues {
  const void *keys, *values;
  size_t stride;  // in values
  bool half;      // half precision, else floats
};

// A causal convolution of each of `channels` channels over tokens.
struct Convolution {
  const float* weights;  // (kernel, channels), the last ones for a token's own input
  const float* past;     // (reach(), channels): the inputs of the tokens before the first one; null: zeros
  float* next;           // (reach(), channels): gets those of the last tokens; not `past`
  int kernel, channels;
  size_t stride;                // from one token's channels to the next one's
  bool silu;                    // of the result
  const float* bias = nullptr;  // (channels,), added to the sums; null: none
  int apart = 1;                // tokens from one input of an output to the next

  int reach() const { return (kernel - 1) * apart; }  // how many tokens before its own an output depends on
};

// One head of a gated delta net or of Mamba-2, for some consecutive tokens. Strides are from one token to the next.
struct DeltaHead {
  const float *q, *k, *v;      // (head_dim,), (head_dim,), (v_dim,) of the first token
  const float *write, *decay;  // one value a token
  float* out;                  // (v_dim,)
  size_t stride;               // of q, k and v
  size_t gate_stride;          // of write and decay
  size_t out_stride;
  int tokens, head_dim, v_dim;
  bool replaces;  // the value of a token's key is replaced, in part, by the token's; false: that is added to it
};

// The functions of an instruction set for matrices of one codec and width.
struct CodecKernels {
  Codec codec;
  int width;

  // y[t*y_stride + row] = matrix[row] . x[t] for rows [row_begin, row_end) and every token t, without the output bias.
  // Affine: for each group, sum = fma(bias, sum of inputs, sum), then for each of its blocks (once for a group of 32)
  // sum = fma(dot, scale_w * scale_x, sum). dot is float(d) with d the integer dot product of the codes or, if the
  // block has two planes, fma(float(l), kLowStep, float(d)) with l the integer dot product of the lows.
  // Mxfp4: the same, in groups of 32, with codes from kE2m1, half of each scale, and -kE2m1Zero times that as bias.
  // Others: 16 lanes of fma(weight, input, lane), folded.
  void (*product)(const Matrix& matrix, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end);

  // One row as float32.
  void (*dequantise_row)(const Matrix& matrix, int row, float* y);
};

// Output strides are in floats. All sizes are in elements.
struct Kernels {
  const char* name;
  const CodecKernels* codecs;  // the codecs and widths that can be multiplied
  int codec_count;

  // Quantise one vector of cols inputs, to vector 0 of `to`. With top the largest |input| of a block, its scale is
  // top / 127, a code is input_code(input, 127 / top), and a low is the remainder, by low_code.
  void (*quantise)(const float* x, int cols, const Quantised& to);

  // y = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, float* y, int n);

  // y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, float* y, int n);

  // gate = gated(gate, up, activation)
  void (*gate_up)(float* gate, const float* up, int n, const Activation& activation);

  // scores[query*scores_stride + position] = scale * q[query] . key, for all positions of the key blocks that overlap
  // [begin, end); scores must have room for these. One sum over head_dim: sum = fma(q, key, sum).
  void (*attend_scores)(const float* const* q, int queries, const KeyValues& cache, int begin, int end, int head_dim,
                        float scale, float* scores, size_t scores_stride);

  // out[query] += the weighted sum of values [begin, end), n floats: out = fma(weight, value, out), position by
  // position; the caller splits long ranges into pieces (position_sums.h).
  void (*attend_values)(const float* weights, size_t weights_stride, int queries, const KeyValues& cache, int begin,
                        int end, int n, float* const* out);

  // y = x * (scale / sqrt(sum(x^2) + eps))
  void (*l2_norm)(const float* x, float eps, float scale, float* y, int n);

  // x = the convolution of x, or the silu of that, for channels [begin, end) of all tokens. A sum begins with the
  // product of the token's own input; then earlier ones follow, the latest first: sum = fma(weight, input, sum). past
  // null: these are left out. Then the bias is added.
  void (*convolve)(const Convolution& c, float* x, int tokens, int begin, int end);

  // For each token and column j of the state s, (head_dim, v_dim): known = the sum over i, in order, of
  // fma(s[i][j] * decay, k[i], known), or 0 if nothing is replaced; change = (v[j] - known) * write; s[i][j] =
  // fma(k[i], change, s[i][j] * decay); out[j] = the sum over i, in order, of fma(s[i][j], q[i], out). The first
  // token's s is `from` (null: zeros), and the last one's is stored in `to`.
  void (*delta_rule)(const DeltaHead& head, const float* from, float* to);

  // y = halves as floats
  void (*widen)(const uint16_t* halves, float* y, int n);

  // y += weight * x
  void (*add_scaled)(float* y, const float* x, float weight, int n);

  // y += weight * x where x is positive
  void (*add_positive)(float* y, const float* x, float weight, int n);

  // x = softmax over [begin, end) and one more logit, the sink, whose share is dropped. With top the largest logit, the
  // sink included: exp(x - top) over the sum of these, in lanes by position and folded, plus exp(sink - top).
  void (*softmax)(float* x, int begin, int end, float sink);

  // The kernels of a codec and width; null if there are none.
  const CodecKernels* find(Codec codec, int width) const {
    for (const CodecKernels* one = codecs; one != codecs + codec_count; ++one)
      if (one->codec == codec && one->width == width) return one;
    return nullptr;
  }

  // CodecKernels::product, plus the output bias. The matrix's codec and width must be among `codecs`.
  void matmul(const Matrix& matrix, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end) const {
    find(matrix.codec, matrix.width)->product(matrix, x, y, y_stride, row_begin, row_end);
    for (int t = 0; matrix.output_bias && t < x.count; ++t)
      for (int row = row_begin; row < row_end; ++row) y[t * y_stride + row] += matrix.output_bias[row];
  }

  void dequantise_row(const Matrix& matrix, int row, float* y) const {
    find(matrix.codec, matrix.width)->dequantise_row(matrix, row, y);
  }
};

// The tables in this binary that this machine can run, fastest first; scalar is always last.
const Kernels* const* available_kernels(int* count);

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels, kAvx512Kernels;    // on x86-64 only
extern const Kernels kNeonKernels, kNeonI8mmKernels;  // on 64-bit Arm only

}  // namespace edge_moe
