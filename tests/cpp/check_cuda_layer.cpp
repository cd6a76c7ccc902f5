// Norms, embeddings, float products, the KV cache and attention against scalar.cpp.
#include "../../devices/cuda/layer.h"
#include "../../devices/half.h"
#include "../../runtime/src/rope.h"
#include "check_cuda.h"

namespace {

const cuda::VectorBuffer kNone{};

void check_norm() {
  for (int n : {1, 15, 64, 100, 2048})
    for (bool quantised : {false, true}) {
      const int vectors = 2;
      const std::vector<float> x = floats(size_t(vectors) * n), weight = floats(size_t(n));
      Vectors want(vectors, n), got(vectors, n);
      for (int t = 0; t < vectors; ++t)
        kScalarKernels.rms_norm(&x[size_t(t) * n], weight.data(), 1e-5f, &want.values[size_t(t) * n], n);
      if (quantised) want.quantise();
      cuda::rms_norm(x.data(), weight.data(), 1e-5f, vectors, n, got.values.data(), quantised ? got.buffer() : kNone,
                     nullptr);
      compare("norm of " + std::to_string(n), got.values, want.values);
      compare("norm of " + std::to_string(n) + ", codes", got.codes, want.codes);
      compare("norm of " + std::to_string(n) + ", sums", got.sums[1], want.sums[1]);
    }
}

// Matrices of every width as embeddings, and those of floats as routers.
void check_floats() {
  for (int width : {1, 2, 3, 4, 5, 6, 8, 16, 32}) {
    const int rows = 21, cols = width < 16 ? 192 : 203, group = 64;
    std::vector<float> values = floats(size_t(rows) * cols);
    std::vector<uint16_t> halves(values.size());
    for (uint16_t& half : halves) half = uint16_t((random_bits() & 0x80ff) | 0x3c00);
    Packed packed(rows, 192, width < 16 ? width : 8, group);
    Matrix m = packed.matrix;
    if (width >= 16) {
      m.codes = width == 16 ? reinterpret_cast<uint8_t*>(halves.data()) : reinterpret_cast<uint8_t*>(values.data());
      m.width = width, m.cols = cols, m.scales = m.biases = nullptr;
    }
    const std::vector<int32_t> ids = {20, 0, 7};
    std::vector<float> want(ids.size() * cols), got(want.size());
    for (size_t i = 0; i < ids.size(); ++i) kScalarKernels.dequantise_row(m, ids[i], &want[i * cols]);
    cuda::embed(m, ids.data(), int(ids.size()), got.data(), nullptr);
    compare("embedding of " + std::to_string(width) + " bits", got, want);
    if (width < 16) continue;
    Vectors x(3, cols);
    std::vector<float> want_y(3 * rows), got_y(3 * rows);
    kScalarKernels.matmul(m, x.activations(0, 3), want_y.data(), rows, 0, rows);
    cuda::float_product(m, x.values.data(), 3, got_y.data(), nullptr);
    compare("float product of " + std::to_string(width) + " bits", got_y, want_y);
  }
  std::vector<float> want = floats(300), got = want;
  const std::vector<float> x = floats(300);
  kScalarKernels.add_scaled(want.data(), x.data(), 1.0f, 300);
  cuda::add(got.data(), x.data(), 300, nullptr);
  compare("add", got, want);
}

// attention.cpp's steps for one token and head, by the scalar kernels.
struct Shape {
  int heads, kv_heads, head_dim, rope_dim, window;
  bool half, biased, normed;
  float clip;
};

void check_attention(const Shape& s, int position, int tokens) {
  const int n = s.head_dim, q_dim = s.heads * n, kv_dim = s.kv_heads * n, turned = s.rope_dim / 2;
  const size_t room = align_up(position + tokens, kKeyBlock), value_bytes = s.half ? 2 : 4;
  const std::vector<float> frequency = floats(size_t(turned)), q_bias = floats(q_dim), k_bias = floats(kv_dim),
                           v_bias = floats(kv_dim), q_norm = floats(n), k_norm = floats(n);
  std::vector<float> cos(room * turned), sin(room * turned);
  fill_rope(frequency, 1.5f, int(room), cos.data(), sin.data());

  std::vector<uint8_t> keys(s.kv_heads * room * n * value_bytes), values(keys.size());
  for (auto* cache : {&keys, &values})
    for (size_t i = 0; i < cache->size(); i += value_bytes) {
      const float value = floats(1)[0];
      const uint16_t half = float_to_half(value);
      std::memcpy(&(*cache)[i], s.half ? static_cast<const void*>(&half) : &value, value_bytes);
    }
  std::vector<float> q = floats(size_t(tokens) * q_dim), k = floats(size_t(tokens) * kv_dim),
                     v = floats(size_t(tokens) * kv_dim);
  std::vector<uint8_t> got_keys = keys, got_values = values;
  std::vector<float> got_q = q, got_k = k, got_v = v, got(q.size()), want(q.size());

  auto put = [&](std::vector<uint8_t>& cache, size_t at, float value) {
    const uint16_t half = float_to_half(value);
    std::memcpy(&cache[at * value_bytes], s.half ? static_cast<const void*>(&half) : &value, value_bytes);
  };
  auto limited = [&](float value) { return s.clip > 0 ? std::fmin(std::fmax(value, -s.clip), s.clip) : value; };
  auto prepared = [&](float* x, const float* bias, const float* weight, size_t at) {
    for (int i = 0; i < n; ++i) x[i] = s.biased ? x[i] + bias[i] : x[i];
    if (weight && s.normed) kScalarKernels.rms_norm(x, weight, 1e-6f, x, n);
    for (int i = 0; i < n; ++i) x[i] = limited(x[i]);
    if (weight) rotate(x, &cos[at * turned], &sin[at * turned], turned, false);
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
  std::vector<float> scores(room);
  for (int t = 0; t < tokens; ++t)
    for (int head = 0; head < s.heads; ++head) {
      const size_t cache = size_t(head / (s.heads / s.kv_heads)) * room * n * value_bytes;
      const KeyValues kv = {&keys[cache], &values[cache], size_t(n), s.half};
      const int end = position + t + 1, begin = s.window && end > s.window ? end - s.window : 0;
      const float* query = &q[(size_t(t) * s.heads + head) * n];
      float* out = &want[(size_t(t) * s.heads + head) * n];
      kScalarKernels.attend_scores(&query, 1, kv, begin, end, n, 0.125f, scores.data(), 0);
      kScalarKernels.softmax(scores.data(), begin, end);
      kScalarKernels.attend_values(scores.data(), 0, 1, kv, begin, end, n, &out);
    }

  const cuda::Heads heads = {s.heads, s.kv_heads, n, s.rope_dim, 1e-6f, s.clip, 0.125f, s.window};
  const cuda::LayerCache cache = {got_keys.data(), got_values.data(), room, s.half};
  cuda::Projections p{};
  p.q = got_q.data(), p.k = got_k.data(), p.v = got_v.data(), p.cos = cos.data(), p.sin = sin.data();
  if (s.biased) p.q_bias = q_bias.data(), p.k_bias = k_bias.data(), p.v_bias = v_bias.data();
  if (s.normed) p.q_norm = q_norm.data(), p.k_norm = k_norm.data();
  cuda::store_keys(p, heads, cache, position, tokens, nullptr);
  std::vector<float> room_for_scores(size_t(tokens) * s.heads * room);
  cuda::attend(got_q.data(), heads, cache, position, tokens, room_for_scores.data(), got.data(), nullptr);
  const std::string what = std::to_string(s.heads) + " heads of " + std::to_string(n) + ", window " +
                           std::to_string(s.window) + ", " + std::to_string(tokens) + " tokens at " +
                           std::to_string(position) + (s.half ? ", halves" : ", floats");
  compare(what + ", q", got_q, q);
  compare(what + ", keys", got_keys, keys);
  compare(what + ", values", got_values, values);
  compare(what + ", attended", got, want);
}

}  // namespace

void check_layer() {
  check_norm();
  check_floats();
  for (bool half : {true, false})
    for (auto [position, tokens] : {std::pair{0, 1}, std::pair{5, 3}, std::pair{300, 1}, std::pair{130, 20}}) {
      check_attention({8, 2, 64, 64, 0, half, false, true, 0}, position, tokens);
      check_attention({4, 4, 32, 16, 0, half, true, false, 0.5f}, position, tokens);
      check_attention({11, 1, 48, 48, 40, half, true, true, 0}, position, tokens);
    }
}
