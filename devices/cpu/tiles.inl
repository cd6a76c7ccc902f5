// Products of packed matrices in tiles of a few rows by a few tokens, and rows as floats: what the x86 instruction
// sets share.
//
// Each cpu/*.cpp includes this file once inside its own namespace, sets kTileTokens before and defines
// `tile`, `tile_float`, `unpack_row` and `dequantise_codes` after. For one token codes are unpacked in registers, as
// its weights are read once. For two or more, four rows are unpacked to bytes once, into a buffer that the first-level
// cache holds, so that unpacking costs little beside the products.

constexpr int kTileRows = 4;
constexpr int kChunk = 16;            // blocks whose scales are multiplied at a time
constexpr int kUnpackedCols = 20480;  // wider rows (none known) go token by token
constexpr int kUnpacked = 0;          // in place of a width: codes below 64, one a byte

// The rows of a tile. At the end of a matrix the last row is repeated.
struct TileRows {
  const uint8_t* codes[kTileRows];
  const uint16_t* scales[kTileRows];
  const uint16_t* biases[kTileRows];
  int cols;
  // Bytes from a code to the one to fetch into the cache with it, a tile later: rows are too short for the
  // processor to see the streams. It doubles decoding from memory (4 bits, one thread of a 2.8 GHz Xeon: 6.1
  // to 10.8 GB/s).
  size_t ahead;
};

// The tokens of a tile, as pointers into Activations. After the last token it is repeated.
struct TileTokens {
  const float* values[kTileTokens];
  const int8_t* codes[kTileTokens];
  const float* scales[kTileTokens];
  const float* sums[kTileTokens];  // over the matrix's groups
};

// f(0), ..., f(N-1) with constants, so that an array of sums indexed by them lives in registers.
template <int N, typename F>
inline void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

// y (tokens, kTileRows) = rows . tokens
using Tile = void (*)(const TileRows& rows, const TileTokens& tokens, float* y);

template <int Width, int Group, int Tokens>
void tile(const TileRows& rows, const TileTokens& tokens, float* y);

// Width 16 or 32.
template <int Width, int Tokens>
void tile_float(const TileRows& rows, const TileTokens& tokens, float* y);

// Codes of a row to bytes; reads nothing past the row.
template <int Width>
void unpack_row(const uint8_t* codes, int cols, uint8_t* out);

// One packed row as float32.
template <int Width>
void dequantise_codes(const Matrix& m, int row, float* y);

// fold() of four rows at once, each as the sum of its two halves of eight lanes.
inline __m128 fold_rows(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  const __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
  const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  const __m128 ac = _mm256_castps256_ps128(pairs), bd = _mm256_extractf128_ps(pairs, 1);
  const __m128 acbd = _mm_add_ps(_mm_shuffle_ps(ac, bd, 0x88), _mm_shuffle_ps(ac, bd, 0xdd));
  return _mm_shuffle_ps(acbd, acbd, 0xd8);
}

template <int Width, int Group>
Tile choose_by_tokens(int tokens) {
  if constexpr (Width == kUnpacked || Width == 8) {
    if (tokens == 2) return tile<Width, Group, 2>;
    if (tokens > 2) return tile<Width, Group, kTileTokens>;
  }
  return tile<Width, Group, 1>;
}

template <int Width>
Tile choose_by_group(int group, int tokens) {
  return group == 32   ? choose_by_tokens<Width, 32>(tokens)
         : group == 64 ? choose_by_tokens<Width, 64>(tokens)
                       : choose_by_tokens<Width, 128>(tokens);
}

template <int Width>
Tile choose_float(int tokens) {
  return tokens == 1 ? tile_float<Width, 1> : tokens == 2 ? tile_float<Width, 2> : tile_float<Width, kTileTokens>;
}

inline Tile choose_tile(int width, int group, int tokens) {
  switch (width) {
    case kUnpacked:
      return choose_by_group<kUnpacked>(group, tokens);
    case 1:
      return choose_by_group<1>(group, tokens);
    case 2:
      return choose_by_group<2>(group, tokens);
    case 3:
      return choose_by_group<3>(group, tokens);
    case 4:
      return choose_by_group<4>(group, tokens);
    case 5:
      return choose_by_group<5>(group, tokens);
    case 6:
      return choose_by_group<6>(group, tokens);
    case 8:
      return choose_by_group<8>(group, tokens);
    case 16:
      return choose_float<16>(tokens);
    default:
      return choose_float<32>(tokens);
  }
}

inline void unpack_row(const uint8_t* codes, int cols, int width, uint8_t* out) {
  switch (width) {
    case 1:
      return unpack_row<1>(codes, cols, out);
    case 2:
      return unpack_row<2>(codes, cols, out);
    case 3:
      return unpack_row<3>(codes, cols, out);
    case 4:
      return unpack_row<4>(codes, cols, out);
    case 5:
      return unpack_row<5>(codes, cols, out);
    default:
      return unpack_row<6>(codes, cols, out);
  }
}

void dequantise_row(const Matrix& m, int row, float* y) {
  switch (m.width) {
    case 1:
      return dequantise_codes<1>(m, row, y);
    case 2:
      return dequantise_codes<2>(m, row, y);
    case 3:
      return dequantise_codes<3>(m, row, y);
    case 4:
      return dequantise_codes<4>(m, row, y);
    case 5:
      return dequantise_codes<5>(m, row, y);
    case 6:
      return dequantise_codes<6>(m, row, y);
    case 8:
      return dequantise_codes<8>(m, row, y);
    default:
      return kScalarKernels.dequantise_row(m, row, y);
  }
}

inline TileRows rows_of(const Matrix& m, int row, int row_end) {
  TileRows rows{};
  rows.cols = m.cols;
  rows.ahead = codes_bytes(kTileRows, m.cols, m.width);
  for (int r = 0; r < kTileRows; ++r) {
    const int at = row + r < row_end ? row + r : row_end - 1;
    rows.codes[r] = m.codes + codes_bytes(at, m.cols, m.width);
    if (m.width < 16) {
      rows.scales[r] = m.scales + size_t(at) * (m.cols / m.group);
      rows.biases[r] = m.biases + size_t(at) * (m.cols / m.group);
    }
  }
  return rows;
}

inline TileTokens tokens_of(const Matrix& m, const Activations& x, int token) {
  TileTokens tokens{};
  const int blocks = x.blocks();
  const int kind = m.group == 32 ? 0 : m.group == 64 ? 1 : 2;
  const int sums_stride = kind == 0 ? 2 * blocks : kind == 1 ? blocks : (blocks + 1) / 2;
  for (int t = 0; t < kTileTokens; ++t) {
    const int at = token + t < x.count ? token + t : x.count - 1;
    const size_t vector = x.rows ? x.rows[at] : at;
    if (m.width < 16) {
      tokens.codes[t] = x.codes + vector * blocks * kBlock;
      tokens.scales[t] = x.scales + vector * blocks;
      tokens.sums[t] = x.sums[kind] + vector * sums_stride;
    } else {
      tokens.values[t] = x.values + vector * x.cols;
    }
  }
  return tokens;
}

void matmul(const Matrix& m, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end) {
  alignas(64) uint8_t unpacked[kTileRows * kUnpackedCols];
  const bool unpack = m.width < 8 && x.count > 1 && m.cols <= kUnpackedCols;
  const int width = unpack ? kUnpacked : m.width;
  const int step = m.width < 8 && !unpack ? 1 : kTileTokens;
  for (int row = row_begin; row < row_end; row += kTileRows) {
    TileRows rows = rows_of(m, row, row_end);
    for (int r = 0; unpack && r < kTileRows; ++r) {
      unpack_row(rows.codes[r], m.cols, m.width, unpacked + r * m.cols);
      rows.codes[r] = unpacked + r * m.cols;
    }
    const int row_count = row_end - row < kTileRows ? row_end - row : kTileRows;
    for (int token = 0; token < x.count; token += step) {
      const int count = x.count - token < step ? x.count - token : step;
      float sums[kTileTokens * kTileRows];
      choose_tile(width, m.group, count)(rows, tokens_of(m, x, token), sums);
      for (int t = 0; t < count; ++t)
        for (int r = 0; r < row_count; ++r) y[(token + t) * y_stride + row + r] = sums[t * kTileRows + r];
    }
  }
}
