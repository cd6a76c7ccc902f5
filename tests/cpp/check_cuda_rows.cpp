// Rows that are key and value of all heads, and compressed rows, against the steps of runtime/src/row_attention.cpp by
// scalar.cpp.
#include "../../devices/cuda/rows.h"
#include "../../devices/position_sums.h"
#include "../../runtime/src/key_block.h"
#include "../../runtime/src/rope.h"
#include "check_cuda.h"

namespace {

constexpr float kEps = 1e-6f;

// A cache of floats or halves, and the same values as floats.
struct Cache {
  Cache(size_t values, bool half) : half(half), floats(::floats(values)), halves(values) {
    std::transform(floats.begin(), floats.end(), halves.begin(), float_to_half);
  }
  void put(size_t at, float value) { half ? void(halves[at] = float_to_half(value)) : void(floats[at] = value); }
  float get(size_t at) const { return half ? half_to_float(halves[at]) : floats[at]; }
  void* data() { return half ? static_cast<void*>(halves.data()) : floats.data(); }
  bool half;
  Floats floats;
  Values<uint16_t> halves;
};

void compare(const std::string& what, const Cache& got, const Cache& want) {
  got.half ? ::compare(what, got.halves, want.halves) : ::compare(what, got.floats, want.floats);
}

struct Angles {
  Angles(size_t positions, int rope_dim) : half(rope_dim / 2), cos(positions * half), sin(positions * half) {
    const Floats frequency = floats(size_t(half));
    fill_rope(frequency, 1.0f, 0, int(positions), cos.data(), sin.data());
  }
  void turn(float* x, int dim, size_t at, bool interleaved) const {
    rotate(x + dim - 2 * half, &cos[at * half], &sin[at * half], half, half, interleaved);
  }
  int half;
  Floats cos, sin;
};

// A span of tokens after `position` others, in a pass that begins with another token.
void check_store(const cuda::RowHeads& heads, bool half, int position, int tokens, int places) {
  const int n = heads.head_dim, first = 1;
  const size_t all = size_t(first) + tokens;
  const Angles angles(size_t(position) + tokens, heads.rope_dim);
  const Floats norm = floats(size_t(n)), ones(size_t(n), 1.0f);
  Floats q = floats(all * heads.heads * n), rows = floats(all * n);
  Floats index = floats(all * heads.index_heads * heads.index_dim);
  Floats got_q = q, got_rows = rows, got_index = index;
  Cache cache(size_t(places) * n, half), got = cache;
  for (int t = first; t < int(all); ++t) {
    const size_t at = size_t(position) + t - first;
    for (int head = 0; head < heads.heads; ++head) {
      float* x = &q[(size_t(t) * heads.heads + head) * n];
      kScalarKernels.rms_norm(x, ones.data(), kEps, x, n);
      angles.turn(x, n, at, heads.interleaved);
      for (int i = 0; i < n; ++i) x[i] *= heads.softmax_scale;
    }
    for (int head = 0; head < heads.index_heads; ++head)
      angles.turn(&index[(size_t(t) * heads.index_heads + head) * heads.index_dim], heads.index_dim, at,
                  heads.interleaved);
    float* row = &rows[size_t(t) * n];
    kScalarKernels.rms_norm(row, norm.data(), kEps, row, n);
    angles.turn(row, n, at, heads.interleaved);
    for (int i = 0; i < n; ++i) cache.put(at % places * n + i, row[i]);
  }
  const Values<int32_t> at = {position - first};
  cuda::store_rows(got_q.data(), got_rows.data(), got_index.data(), {angles.cos.data(), angles.sin.data(), norm.data()},
                   heads, {got.data(), places, 0, half}, {at.data(), first, tokens, position + tokens}, nullptr);
  const std::string what =
      "rows of " + std::to_string(n) + ", " + std::to_string(tokens) + " tokens at " + std::to_string(position);
  compare(what + ", queries", got_q, q);
  compare(what + ", queries of the indexer", got_index, index);
  compare(what + ", cache", got, cache);
}

// Compressed rows, or keys, of a span; the sums before it are those of a token that was there.
void check_pool(int dim, int rate, bool overlaps, bool keys, bool half, int position, int tokens) {
  const int first = 2, places = 8, rope_dim = 8;
  const size_t all = size_t(first) + tokens, rows = (size_t(position) + tokens) / rate + 1, at = 5;
  const Angles angles(size_t(position) + tokens, rope_dim);
  const int columns = overlaps ? 2 * dim : dim, series = overlaps ? 2 : 1, own = columns - dim;
  const Floats bias = floats(size_t(rate) * columns), norm = floats(size_t(dim)), gates = floats(all * columns);
  const size_t values_of_state = at + size_t(series) * 3 * dim;
  Floats values = floats(all * columns), states = floats(2 * values_of_state);
  for (float& value : states) value = std::abs(value) + 0.5f;  // weights are above zero
  Floats got_values = values, got_states = states;
  Cache cache(keys ? align_up(rows, kKeyBlock) * dim : (places + rows) * dim, half), got = cache;
  const auto sums = [&](size_t buffer, int which, int i) {
    return &states[buffer * values_of_state + at + 3 * which * dim + i];
  };
  for (int i = 0; i < dim; ++i) {
    PoolSums its[2];
    for (int which = 0; position && which < series; ++which) {
      const float* from = sums(0, which, i);
      its[which] = {from[0], from[dim], from[2 * dim]};
    }
    for (size_t t = first; t < all; ++t) {
      const size_t in_row = (position + t - first) % rate, row = t * columns;
      its[0].add(gates[row + own + i] + bias[in_row * columns + own + i], values[row + own + i]);
      if (overlaps) its[1].add(gates[row + i] + bias[in_row * columns + i], values[row + i]);
      if (in_row + 1 == size_t(rate)) values[row + i] = its[0].mean(), its[0] = its[1], its[1] = {};
    }
    for (int which = 0; which < series; ++which) {
      float* to = sums(1, which, i);
      to[0] = its[which].top, to[dim] = its[which].weight, to[2 * dim] = its[which].value;
    }
  }
  for (size_t t = first; t < all; ++t) {
    const size_t position_of = size_t(position) + t - first, place = position_of / rate;
    if ((position_of + 1) % rate) continue;
    float* row = &values[t * columns];
    kScalarKernels.rms_norm(row, norm.data(), kEps, row, dim);
    angles.turn(row, dim, place * rate, true);
    for (int i = 0; i < dim; ++i)
      cache.put(keys ? (place / kKeyBlock * dim + i) * kKeyBlock + place % kKeyBlock : (places + place) * dim + i,
                row[i]);
  }
  const Values<int32_t> before = {position - first}, numbers = {position ? 0 : -1, 1};
  cuda::pool_rows(got_values.data(), gates.data(), {bias.data(), norm.data(), kEps, dim, rate, overlaps, at},
                  {angles.cos.data(), angles.sin.data(), nullptr}, rope_dim, true,
                  {got_states.data(), values_of_state, numbers.data()}, {keys ? nullptr : got.data(), places, 0, half},
                  {got.data(), 0, half}, {before.data(), first, tokens, position + tokens}, nullptr);
  const std::string what = "compressed rows of " + std::to_string(dim) + ", " + std::to_string(rate) +
                           " tokens each, " + std::to_string(tokens) + " tokens at " + std::to_string(position);
  compare(what + ", values", got_values, values);
  compare(what + ", states", got_states, states);
  compare(what + ", cache", got, cache);
}

// Attention of some tokens, every second one to a choice of the compressed rows, the others to all.
void check_attend(int heads, int groups, int n, int rate, int window, bool half, int position, int tokens) {
  const int places = window + tokens - 1, of_group = heads / groups;
  const size_t end = size_t(position) + tokens, pooled = rate ? end / rate : 0, most = std::max<size_t>(pooled, 1);
  const size_t room = align_up(pooled + window, kKeyBlock);
  const Angles angles(end, 8);
  Cache cache((places + pooled) * n, half);
  const Floats q = floats(size_t(tokens) * heads * n), sinks = floats(size_t(heads));
  Values<int32_t> chosen(tokens * most, -1), counts(size_t(tokens), 0);
  for (int t = 0; t < tokens; t += 2)
    for (int row = 0; rate && row < (position + t + 1) / rate; ++row)
      if (random_bits() % 3 == 0) chosen[t * most + counts[t]++] = row;
  Floats want(q.size()), got(q.size()), scores(size_t(tokens) * heads * room), mixed(q.size());
  for (int t = 0; t < tokens; ++t) {
    const int seen = position + t + 1, all = rate ? seen / rate : 0, compressed = counts[t] ? counts[t] : all;
    Floats rows;
    const auto add = [&](size_t row) {
      for (int i = 0; i < n; ++i) rows.push_back(cache.get(row * n + i));
    };
    for (int i = 0; i < compressed; ++i) add(places + size_t(counts[t] ? chosen[t * most + i] : i));
    for (int at = std::max(0, seen - window); at < seen; ++at) add(size_t(at) % places);
    const int count = int(rows.size()) / n;
    for (int head = 0; head < heads; ++head) {
      Activations x;
      x.values = &q[(size_t(t) * heads + head) * n], x.count = 1, x.cols = n;
      Floats weights(room), piece(static_cast<size_t>(n));
      kScalarKernels.matmul(float_matrix(rows.data(), count, n), x, weights.data(), room, 0, count);
      kScalarKernels.softmax(weights.data(), 0, count, sinks[head]);
      float *out = &want[((size_t(head / of_group) * tokens + t) * of_group + head % of_group) * n],
            *part = piece.data();
      std::fill_n(out, n, 0.0f);
      sum_positions(0, count, 1, n, &out, &part, [&](int from, int to, float* const* sums) {
        kScalarKernels.attend_values(&weights[from], 0, 1, {nullptr, &rows[size_t(from) * n], size_t(n), false}, 0,
                                     to - from, n, sums);
      });
      const size_t angle = size_t(position + t) * angles.half;
      rotate_back(out + n - 8, &angles.cos[angle], &angles.sin[angle], 4, 4, true);
    }
  }
  const Values<int32_t> at = {position};
  const cuda::RowHeads of_heads = {heads, n, 8, 0, 0, kEps, 1.0f, true};
  const RowChoice choice = {{chosen.data(), counts.data(), int(most)}, rate, window, places};
  cuda::attend_rows(q.data(), sinks.data(), {angles.cos.data(), angles.sin.data(), nullptr}, of_heads, groups, tokens,
                    {cache.data(), places, room, half}, choice, {at.data(), 0, tokens, int(end) - 1}, scores.data(),
                    mixed.data(), got.data(), nullptr);
  compare("attention of " + std::to_string(heads) + " heads to rows of a window of " + std::to_string(window) +
              " and of every " + std::to_string(rate) + " tokens, " + std::to_string(tokens) + " tokens at " +
              std::to_string(position),
          got, want);
}

}  // namespace

void check_rows() {
  for (bool half : {true, false}) {
    for (auto [position, tokens] : {std::pair{0, 1}, std::pair{0, 50}, std::pair{37, 1}, std::pair{130, 21}}) {
      check_store({3, 28, 12, 2, 20, kEps, 0.3f, true}, half, position, tokens, 64);
      check_store({18, 512, 64, 0, 0, kEps, 0.04f, false}, half, position, tokens, 150);
      for (bool keys : {false, true}) {
        check_pool(28, 4, true, keys, half, position, tokens);
        check_pool(136, 128, false, keys, half, position, tokens);
      }
      check_attend(6, 2, 28, 4, 7, half, position, tokens);
      check_attend(12, 3, 136, 0, 40, half, position, tokens);
    }
    check_attend(2, 1, 16, 1, 16, half, 5000, 2);  // beyond one piece of a sum
  }
}
