// Kernels of scalar.cpp for AVX-512 with VBMI and VNNI: a block of 64 codes is one register, and one integer
// dot product of it gives the sixteen lanes of the contract in order.
#if defined(__GNUC__) && !defined(__clang__)
// In gcc 12 its own headers warn in every intrinsic (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "../kernels.h"

namespace edge_moe {
namespace avx512 {

constexpr int kRegister = 16;
constexpr int kTileTokens = 4;

#include "tiles.inl"
#include "vector_ops.inl"

// ---- codes -> bytes ----

// Code i of a block is in bits [i*Width, (i+1)*Width). Eight codes are Width whole bytes: vpermb brings these
// to a quadword and vpmultishiftqb takes eight bits from each code's first bit on. Width 1 has all its bits
// in every quadword already.
template <int Width>
constexpr std::array<uint8_t, 64> code_bytes() {
  std::array<uint8_t, 64> index{};
  for (int i = 0; i < 64; ++i) index[i] = uint8_t(i / 8 * Width + i % 8);
  return index;
}

template <int Width>
constexpr std::array<uint8_t, 64> code_bits() {
  std::array<uint8_t, 64> first{};
  for (int i = 0; i < 64; ++i) first[i] = uint8_t(Width == 1 ? i : i % 8 * Width);
  return first;
}

template <int Width>
alignas(64) constexpr std::array<uint8_t, 64> kCodeBytes = code_bytes<Width>();
template <int Width>
alignas(64) constexpr std::array<uint8_t, 64> kCodeBits = code_bits<Width>();

template <int Width>
inline __m512i unpack(__m512i packed) {
  if constexpr (Width == 8 || Width == kUnpacked) {
    return packed;
  } else {
    if constexpr (Width > 1) packed = _mm512_permutexvar_epi8(_mm512_load_si512(kCodeBytes<Width>.data()), packed);
    packed = _mm512_multishift_epi64_epi8(_mm512_load_si512(kCodeBits<Width>.data()), packed);
    return _mm512_and_si512(packed, _mm512_set1_epi8((1 << Width) - 1));
  }
}

template <int Width>
constexpr int kBlockBytes = Width == kUnpacked ? kBlock : kBlock / 8 * Width;

// The bytes that load_block reads; a masked load costs a slot of the vector ports, a wide one does not.
template <int Width>
constexpr int kLoadBytes = Width == 3                 ? 32
                           : Width == 5 || Width == 6 ? 64
                                                      : kBlockBytes<Width>;

template <int Width>
inline __m512i load_block(const uint8_t* p) {
  if constexpr (Width == 1) {
    int64_t bits;
    std::memcpy(&bits, p, 8);
    return unpack<Width>(_mm512_set1_epi64(bits));
  } else if constexpr (kLoadBytes<Width> == 16) {
    return unpack<Width>(_mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  } else if constexpr (kLoadBytes<Width> == 32) {
    return unpack<Width>(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  } else {
    return unpack<Width>(_mm512_loadu_si512(p));
  }
}

// The last blocks of a row, of 64 or 32 codes: nothing past them may be read.
template <int Width>
inline __m512i load_last(const uint8_t* p, int codes) {
  const __mmask16 words = __mmask16((1u << (codes * kBlockBytes<Width> / (4 * kBlock))) - 1);
  const __m512i packed = _mm512_maskz_loadu_epi32(words, p);
  return unpack<Width>(Width == 1 ? _mm512_broadcastq_epi64(_mm512_castsi512_si128(packed)) : packed);
}

// Leading blocks of a row that load_block may read.
template <int Width>
inline int safe_blocks(int cols) {
  const int spare = cols / 32 * (kBlockBytes<Width> / 2) - kLoadBytes<Width>;
  return spare < 0 ? 0 : spare / kBlockBytes<Width> + 1;
}

template <int Width>
void unpack_row(const uint8_t* codes, int cols, uint8_t* out) {
  const int safe = safe_blocks<Width>(cols);
  for (int block = 0; block * kBlock < cols; ++block) {
    const uint8_t* p = codes + block * kBlockBytes<Width>;
    const int count = cols - block * kBlock;
    if (block < safe)
      _mm512_storeu_si512(out + block * kBlock, load_block<Width>(p));
    else if (count >= kBlock)
      _mm512_storeu_si512(out + block * kBlock, load_last<Width>(p, kBlock));
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + block * kBlock),
                          _mm512_castsi512_si256(load_last<Width>(p, count)));
  }
}

// ---- products ----

inline __mmask16 first_lanes(int count) { return count >= kLanes ? __mmask16(-1) : __mmask16((1u << count) - 1); }

inline __m512 from_bfloat16(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

inline __m512 load_bfloat16(const void* p, int count) {
  return from_bfloat16(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}

inline __m256 halves(__m512 lanes) {
  return _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
}

template <int Tokens>
inline void store_tile(const __m512* sums, float* y) {
  unrolled<Tokens>([&](auto t) {
    _mm_storeu_ps(y + t * kTileRows, fold_rows(halves(sums[t]), halves(sums[Tokens + t]), halves(sums[2 * Tokens + t]),
                                               halves(sums[3 * Tokens + t])));
  });
}

// Weight scales of sixteen blocks; `odd` is the second group of a block, at group 32 only.
template <int Group>
inline void block_scales(const uint16_t* scales, int block, int blocks, int groups, __m512& even, __m512& odd) {
  if constexpr (Group == 32) {
    const int count = groups - 2 * block;
    const __mmask32 present = count >= 32 ? __mmask32(-1) : (__mmask32(1) << count) - 1;
    const __m512i pairs = _mm512_maskz_loadu_epi16(present, scales + 2 * block);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
  } else if constexpr (Group == 64) {
    even = load_bfloat16(scales + block, blocks - block);
  } else {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const int count = groups - block / 2;
    even = _mm512_permutexvar_ps(twice, load_bfloat16(scales + block / 2, count < 8 ? count : 8));
  }
}

template <int Width, int Group, int Tokens>
[[gnu::flatten]] void tile(const TileRows& rows, const TileTokens& tokens, float* y) {
  const int blocks = (rows.cols + kBlock - 1) / kBlock, groups = rows.cols / Group;
  const int safe = safe_blocks<Width>(rows.cols);
  alignas(64) float even[kTileRows][Tokens][kChunk], odd[Group == 32 ? kTileRows : 1][Tokens][kChunk];
  __m512 sums[kTileRows * Tokens];
  unrolled<kTileRows * Tokens>([&](auto i) { sums[i] = _mm512_setzero_ps(); });

  for (int chunk = 0; chunk < blocks; chunk += kChunk) {
    const int end = chunk + kChunk < blocks ? chunk + kChunk : blocks;
    for (int r = 0; r < kTileRows; ++r) {
      __m512 w_even, w_odd;
      block_scales<Group>(rows.scales[r], chunk, blocks, groups, w_even, w_odd);
      for (int t = 0; t < Tokens; ++t) {
        const __m512 x = _mm512_maskz_loadu_ps(first_lanes(end - chunk), tokens.scales[t] + chunk);
        _mm512_store_ps(even[r][t], _mm512_mul_ps(w_even, x));
        if constexpr (Group == 32) _mm512_store_ps(odd[r][t], _mm512_mul_ps(w_odd, x));
      }
    }
    auto add_block = [&](int block, auto load) {
      __m512i x[Tokens];
      unrolled<Tokens>([&](auto t) { x[t] = _mm512_loadu_si512(tokens.codes[t] + block * kBlock); });
      unrolled<kTileRows>([&](auto r) {
        const uint8_t* p = rows.codes[r] + block * kBlockBytes<Width>;
        if constexpr (Tokens == 1) _mm_prefetch(reinterpret_cast<const char*>(p + rows.ahead), _MM_HINT_T0);
        const __m512i codes = load(p);
        unrolled<Tokens>([&](auto t) {
          const __m512 dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x[t]));
          __m512 scale = _mm512_set1_ps(even[r][t][block - chunk]);
          if constexpr (Group == 32)
            scale = _mm512_mask_broadcastss_ps(scale, 0xff00, _mm_load_ss(&odd[r][t][block - chunk]));
          sums[r * Tokens + t] = _mm512_fmadd_ps(dots, scale, sums[r * Tokens + t]);
        });
      });
    };
    int block = chunk;
    for (; block < end && block < safe; ++block) add_block(block, load_block<Width>);
    for (; block < end; ++block)
      add_block(block, [&](const uint8_t* p) {
        return load_last<Width>(p, rows.cols - block * kBlock < kBlock ? 32 : kBlock);
      });
  }

  unrolled<kTileRows>([&](auto r) {
    __m512 bias_sums[Tokens];
    unrolled<Tokens>([&](auto t) { bias_sums[t] = _mm512_setzero_ps(); });
    for (int group = 0; group < groups; group += kLanes) {
      const __m512 bias = load_bfloat16(rows.biases[r] + group, groups - group);
      unrolled<Tokens>([&](auto t) {
        const __m512 x = _mm512_maskz_loadu_ps(first_lanes(groups - group), tokens.sums[t] + group);
        bias_sums[t] = _mm512_fmadd_ps(bias, x, bias_sums[t]);
      });
    }
    unrolled<Tokens>([&](auto t) { sums[r * Tokens + t] = _mm512_add_ps(sums[r * Tokens + t], bias_sums[t]); });
  });
  store_tile<Tokens>(sums, y);
}

template <int Width, int Tokens>
[[gnu::flatten]] void tile_float(const TileRows& rows, const TileTokens& tokens, float* y) {
  const int whole = rows.cols / kLanes * kLanes;
  const __mmask16 rest = first_lanes(rows.cols - whole);
  __m512 sums[kTileRows * Tokens];
  unrolled<kTileRows * Tokens>([&](auto i) { sums[i] = _mm512_setzero_ps(); });
  auto add = [&](int i, __mmask16 lanes) {
    __m512 x[Tokens];
    unrolled<Tokens>([&](auto t) { x[t] = _mm512_maskz_loadu_ps(lanes, tokens.values[t] + i); });
    unrolled<kTileRows>([&](auto r) {
      const uint8_t* p = rows.codes[r] + size_t(i) * (Width / 8);
      if constexpr (Tokens == 1) _mm_prefetch(reinterpret_cast<const char*>(p + rows.ahead), _MM_HINT_T0);
      const __m512 w =
          Width == 16 ? from_bfloat16(_mm256_maskz_loadu_epi16(lanes, p)) : _mm512_maskz_loadu_ps(lanes, p);
      unrolled<Tokens>(
          [&](auto t) { sums[r * Tokens + t] = _mm512_mask3_fmadd_ps(w, x[t], sums[r * Tokens + t], lanes); });
    });
  };
  for (int i = 0; i < whole; i += kLanes) add(i, __mmask16(-1));
  if (rest) add(whole, rest);
  store_tile<Tokens>(sums, y);
}

// ---- activations to int8, and rows to floats ----

void quantise(const float* x, int cols, int8_t* codes, float* scales, float* sums32, float* sums64, float* sums128) {
  const int blocks = (cols + kBlock - 1) / kBlock;
  for (int block = 0; block < blocks; ++block) {
    __m512 in[4];
    __m512 tops = _mm512_setzero_ps();
    for (int i = 0; i < 4; ++i) {
      const int first = block * kBlock + i * kLanes;
      in[i] = _mm512_maskz_loadu_ps(first_lanes(cols - first > 0 ? cols - first : 0), x + first);
      tops = _mm512_max_ps(_mm512_abs_ps(in[i]),
                           tops);  // keeps the second operand when the first is not a number
    }
    const float top = _mm512_reduce_max_ps(tops);
    const __m512 inverse = _mm512_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
    int sums[2] = {};
    for (int i = 0; i < 4; ++i) {
      const __m512 scaled = _mm512_mul_ps(in[i], inverse);
      const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(scaled), _mm512_set1_ps(127.5f), _CMP_LE_OQ);
      const __m512i rounded = _mm512_maskz_cvtps_epi32(finite, scaled);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + block * kBlock + i * kLanes), _mm512_cvtepi32_epi8(rounded));
      sums[i / 2] += _mm512_reduce_add_epi32(rounded);
    }
    store_sums(block, top / 127.0f, sums, scales, sums32, sums64);
  }
  pair_sums(blocks, sums64, sums128);
}

template <int Width>
void dequantise_codes(const Matrix& m, int row, float* y) {
  const uint8_t* codes = m.codes + codes_bytes(row, m.cols, Width);
  const size_t groups = m.cols / m.group;
  const int safe = safe_blocks<Width>(m.cols);
  for (int first = 0; first < m.cols; first += kBlock) {
    const int count = m.cols - first < kBlock ? 32 : kBlock, block = first / kBlock;
    const uint8_t* p = codes + block * kBlockBytes<Width>;
    alignas(64) uint8_t bytes[kBlock];
    _mm512_store_si512(bytes, block < safe ? load_block<Width>(p) : load_last<Width>(p, count));
    for (int i = 0; i < count; i += kLanes) {
      const size_t group = row * groups + (first + i) / m.group;
      const __m512 scale = _mm512_castsi512_ps(_mm512_set1_epi32(int(uint32_t(m.scales[group]) << 16)));
      const __m512 bias = _mm512_castsi512_ps(_mm512_set1_epi32(int(uint32_t(m.biases[group]) << 16)));
      const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes + i));
      const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(values));
      _mm512_storeu_ps(y + first + i, _mm512_add_ps(_mm512_mul_ps(scale, code), bias));
    }
  }
}

}  // namespace avx512

const Kernels kAvx512Kernels = {"avx512",           avx512::matmul,  avx512::quantise,
                                avx512::rms_norm,   avx512::gate_up, avx512::attend,
                                avx512::add_scaled, avx512::softmax, avx512::dequantise_row};

}  // namespace edge_moe
