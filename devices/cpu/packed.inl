// Products of packed matrices for all instruction sets: a tile of kTileRows rows, one per lane, by one or several
// tokens. scalar.cpp defines the result.
//
// Each cpu/*.cpp includes this file after vector_ops.inl, inside its own namespace. Before, it sets kTileRows and
// kSpan<Width, Group>, the number of blocks that a product of one token takes together, and defines Vector, a register
// of kTileRows floats, with load, store, broadcast, multiply and fma; after, it defines the templates declared here.
// For one token, codes are unpacked in registers, as each weight is read once. For several, blocks are unpacked to
// bytes once, into a buffer in the L1 cache, and multiplied with every token. Lows cost only where they exist: for one
// token they use the same unpacked codes, and of several tokens only those with lows in a block are multiplied with it
// again.

constexpr int kChunk = 16;  // blocks unpacked at a time
constexpr int kTokens = 8;  // with sums in registers
constexpr int kBatch = 64;  // tokens for which blocks are unpacked once
constexpr int kMostGroups = kChunk * kBlock / 32;
constexpr int kManyLows = 6;            // if so many of kTokens have lows, all are multiplied again
constexpr int kMostArranged = 1 << 15;  // maximum inputs of a product with rearranged inputs

// For lambdas in the innermost loops: gcc does not inline one that is called often, and keeps its sums in memory.
#define EDGE_MOE_INLINED __attribute__((always_inline))

// Calls f(0), ..., f(N-1) with constants, so that an array of sums that they index is kept in registers.
template <int N, typename F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      EDGE_MOE_INLINED { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

// The first row of a tile; the others follow it.
struct PackedRows {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint16_t* biases;
  size_t stride;  // bytes of a row's codes
  int cols;
};

// Vectors of Activations.
struct PackedTokens {
  const int8_t *codes[kBatch], *lows[kBatch];
  const uint8_t* two_planes[kBatch];
  const float* scales[kBatch];
  const float* sums[kBatch];  // over the matrix's groups
};

// One vector; its planes are in the order of the rows' codes if arrange() has rearranged them.
struct PackedToken {
  const int8_t* planes[2];
  const uint8_t* two_planes;  // at each span's first block, whether any block of the span has lows
  const float* scales;
  const float* sums;
};

// out[g][row] = the bfloat16 values [first, first + count) of each row, with rows `stride` values apart. Rounds count
// up to 8. Not inlined: gcc then keeps the variables of the loop over blocks in registers (decoding at 2 and 4 bits
// is 1.10 and 1.16 times as fast).
[[gnu::noinline]] void columns(const uint16_t* values, int stride, int first, int count, float (*out)[kTileRows]);

// The dot products of each row's block with the planes of a token's block: over all 64 inputs, or over each half. Reads
// nothing past the block.
template <int Width, Codec C, int Planes, int Parts>
[[gnu::always_inline]] inline void block_dots(const uint8_t* codes, size_t stride, const int8_t* const* x,
                                              Vector (&dots)[Planes][Parts]);

// The same for kSpan blocks, whose inputs arrange() has rearranged; the rows have `left` more inputs, and nothing past
// them is read. Prefetches as many bytes from `next` on, row by row.
template <int Width, Codec C, int Planes, int Parts>
[[gnu::always_inline]] inline void span_dots(const uint8_t* codes, size_t stride, int left, const int8_t* const* x,
                                             const uint8_t* next, Vector (&dots)[Planes][Parts]);

// Unpacks the block's codes to kTileRows * kBlock bytes, in an order specific to the instruction set.
template <int Width>
inline void unpack_block(const uint8_t* codes, size_t stride, uint8_t* out);

// block_dots for bytes from unpack_block, with one plane of several tokens. Wide: codes may exceed 63.
template <int Tokens, int Parts, bool Wide>
inline void unpacked_dots(const uint8_t* bytes, const int8_t* const* x, size_t at, Vector (&dots)[Tokens][Parts]);

// Replaces unpacked E2M1 codes, kTileRows * kBlock bytes, by kE2m1 of each.
inline void look_up(uint8_t* bytes);

// Unpacks the 64 codes of one row's block to bytes, in order.
template <int Width>
inline void unpack_in_order(const uint8_t* codes, uint8_t* out);

// columns(), computed value by value.
inline void plain_columns(const uint16_t* values, int stride, int first, int count, float (*out)[kTileRows]) {
  for (int g = 0; g < count; ++g)
    for (int r = 0; r < kTileRows; ++r) out[g][r] = from_bfloat16(values[size_t(r) * stride + first + g]);
}

// columns() of scales and biases for E8M0 scales, given those of the first row. Rows of sixteen bytes are transposed by
// log2(kTileRows) perfect shuffles.
[[gnu::noinline]] inline void exponent_columns(const uint8_t* exponents, int stride, int first, int count,
                                               float (*scales)[kTileRows], float (*biases)[kTileRows]) {
  typedef uint8_t Sixteen __attribute__((vector_size(16)));
  constexpr int kAtOnce = 16;
  for (int g = 0; g < count; g += kAtOnce) {
    const int here = count - g < kAtOnce ? count - g : kAtOnce;
    Sixteen rows[kTileRows] = {}, next[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      const uint8_t* from = exponents + size_t(r) * stride + first + g;
      here == kAtOnce ? std::memcpy(&rows[r], from, kAtOnce) : std::memcpy(&rows[r], from, size_t(here));
    }
    for (int step = 1; step < kTileRows; step *= 2) {
      for (int r = 0; r < kTileRows / 2; ++r) {
        const Sixteen a = rows[r], b = rows[r + kTileRows / 2];
        next[2 * r] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        next[2 * r + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
      }
      std::memcpy(rows, next, sizeof(rows));
    }
    uint8_t of_groups[kAtOnce * kTileRows];
    std::memcpy(of_groups, rows, sizeof(rows));
    for (int i = 0; i < here * kTileRows; ++i) {
      const float scale = e8m0_half(of_groups[i]);
      scales[g][i] = scale;
      biases[g][i] = -kE2m1Zero * scale;
    }
  }
}

// Parts of a block that belong to different weight groups: two halves for groups of 32.
template <int Group>
constexpr int kParts = Group == 32 ? 2 : 1;
template <int Group>
constexpr int kGroupBlocks = Group == 128 ? 2 : 1;

// The codes of a whole block, or of a last half block, padded with zeros in `tail`.
template <int Width>
inline const uint8_t* block_codes(const PackedRows& rows, int block, uint8_t* tail, size_t& stride) {
  const uint8_t* codes = rows.codes + size_t(block) * (kBlock / 8 * Width);
  if ((block + 1) * kBlock <= rows.cols) {
    stride = rows.stride;
    return codes;
  }
  std::memset(tail, 0, size_t(kTileRows) * kBlock);
  for (int r = 0; r < kTileRows; ++r) std::memcpy(tail + r * kBlock, codes + r * rows.stride, kBlock / 16 * Width);
  stride = kBlock;
  return tail;
}

// Prefetches rows of the next tile to the L2 cache while this tile is computed, as the hardware prefetcher does not
// handle many short rows in parallel. From memory at 2 bits: 4.7 GB/s a thread without, 6.7 with. always_inline: gcc
// considers a function that only prefetches free of effects, and removes its calls.
[[gnu::always_inline]] inline void fetch(const void* data, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(data) + i, 0, 2);
}

template <int Width>
inline const uint8_t* next_codes(const PackedRows& rows, int block) {
  return rows.codes + kTileRows * rows.stride + size_t(block) * (kTileRows * kBlock / 8 * Width);
}

template <int Group, int Blocks, Codec C>
[[gnu::always_inline]] inline void fetch_next_scales(const PackedRows& rows, int block) {
  const size_t at = size_t(kTileRows) * (rows.cols / Group + block * kBlock / Group);
  constexpr int kValues = kTileRows * Blocks * kBlock / Group;
  if constexpr (C == Codec::kMxfp4) {
    fetch(reinterpret_cast<const uint8_t*>(rows.scales) + at, kValues);
  } else {
    fetch(rows.scales + at, kValues * sizeof(uint16_t));
    fetch(rows.biases + at, kValues * sizeof(uint16_t));
  }
}

// The scales and biases of groups [first, first + count), as columns().
template <Codec C>
[[gnu::always_inline]] inline void group_columns(const PackedRows& rows, int groups, int first, int count,
                                                 float (*scales)[kTileRows], float (*biases)[kTileRows]) {
  if constexpr (C == Codec::kMxfp4) {
    exponent_columns(reinterpret_cast<const uint8_t*>(rows.scales), groups, first, count, scales, biases);
  } else {
    columns(rows.scales, groups, first, count, scales);
    columns(rows.biases, groups, first, count, biases);
  }
}

// The inputs of a span in the order of its codes: first those of every byte's lowest code, then of the next code. An
// incomplete last span is padded with zeros.
template <int Width, int Group>
inline void arrange_span(const int8_t* x, int blocks, int8_t* out) {
  constexpr int kFields = 8 / Width, kBytes = kSpan<Width, Group> * kBlock / kFields;
  int8_t in[kFields * kBytes] = {};
  std::memcpy(in, x, size_t(blocks) * kBlock);
  for (int field = 0; field < kFields; ++field)
    for (int i = 0; i < kBytes; ++i) out[field * kBytes + i] = in[i * kFields + field];
}

template <int Width, int Group>
struct ArrangedToken {
  alignas(64) int8_t planes[2][kMostArranged];
  uint8_t two_planes[kMostArranged / kBlock];

  static bool holds(int blocks) { return blocks + kSpan<Width, Group> <= kMostArranged / kBlock; }

  // Rearranges lows only for spans that have any.
  PackedToken arrange(const Quantised& x, int blocks) {
    for (int block = 0; block < blocks; block += kSpan<Width, Group>) {
      const int count = blocks - block < kSpan<Width, Group> ? blocks - block : kSpan<Width, Group>;
      two_planes[block] = 0;
      for (int i = 0; i < count; ++i) two_planes[block] |= x.two_planes[block + i];
      arrange_span<Width, Group>(x.codes + block * kBlock, count, planes[0] + block * kBlock);
      if (two_planes[block]) arrange_span<Width, Group>(x.lows + block * kBlock, count, planes[1] + block * kBlock);
    }
    return {{planes[0], planes[1]}, two_planes, x.scales, x.group_sums(Group)};
  }
};

// A token whose inputs are not rearranged.
template <int Width, int Group>
  requires(kSpan<Width, Group> == 1)
struct ArrangedToken<Width, Group> {
  static bool holds(int) { return true; }
  PackedToken arrange(const Quantised& x, int) {
    return {{x.codes, x.lows}, x.two_planes, x.scales, x.group_sums(Group)};
  }
};

// The dot products of a span whose inputs have lows. Not inlined: the loop over spans without lows keeps its registers.
template <int Width, int Group, Codec C>
[[gnu::noinline, gnu::flatten]] void both_planes(const uint8_t* codes, size_t stride, int left, const int8_t* inputs,
                                                 const int8_t* lows, const uint8_t* next, float (*out)[kTileRows]) {
  constexpr int kDots = kSpan<Width, Group> * kParts<Group>;
  const int8_t* const planes[] = {inputs, lows};
  Vector dots[2][kDots];
  if constexpr (kSpan<Width, Group> != 1)
    span_dots<Width, C>(codes, stride, left, planes, next, dots);
  else
    block_dots<Width, C>(codes, stride, planes, dots);
  unrolled<kDots>([&](auto i) { store(out[i], fma(dots[1][i], broadcast(kLowStep), dots[0][i])); });
}

template <int Width, int Group, Codec C = Codec::kAffine>
void one_token(const PackedRows rows, const PackedToken& x, float* y) {
  constexpr int kGroups = kChunk * kBlock / Group, kDots = kSpan<Width, Group> * kParts<Group>;
  alignas(64) float scales[kGroups][kTileRows], biases[kGroups][kTileRows];
  alignas(64) float both[kDots][kTileRows];
  alignas(64) uint8_t tail[Group == 32 ? kTileRows * kBlock : 1];
  const int groups = rows.cols / Group;
  Vector sum = broadcast(0.0f);
  for (int first = 0; first < groups; first += kGroups) {
    const int count = groups - first < kGroups ? groups - first : kGroups, end = count * kGroupBlocks<Group>;
    group_columns<C>(rows, groups, first, count, scales, biases);
    for (int at = 0; at < end; at += kDots) {
      const int block = (first * kGroupBlocks<Group> + at) / kParts<Group>;
      const uint8_t* codes = rows.codes + size_t(block) * (kBlock / 8 * Width);
      const int left = rows.cols - block * kBlock;
      const int8_t *inputs = x.planes[0] + block * kBlock, *lows = x.planes[1] + block * kBlock;
      size_t stride = rows.stride;
      Vector dots[1][kDots];
      fetch_next_scales<Group, kSpan<Width, Group>, C>(rows, block);
      if constexpr (kSpan<Width, Group> == 1) {
        fetch(next_codes<Width>(rows, block), kTileRows * kBlock / 8 * Width);
        if constexpr (Group == 32) codes = block_codes<Width>(rows, block, tail, stride);
      }
      if (x.two_planes[block]) {
        both_planes<Width, Group, C>(codes, stride, left, inputs, lows, next_codes<Width>(rows, block), both);
        unrolled<kDots>([&](auto i) { dots[0][i] = load(both[i]); });
      } else if constexpr (kSpan<Width, Group> != 1) {
        span_dots<Width, C>(codes, stride, left, &inputs, next_codes<Width>(rows, block), dots);
      } else {
        block_dots<Width, C>(codes, stride, &inputs, dots);
      }
      unrolled<kDots>([&](auto i) {
        if (i > 0 && at + i >= end) return;
        const int group = (at + i) / kGroupBlocks<Group>;
        if ((at + i) % kGroupBlocks<Group> == 0) sum = fma(load(biases[group]), broadcast(x.sums[first + group]), sum);
        const Vector x_scale = broadcast(x.scales[block + i / kParts<Group>]);
        sum = fma(dots[0][i], multiply(load(scales[group]), x_scale), sum);
      });
    }
  }
  store(y, sum);
}

// The first bytes, at most 8, and zeros. It reads no others, which may be of a vector that another thread rounds.
[[gnu::always_inline]] inline uint64_t first_bytes(const uint8_t* from, int count) {
  uint64_t bytes = 0;
  if (count >= 8) {
    std::memcpy(&bytes, from, 8);
    return bytes;
  }
  int at = 0;
  const auto take = [&](auto part) {
    if (!(count & int(sizeof(part)))) return;
    std::memcpy(&part, from + at, sizeof(part));
    bytes |= uint64_t(part) << 8 * at;
    at += int(sizeof(part));
  };
  take(uint32_t{}), take(uint16_t{}), take(uint8_t{});
  return bytes;
}

// Sets bit t of flags[block] if token t has lows in that block of a chunk of `blocks`. Returns whether any token has.
template <int Tokens>
[[gnu::always_inline]] inline bool low_flags(const uint8_t* const* two_planes, int first_block, int blocks,
                                             uint8_t (&flags)[kChunk]) {
  static_assert(kChunk == 16 && Tokens <= 8);
  uint64_t words[2] = {};
  for (int i = 0; i < 2 && 8 * i < blocks; ++i)
    for (int t = 0; t < Tokens; ++t) words[i] |= first_bytes(two_planes[t] + first_block + 8 * i, blocks - 8 * i) << t;
  std::memcpy(flags, words, kChunk);
  return words[0] | words[1];
}

// out[block][token] = unpacked_dots of lows, for the blocks and tokens in flags; zeros for the other tokens of such a
// block. Not inlined: the loop over tokens without lows keeps its registers.
template <int Tokens, int Parts, bool Wide>
[[gnu::noinline, gnu::flatten]] void low_dots(const uint8_t* bytes, const int8_t* const* lows, int first_block,
                                              int blocks, const uint8_t* flags,
                                              float (*out)[Tokens][Parts][kTileRows]) {
  for (int block = 0; block < blocks; ++block) {
    unsigned left = flags[block];
    if (!left) continue;
    const uint8_t* codes = bytes + size_t(block) * kTileRows * kBlock;
    const size_t at = size_t(first_block + block) * kBlock;
    if (__builtin_popcount(left) >= kManyLows) {
      Vector dots[Tokens][Parts];
      unpacked_dots<Tokens, Parts, Wide>(codes, lows, at, dots);
      unrolled<Tokens * Parts>([&](auto i) { store(out[block][i / Parts][i % Parts], dots[i / Parts][i % Parts]); });
      continue;
    }
    std::memset(out[block], 0, sizeof(out[block]));
    auto some = [&](auto count) {
      const int8_t* inputs[count];
      int tokens[count];
      for (int i = 0; i < count; ++i, left &= left - 1) {
        tokens[i] = __builtin_ctz(left);
        inputs[i] = lows[tokens[i]];
      }
      Vector dots[count][Parts];
      unpacked_dots<count, Parts, Wide>(codes, inputs, at, dots);
      unrolled<count * Parts>(
          [&](auto i) { store(out[block][tokens[i / Parts]][i % Parts], dots[i / Parts][i % Parts]); });
    };
    while (left & (left - 1)) some(std::integral_constant<int, 2>{});
    if (left) some(std::integral_constant<int, 1>{});
  }
}

// Adds the products of a chunk of blocks to the sums of `Tokens` tokens.
template <int Group, int Tokens, bool Wide>
[[gnu::flatten]] void some_tokens(const uint8_t* bytes, const float (*scales)[kTileRows],
                                  const float (*biases)[kTileRows], int first_block, int first_group, int groups,
                                  const PackedTokens& tokens, int token, float (*sums)[kTileRows]) {
  constexpr int kSums = kParts<Group>;
  const int8_t* const* x = tokens.codes + token;
  uint8_t flags[kChunk];
  alignas(64) float lows[kChunk][Tokens][kSums][kTileRows];
  const int blocks = (groups + kSums - 1) / kSums * kGroupBlocks<Group>;
  const bool any_lows = low_flags<Tokens>(tokens.two_planes + token, first_block, blocks, flags);
  if (any_lows) low_dots<Tokens, kSums, Wide>(bytes, tokens.lows + token, first_block, blocks, flags, lows);
  Vector sum[Tokens];
  unrolled<Tokens>([&](auto t) { sum[t] = load(sums[t]); });
  for (int g = 0; g < groups; g += kParts<Group>)
    for (int b = 0; b < kGroupBlocks<Group>; ++b) {
      const int block = g / kParts<Group> * kGroupBlocks<Group> + b;
      const uint8_t* codes = bytes + size_t(block) * kTileRows * kBlock;
      const size_t at = size_t(first_block + block) * kBlock;
      Vector dots[Tokens][kSums];
      unpacked_dots<Tokens, kSums, Wide>(codes, x, at, dots);
      if (any_lows && flags[block])
        unrolled<Tokens * kSums>([&](auto i) {
          Vector& dot = dots[i / kSums][i % kSums];
          dot = fma(load(lows[block][i / kSums][i % kSums]), broadcast(kLowStep), dot);
        });
      unrolled<kParts<Group>>([&](auto part) {
        if (part && g + 1 >= groups) return;
        const Vector scale = load(scales[g + part]), bias = load(biases[g + part]);
        unrolled<Tokens>([&](auto t) {
          if (b == 0) sum[t] = fma(bias, broadcast(tokens.sums[token + t][first_group + g + part]), sum[t]);
          const Vector x_scale = broadcast(tokens.scales[token + t][first_block + block]);
          sum[t] = fma(dots[t][part], multiply(scale, x_scale), sum[t]);
        });
      });
    }
  unrolled<Tokens>([&](auto t) { store(sums[t], sum[t]); });
}

template <int Width, int Group, Codec C = Codec::kAffine>
void many_tokens(const PackedRows& rows, const PackedTokens& tokens, int count, float (*sums)[kTileRows]) {
  alignas(64) uint8_t bytes[kChunk * kTileRows * kBlock], tail[kTileRows * kBlock];
  alignas(64) float scales[kMostGroups][kTileRows], biases[kMostGroups][kTileRows];
  const int blocks = (rows.cols + kBlock - 1) / kBlock, groups = rows.cols / Group;
  std::memset(sums, 0, sizeof(*sums) * count);
  for (int chunk = 0; chunk < blocks; chunk += kChunk) {
    const int end = chunk + kChunk < blocks ? chunk + kChunk : blocks;
    for (int block = chunk; block < end; ++block) {
      size_t stride;
      const uint8_t* codes = block_codes<Width>(rows, block, tail, stride);
      uint8_t* unpacked = bytes + size_t(block - chunk) * kTileRows * kBlock;
      unpack_block<Width>(codes, stride, unpacked);
      if constexpr (C == Codec::kMxfp4) look_up(unpacked);
    }
    const int first = chunk * kBlock / Group, last = end * kBlock / Group < groups ? end * kBlock / Group : groups;
    group_columns<C>(rows, groups, first, last - first, scales, biases);
    auto add = [&](auto step, int token) {
      some_tokens<Group, step, (Width > 6)>(bytes, scales, biases, chunk, first, last - first, tokens, token,
                                            sums + token);
    };
    int token = 0;
    for (; token + kTokens <= count; token += kTokens) add(std::integral_constant<int, kTokens>{}, token);
    for (; token + 2 <= count; token += 2) add(std::integral_constant<int, 2>{}, token);
    for (; token < count; ++token) add(std::integral_constant<int, 1>{}, token);
  }
}

template <int Width, int Group, Codec C = Codec::kAffine>
void packed_matmul(const Matrix& m, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end) {
  const int blocks = x.blocks(), groups = m.cols / Group;
  alignas(64) float sums[kBatch][kTileRows];
  const bool one = x.count == 1 && ArrangedToken<Width, Group>::holds(blocks);
  ArrangedToken<Width, Group> arranged;
  PackedToken only{};
  if (one) only = arranged.arrange(x.quantised.from(x.vector(0), x.cols), blocks);
  for (int row = row_begin; row < row_end; row += kTileRows) {
    // The last tile begins earlier, and its first rows, which are done already, are not stored.
    const int first = row + kTileRows <= m.rows ? row : m.rows - kTileRows;
    const int stored = row_end - row < kTileRows ? row_end - row : kTileRows;
    const size_t at = size_t(first) * groups;
    const uint16_t* scales = C == Codec::kMxfp4 ? reinterpret_cast<const uint16_t*>(m.exponents() + at) : m.scales + at;
    const PackedRows rows = {m.codes + codes_bytes(first, m.cols, Width), scales, m.biases + at,
                             codes_bytes(1, m.cols, Width), m.cols};
    for (int token = 0; token < x.count; token += kBatch) {
      const int count = x.count - token < kBatch ? x.count - token : kBatch;
      PackedTokens tokens;
      for (int t = 0; t < count; ++t) {
        const Quantised vector = x.quantised.from(x.vector(token + t), x.cols);
        tokens.codes[t] = vector.codes, tokens.lows[t] = vector.lows;
        tokens.two_planes[t] = vector.two_planes;
        tokens.scales[t] = vector.scales;
        tokens.sums[t] = vector.group_sums(Group);
      }
      if (one)
        one_token<Width, Group, C>(rows, only, sums[0]);
      else
        many_tokens<Width, Group, C>(rows, tokens, count, sums);
      for (int t = 0; t < count; ++t)
        std::memcpy(y + (token + t) * y_stride + row, sums[t] + (row - first), size_t(stored) * sizeof(float));
    }
  }
}

template <int Width>
void dequantise_codes(const Matrix& m, int row, float* y) {
  const uint8_t* codes = m.codes + codes_bytes(row, m.cols, Width);
  const size_t groups = m.cols / m.group;
  for (int first = 0; first < m.cols; first += kBlock, codes += kBlock / 8 * Width) {
    const int count = m.cols - first < kBlock ? 32 : kBlock;
    uint8_t block[kBlock] = {}, bytes[kBlock];
    std::memcpy(block, codes, size_t(count) / 8 * Width);
    unpack_in_order<Width>(block, bytes);
    for (int i = 0; i < count; ++i) {
      const size_t group = row * groups + (first + i) / m.group;
      y[first + i] = from_bfloat16(m.scales[group]) * float(bytes[i]) + from_bfloat16(m.biases[group]);
    }
  }
}

template <int Width>
void packed_by_group(const Matrix& m, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end) {
  if (m.rows < kTileRows) return kScalarKernels.find(m.codec, m.width)->product(m, x, y, y_stride, row_begin, row_end);
  auto* product = m.group == 32   ? packed_matmul<Width, 32>
                  : m.group == 64 ? packed_matmul<Width, 64>
                                  : packed_matmul<Width, 128>;
  product(m, x, y, y_stride, row_begin, row_end);
}

// By scalar.cpp: floats, and E2M1 values.
void dequantise_floats(const Matrix& m, int row, float* y) { kScalarKernels.dequantise_row(m, row, y); }

void mxfp4_product(const Matrix& m, const Activations& x, float* y, size_t y_stride, int row_begin, int row_end) {
  if (m.rows < kTileRows) return kScalarKernels.find(m.codec, m.width)->product(m, x, y, y_stride, row_begin, row_end);
  packed_matmul<4, 32, Codec::kMxfp4>(m, x, y, y_stride, row_begin, row_end);
}

constexpr CodecKernels mxfp4() { return {Codec::kMxfp4, 4, mxfp4_product, dequantise_floats}; }

template <int Width>
constexpr CodecKernels affine() {
  return {Codec::kAffine, Width, packed_by_group<Width>, dequantise_codes<Width>};
}
