// Kernels of scalar.cpp for AVX2: a register of bytes is half a block, 32 codes of one row, and two multiply-adds of it
// give eight partial sums, which are added across a tile's rows.
#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <utility>

#include "../half.h"
#include "../kernels.h"
#include "../lane_math.h"

namespace edge_moe {
namespace avx2 {

constexpr int kRegister = 8;
constexpr int kTileTokens = 2;
constexpr int kTileRows = 8;

template <int Width, int Group>
constexpr int kSpan = 1;

using Vector = __m256;
inline Vector load(const float* p) { return _mm256_load_ps(p); }
inline void store(float* p, Vector v) { _mm256_store_ps(p, v); }
inline Vector broadcast(float v) { return _mm256_set1_ps(v); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector load_cached(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

#include "vector_ops.inl"
// these use it
#include "packed.inl"
// and this uses both
#include "attend.inl"
#include "delta.inl"
#include "tiles.inl"

constexpr int kHalf = kBlock / 2;

inline __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load_8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

// ---- codes -> bytes ----

// Widths 3, 5 and 6: each 128-bit lane takes sixteen codes, eight in each of two registers of 16-bit fields.
// pshufb moves the one or two bytes of a code to its field, a multiplication moves the code to the field's top, and a
// shift moves it down. The upper lane is loaded so that it ends with the 32 codes; its codes then begin at kShift.
template <int Width>
struct Fields {
  static constexpr int kShift = Width == 3 ? 2 : Width == 5 ? 6 : 4;
  alignas(32) std::array<uint8_t, 32> bytes[2];
  alignas(32) std::array<uint16_t, 16> factors[2];
};

template <int Width>
constexpr Fields<Width> fields() {
  Fields<Width> f{};
  for (int part = 0; part < 2; ++part)
    for (int field = 0; field < 16; ++field) {
      const int bit = (field % 8 + 8 * part) * Width, low = bit % 8;
      const int byte = bit / 8 + (field < 8 ? 0 : Fields<Width>::kShift);
      f.bytes[part][2 * field] = uint8_t(byte);
      f.bytes[part][2 * field + 1] = low + Width > 8 ? uint8_t(byte + 1) : 0x80;
      f.factors[part][field] = uint16_t(1 << (16 - Width - low));
    }
  return f;
}

template <int Width>
constexpr Fields<Width> kFields = fields<Width>();

template <int Width>
inline __m256i unpack_fields(__m256i packed, int part) {
  const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kFields<Width>.bytes[part].data()));
  const __m256i factors = _mm256_load_si256(reinterpret_cast<const __m256i*>(kFields<Width>.factors[part].data()));
  return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(packed, bytes), factors), 16 - Width);
}

// 32 codes from 4*Width bytes; reads no others.
template <int Width>
inline __m256i load_half(const uint8_t* p) {
  if constexpr (Width == 8) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  } else if constexpr (Width == 4) {
    const __m256i v = _mm256_cvtepu8_epi16(load_16(p));
    return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 4)), _mm256_set1_epi8(15));
  } else if constexpr (Width == 2) {
    const __m256i v = _mm256_cvtepu8_epi32(load_8(p));
    const __m256i pairs = _mm256_or_si256(v, _mm256_slli_epi32(v, 12));
    return _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi32(pairs, 6)), _mm256_set1_epi8(3));
  } else if constexpr (Width == 1) {
    int bits;
    std::memcpy(&bits, p, 4);
    const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread);
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    return _mm256_min_epu8(_mm256_and_si256(v, bit), _mm256_set1_epi8(1));
  } else {
    const __m256i packed = Width == 3 ? _mm256_set_m128i(load_8(p + 4), load_8(p))
                                      : _mm256_set_m128i(load_16(p + 4 * Width - 16), load_16(p));
    return _mm256_packus_epi16(unpack_fields<Width>(packed, 0), unpack_fields<Width>(packed, 1));
  }
}

template <int Width>
constexpr int kHalfBytes = kHalf / 8 * Width;

template <int Width>
inline void unpack_in_order(const uint8_t* codes, uint8_t* out) {
  for (int half = 0; half < 2; ++half)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + half * kHalf),
                        load_half<Width>(codes + half * kHalfBytes<Width>));
}

template <int Width>
inline void unpack_block(const uint8_t* codes, size_t stride, uint8_t* out) {
  for (int r = 0; r < kTileRows; ++r) unpack_in_order<Width>(codes + r * stride, out + r * kBlock);
}

inline __m256i look_up(__m256i codes) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_16(kE2m1)), codes);
}

inline void look_up(uint8_t* bytes) {
  for (int i = 0; i < kTileRows * kBlock; i += 32) {
    auto* at = reinterpret_cast<__m256i*>(bytes + i);
    _mm256_store_si256(at, look_up(_mm256_load_si256(at)));
  }
}

// ---- products ----

inline __m256 load_bfloat16(const void* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p)), 16));
}

// Sums of pairs in 16 bits: two products of codes up to 63 with inputs of -128 fit. Wider codes are split in two.
template <bool Wide>
inline __m256i dot_half(__m256i codes, __m256i x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (Wide) {
    const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(127)), high = _mm256_xor_si256(codes, low);
    return _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones),
                            _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), ones));
  }
  return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones);
}

template <bool Wide>
inline __m256i dot_block(__m256i low, __m256i high, __m256i x_low, __m256i x_high) {
  if constexpr (Wide) return _mm256_add_epi32(dot_half<true>(low, x_low), dot_half<true>(high, x_high));
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, x_low), _mm256_maddubs_epi16(high, x_high));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// Lane r is the sum of register r.
inline Vector add_lanes(const __m256i (&rows)[kTileRows]) {
  auto four = [&](int r) {
    return _mm256_hadd_epi32(_mm256_hadd_epi32(rows[r], rows[r + 1]), _mm256_hadd_epi32(rows[r + 2], rows[r + 3]));
  };
  const __m256i a = four(0), b = four(4);
  return _mm256_cvtepi32_ps(
      _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)));
}

inline __m256i half_of(const void* p, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint8_t*>(p) + half * kHalf));
}

// codes_of(row, half): 32 codes as bytes.
template <bool Wide, int Planes, int Parts, typename Codes>
[[gnu::always_inline]] inline void dots_of(const Codes& codes_of, const int8_t* const* x,
                                           Vector (&dots)[Planes][Parts]) {
  __m256i inputs[Planes][2], sums[Planes][Parts][kTileRows];
  unrolled<2 * Planes>([&](auto i) EDGE_MOE_INLINED { inputs[i / 2][i % 2] = half_of(x[i / 2], i % 2); });
  unrolled<kTileRows>([&](auto r) EDGE_MOE_INLINED {
    const __m256i low = codes_of(r, 0), high = codes_of(r, 1);
    unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED {
      if constexpr (Parts == 1) {
        sums[plane][0][r] = dot_block<Wide>(low, high, inputs[plane][0], inputs[plane][1]);
      } else {
        sums[plane][0][r] = dot_half<Wide>(low, inputs[plane][0]);
        sums[plane][1][r] = dot_half<Wide>(high, inputs[plane][1]);
      }
    });
  });
  unrolled<Planes * Parts>(
      [&](auto i) EDGE_MOE_INLINED { dots[i / Parts][i % Parts] = add_lanes(sums[i / Parts][i % Parts]); });
}

template <int Width, Codec C, int Planes, int Parts>
[[gnu::always_inline]] inline void block_dots(const uint8_t* codes, size_t stride, const int8_t* const* x,
                                              Vector (&dots)[Planes][Parts]) {
  auto codes_of = [&](int r, int half) EDGE_MOE_INLINED {
    const __m256i stored = load_half<Width>(codes + r * stride + half * kHalfBytes<Width>);
    return C == Codec::kMxfp4 ? look_up(stored) : stored;
  };
  dots_of<(Width > 6)>(codes_of, x, dots);
}

template <int Tokens, int Parts, bool Wide>
inline void unpacked_dots(const uint8_t* bytes, const int8_t* const* x, size_t at, Vector (&dots)[Tokens][Parts]) {
  unrolled<Tokens>([&](auto t) EDGE_MOE_INLINED {
    const int8_t* inputs = x[t] + at;
    Vector of_token[1][Parts];
    dots_of<Wide>([&](int r, int half) EDGE_MOE_INLINED { return half_of(bytes + r * kBlock, half); }, &inputs,
                  of_token);
    unrolled<Parts>([&](auto part) EDGE_MOE_INLINED { dots[t][part] = of_token[0][part]; });
  });
}

void columns(const uint16_t* values, int stride, int first, int count, float (*out)[kTileRows]) {
  plain_columns(values, stride, first, count, out);
}

template <int Width>
inline float float_at(const uint8_t* row, int i) {
  if constexpr (Width == 16) return from_bfloat16(reinterpret_cast<const uint16_t*>(row)[i]);
  return reinterpret_cast<const float*>(row)[i];
}

template <int Width>
inline __m256 load_floats(const uint8_t* row, int i) {
  if constexpr (Width == 16) return load_bfloat16(row + 2 * size_t(i));
  return _mm256_loadu_ps(reinterpret_cast<const float*>(row) + i);
}

template <int Width, int Tokens>
[[gnu::flatten]] void tile_float(const FloatRows& rows, const FloatTokens& tokens, float* y) {
  constexpr int kPair = 2 * Tokens;  // two rows at a time, for the number of registers
  const int whole = rows.cols / kLanes * kLanes;
  __m256 halves[kFloatRows][Tokens];
  for (int first = 0; first < kFloatRows; first += 2) {
    __m256 low[kPair], high[kPair];
    unrolled<kPair>([&](auto i) { low[i] = high[i] = _mm256_setzero_ps(); });
    for (int i = 0; i < whole; i += kLanes)
      unrolled<2>([&](auto r) {
        const uint8_t* row = rows.codes[first + r];
        if constexpr (Tokens == 1)
          _mm_prefetch(reinterpret_cast<const char*>(row + size_t(i) * (Width / 8) + rows.ahead), _MM_HINT_T0);
        const __m256 w_low = load_floats<Width>(row, i), w_high = load_floats<Width>(row, i + 8);
        unrolled<Tokens>([&](auto t) {
          const float* x = tokens.values[t] + i;
          low[r * Tokens + t] = _mm256_fmadd_ps(w_low, _mm256_loadu_ps(x), low[r * Tokens + t]);
          high[r * Tokens + t] = _mm256_fmadd_ps(w_high, _mm256_loadu_ps(x + 8), high[r * Tokens + t]);
        });
      });
    unrolled<kPair>([&](auto i) {
      const int r = first + i / Tokens, t = i % Tokens;
      alignas(32) float lanes[kLanes];
      _mm256_store_ps(lanes, low[i]);
      _mm256_store_ps(lanes + 8, high[i]);
      for (int k = whole; k < rows.cols; ++k)
        lanes[k - whole] = std::fma(float_at<Width>(rows.codes[r], k), tokens.values[t][k], lanes[k - whole]);
      halves[r][t] = _mm256_add_ps(_mm256_load_ps(lanes), _mm256_load_ps(lanes + 8));
    });
  }
  for (int t = 0; t < Tokens; ++t)
    _mm_storeu_ps(y + t * kFloatRows, fold_rows(halves[0][t], halves[1][t], halves[2][t], halves[3][t]));
}

// ---- activations to int8, and rows to floats ----

inline __m256 absolute(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

inline int sum_of(__m256i lanes) {
  alignas(32) int of[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(of), lanes);
  return of[0] + of[1] + of[2] + of[3] + of[4] + of[5] + of[6] + of[7];
}

// 32 integers as bytes, saturated at 127.
inline __m256i as_bytes(const __m256i* integers) {
  const __m256i bytes =
      _mm256_packs_epi16(_mm256_packs_epi32(integers[0], integers[1]), _mm256_packs_epi32(integers[2], integers[3]));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

void quantise(const float* x, int cols, const Quantised& to) {
  const int blocks = (cols + kBlock - 1) / kBlock;
  for (int block = 0; block < blocks; ++block) {
    float padded[kBlock];
    const float* in = block_inputs(x, cols, block, padded);
    alignas(32) float tops[8];
    __m256 top_lanes = _mm256_setzero_ps();
    for (int i = 0; i < kBlock; i += 8)  // max returns the second operand if the first is NaN
      top_lanes = _mm256_max_ps(absolute(_mm256_loadu_ps(in + i)), top_lanes);
    _mm256_store_ps(tops, top_lanes);
    float top = 0.0f;
    for (float lane : tops) top = lane > top ? lane : top;
    const __m256 inverse = _mm256_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
    __m256i codes[2], lows[2] = {}, squares = _mm256_setzero_si256();
    __m256 scaled[8];
    for (int half = 0; half < 2; ++half) {
      __m256i rounded[4];
      for (int i = 0; i < 4; ++i) {
        __m256& eight = scaled[4 * half + i];
        eight = _mm256_mul_ps(_mm256_loadu_ps(in + half * kHalf + i * 8), inverse);
        eight = _mm256_and_ps(eight, _mm256_cmp_ps(absolute(eight), _mm256_set1_ps(127.5f), _CMP_LE_OQ));
        rounded[i] = _mm256_cvtps_epi32(eight);
      }
      codes[half] = as_bytes(rounded);
      const __m256i positive = _mm256_abs_epi8(codes[half]);
      squares = _mm256_add_epi32(squares, dot_half<false>(positive, positive));
    }
    const bool two = two_planes(sum_of(squares));
    int sums[2];
    for (int half = 0; half < 2; ++half) {
      if (two) {
        __m256i rounded[4];
        for (int i = 0; i < 4; ++i) {
          const __m256 eight = scaled[4 * half + i];
          const __m256 nearest = _mm256_round_ps(eight, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
          const __m256 left = _mm256_sub_ps(eight, nearest);
          rounded[i] = _mm256_cvtps_epi32(_mm256_mul_ps(left, _mm256_set1_ps(256.0f)));
        }
        lows[half] = as_bytes(rounded);
      }
      const size_t at = size_t(block) * kBlock + half * kHalf;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.codes + at), codes[half]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.lows + at), lows[half]);
      const __m256i ones = _mm256_set1_epi8(1);
      sums[half] = 256 * sum_of(dot_half<false>(ones, codes[half])) + sum_of(dot_half<false>(ones, lows[half]));
    }
    store_block(to, block, two, top / 127.0f, sums);
  }
  pair_sums(to, blocks);
}

}  // namespace avx2

const Kernels kAvx2Kernels = {"avx2",         avx2::kCodecKernels, int(std::size(avx2::kCodecKernels)),
                              avx2::quantise, avx2::rms_norm,      avx2::layer_norm,
                              avx2::gate_up,  avx2::attend_scores, avx2::attend_values,
                              avx2::l2_norm,  avx2::convolve,      avx2::delta_rule,
                              avx2::widen,    avx2::add_scaled,    avx2::add_positive,
                              avx2::softmax};

}  // namespace edge_moe
