// Dot products of packed rows with one vector of int8 inputs, by a warp; cpu/scalar.cpp defines the bits.
//
// Each lane takes 64 neighbouring codes of each of the warp's rows, so that a warp reads consecutive bytes of a row,
// and multiplies four codes at a time. The dot products of blocks go to shared memory, with the scales and biases; then
// one lane adds up one row, as the order of float additions determines the result.
#pragma once

#include <type_traits>

#include "lanes.cuh"

namespace edge_moe::cuda {

constexpr int kWarpRows = 8;  // rows that a warp multiplies at a time, unless there would be too few warps
constexpr int kBlockWords = kBlock / 4;
constexpr int kStepStride = kWarp + 1;  // puts rows in different banks

// A warp's part of shared memory: 32 steps of each row, with one or two steps per block.
struct WarpSteps {
  float dots[kWarpRows * kStepStride];
  uint32_t scales[kWarpRows * kStepStride];  // of weights: a scale in the lower 16 bits, a bias in the upper
  float input_scales[kWarp];                 // of blocks
  float input_sums[kWarp];                   // of the inputs of groups
};

// One input vector from Kernels::quantise; sums over 128 inputs are computed from those over 64.
struct QuantisedVector {
  const int8_t *codes, *lows;  // (blocks, 64)
  const uint8_t* two_planes;   // (blocks,)
  const float* scales;         // (blocks,)
  const float* sums[2];        // (blocks*2,), (blocks,)
};

// Spreads four neighbouring codes of 3, 5 or 6 bits to one byte each.
template <int Width>
__device__ __forceinline__ uint32_t spread(uint32_t codes) {
  constexpr uint32_t kTwo = (1u << 2 * Width) - 1, kOne = ((1u << Width) - 1) * 0x00010001u;
  const uint32_t pairs = (codes & kTwo) | (codes << (16 - 2 * Width) & kTwo << 16);
  return (pairs & kOne) | (pairs << (8 - Width) & kOne << 8);
}

// Kernels are compiled for each kind of codes: a width of affine codes, or E2M1.
constexpr int kE2m1Codes = -4;
template <int Codes>
constexpr int kBits = Codes == kE2m1Codes ? 4 : Codes;

// Affine codes of 1, 2, 4 and 8 bits are extracted as one plane of each word at a time, others as four neighbours at a
// time.
template <int Codes>
constexpr bool kByPlane = Codes != kE2m1Codes && 8 % Codes == 0;
template <int Codes>
constexpr int kPlanes = kByPlane<Codes> ? 8 / Codes : 1;

// kE2m1 of the four codes in the lower half of a word.
__device__ __forceinline__ uint32_t e2m1_codes(uint32_t four) {
  const uint32_t magnitudes = choose_bytes(0x03020100, 0x0c080604, four);
  uint32_t signs = four >> 3 & 0x1111;
  signs = (signs | signs << 8) & 0x00ff00ff;
  signs = (signs | signs << 4) & 0x01010101;
  return kE2m1Zero * 0x01010101u + magnitudes - 2 * (magnitudes & signs * 0xff);
}

// Operand `which` of eight: four of the 32 codes in kBits words, in the order of arrange().
template <int Codes>
__device__ __forceinline__ uint32_t four_codes(const uint32_t* words, int which) {
  if constexpr (Codes == kE2m1Codes) {
    return e2m1_codes(words[which / 2] >> which % 2 * 16);
  } else if constexpr (kByPlane<Codes>) {
    constexpr uint32_t kMask = ((1u << Codes) - 1) * 0x01010101u;
    return words[which / kPlanes<Codes>] >> which % kPlanes<Codes> * Codes & kMask;
  } else {
    const int bit = which * 4 * Codes, word = bit / 32, low = bit % 32;
    uint32_t codes = words[word] >> low;
    if (low + 4 * Codes > 32) codes |= words[word + 1] << (32 - low);
    return spread<Codes>(codes);
  }
}

// The index of the input, out of 32, by which byte `byte` of operand `which` is multiplied.
template <int Codes>
__host__ __device__ constexpr int input_of(int which, int byte) {
  return kByPlane<Codes> ? which / kPlanes<Codes> * (32 / Codes) + byte * kPlanes<Codes> + which % kPlanes<Codes>
                         : which * 4 + byte;
}

// Rearranges 32 inputs to the order of the codes.
template <int Codes>
__device__ __forceinline__ void arrange(const uint32_t* in, uint32_t* inputs) {
  EDGE_MOE_UNROLL
  for (int i = 0; i < 8; ++i) {
    uint32_t word = 0;
    EDGE_MOE_UNROLL
    for (int byte = 0; byte < 4; ++byte) {
      const int at = input_of<Codes>(i, byte);
      word |= (in[at / 4] >> at % 4 * 8 & 0xff) << byte * 8;
    }
    inputs[i] = word;
  }
}

// Loads four words at a time, from an address aligned to 16 bytes.
template <int Count>
__device__ __forceinline__ void load_words(const void* from, uint32_t* words) {
  EDGE_MOE_UNROLL
  for (int i = 0; i < Count / 4; ++i) {
    const uint4 four = static_cast<const uint4*>(from)[i];
    words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
  }
}

// Loads a block's codes, or only the first half if there is no second; with wide loads if every row begins with a whole
// block.
template <int Codes>
__device__ __forceinline__ void load_block(const uint8_t* codes, bool aligned, bool whole,
                                           uint32_t (&words)[2 * kBits<Codes>]) {
  constexpr int kWidth = kBits<Codes>;
  if (aligned && kWidth % 2 == 0) {
    load_words<2 * kWidth>(codes, words);
  } else if (aligned) {
    EDGE_MOE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      const uint2 two = reinterpret_cast<const uint2*>(codes)[i];
      words[2 * i] = two.x, words[2 * i + 1] = two.y;
    }
  } else {
    EDGE_MOE_UNROLL
    for (int i = 0; i < 2 * kWidth; ++i)
      words[i] = i < kWidth || whole ? reinterpret_cast<const uint32_t*>(codes)[i] : 0;
  }
}

// The sum of a group's inputs, from the vector's sums over 32 and 64.
__device__ __forceinline__ float group_sum(const QuantisedVector& x, int group_size, int group, int blocks) {
  if (group_size == 32) return x.sums[0][group];
  if (group_size == 64) return x.sums[1][group];
  return 2 * group + 1 < blocks ? x.sums[1][2 * group] + x.sums[1][2 * group + 1] : x.sums[1][2 * group];
}

// Loads 32 inputs of a plane, in the order of the codes.
template <int Codes>
__device__ __forceinline__ void load_inputs(const int8_t* plane, uint32_t* inputs) {
  uint32_t in[kBlockWords / 2];
  load_words<kBlockWords / 2>(plane, in);
  arrange<Codes>(in, inputs);
}

// The value of an integer dot product in shared memory: of codes or, if `two`, of both planes in steps of the lows.
__device__ __forceinline__ float dot_value(int dot, bool two) { return two ? float(dot) * kLowStep : small_float(dot); }

// The scale and the bias of one group of weights, both bfloat16: the scale in the lower 16 bits.
template <bool E2m1>
__device__ __forceinline__ uint32_t scale_and_bias(const Matrix& m, size_t at) {
  if constexpr (E2m1) {  // powers of two, and 12 times these
    const float scale = e8m0_half(m.exponents()[at]), bias = -kE2m1Zero * scale;
    uint32_t bits[2];
    memcpy(&bits[0], &scale, 4), memcpy(&bits[1], &bias, 4);
    return bits[0] >> 16 | bits[1];
  } else {
    return uint32_t(m.scales[at]) | uint32_t(m.biases[at]) << 16;
  }
}

// Rows [first_row, first_row + Rows) times x, by all lanes of a warp: lane i < Rows gets the result of row first_row +
// i, or of the matrix's last row if there are fewer.
template <int Codes, int Rows>
__device__ float warp_rows_of(const Matrix& m, int first_row, const QuantisedVector& x, WarpSteps& steps) {
  static_assert(Rows <= kWarpRows);
  constexpr int kWidth = kBits<Codes>;
  const int lane = int(threadIdx.x) % kWarp, blocks = (m.cols + kBlock - 1) / kBlock;
  const int groups = m.cols / m.group, halves = m.group == 32 ? 2 : 1, blocks_a_group = m.group == 128 ? 2 : 1;
  const size_t row_bytes = size_t(m.cols) / 8 * kWidth;
  const bool aligned = m.cols % kBlock == 0 && reinterpret_cast<uintptr_t>(m.codes) % (kWidth % 2 ? 8 : 16) == 0;
  // Lanes per row; the other lanes take other rows.
  const int lanes = blocks <= 8 ? 8 : blocks <= 16 || halves == 2 ? 16 : kWarp;
  auto clamped = [&](int row) { return size_t(row < m.rows ? row : m.rows - 1); };
  float sum = 0.0f;
  for (int first = 0; first < blocks; first += lanes) {
    const int of_block = lane % lanes, block = first + of_block;
    if (block < blocks) {
      const bool whole = (block + 1) * kBlock <= m.cols;
      const bool two = x.two_planes[block];
      uint32_t inputs[kBlockWords], lows[kBlockWords] = {};
      EDGE_MOE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const size_t at = size_t(block) * kBlock + half * kBlock / 2;
        load_inputs<Codes>(x.codes + at, inputs + half * kBlockWords / 2);
        if (two) load_inputs<Codes>(x.lows + at, lows + half * kBlockWords / 2);
      }
      const int group = block * halves / blocks_a_group;
      if (lane < lanes) {
        steps.input_scales[of_block] = x.scales[block];
        for (int half = 0; half < halves && group + half < groups; ++half)
          steps.input_sums[of_block * halves + half] = group_sum(x, m.group, group + half, blocks);
      }
      EDGE_MOE_UNROLL_4
      for (int r = lane / lanes; r < Rows; r += kWarp / lanes) {
        const size_t row = clamped(first_row + r), at = row * groups + group;
        uint32_t words[2 * kWidth];
        load_block<Codes>(m.codes + row * row_bytes + size_t(block) * (kBlock / 8 * kWidth), aligned, whole, words);
        uint32_t scales[2] = {scale_and_bias<Codes == kE2m1Codes>(m, at), 0};
        if (halves == 2 && whole) scales[1] = scale_and_bias<Codes == kE2m1Codes>(m, at + 1);
        int dot[2] = {0, 0};
        EDGE_MOE_UNROLL
        for (int i = 0; i < kBlockWords; ++i)
          dot[i / 8] = dot_bytes(four_codes<Codes>(words + i / 8 * kWidth, i % 8), inputs[i], dot[i / 8]);
        if (two) {
          dot[0] *= 256, dot[1] *= 256;
          EDGE_MOE_UNROLL
          for (int i = 0; i < kBlockWords; ++i)
            dot[i / 8] = dot_bytes(four_codes<Codes>(words + i / 8 * kWidth, i % 8), lows[i], dot[i / 8]);
        }
        const int to = r * kStepStride + of_block * halves;
        if (halves == 2) {
          EDGE_MOE_UNROLL
          for (int half = 0; half < 2; ++half)
            steps.dots[to + half] = dot_value(dot[half], two), steps.scales[to + half] = scales[half];
        } else {
          steps.dots[to] = dot_value(dot[0] + dot[1], two), steps.scales[to] = scales[0];
        }
      }
    }
    __syncwarp();
    if (lane < Rows) {
      const int left = (halves == 2 ? groups : blocks) - first * halves;
      const int count = left < lanes * halves ? left : lanes * halves;
      const float* dots = steps.dots + lane * kStepStride;
      const uint32_t* scales = steps.scales + lane * kStepStride;
      EDGE_MOE_UNROLL_8
      for (int i = 0; i < count; ++i) {
        const float bias = from_bfloat16(uint16_t(scales[i] >> 16)), scale = from_bfloat16(uint16_t(scales[i]));
        if (blocks_a_group == 1 || i % 2 == 0) sum = fmaf(bias, steps.input_sums[i], sum);
        sum = fmaf(dots[i], scale * steps.input_scales[i / halves], sum);
      }
    }
    __syncwarp();
  }
  return sum;
}

// Calls f with a packed matrix's kind of codes as a constant.
template <typename F>
__device__ __forceinline__ auto with_codes(const Matrix& m, const F& f) {
  if (m.codec == Codec::kMxfp4) return f(std::integral_constant<int, kE2m1Codes>{});
  switch (m.width) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 6:
      return f(std::integral_constant<int, 6>{});
    default:
      return f(std::integral_constant<int, 8>{});
  }
}

// warp_rows_of for any packed matrix.
template <int Rows>
__device__ float warp_rows(const Matrix& m, int first_row, const QuantisedVector& x, WarpSteps& steps) {
  return with_codes(m, [&](auto codes) { return warp_rows_of<decltype(codes)::value, Rows>(m, first_row, x, steps); });
}

}  // namespace edge_moe::cuda
