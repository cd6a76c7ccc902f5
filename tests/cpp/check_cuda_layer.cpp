// Norms, embeddings, float products, sums of tokens, the KV cache and attention against scalar.cpp.
#include <algorithm>

#include "../../devices/cuda/layer.h"
#include "../../devices/half.h"
#include "../../devices/position_sums.h"
#include "../../runtime/src/rope.h"
#include "check_cuda.h"

namespace {

const cuda::VectorBuffer kNone{};

void check_norm(int n, bool quantised, bool of_layer) {
  const int vectors = 2;
  const Floats x = floats(size_t(vectors) * n), weight = floats(size_t(n)), bias = floats(size_t(n));
  Vectors want(vectors, n), got(vectors, n);
  for (int t = 0; t < vectors; ++t) {
    const float* from = &x[size_t(t) * n];
    float* to = &want.values[size_t(t) * n];
    if (of_layer)
      kScalarKernels.layer_norm(from, weight.data(), bias.data(), 1e-5f, to, n);
    else
      kScalarKernels.rms_norm(from, weight.data(), 1e-5f, to, n);
  }
  if (quantised) want.quantise();
  const cuda::VectorBuffer into = quantised ? got.buffer() : kNone;
  if (of_layer)
    cuda::layer_norm(x.data(), weight.data(), bias.data(), 1e-5f, vectors, n, got.values.data(), into, nullptr);
  else
    cuda::rms_norm(x.data(), weight.data(), 1e-5f, vectors, n, got.values.data(), into, nullptr);
  const std::string what = (of_layer ? "layer norm of " : "norm of ") + std::to_string(n);
  compare(what, got.values, want.values);
  compare(what + ", codes", got.codes, want.codes);
  compare(what + ", sums", got.sums[1], want.sums[1]);
}

// Matrices of every width as embeddings, and those of floats as routers.
void check_floats() {
  for (int width : {kMxfp4, 1, 2, 3, 4, 5, 6, 8, 16, 32}) {
    const int rows = 21, cols = width < 16 ? 192 : 203, group = 64;
    Floats values = floats(size_t(rows) * cols);
    Values<uint16_t> halves(values.size());
    for (uint16_t& half : halves) half = uint16_t((random_bits() & 0x80ff) | 0x3c00);
    Packed packed(rows, 192, width < 16 ? width : 8, group);
    Matrix m = packed.matrix;
    if (width >= 16) {
      m.codes = width == 16 ? reinterpret_cast<uint8_t*>(halves.data()) : reinterpret_cast<uint8_t*>(values.data());
      m.width = width, m.codec = codec_of(width), m.cols = cols, m.scales = m.biases = nullptr;
    }
    const Values<int32_t> ids = {20, 0, 7};
    Floats want(ids.size() * cols), got(want.size());
    const float scale = width % 2 ? 1.0f : 6.5f;
    for (size_t i = 0; i < ids.size(); ++i) kScalarKernels.dequantise_row(m, ids[i], &want[i * cols]);
    for (float& value : want) value *= scale;
    cuda::embed(m, ids.data(), int(ids.size()), scale, got.data(), nullptr);
    compare("embedding of " + std::to_string(width) + " bits", got, want);
    if (width < 16) continue;
    Vectors x(3, cols);
    Floats want_y(3 * rows), got_y(3 * rows);
    kScalarKernels.matmul(m, x.activations(0, 3), want_y.data(), rows, 0, rows);
    const cuda::ProductJob job = cuda::whole(m, 3, got_y.data());
    cuda::float_product(&job, 1, x.values.data(), nullptr);
    compare("float product of " + std::to_string(width) + " bits", got_y, want_y);
  }
  Floats want = floats(300), got = want;
  const Floats x = floats(300);
  kScalarKernels.add_scaled(want.data(), x.data(), 1.0f, 300);
  cuda::add_gated(got.data(), x.data(), nullptr, 1.0f, 1, 300, nullptr);
  compare("add", got, want);
}

void check_importance(const Floats& received, size_t stride, int heads, int tokens) {
  const int dim = 37;
  const Floats normed = floats(size_t(tokens) * dim);
  Floats want(static_cast<size_t>(tokens)), got(want.size());
  for (int t = 0; t < tokens; ++t) {
    double norm = 0, sum = 0;
    for (int i = 0; i < dim; ++i) norm += std::fabs(normed[size_t(t) * dim + i]);
    for (int head = 0; head < heads; ++head) sum += received[head * stride + t];
    want[t] = float(norm * sum / heads / (tokens - t));
  }
  cuda::importance(normed.data(), received.data(), stride, heads, tokens, dim, got.data(), nullptr);
  compare("importance", got, want);
}

// What a layer adds up of many tokens.
void check_sums() {
  const int tokens = 5, places = 3, dim = 130, hidden = 100;
  const Floats down = floats(tokens * places * dim), weights = floats(tokens * places), gates = floats(tokens);
  Values<int32_t> pairs(tokens * places);
  for (int i = 0; i < tokens * places; ++i) pairs[i] = i % 4 == 3 ? -1 : (i * 7 + 2) % (tokens * places);
  Floats want = floats(tokens * dim), got = want;
  for (int i = 0; i < tokens * places; ++i)
    if (pairs[i] >= 0) kScalarKernels.add_scaled(&want[i / places * dim], &down[pairs[i] * dim], weights[i], dim);
  cuda::ranked_sum(got.data(), down.data(), weights.data(), pairs.data(), tokens, places, dim, nullptr);
  compare("ranked sum", got, want);
  for (const float* gate : {static_cast<const float*>(nullptr), gates.data()})
    for (float scale : {1.0f, 0.22f}) {
      for (int t = 0; t < tokens; ++t)
        kScalarKernels.add_scaled(&want[t * dim], &down[t * dim], (gate ? sigmoid(gate[t]) : 1.0f) * scale, dim);
      cuda::add_gated(got.data(), down.data(), gate, scale, tokens, dim, nullptr);
      compare("gated sum", got, want);
    }
  for (const Activation& activation : kActivations) {
    const Floats up = floats(tokens * hidden);
    Vectors want_h(tokens, hidden), got_h(tokens, hidden, want_h.values);
    for (int t = 0; t < tokens; ++t)
      kScalarKernels.gate_up(&want_h.values[t * hidden], &up[t * hidden], hidden, activation);
    want_h.quantise();
    const cuda::Rows parts[] = {{3, 2}, {0, 3}};
    cuda::activate(parts, 2, got_h.values.data(), up.data(), hidden, activation, got_h.buffer(), nullptr);
    compare("activated", got_h.values, want_h.values);
    compare("activated, codes", got_h.codes, want_h.codes);
    compare("activated, lows", got_h.lows, want_h.lows);
    compare("activated, sums", got_h.sums[0], want_h.sums[0]);
  }
  const Floats bias = floats(size_t(dim));
  for (int i = 0; i < tokens * dim; ++i) want[i] += bias[i % dim];
  cuda::add_bias(got.data(), bias.data(), tokens, dim, nullptr);
  compare("bias", got, want);
  for (float& value : want) value *= 0.7f;
  cuda::scale(got.data(), 0.7f, got.size(), nullptr);
  compare("scaled", got, want);
  cuda::fill(got.data(), 0.25f, got.size() - 3, nullptr);
  std::fill(want.begin(), want.end() - 3, 0.25f);
  compare("filled", got, want);
}

// attention.cpp's steps for one token and head, by the scalar kernels.
struct Shape {
  int heads, kv_heads, head_dim, rope_dim, window;
  bool half, biased, normed;
  float clip;
  bool interleaved = false, norm_after_rope = false;
  int rope_span = 0;  // 0: rope_dim
  bool v_norm = false;
};

int span_of(const Shape& s) { return s.rope_span ? s.rope_span : s.rope_dim; }

void check_attention(const Shape& s, int position, int tokens) {
  const int n = s.head_dim, q_dim = s.heads * n, kv_dim = s.kv_heads * n, turned = s.rope_dim / 2;
  const size_t room = align_up(position + tokens, kKeyBlock), value_bytes = s.half ? 2 : 4;
  const Floats frequency = floats(size_t(turned)), q_bias = floats(q_dim), k_bias = floats(kv_dim),
               v_bias = floats(kv_dim), q_norm = floats(n), k_norm = floats(n);
  const Floats ones(n, 1.0f);
  Floats cos(room * turned), sin(room * turned);
  fill_rope(frequency, 1.5f, 0, int(room), cos.data(), sin.data());

  Values<uint8_t> keys(s.kv_heads * room * n * value_bytes), values(keys.size());
  for (auto* cache : {&keys, &values})
    for (size_t i = 0; i < cache->size(); i += value_bytes) {
      const float value = floats(1)[0];
      const uint16_t half = float_to_half(value);
      std::memcpy(&(*cache)[i], s.half ? static_cast<const void*>(&half) : &value, value_bytes);
    }
  Floats q = floats(size_t(tokens) * q_dim), k = floats(size_t(tokens) * kv_dim), v = floats(size_t(tokens) * kv_dim);
  // What the cache of a window has of the keys and values of the first positions: the latest one of each place.
  const size_t places = s.window ? std::min(room, align_up(s.window - 1 + tokens, kKeyBlock)) : room;
  auto in_places = [&](const Values<uint8_t>& whole, bool is_keys, int positions) {
    Values<uint8_t> some(s.kv_heads * places * n * value_bytes);
    for (size_t head = 0; head < size_t(s.kv_heads); ++head)
      for (size_t place = 0; place < places; ++place)
        for (size_t i = 0; i < size_t(n); ++i) {
          const size_t p = int(place) < positions ? place + (positions - 1 - place) / places * places : place;
          auto index = [&](size_t at, size_t of) {
            return head * of * n + (is_keys ? (at / kKeyBlock * n + i) * kKeyBlock + at % kKeyBlock : at * n + i);
          };
          std::memcpy(&some[index(place, places) * value_bytes], &whole[index(p, room) * value_bytes], value_bytes);
        }
    return some;
  };
  Values<uint8_t> got_keys = in_places(keys, true, position), got_values = in_places(values, false, position);
  Floats got_q = q, got_k = k, got_v = v, got(q.size()), want(q.size());

  auto put = [&](Values<uint8_t>& cache, size_t at, float value) {
    const uint16_t half = float_to_half(value);
    std::memcpy(&cache[at * value_bytes], s.half ? static_cast<const void*>(&half) : &value, value_bytes);
  };
  auto limited = [&](float value) { return s.clip > 0 ? std::fmin(std::fmax(value, -s.clip), s.clip) : value; };
  auto prepared = [&](float* x, const float* bias, const float* weight, size_t at) {
    for (int i = 0; i < n; ++i) x[i] = s.biased ? x[i] + bias[i] : x[i];
    const bool normed = weight && s.normed;
    if (!weight && s.v_norm) kScalarKernels.rms_norm(x, ones.data(), 1e-6f, x, n);
    if (normed && !s.norm_after_rope) kScalarKernels.rms_norm(x, weight, 1e-6f, x, n);
    for (int i = 0; i < n; ++i) x[i] = limited(x[i]);
    if (weight) rotate(x, &cos[at * turned], &sin[at * turned], turned, span_of(s) / 2, s.interleaved);
    if (normed && s.norm_after_rope) kScalarKernels.rms_norm(x, weight, 1e-6f, x, n);
  };
  for (int t = 0; t < tokens; ++t) {
    const size_t at = size_t(position) + t;
    for (int head = 0; head < s.heads; ++head)
      prepared(&q[(size_t(t) * s.heads + head) * n], &q_bias[head * n], q_norm.data(), at);
    for (int head = 0; head < s.kv_heads; ++head) {
      float *key = &k[(size_t(t) * s.kv_heads + head) * n], *value = &v[(size_t(t) * s.kv_heads + head) * n];
      prepared(key, &k_bias[head * n], k_norm.data(), at);
      prepared(value, &v_bias[head * n], nullptr, at);
      for (int i = 0; i < n; ++i) {
        put(keys, (head * room + at / kKeyBlock * kKeyBlock) * n + size_t(i) * kKeyBlock + at % kKeyBlock, key[i]);
        put(values, (head * room + at) * n + i, value[i]);
      }
    }
  }
  const size_t stride = size_t(tokens) + 3;
  const Floats sinks = floats(s.heads);
  Floats scores(room), piece(n), received(s.heads * stride);
  for (int t = 0; t < tokens; ++t)
    for (int head = 0; head < s.heads; ++head) {
      const size_t cache = size_t(head / (s.heads / s.kv_heads)) * room * n * value_bytes;
      const KeyValues kv = {&keys[cache], &values[cache], size_t(n), s.half};
      const int end = position + t + 1, begin = s.window && end > s.window ? end - s.window : 0;
      const float* query = &q[(size_t(t) * s.heads + head) * n];
      float* out = &want[(size_t(t) * s.heads + head) * n];
      kScalarKernels.attend_scores(&query, 1, kv, begin, end, n, 0.125f, scores.data(), 0);
      kScalarKernels.softmax(scores.data(), begin, end, s.clip ? sinks[head] : kNoSink);
      float* into = piece.data();
      sum_positions(begin, end, 1, n, &out, &into, [&](int from, int to, float* const* rows) {
        kScalarKernels.attend_values(scores.data(), 0, 1, kv, from, to, n, rows);
      });
      for (int of = std::max(begin - position, 0); of <= t; ++of) received[head * stride + of] += scores[position + of];
    }

  const cuda::Heads heads = {s.heads,
                             s.kv_heads,
                             n,
                             s.rope_dim,
                             span_of(s),
                             1e-6f,
                             s.clip,
                             0.125f,
                             s.window,
                             s.interleaved,
                             s.norm_after_rope,
                             s.v_norm,
                             s.clip ? sinks.data() : nullptr};
  const cuda::LayerCache cache = {got_keys.data(), got_values.data(), places, s.half, room};
  cuda::Projections p{};
  p.q = got_q.data(), p.k = got_k.data(), p.v = got_v.data(), p.cos = cos.data(), p.sin = sin.data();
  if (s.biased) p.q_bias = q_bias.data(), p.k_bias = k_bias.data(), p.v_bias = v_bias.data();
  if (s.normed) p.q_norm = q_norm.data(), p.k_norm = k_norm.data();
  const Values<int32_t> at = {position};
  const auto span = [&](int first, int count) { return cuda::Span{at.data(), first, count, position + first + count}; };
  cuda::store_keys(p, heads, cache, span(0, tokens), nullptr);
  Floats room_for_scores(size_t(tokens) * s.heads * room), got_received(s.heads * stride, NAN);
  for (int first = 0; first < tokens; first += 7) {  // as engines do that have no room for the scores of all
    const cuda::Span some = span(first, std::min(7, tokens - first));
    cuda::attend(got_q.data(), heads, cache, some, room_for_scores.data(), got.data(), nullptr);
    cuda::add_received(room_for_scores.data(), heads, room, some, got_received.data(), stride, nullptr);
  }
  const std::string what = std::to_string(s.heads) + " heads of " + std::to_string(n) + ", window " +
                           std::to_string(s.window) + ", " + std::to_string(tokens) + " tokens at " +
                           std::to_string(position) + (s.half ? ", halves" : ", floats");
  compare(what + ", q", got_q, q);
  compare(what + ", keys", got_keys, in_places(keys, true, position + tokens));
  compare(what + ", values", got_values, in_places(values, false, position + tokens));
  compare(what + ", attended", got, want);
  cuda::wait(nullptr);
  for (int head = 0; head < s.heads; ++head)  // beyond the tokens there is nothing
    std::fill_n(&got_received[head * stride + tokens], stride - tokens, 0.0f);
  compare(what + ", received", got_received, received);
  check_importance(received, stride, s.heads, tokens);
}

}  // namespace

void check_layer() {
  for (int n : {1, 15, 64, 100, 2048})
    for (bool quantised : {false, true})
      for (bool of_layer : {false, true}) check_norm(n, quantised, of_layer);
  check_floats();
  check_sums();
  for (bool half : {true, false})
    for (auto [position, tokens] : {std::pair{0, 1}, std::pair{5, 3}, std::pair{300, 1}, std::pair{130, 20}}) {
      check_attention({8, 2, 64, 64, 0, half, false, true, 0}, position, tokens);
      check_attention({4, 4, 32, 16, 0, half, true, false, 0.5f}, position, tokens);
      check_attention({11, 1, 48, 48, 40, half, true, true, 0}, position, tokens);
      check_attention({4, 2, 40, 24, 0, half, true, true, 0, true, false}, position, tokens);
      check_attention({6, 2, 32, 32, 0, half, false, true, 0, false, true}, position, tokens);
      check_attention({6, 3, 36, 18, 17, half, true, true, 0, false, false, 36, true}, position, tokens);
      check_attention({8, 1, 512, 128, 0, half, false, true, 0, false, false, 512, true}, position, tokens);
    }
  for (auto [position, tokens] : {std::pair{2 * kSumPositions, 1}, std::pair{kSumPositions - 5, 12}})
    for (int window : {0, kSumPositions - 100})
      check_attention({2, 1, 32, 32, window, true, false, true, 0}, position, tokens);
}
