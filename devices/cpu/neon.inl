// Kernels of scalar.cpp for 64-bit Arm with dot products: an integer dot product of sixteen codes of one row adds to
// four sums, which are added across the four rows of a tile. If the processor has int8 matrix products, prompts are
// multiplied two rows and two tokens at a time.
//
// neon.cpp and neon_i8mm.cpp include this file inside their own namespaces, compiled without and with these products.

constexpr int kRegister = 4;
constexpr int kTileRows = 4;
constexpr int kPieces = 4;  // registers of a block's codes

template <int Width, int Group>
constexpr int kSpan = 1;

using Vector = float32x4_t;
inline Vector load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vector v) { vst1q_f32(p, v); }
inline Vector broadcast(float v) { return vdupq_n_f32(v); }
inline Vector multiply(Vector a, Vector b) { return vmulq_f32(a, b); }
inline Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline Vector load_cached(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

#include "vector_ops.inl"
// these use it
#include "packed.inl"
// and this uses both
#include "attend.inl"
#include "delta.inl"

// ---- codes -> bytes ----

// The positions of sixteen codes in a register of bytes, which is loaded such that it does not extend past the block.
// For 1 and 2 bits: the byte of each code, and the shift of its bits. For 3, 5 and 6 bits, which may span two bytes:
// the same for 16-bit fields, eight per register.
template <int Width, int Piece>
struct Places {
  static constexpr int kAt = 2 * Width * Piece < 8 * Width - 16 ? 2 * Width * Piece : 8 * Width - 16;
  static constexpr int kFrom = 2 * Width * Piece - kAt;  // the first code's byte
  uint8_t bytes[16];
  int8_t shifts[16];
  uint8_t field_bytes[2][16];
  int16_t field_shifts[2][8];
  constexpr Places() : bytes(), shifts(), field_bytes(), field_shifts() {
    for (int i = 0; i < 16; ++i) {
      const int low = i * Width % 8, byte = i * Width / 8;
      bytes[i] = uint8_t(byte);
      shifts[i] = int8_t(-low);
      field_bytes[i / 8][i % 8 * 2] = uint8_t(kFrom + byte);
      field_bytes[i / 8][i % 8 * 2 + 1] = uint8_t(low + Width > 8 ? kFrom + byte + 1 : 255);  // 255 gives 0
      field_shifts[i / 8][i % 8] = int16_t(-low);
    }
  }
};

template <int Width, int Piece>
constexpr Places<Width, Piece> kPlaces;

// The same 16 or 32 bits throughout.
template <typename Bits>
inline uint8x16_t repeated(const uint8_t* p) {
  Bits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return sizeof(bits) == 4 ? vreinterpretq_u8_u32(vdupq_n_u32(uint32_t(bits)))
                           : vreinterpretq_u8_u16(vdupq_n_u16(uint16_t(bits)));
}

// Codes [16 Piece, 16 Piece + 16) of a block.
template <int Width, int Piece>
[[gnu::always_inline]] inline uint8x16_t sixteen(const uint8_t* p) {
  constexpr const Places<Width, Piece>& places = kPlaces<Width, Piece>;
  const uint8x16_t mask = vdupq_n_u8((1 << Width) - 1);
  if constexpr (Width == 8) {
    return vld1q_u8(p + 16 * Piece);
  } else if constexpr (Width == 4) {
    const uint8x8_t pairs = vld1_u8(p + 8 * Piece), low = vand_u8(pairs, vdup_n_u8(15)), high = vshr_n_u8(pairs, 4);
    return vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
  } else if constexpr (Width < 3) {
    const uint8x16_t bytes = Width == 2 ? repeated<uint32_t>(p + 4 * Piece) : repeated<uint16_t>(p + 2 * Piece);
    return vandq_u8(vshlq_u8(vqtbl1q_u8(bytes, vld1q_u8(places.bytes)), vld1q_s8(places.shifts)), mask);
  } else {
    const uint8x16_t bytes = vld1q_u8(p + places.kAt);
    auto fields = [&](int half) {
      const uint16x8_t two = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(places.field_bytes[half])));
      return vreinterpretq_u8_u16(vshlq_u16(two, vld1q_s16(places.field_shifts[half])));
    };
    return vandq_u8(vuzp1q_u8(fields(0), fields(1)), mask);
  }
}

template <int Width>
inline void unpack_in_order(const uint8_t* codes, uint8_t* out) {
  unrolled<kPieces>([&](auto piece) {
    const uint8x16_t bytes = sixteen<Width, piece>(codes);
    vst1q_u8(out + 16 * piece, bytes);
  });
}

inline uint8x16_t look_up(uint8x16_t codes) { return vqtbl1q_u8(vld1q_u8(kE2m1), codes); }

inline void look_up(uint8_t* bytes) {
  for (int i = 0; i < kTileRows * kBlock; i += 16) vst1q_u8(bytes + i, look_up(vld1q_u8(bytes + i)));
}

// ---- products ----

// Wide codes are reduced by 128, which the sum of the inputs compensates.
template <bool Wide>
inline int8x16_t as_signed(uint8x16_t codes) {
  return vreinterpretq_s8_u8(Wide ? veorq_u8(codes, vdupq_n_u8(128)) : codes);
}

inline int32x4_t add_rows(const int32x4_t (&rows)[kTileRows]) {
  return vpaddq_s32(vpaddq_s32(rows[0], rows[1]), vpaddq_s32(rows[2], rows[3]));
}

// codes_of(row, piece): sixteen codes.
template <bool Wide, int Planes, int Parts, typename Codes>
[[gnu::always_inline]] inline void dots_of(const Codes& codes_of, const int8_t* const* x,
                                           Vector (&dots)[Planes][Parts]) {
  unrolled<Parts>([&](auto part) EDGE_MOE_INLINED {
    constexpr int kEach = kPieces / Parts;
    int8x16_t inputs[Planes][kEach];
    int32x4_t of_inputs[Planes], sums[Planes][kTileRows];
    unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED {
      of_inputs[plane] = vdupq_n_s32(0);
      unrolled<kEach>([&](auto i) EDGE_MOE_INLINED {
        inputs[plane][i] = vld1q_s8(x[plane] + 16 * (part * kEach + i));
        if constexpr (Wide) of_inputs[plane] = vdotq_s32(of_inputs[plane], inputs[plane][i], vdupq_n_s8(1));
      });
    });
    unrolled<kTileRows>([&](auto r) EDGE_MOE_INLINED {
      unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED { sums[plane][r] = vdupq_n_s32(0); });
      unrolled<kEach>([&](auto i) EDGE_MOE_INLINED {
        constexpr int piece = part * kEach + i;
        const int8x16_t codes = as_signed<Wide>(codes_of(r, std::integral_constant<int, piece>{}));
        unrolled<Planes>([&](auto plane)
                             EDGE_MOE_INLINED { sums[plane][r] = vdotq_s32(sums[plane][r], codes, inputs[plane][i]); });
      });
    });
    unrolled<Planes>([&](auto plane) EDGE_MOE_INLINED {
      int32x4_t sum = add_rows(sums[plane]);
      if constexpr (Wide) sum = vmlaq_n_s32(sum, vdupq_n_s32(vaddvq_s32(of_inputs[plane])), 128);
      dots[plane][part] = vcvtq_f32_s32(sum);
    });
  });
}

template <int Width, Codec C, int Planes, int Parts>
[[gnu::always_inline]] inline void block_dots(const uint8_t* codes, size_t stride, const int8_t* const* x,
                                              Vector (&dots)[Planes][Parts]) {
  auto codes_of = [&](int r, auto piece) EDGE_MOE_INLINED {
    const uint8x16_t stored = sixteen<Width, decltype(piece)::value>(codes + r * stride);
    return C == Codec::kMxfp4 ? look_up(stored) : stored;
  };
  dots_of<(Width > 6)>(codes_of, x, dots);
}

#ifdef __ARM_FEATURE_MATMUL_INT8

// Eight codes of one row, then eight of the next, for the instruction that multiplies two rows by two tokens.
template <int Width>
inline void unpack_block(const uint8_t* codes, size_t stride, uint8_t* out) {
  for (int r = 0; r < kTileRows; r += 2)
    unrolled<kPieces>([&](auto piece) EDGE_MOE_INLINED {
      const uint8x16_t first = sixteen<Width, piece>(codes + r * stride);
      const uint8x16_t second = sixteen<Width, piece>(codes + (r + 1) * stride);
      uint8_t* at = out + r * kBlock + 32 * piece;
      vst1q_u8(at, vcombine_u8(vget_low_u8(first), vget_low_u8(second)));
      vst1q_u8(at + 16, vcombine_u8(vget_high_u8(first), vget_high_u8(second)));
    });
}

template <int Tokens, int Parts, bool Wide>
inline void unpacked_dots(const uint8_t* bytes, const int8_t* const* x, size_t at, Vector (&dots)[Tokens][Parts]) {
  constexpr int kEach = kBlock / 8 / Parts;
  unrolled<(Tokens + 1) / 2>([&](auto pair) EDGE_MOE_INLINED {
    constexpr int first = 2 * pair, second = first + 1 < Tokens ? first + 1 : first;
    unrolled<Parts>([&](auto part) EDGE_MOE_INLINED {
      int32x4_t upper = vdupq_n_s32(0), lower = upper;  // rows 0 and 1, rows 2 and 3, each by both tokens
      unrolled<kEach>([&](auto i) EDGE_MOE_INLINED {
        constexpr int eight = part * kEach + i;
        const int8x16_t inputs = vcombine_s8(vld1_s8(x[first] + at + 8 * eight), vld1_s8(x[second] + at + 8 * eight));
        upper = vusmmlaq_s32(upper, vld1q_u8(bytes + 16 * eight), inputs);
        lower = vusmmlaq_s32(lower, vld1q_u8(bytes + 2 * kBlock + 16 * eight), inputs);
      });
      dots[first][part] = vcvtq_f32_s32(vuzp1q_s32(upper, lower));
      if constexpr (second > first) dots[second][part] = vcvtq_f32_s32(vuzp2q_s32(upper, lower));
    });
  });
}

#else

template <int Width>
inline void unpack_block(const uint8_t* codes, size_t stride, uint8_t* out) {
  for (int r = 0; r < kTileRows; ++r) unpack_in_order<Width>(codes + r * stride, out + r * kBlock);
}

template <int Tokens, int Parts, bool Wide>
inline void unpacked_dots(const uint8_t* bytes, const int8_t* const* x, size_t at, Vector (&dots)[Tokens][Parts]) {
  unrolled<Tokens>([&](auto t) EDGE_MOE_INLINED {
    const int8_t* inputs = x[t] + at;
    Vector of_token[1][Parts];
    dots_of<Wide>([&](int r, auto piece) EDGE_MOE_INLINED { return vld1q_u8(bytes + r * kBlock + 16 * piece); },
                  &inputs, of_token);
    unrolled<Parts>([&](auto part) EDGE_MOE_INLINED { dots[t][part] = of_token[0][part]; });
  });
}

#endif

void columns(const uint16_t* values, int stride, int first, int count, float (*out)[kTileRows]) {
  plain_columns(values, stride, first, count, out);
}

template <int Width>
inline float32x4_t load_floats(const uint8_t* row, int i) {
  if constexpr (Width == 32) return vld1q_f32(reinterpret_cast<const float*>(row) + i);
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(row) + i), 16));
}

// The sixteen lanes of one row and token.
template <int Width>
float dot_floats(const uint8_t* row, const float* x, int cols) {
  const int whole = cols / kLanes * kLanes;
  float32x4_t sums[4] = {};
  for (int i = 0; i < whole; i += kLanes)
    for (int j = 0; j < 4; ++j)
      sums[j] = vfmaq_f32(sums[j], load_floats<Width>(row, i + 4 * j), vld1q_f32(x + i + 4 * j));
  float lanes[kLanes];
  for (int j = 0; j < 4; ++j) vst1q_f32(lanes + 4 * j, sums[j]);
  for (int i = whole; i < cols; ++i) {
    float weight;
    if constexpr (Width == 32)
      weight = reinterpret_cast<const float*>(row)[i];
    else
      weight = from_bfloat16(reinterpret_cast<const uint16_t*>(row)[i]);
    lanes[i - whole] = std::fma(weight, x[i], lanes[i - whole]);
  }
  return fold(lanes);
}

template <int Width>
void float_product(const Matrix& m, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end) {
  for (int row = row_begin; row < row_end; ++row)
    for (int token = 0; token < x.count; ++token) {
      const uint8_t* weights = m.codes + codes_bytes(1, m.cols, Width) * row;
      const float* values = x.values + size_t(x.rows ? x.rows[token] : token) * x.cols;
      y[token * y_stride + row] = dot_floats<Width>(weights, values, m.cols);
    }
}

constexpr CodecKernels kCodecKernels[] = {
    affine<1>(),
    affine<2>(),
    affine<3>(),
    affine<4>(),
    affine<5>(),
    affine<6>(),
    affine<8>(),
    {Codec::kBfloat16, 16, float_product<16>, dequantise_floats},
    {Codec::kFloat32, 32, float_product<32>, dequantise_floats},
    mxfp4(),
};

// ---- activations to int8, and rows to floats ----

void quantise(const float* x, int cols, const Quantised& to) {
  const int blocks = (cols + kBlock - 1) / kBlock;
  for (int block = 0; block < blocks; ++block) {
    float padded[kBlock];
    const float* in = block_inputs(x, cols, block, padded);
    float32x4_t tops = vdupq_n_f32(0);
    for (int i = 0; i < kBlock; i += 4) tops = vmaxnmq_f32(tops, vabsq_f32(vld1q_f32(in + i)));  // ignores NaN
    const float top = vmaxvq_f32(tops), inverse = top > 0.0f ? 127.0f / top : 0.0f;
    float32x4_t scaled[kBlock / 4];
    int32x4_t codes[kBlock / 4], squares = vdupq_n_s32(0);
    for (int i = 0; i < kBlock / 4; ++i) {
      scaled[i] = vmulq_n_f32(vld1q_f32(in + 4 * i), inverse);
      const uint32x4_t finite = vcleq_f32(vabsq_f32(scaled[i]), vdupq_n_f32(127.5f));
      scaled[i] = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(scaled[i]), finite));
      codes[i] = vcvtnq_s32_f32(scaled[i]);
      squares = vmlaq_s32(squares, codes[i], codes[i]);
    }
    const bool two = two_planes(vaddvq_s32(squares));
    int sums[2];
    for (int half = 0; half < 2; ++half) {
      int32x4_t sum = vdupq_n_s32(0);
      for (int i = 8 * half; i < 8 * half + 8; i += 2) {
        int32x4_t lows[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
        for (int j = 0; j < 2; ++j) {
          const float32x4_t left = vsubq_f32(scaled[i + j], vcvtq_f32_s32(codes[i + j]));
          if (two) lows[j] = vminq_s32(vcvtnq_s32_f32(vmulq_n_f32(left, 256.0f)), vdupq_n_s32(127));
          sum = vaddq_s32(sum, vaddq_s32(vshlq_n_s32(codes[i + j], 8), lows[j]));
        }
        auto store_eight = [&](int8_t* to, const int32x4_t* from) {
          vst1_s8(to + block * kBlock + 4 * i, vmovn_s16(vcombine_s16(vmovn_s32(from[0]), vmovn_s32(from[1]))));
        };
        store_eight(to.codes, codes + i);
        store_eight(to.lows, lows);
      }
      sums[half] = vaddvq_s32(sum);
    }
    store_block(to, block, two, top / 127.0f, sums);
  }
  pair_sums(to, blocks);
}
