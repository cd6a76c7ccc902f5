// Attention's products with the KV cache, queries with keys and weights with values, for all instruction sets.
// scalar.cpp defines the result.
//
// Each cpu/*.cpp includes this file after packed.inl and vector_ops.inl, inside its own namespace, and defines
// load_cached(const uint16_t*) before. A tile is eight queries, or fewer with proportionally more positions, so that
// the number of sums in registers is constant, and a loaded key or value is used for up to eight queries.

constexpr int kTileQueries = 8;
constexpr int kValueRows = 64;  // values in one pass over the queries: with 128 floats each they fill the L1 cache

inline Vector load_cached(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Calls tile(count, at) for queries [at, at + count) until all are covered; count is a compile-time constant.
template <typename Tile>
inline void in_tiles(int queries, const Tile& tile) {
  int at = 0;
  auto all_of = [&](auto count) {
    for (; at + count <= queries; at += count) tile(count, at);
  };
  all_of(std::integral_constant<int, kTileQueries>{});
  all_of(std::integral_constant<int, 4>{});
  all_of(std::integral_constant<int, 2>{});
  all_of(std::integral_constant<int, 1>{});
}

// The scores of a tile: `Queries` queries by `Blocks` key blocks.
template <typename T, int Queries, int Blocks>
inline void tile_scores(const float* const* q, const T* keys, int head_dim, float scale, float* const* scores) {
  for (int part = 0; part < kKeyBlock; part += kTileRows) {
    Vector sums[Blocks][Queries];
    unrolled<Blocks * Queries>([&](auto i) { sums[i / Queries][i % Queries] = broadcast(0.0f); });
    const T* key = keys + part;
    for (int d = 0; d < head_dim; ++d, key += kKeyBlock) {
      Vector at[Blocks];
      unrolled<Blocks>([&](auto b) { at[b] = load_cached(key + size_t(b) * head_dim * kKeyBlock); });
      unrolled<Queries>([&](auto i) {
        const Vector value = broadcast(q[i][d]);
        unrolled<Blocks>([&](auto b) { sums[b][i] = fma(value, at[b], sums[b][i]); });
      });
    }
    unrolled<Blocks * Queries>([&](auto i) {
      const Vector score = multiply(sums[i / Queries][i % Queries], broadcast(scale));
      std::memcpy(scores[i % Queries] + i / Queries * kKeyBlock + part, &score, sizeof score);
    });
  }
}

// The scores of `Queries` queries with all key blocks in [begin, end).
template <typename T, int Queries>
void block_scores(const float* const* q, const T* keys, int begin, int end, int head_dim, float scale, float* scores,
                  size_t scores_stride) {
  constexpr int kBlocks = kTileQueries / Queries;
  int block = begin;
  auto tile = [&](auto blocks) {
    float* out[Queries];
    for (int i = 0; i < Queries; ++i) out[i] = scores + i * scores_stride + size_t(block) * kKeyBlock;
    tile_scores<T, Queries, blocks>(q, keys + size_t(block) * head_dim * kKeyBlock, head_dim, scale, out);
    block += blocks;
  };
  while (block + kBlocks <= end) tile(std::integral_constant<int, kBlocks>{});
  while (block < end) tile(std::integral_constant<int, 1>{});
}

template <typename T>
void all_scores(const float* const* q, int queries, const T* keys, int begin, int end, int head_dim, float scale,
                float* scores, size_t scores_stride) {
  in_tiles(queries, [&](auto count, int at) {
    block_scores<T, count>(q + at, keys, begin, end, head_dim, scale, scores + at * scores_stride, scores_stride);
  });
}

void attend_scores(const float* const* q, int queries, const KeyValues& cache, int begin, int end, int head_dim,
                   float scale, float* scores, size_t scores_stride) {
  const int first = begin / kKeyBlock, last = (end + kKeyBlock - 1) / kKeyBlock;
  if (cache.half)
    all_scores(q, queries, static_cast<const uint16_t*>(cache.keys), first, last, head_dim, scale, scores,
               scores_stride);
  else
    all_scores(q, queries, static_cast<const float*>(cache.keys), first, last, head_dim, scale, scores, scores_stride);
}

// Adds `rows` weighted values, n floats of each, for `Queries` queries.
template <typename T, int Queries>
void row_values(const float* weights, size_t weights_stride, const T* values, size_t stride, int rows, int n,
                float* const* out) {
  int i = 0;
  for (; i + kTileRows <= n; i += kTileRows) {
    Vector sums[Queries];
    unrolled<Queries>([&](auto query) { sums[query] = load_cached(out[query] + i); });
    for (int row = 0; row < rows; ++row) {
      const Vector value = load_cached(values + row * stride + i);
      unrolled<Queries>(
          [&](auto query) { sums[query] = fma(broadcast(weights[query * weights_stride + row]), value, sums[query]); });
    }
    unrolled<Queries>([&](auto query) { std::memcpy(out[query] + i, &sums[query], sizeof(Vector)); });
  }
  for (; i < n; ++i)
    for (int query = 0; query < Queries; ++query)
      for (int row = 0; row < rows; ++row)
        out[query][i] =
            std::fma(weights[query * weights_stride + row], as_float(values[row * stride + i]), out[query][i]);
}

template <typename T>
void all_values(const float* weights, size_t weights_stride, int queries, const T* values, size_t stride, int begin,
                int end, int n, float* const* out) {
  for (int row = begin; row < end; row += kValueRows) {
    const int rows = end - row < kValueRows ? end - row : kValueRows;
    in_tiles(queries, [&](auto count, int at) {
      row_values<T, count>(weights + at * weights_stride + row, weights_stride, values + row * stride, stride, rows, n,
                           out + at);
    });
  }
}

void attend_values(const float* weights, size_t weights_stride, int queries, const KeyValues& cache, int begin, int end,
                   int n, float* const* out) {
  if (cache.half)
    all_values(weights, weights_stride, queries, static_cast<const uint16_t*>(cache.values), cache.stride, begin, end,
               n, out);
  else
    all_values(weights, weights_stride, queries, static_cast<const float*>(cache.values), cache.stride, begin, end, n,
               out);
}

void widen(const uint16_t* halves, float* y, int n) {
  int i = 0;
  for (; i + kTileRows <= n; i += kTileRows) {
    const Vector values = load_cached(halves + i);
    std::memcpy(y + i, &values, sizeof values);
  }
  for (; i < n; ++i) y[i] = half_to_float(halves[i]);
}
