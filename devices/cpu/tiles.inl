// Products of float matrices in tiles of a few rows by a few tokens, for the x86 instruction sets.
//
// Each of them includes this file after packed.inl, sets kTileTokens before, and defines `tile_float` after.

constexpr int kFloatRows = 4;

// The rows of a tile. At the end of a matrix, its last row is repeated.
struct FloatRows {
  const uint8_t* codes[kFloatRows];
  int cols;
  size_t ahead;  // bytes from a value to the one to prefetch with it, one tile later
};

// The tokens of a tile, as pointers into Activations. The last token is repeated to fill a tile.
struct FloatTokens {
  const float* values[kTileTokens];
};

// y (tokens, kFloatRows) = rows . tokens; width 16 or 32
template <int Width, int Tokens>
void tile_float(const FloatRows& rows, const FloatTokens& tokens, float* y);

// fold() for four rows at once, given the sum of each row's two halves of eight lanes.
inline __m128 fold_rows(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  const __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
  const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  const __m128 ac = _mm256_castps256_ps128(pairs), bd = _mm256_extractf128_ps(pairs, 1);
  const __m128 acbd = _mm_add_ps(_mm_shuffle_ps(ac, bd, 0x88), _mm_shuffle_ps(ac, bd, 0xdd));
  return _mm_shuffle_ps(acbd, acbd, 0xd8);
}

template <int Width>
void float_matmul(const Matrix& m, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end) {
  const size_t row_bytes = codes_bytes(1, m.cols, Width);
  for (int row = row_begin; row < row_end; row += kFloatRows) {
    FloatRows rows{{}, m.cols, kFloatRows * row_bytes};
    const int row_count = row_end - row < kFloatRows ? row_end - row : kFloatRows;
    for (int r = 0; r < kFloatRows; ++r)
      rows.codes[r] = m.codes + size_t(r < row_count ? row + r : row_end - 1) * row_bytes;
    for (int token = 0; token < x.count; token += kTileTokens) {
      const int count = x.count - token < kTileTokens ? x.count - token : kTileTokens;
      FloatTokens tokens;
      for (int t = 0; t < kTileTokens; ++t) {
        const int at = t < count ? token + t : x.count - 1;
        tokens.values[t] = x.values + size_t(x.rows ? x.rows[at] : at) * x.cols;
      }
      float sums[kTileTokens * kFloatRows];
      auto* tile = count == 1   ? tile_float<Width, 1>
                   : count == 2 ? tile_float<Width, 2>
                                : tile_float<Width, kTileTokens>;
      tile(rows, tokens, sums);
      for (int t = 0; t < count; ++t)
        for (int r = 0; r < row_count; ++r) y[(token + t) * y_stride + row + r] = sums[t * kFloatRows + r];
    }
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
    {Codec::kBfloat16, 16, float_matmul<16>, dequantise_floats},
    {Codec::kFloat32, 32, float_matmul<32>, dequantise_floats},
    mxfp4(),
};
