// Kernels of scalar.cpp for AVX-512 with VBMI, VBMI2 and VNNI: a register has eight consecutive codes of each of eight
// rows, and its integer dot product adds to two sums per row.
#if defined(__GNUC__) && !defined(__clang__)
// The headers of gcc 12 cause warnings at every intrinsic (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
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
namespace avx512 {

constexpr int kRegister = 16;
constexpr int kTileTokens = 4;
constexpr int kTileRows = 16;

template <int Width, int Group>
constexpr int kSpan = Width == 4                 ? 2
                      : Width == 2 && Group > 32 ? 4
                                                 : 1;

using Vector = __m512;
inline Vector load(const float* p) { return _mm512_load_ps(p); }
inline void store(float* p, Vector v) { _mm512_store_ps(p, v); }
inline Vector broadcast(float v) { return _mm512_set1_ps(v); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector load_cached(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

#include "vector_ops.inl"
// these use it
#include "packed.inl"
// and this uses both
#include "attend.inl"
#include "delta.inl"
#include "tiles.inl"

// ---- codes -> bytes ----

inline __mmask16 first_lanes(int count) { return count >= kLanes ? __mmask16(-1) : __mmask16((1u << count) - 1); }

inline __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline __m512i lanes(__m128i a, __m128i b, __m128i c, __m128i d) {
  const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(two, c, 2), d, 3);
}

// A block of eight rows is Width registers; register i has the i-th quadword of each row. Two quadwords are loaded at a
// time, four rows to a register, then pairs of registers are interleaved.
template <int Width>
[[gnu::always_inline]] inline void load_quadwords(const uint8_t* p, size_t stride, __m512i (&words)[Width]) {
  const uint8_t* p4 = p + 4 * stride;
  if constexpr (Width == 1) {
    auto two = [&](const uint8_t* row) EDGE_MOE_INLINED {
      const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row));
      return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(low), reinterpret_cast<const double*>(row + stride)));
    };
    words[0] = lanes(two(p), two(p + 2 * stride), two(p4), two(p4 + 2 * stride));
  } else {
    unrolled<(Width + 1) / 2>([&](auto i) EDGE_MOE_INLINED {
      constexpr int first = 2 * i + 2 <= Width ? 2 * i : Width - 2;  // if Width is odd, the last two loads overlap
      auto four = [&](size_t at) EDGE_MOE_INLINED {
        return lanes(load_16(p + at), load_16(p + 2 * stride + at), load_16(p4 + at), load_16(p4 + 2 * stride + at));
      };
      const __m512i even = four(8 * first), odd = four(stride + 8 * first);
      words[first] = _mm512_unpacklo_epi64(even, odd);
      words[first + 1] = _mm512_unpackhi_epi64(even, odd);
    });
  }
}

// Codes [8 Step, 8 Step + 8) of eight rows, a quadword per row. They are Width whole bytes, from one quadword or two; a
// multishift takes eight bits from each code's first bit on.
template <int Width, int Step>
[[gnu::always_inline]] inline __m512i codes_of(const __m512i* words) {
  if constexpr (Width == 8) {
    return words[Step];
  } else {
    constexpr int bit = Step * 8 * Width, word = bit / 64, low = bit % 64;
    constexpr bool in_two = low + 8 * Width > 64;
    constexpr int64_t kBits = 0x0706050403020100 * Width + 0x0101010101010101 * (in_two ? 0 : low);
    __m512i bits = words[word];
    if constexpr (in_two) bits = _mm512_shrdi_epi64(bits, words[word + 1], low);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(kBits), bits),
                            _mm512_set1_epi8((1 << Width) - 1));
  }
}

// Calls f(step, half, codes) for the eight steps of each half of a tile's rows.
template <int Width, typename F>
[[gnu::always_inline]] inline void for_codes(const uint8_t* codes, size_t stride, const F& f) {
  unrolled<2>([&](auto half) EDGE_MOE_INLINED {
    __m512i words[Width];
    load_quadwords<Width>(codes + 8 * half * stride, stride, words);
    unrolled<8>([&](auto step) EDGE_MOE_INLINED { f(step, half, codes_of<Width, step>(words)); });
  });
}

template <int Width>
inline void unpack_block(const uint8_t* codes, size_t stride, uint8_t* out) {
  for_codes<Width>(codes, stride, [&](auto step, auto half, __m512i eight) EDGE_MOE_INLINED {
    _mm512_store_si512(out + (2 * step + half) * 64, eight);
  });
}

template <int Width>
inline void unpack_in_order(const uint8_t* codes, uint8_t* out) {  // the first row of a tile that repeats this row
  for_codes<Width>(codes, 0, [&](auto step, auto half, __m512i eight) EDGE_MOE_INLINED {
    if (half == 0) _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * step), _mm512_castsi512_si128(eight));
  });
}

inline __m512i look_up(__m512i codes) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_16(kE2m1)), codes); }

inline void look_up(uint8_t* bytes) {
  for (int i = 0; i < kTileRows * kBlock; i += 64) _mm512_store_si512(bytes + i, look_up(_mm512_load_si512(bytes + i)));
}

// ---- products ----

inline __m512i eight_inputs(const int8_t* x) {
  int64_t value;
  std::memcpy(&value, x, 8);
  return _mm512_set1_epi64(value);
}

// The sums of sixteen rows, from two registers with pairs of sums of eight rows each.
inline Vector add_pairs(__m512i low, __m512i high) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return _mm512_cvtepi32_ps(
      _mm512_add_epi32(_mm512_permutex2var_epi32(low, even, high), _mm512_permutex2var_epi32(low, odd, high)));
}

// Codes of width 8 are bytes already: a register has half a block of two rows.
template <int Planes, int Parts>
[[gnu::always_inline]] inline void block_dots_of_bytes(const uint8_t* codes, size_t stride, const int8_t* const* x,
                                                       Vector (&dots)[Planes][Parts]) {
  __m512i sums[Planes][Parts][8];
  unrolled<2>([&](auto half) EDGE_MOE_INLINED {
    constexpr int part = half * (Parts - 1);
    __m512i inputs[Planes];
    unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED {
      const __m256i half_inputs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[plane] + 32 * half));
      inputs[plane] = _mm512_broadcast_i64x4(half_inputs);
    });
    unrolled<8>([&](auto i) EDGE_MOE_INLINED {
      const uint8_t* p = codes + (i + i / 4 * 4) * stride + 32 * half;  // rows 0-3 with 4-7, then 8-11 with 12-15
      const __m512i row = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 4 * stride));
      const __m512i rows = _mm512_inserti64x4(row, other, 1);
      unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED {
        const __m512i so_far = half == 0 || Parts == 2 ? _mm512_setzero_si512() : sums[plane][part][i];
        sums[plane][part][i] = _mm512_dpbusd_epi32(so_far, rows, inputs[plane]);
      });
    });
  });
  unrolled<Planes * Parts>([&](auto which) EDGE_MOE_INLINED {
    constexpr int plane = which / Parts, part = which % Parts;
    __m512i fours[2];
    unrolled<2>([&](auto i) EDGE_MOE_INLINED {
      auto two = [&](int at) EDGE_MOE_INLINED {
        const __m512i a = sums[plane][part][at], b = sums[plane][part][at + 1];
        return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
      };
      const __m512i a = two(4 * i), b = two(4 * i + 2);
      fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    });
    dots[plane][part] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_shuffle_i64x2(fours[0], fours[1], 0x88),
                                                            _mm512_shuffle_i64x2(fours[0], fours[1], 0xdd)));
  });
}

template <int Width, Codec C, int Planes, int Parts>
[[gnu::always_inline]] inline void block_dots(const uint8_t* codes, size_t stride, const int8_t* const* x,
                                              Vector (&dots)[Planes][Parts]) {
  static_assert(C == Codec::kAffine);  // others in spans
  if constexpr (Width == 8) return block_dots_of_bytes(codes, stride, x, dots);
  __m512i sums[Planes * Parts][2];
  unrolled<Planes * Parts>([&](auto i) EDGE_MOE_INLINED { sums[i][0] = sums[i][1] = _mm512_setzero_si512(); });
  for_codes<Width>(codes, stride, [&](auto step, auto half, __m512i eight) EDGE_MOE_INLINED {
    unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED {
      __m512i& sum = sums[plane * Parts + step * Parts / 8][half];
      sum = _mm512_dpbusd_epi32(sum, eight, eight_inputs(x[plane] + 8 * step));
    });
  });
  unrolled<Planes * Parts>([&](auto i)
                               EDGE_MOE_INLINED { dots[i / Parts][i % Parts] = add_pairs(sums[i][0], sums[i][1]); });
}

// fours: for four rows each, the sums of each quarter of a span.
template <int Parts>
[[gnu::always_inline]] inline void add_quarters(const __m512i (&fours)[4], Vector (&dots)[Parts]) {
  auto even = [](__m512i a, __m512i b) EDGE_MOE_INLINED { return _mm512_shuffle_i64x2(a, b, 0x88); };
  auto odd = [](__m512i a, __m512i b) EDGE_MOE_INLINED { return _mm512_shuffle_i64x2(a, b, 0xdd); };
  const __m512i even_lanes[] = {even(fours[0], fours[1]), even(fours[2], fours[3])};
  const __m512i odd_lanes[] = {odd(fours[0], fours[1]), odd(fours[2], fours[3])};
  if constexpr (Parts == 2) {
    const __m512i a = _mm512_add_epi32(even_lanes[0], odd_lanes[0]), b = _mm512_add_epi32(even_lanes[1], odd_lanes[1]);
    dots[0] = _mm512_cvtepi32_ps(even(a, b));
    dots[1] = _mm512_cvtepi32_ps(odd(a, b));
  } else {
    dots[0] = _mm512_cvtepi32_ps(even(even_lanes[0], even_lanes[1]));
    dots[1] = _mm512_cvtepi32_ps(even(odd_lanes[0], odd_lanes[1]));
    dots[2] = _mm512_cvtepi32_ps(odd(even_lanes[0], even_lanes[1]));
    dots[3] = _mm512_cvtepi32_ps(odd(odd_lanes[0], odd_lanes[1]));
  }
}

// A register is 64 bytes of one row, whose codes are multiplied one field of each byte at a time: the sums, not the
// codes, are rearranged into one lane per row. Compared with block_dots, it is 1.3 times as fast from the L2 cache, and
// decoding of a model is 1.11 to 1.18 times as fast at 4 bits, 1.01 to 1.07 at 2. Prefetching a line with each row
// instead of all lines before the first gains 1.02 to 1.06. With 3 bits, three bytes expanded to four, it had 0.95
// to 1.0 of the speed of block_dots.
template <int Width, Codec C, int Planes, int Parts>
[[gnu::always_inline]] inline void span_dots(const uint8_t* codes, size_t stride, int left, const int8_t* const* x,
                                             const uint8_t* next, Vector (&dots)[Planes][Parts]) {
  constexpr int kFields = 8 / Width;
  const __m512i low = _mm512_set1_epi8((1 << Width) - 1);
  const __mmask16 present = first_lanes(left * Width / 32);
  __m512i inputs[Planes][kFields];
  unrolled<Planes * kFields>([&](auto i) EDGE_MOE_INLINED {
    inputs[i / kFields][i % kFields] = _mm512_load_si512(x[i / kFields] + 64 * (i % kFields));
  });
  auto of_row = [&](int row, __m512i(&sums)[Planes]) EDGE_MOE_INLINED {
    const uint8_t* p = codes + row * stride;
    _mm_prefetch(reinterpret_cast<const char*>(next + row * 64), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(p + 2 * 64), _MM_HINT_T0);
    const __m512i bits = _mm512_maskz_loadu_epi32(present, p);
    unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED { sums[plane] = _mm512_setzero_si512(); });
    unrolled<kFields>([&](auto field) EDGE_MOE_INLINED {
      const __m512i stored = _mm512_and_si512(field ? _mm512_srli_epi16(bits, field * Width) : bits, low);
      const __m512i codes = C == Codec::kMxfp4 ? look_up(stored) : stored;
      unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED {
        sums[plane] = _mm512_dpbusd_epi32(sums[plane], codes, inputs[plane][field]);
      });
    });
  };
  auto of_two = [&](int row, __m512i(&sums)[Planes]) EDGE_MOE_INLINED {
    __m512i a[Planes], b[Planes];
    of_row(row, a), of_row(row + 1, b);
    unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED {
      sums[plane] =
          _mm512_add_epi32(_mm512_unpacklo_epi32(a[plane], b[plane]), _mm512_unpackhi_epi32(a[plane], b[plane]));
    });
  };
  __m512i fours[Planes][4];  // for four rows, the sums of each quarter
  unrolled<4>([&](auto i) EDGE_MOE_INLINED {
    __m512i a[Planes], b[Planes];
    of_two(4 * i, a), of_two(4 * i + 2, b);
    unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED {
      fours[plane][i] =
          _mm512_add_epi32(_mm512_unpacklo_epi64(a[plane], b[plane]), _mm512_unpackhi_epi64(a[plane], b[plane]));
    });
  });
  unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED { add_quarters(fours[plane], dots[plane]); });
}

template <int Tokens, int Parts, bool Wide>
inline void unpacked_dots(const uint8_t* bytes, const int8_t* const* x, size_t at, Vector (&dots)[Tokens][Parts]) {
  unrolled<Parts>([&](auto part) EDGE_MOE_INLINED {
    constexpr int kWays = Tokens == 1 ? 2 : 1;  // independent sums of a token, which hide latency
    __m512i low[Tokens][kWays], high[Tokens][kWays];
    unrolled<Tokens * kWays>([&](auto i) EDGE_MOE_INLINED {
      low[i / kWays][i % kWays] = high[i / kWays][i % kWays] = _mm512_setzero_si512();
    });
    unrolled<8 / Parts>([&](auto i) EDGE_MOE_INLINED {
      constexpr int step = part * (8 / Parts) + i, way = i % kWays;
      const __m512i low_codes = _mm512_load_si512(bytes + 128 * step);
      const __m512i high_codes = _mm512_load_si512(bytes + 128 * step + 64);
      unrolled<Tokens>([&](auto t) EDGE_MOE_INLINED {
        const __m512i inputs = eight_inputs(x[t] + at + 8 * step);
        low[t][way] = _mm512_dpbusd_epi32(low[t][way], low_codes, inputs);
        high[t][way] = _mm512_dpbusd_epi32(high[t][way], high_codes, inputs);
      });
    });
    unrolled<Tokens>([&](auto t) EDGE_MOE_INLINED {
      if constexpr (kWays == 2)
        dots[t][part] = add_pairs(_mm512_add_epi32(low[t][0], low[t][1]), _mm512_add_epi32(high[t][0], high[t][1]));
      else
        dots[t][part] = add_pairs(low[t][0], high[t][0]);
    });
  });
}

// Eight values of sixteen rows at a time: pairs of values are transposed as doublewords, then separated.
void columns(const uint16_t* values, int stride, int first, int count, float (*out)[kTileRows]) {
  for (int g = 0; g < count; g += 8) {
    const __mmask8 present = count - g >= 8 ? 0xff : __mmask8((1 << (count - g)) - 1);
    auto row = [&](int r) { return _mm_maskz_loadu_epi16(present, values + size_t(r) * stride + first + g); };
    __m512i rows[4];
    unrolled<4>([&](auto i) { rows[i] = lanes(row(i), row(i + 4), row(i + 8), row(i + 12)); });
    const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    const __m512i pairs[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                              _mm512_unpackhi_epi64(b, d)};
    unrolled<4>([&](auto i) {
      _mm512_store_si512(out[g + 2 * i], _mm512_slli_epi32(pairs[i], 16));
      _mm512_store_si512(out[g + 2 * i + 1], _mm512_and_si512(pairs[i], _mm512_set1_epi32(int(0xffff0000))));
    });
  }
}

inline __m512 from_bfloat16(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

inline __m256 halves(__m512 lanes) {
  return _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
}

template <int Width, int Tokens>
[[gnu::flatten]] void tile_float(const FloatRows& rows, const FloatTokens& tokens, float* y) {
  const int whole = rows.cols / kLanes * kLanes;
  const __mmask16 rest = first_lanes(rows.cols - whole);
  __m512 sums[kFloatRows * Tokens];
  unrolled<kFloatRows * Tokens>([&](auto i) { sums[i] = _mm512_setzero_ps(); });
  auto add = [&](int i, __mmask16 present) {
    __m512 x[Tokens];
    unrolled<Tokens>([&](auto t) { x[t] = _mm512_maskz_loadu_ps(present, tokens.values[t] + i); });
    unrolled<kFloatRows>([&](auto r) {
      const uint8_t* p = rows.codes[r] + size_t(i) * (Width / 8);
      if constexpr (Tokens == 1) _mm_prefetch(reinterpret_cast<const char*>(p + rows.ahead), _MM_HINT_T0);
      const __m512 w =
          Width == 16 ? from_bfloat16(_mm256_maskz_loadu_epi16(present, p)) : _mm512_maskz_loadu_ps(present, p);
      unrolled<Tokens>(
          [&](auto t) { sums[r * Tokens + t] = _mm512_mask3_fmadd_ps(w, x[t], sums[r * Tokens + t], present); });
    });
  };
  for (int i = 0; i < whole; i += kLanes) add(i, __mmask16(-1));
  if (rest) add(whole, rest);
  unrolled<Tokens>([&](auto t) {
    _mm_storeu_ps(y + t * kFloatRows, fold_rows(halves(sums[t]), halves(sums[Tokens + t]), halves(sums[2 * Tokens + t]),
                                                halves(sums[3 * Tokens + t])));
  });
}

// ---- activations to int8, and rows to floats ----

void quantise(const float* x, int cols, const Quantised& to) {
  const int blocks = (cols + kBlock - 1) / kBlock;
  for (int block = 0; block < blocks; ++block) {
    __m512 in[4];
    __m512 tops = _mm512_setzero_ps();
    for (int i = 0; i < 4; ++i) {
      const int first = block * kBlock + i * kLanes;
      in[i] = _mm512_maskz_loadu_ps(first_lanes(cols - first > 0 ? cols - first : 0), x + first);
      tops = _mm512_max_ps(_mm512_abs_ps(in[i]),
                           tops);  // returns the second operand if the first is NaN
    }
    const float top = _mm512_reduce_max_ps(tops);
    const __m512 inverse = _mm512_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
    auto store_codes = [&](int8_t* to, int i, __m512i codes) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + block * kBlock + i * kLanes), _mm512_cvtepi32_epi8(codes));
    };
    __m512i codes[4], squares = _mm512_setzero_si512();
    for (int i = 0; i < 4; ++i) {
      in[i] = _mm512_mul_ps(in[i], inverse);
      const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(in[i]), _mm512_set1_ps(127.5f), _CMP_LE_OQ);
      in[i] = _mm512_maskz_mov_ps(finite, in[i]);
      codes[i] = _mm512_cvtps_epi32(in[i]);
      const __m512i positive = _mm512_abs_epi32(codes[i]);  // the upper halves are zeros
      squares = _mm512_add_epi32(squares, _mm512_madd_epi16(positive, positive));
      store_codes(to.codes, i, codes[i]);
    }
    const bool two = two_planes(_mm512_reduce_add_epi32(squares));
    int sums[2] = {};
    for (int i = 0; i < 4; ++i) {
      const __m512 left = _mm512_sub_ps(in[i], _mm512_cvtepi32_ps(codes[i]));
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(left, _mm512_set1_ps(256.0f)));
      const __m512i lows = _mm512_maskz_min_epi32(two ? 0xffff : 0, rounded, _mm512_set1_epi32(127));
      store_codes(to.lows, i, lows);
      sums[i / 2] += _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(codes[i], 8), lows));
    }
    store_block(to, block, two, top / 127.0f, sums);
  }
  pair_sums(to, blocks);
}

}  // namespace avx512

const Kernels kAvx512Kernels = {"avx512",         avx512::kCodecKernels, int(std::size(avx512::kCodecKernels)),
                                avx512::quantise, avx512::rms_norm,      avx512::layer_norm,
                                avx512::gate_up,  avx512::attend_scores, avx512::attend_values,
                                avx512::l2_norm,  avx512::convolve,      avx512::delta_rule,
                                avx512::widen,    avx512::add_scaled,    avx512::add_positive,
                                avx512::softmax};

}  // namespace edge_moe
