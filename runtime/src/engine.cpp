// The forward pass; read it beside runtime/reference.py, which has the same sections in the same order.
#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace edge_moe {

namespace {

// Gives out consecutive aligned pieces of a block of memory; with none, only counts them.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}

  template <typename T>
  void carve(T*& pointer, size_t count) {
    pointer = reinterpret_cast<T*>(base_ + used_);
    used_ = align_up(used_ + count * sizeof(T), kPartAlignment);
  }
  void carve(QuantisedBuffer& buffer, size_t vectors, size_t cols) {
    const size_t blocks = (cols + kBlock - 1) / kBlock;
    carve(buffer.codes, vectors * blocks * kBlock);
    carve(buffer.scales, vectors * blocks);
    carve(buffer.sums[0], vectors * blocks * 2);
    carve(buffer.sums[1], vectors * blocks);
    carve(buffer.sums[2], vectors * ((blocks + 1) / 2));
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

size_t most(const std::vector<int>& counts) {
  return counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
}

size_t carve_scratch(const EngineConfig& c, Scratch& s, uint8_t* base) {
  const size_t chunk = c.chunk, pairs = chunk * most(c.top_k), experts = most(c.experts);
  const size_t q_dim = size_t(c.heads) * c.head_dim, kv_dim = size_t(c.kv_heads) * c.head_dim;
  const size_t widest = std::max({c.expert_hidden, c.shared_hidden, c.dense_hidden});
  const size_t hidden = std::max({pairs * c.expert_hidden, chunk * c.shared_hidden, chunk * c.dense_hidden});
  Carver carver(base);
  carver.carve(s.x, chunk * c.dim);
  carver.carve(s.normed, chunk * c.dim);
  carver.carve(s.q, chunk * q_dim);
  carver.carve(s.k, chunk * kv_dim);
  carver.carve(s.v, chunk * kv_dim);
  carver.carve(s.attended, chunk * q_dim);
  carver.carve(s.scores, size_t(c.threads) * c.context);
  carver.carve(s.router_logits, chunk * experts);
  carver.carve(s.routing_weights, pairs);
  carver.carve(s.routed, pairs);
  carver.carve(s.pair_of, pairs);
  carver.carve(s.pair_token, pairs);
  carver.carve(s.all_tokens, chunk);
  carver.carve(s.first_pair, experts + 1);
  carver.carve(s.gate, hidden);
  carver.carve(s.up, hidden);
  carver.carve(s.down, pairs * c.dim);
  carver.carve(s.shared, c.shared_hidden || c.dense_hidden ? chunk * c.dim : 0);
  carver.carve(s.shared_gate, chunk);
  carver.carve(s.logits, size_t(c.logits_rows) * c.vocab);
  carver.carve(s.cos, size_t(c.context) * (c.head_dim / 2));
  carver.carve(s.sin, size_t(c.context) * (c.head_dim / 2));
  carver.carve(s.normed_q, chunk, c.dim);
  carver.carve(s.attended_q, chunk, q_dim);
  carver.carve(s.hidden_q, pairs, widest);
  return carver.used();
}

// NeoX rotation of one head by the angles of its position.
void rotate(float* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i] + a * sin[i];
  }
}

}  // namespace

EngineMemory engine_memory(const EngineConfig& c) {
  Scratch unused;
  EngineMemory memory;
  memory.kv_cache = size_t(2) * c.layers * c.kv_heads * c.context * c.head_dim * sizeof(float);
  memory.scratch = carve_scratch(c, unused, nullptr);
  return memory;
}

Engine::Engine(const EngineConfig& config, Trunk trunk, ExpertStore store, int slots, int readers,
               const Kernels& kernels)
    : config_(config),
      kernels_(kernels),
      trunk_(std::move(trunk)),
      store_(std::move(store)),
      cache_(store_, slots, readers),
      pool_(config.threads) {
  const EngineConfig& c = config_;
  const EngineMemory memory = engine_memory(c);
  kv_arena_ = Arena(memory.kv_cache);
  scratch_arena_ = Arena(memory.scratch);
  carve_scratch(c, s_, scratch_arena_.data());
  keys_ = reinterpret_cast<float*>(kv_arena_.data());
  values_ = keys_ + memory.kv_cache / sizeof(float) / 2;

  const int half = c.head_dim / 2;
  for (int i = 0; i < half; ++i) {  // in float32, as transformers computes the angles
    const float inverse =
        float(1.0 / std::pow(c.rope_theta, double(float(2 * i) / float(c.head_dim)))) / float(c.rope_factor);
    for (int position = 0; position < c.context; ++position) {
      s_.cos[size_t(position) * half + i] = float(std::cos(double(inverse * float(position))));
      s_.sin[size_t(position) * half + i] = float(std::sin(double(inverse * float(position))));
    }
  }
  std::iota(s_.all_tokens, s_.all_tokens + c.chunk, 0);

  embedding_ = trunk_.matrix("embedding");
  head_ = trunk_.matrix_if_any("head");
  if (!head_) head_ = embedding_;  // tied
  output_norm_ = trunk_.vector("output_norm", c.dim);
  for (int layer = 0; layer < c.layers; ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    auto matrix = [&](const char* name) { return trunk_.matrix(prefix + name); };
    auto vector = [&](const char* name, int n) { return trunk_.vector_if_any(prefix + name, n); };
    const int q_dim = c.heads * c.head_dim, kv_dim = c.kv_heads * c.head_dim;
    LayerWeights w{};
    w.attention_norm = trunk_.vector(prefix + "attention_norm", c.dim);
    w.mlp_norm = trunk_.vector(prefix + "mlp_norm", c.dim);
    w.q = matrix("q"), w.k = matrix("k"), w.v = matrix("v"), w.o = matrix("o");
    w.q_bias = vector("q_bias", q_dim), w.k_bias = vector("k_bias", kv_dim), w.v_bias = vector("v_bias", kv_dim);
    w.q_norm = vector("q_norm", c.qk_norm_full ? q_dim : c.head_dim);
    w.k_norm = vector("k_norm", c.qk_norm_full ? kv_dim : c.head_dim);
    if (!c.experts[layer]) {
      w.dense = {matrix("dense.gate"), matrix("dense.up"), matrix("dense.down")};
    } else {
      w.router = matrix("router");
      if (c.shared_hidden) {
        w.shared = {matrix("shared.gate"), matrix("shared.up"), matrix("shared.down")};
        w.shared_router = matrix("shared_router");
      }
    }
    layers_.push_back(w);
  }
  first_record_.resize(c.layers);
  std::exclusive_scan(c.experts.begin(), c.experts.end(), first_record_.begin(), 0);
  jobs_.reserve(most(c.experts) + 1);
  pending_.reserve(most(c.experts));
  tasks_.reserve(4096);
}

std::span<const float> Engine::forward(std::span<const int32_t> ids, Want want) {
  const EngineConfig& c = config_;
  const int tokens = int(ids.size());
  const int rows = want == Want::kNothing ? 0 : want == Want::kLast ? 1 : tokens;
  if (tokens < 1 || tokens > c.chunk) throw std::invalid_argument("forward takes 1 to chunk tokens");
  if (rows > c.logits_rows) throw std::invalid_argument("more rows of logits wanted than were planned for");
  if (position_ + tokens > c.context) throw std::invalid_argument("the context is full");
  for (int32_t id : ids)
    if (id < 0 || id >= c.vocab) throw std::invalid_argument("token id out of range");

  // embed
  for (int t = 0; t < tokens; ++t) kernels_.dequantise_row(embedding_, ids[t], s_.x + size_t(t) * c.dim);

  for (int layer = 0; layer < c.layers; ++layer) {
    attention(layer, tokens);
    experts(layer, tokens);
    cache_.tick();
  }

  // output norm and head, of the wanted rows alone
  const float* last = s_.x + size_t(tokens - rows) * c.dim;
  pool_.run(rows, [&](int t, int) {
    kernels_.rms_norm(last + size_t(t) * c.dim, output_norm_, c.norm_eps, s_.normed + size_t(t) * c.dim, c.dim);
  });
  if (rows) matmul(head_, prepare(s_.normed, rows, c.dim, s_.normed_q, head_.width < 16), s_.logits);
  position_ += tokens;
  stats_.tokens += tokens;
  return {s_.logits, size_t(rows) * c.vocab};
}

void Engine::rewind(int position) {
  if (position < 0 || position > position_) throw std::invalid_argument("rewind goes back only");
  position_ = position;
}

void Engine::attention(int layer, int tokens) {
  const EngineConfig& c = config_;
  const LayerWeights& w = layers_[layer];
  const int q_dim = c.heads * c.head_dim, kv_dim = c.kv_heads * c.head_dim, half = c.head_dim / 2;

  // attention norm
  pool_.run(tokens, [&](int t, int) {
    kernels_.rms_norm(s_.x + size_t(t) * c.dim, w.attention_norm, c.norm_eps, s_.normed + size_t(t) * c.dim, c.dim);
  });

  // q k v
  const bool quantised = std::min({w.q.width, w.k.width, w.v.width}) < 16;  // a bundle may mix widths
  Activations x = prepare(s_.normed, tokens, c.dim, s_.normed_q, quantised);
  matmul(w.q, x, s_.q);
  matmul(w.k, x, s_.k);
  matmul(w.v, x, s_.v);
  auto add_bias = [&](float* vector, int n, const float* bias) {
    for (int i = 0; bias && i < n; ++i) vector[i] += bias[i];
  };
  auto clip = [&](float* vector, int n) {
    for (int i = 0; c.qkv_clip > 0 && i < n; ++i) vector[i] = std::clamp(vector[i], -c.qkv_clip, c.qkv_clip);
  };
  auto norm = [&](float* vector, int n, const float* weight) {
    const int step = c.qk_norm_full ? n : c.head_dim;
    for (int i = 0; weight && i < n; i += step) kernels_.rms_norm(vector + i, weight, c.norm_eps, vector + i, step);
  };

  // norms of q and k, rope, and into the KV cache
  pool_.run(tokens, [&](int t, int) {
    float *q = s_.q + size_t(t) * q_dim, *k = s_.k + size_t(t) * kv_dim, *v = s_.v + size_t(t) * kv_dim;
    add_bias(q, q_dim, w.q_bias), add_bias(k, kv_dim, w.k_bias), add_bias(v, kv_dim, w.v_bias);
    norm(q, q_dim, w.q_norm), norm(k, kv_dim, w.k_norm);
    clip(q, q_dim), clip(k, kv_dim), clip(v, kv_dim);
    const size_t position = position_ + t;
    const float *cos = s_.cos + position * half, *sin = s_.sin + position * half;
    for (int head = 0; head < c.heads; ++head) rotate(q + head * c.head_dim, cos, sin, half);
    for (int head = 0; head < c.kv_heads; ++head) {
      rotate(k + head * c.head_dim, cos, sin, half);
      const size_t at = position * c.head_dim, bytes = c.head_dim * sizeof(float);
      std::memcpy(cached(keys_, layer, head) + at, k + head * c.head_dim, bytes);
      std::memcpy(cached(values_, layer, head) + at, v + head * c.head_dim, bytes);
    }
  });

  // attention, one task a token and head
  const float scale = 1.0f / std::sqrt(float(c.head_dim));
  pool_.run(tokens * c.heads, [&](int task, int thread) {
    const int t = task / c.heads, head = task % c.heads, kv_head = head / (c.heads / c.kv_heads);
    const int end = position_ + t + 1;
    const int begin = c.sliding_window ? std::max(0, end - c.sliding_window) : 0;
    kernels_.attend(s_.q + size_t(t) * q_dim + head * c.head_dim, cached(keys_, layer, kv_head),
                    cached(values_, layer, kv_head), begin, end, c.head_dim, scale,
                    s_.scores + size_t(thread) * c.context, s_.attended + size_t(t) * q_dim + head * c.head_dim);
  });

  // output projection and residual
  matmul(w.o, prepare(s_.attended, tokens, q_dim, s_.attended_q, w.o.width < 16), s_.normed);
  add_to_residual(s_.normed, tokens);
}

// Router logits -> routed, routing_weights; then (token, k) pairs sorted by expert: pair_of, pair_token, first_pair.
void Engine::route_tokens(int layer, int tokens) {
  const EngineConfig& c = config_;
  const int experts = c.experts[layer], top_k = c.top_k[layer];
  Activations x;
  x.values = s_.normed, x.count = tokens, x.cols = c.dim;
  matmul(layers_[layer].router, x, s_.router_logits);
  const RouterRule rule{c.renormalise};
  pool_.run(tokens, [&](int t, int) {
    route(kernels_, rule, s_.router_logits + size_t(t) * experts, experts, top_k, s_.routed + t * top_k,
          s_.routing_weights + t * top_k);
  });
  const int pairs = tokens * top_k;
  std::fill(s_.first_pair, s_.first_pair + experts + 1, 0);
  for (int i = 0; i < pairs; ++i) ++s_.first_pair[s_.routed[i] + 1];
  std::partial_sum(s_.first_pair, s_.first_pair + experts + 1, s_.first_pair);
  for (int i = 0; i < pairs; ++i) {
    const int pair = s_.first_pair[s_.routed[i]]++;
    s_.pair_of[i] = pair;
    s_.pair_token[pair] = i / top_k;
  }
  for (int expert = experts; expert > 0; --expert) s_.first_pair[expert] = s_.first_pair[expert - 1];
  s_.first_pair[0] = 0;
  stats_.moe_tokens += tokens;
  stats_.experts_used += pairs;
}

void Engine::experts(int layer, int tokens) {
  const EngineConfig& c = config_;
  const LayerWeights& w = layers_[layer];
  const int experts = c.experts[layer], top_k = c.top_k[layer], first_record = first_record_[layer];

  // mlp norm
  pool_.run(tokens, [&](int t, int) {
    float* normed = s_.normed + size_t(t) * c.dim;
    kernels_.rms_norm(s_.x + size_t(t) * c.dim, w.mlp_norm, c.norm_eps, normed, c.dim);
    quantise_vector(normed, c.dim, s_.normed_q, t);
  });

  if (!experts) {
    jobs_.assign(1, {w.dense, s_.all_tokens, tokens, 0, -1});
    run_jobs(s_.shared);
    add_to_residual(s_.shared, tokens);
    return;
  }

  // route
  route_tokens(layer, tokens);

  // experts, expert-major: those in memory are pinned first and computed while readers fetch the others
  pending_.clear();
  for (int pass = 0; pass < 2; ++pass)
    for (int e = 0; e < experts; ++e)
      if (s_.first_pair[e + 1] > s_.first_pair[e] && cache_.holds(first_record + e) == (pass == 0))
        pending_.push_back(e);
  size_t acquired = 0, computed = 0;  // of pending_: [0, computed) done, [computed, acquired) pinned
  try {
    while (computed < pending_.size()) {
      while (acquired < pending_.size() &&
             cache_.acquire(first_record + pending_[acquired]) != ExpertCache::Acquired::kNoSlot)
        ++acquired;
      jobs_.clear();
      for (size_t i = computed; i < acquired; ++i) {
        const int e = pending_[i], record = first_record + e, first = s_.first_pair[e];
        const uint8_t* bytes = cache_.bytes(record);
        if (!bytes) continue;
        jobs_.push_back({expert_weights(store_.records()[record], bytes), s_.pair_token + first,
                         s_.first_pair[e + 1] - first, first, record});
        std::swap(pending_[i], pending_[computed + jobs_.size() - 1]);
      }
      if (jobs_.empty()) {
        cache_.wait();
        continue;
      }
      run_jobs(s_.down);
      for (const Job& job : jobs_) cache_.release(job.record);
      computed += jobs_.size();
    }
  } catch (...) {
    for (size_t i = computed; i < acquired; ++i) cache_.release(first_record + pending_[i]);
    throw;
  }

  // their weighted sum, in order of rank whatever order they were computed in
  pool_.run(tokens, [&](int t, int) {
    for (int k = 0; k < top_k; ++k)
      kernels_.add_scaled(s_.x + size_t(t) * c.dim, s_.down + size_t(s_.pair_of[t * top_k + k]) * c.dim,
                          s_.routing_weights[t * top_k + k], c.dim);
  });

  // shared expert
  if (w.shared_router) {
    Activations x;
    x.values = s_.normed, x.count = tokens, x.cols = c.dim;
    matmul(w.shared_router, x, s_.shared_gate);
    jobs_.assign(1, {w.shared, s_.all_tokens, tokens, 0, -1});
    run_jobs(s_.shared);
    pool_.run(tokens, [&](int t, int) {
      const float gate = 1.0f / (1.0f + std::exp(-s_.shared_gate[t]));
      kernels_.add_scaled(s_.x + size_t(t) * c.dim, s_.shared + size_t(t) * c.dim, gate, c.dim);
    });
  }
}

// Every job's gated MLP, in three passes over all of their rows at once: gate and up; activation; down.
void Engine::run_jobs(float* out) {
  const EngineConfig& c = config_;
  const int hidden = jobs_[0].weights.gate.rows;
  const int total_rows = 2 * hidden * int(jobs_.size());
  auto inputs = [&](const Job& job, const float* values, const QuantisedBuffer& q, int cols, bool gathered) {
    Activations x;
    const size_t first = gathered ? 0 : job.first, blocks = (cols + kBlock - 1) / kBlock;
    x.values = values + first * cols;
    x.codes = q.codes + first * blocks * kBlock;
    x.scales = q.scales + first * blocks;
    x.sums[0] = q.sums[0] + first * blocks * 2;
    x.sums[1] = q.sums[1] + first * blocks;
    x.sums[2] = q.sums[2] + first * ((blocks + 1) / 2);
    x.rows = gathered ? job.tokens : nullptr;
    x.count = job.count;
    x.cols = cols;
    return x;
  };
  // Rows of a task: some tasks a thread so that the last ones even out, whole vectors of rows.
  auto rows_per_task = [&](int rows) { return std::clamp(rows / (pool_.threads() * 8) / 16 * 16, 16, 256); };

  tasks_.clear();
  for (const Job& job : jobs_) {
    add_tasks(job, &job.weights.gate, hidden, rows_per_task(total_rows));
    add_tasks(job, &job.weights.up, hidden, rows_per_task(total_rows));
  }
  pool_.run(int(tasks_.size()), [&](int i, int) {
    const Task& task = tasks_[i];
    float* y = (task.matrix == &task.job->weights.gate ? s_.gate : s_.up) + size_t(task.job->first) * hidden;
    kernels_.matmul(*task.matrix, inputs(*task.job, s_.normed, s_.normed_q, c.dim, true), y, hidden, task.begin,
                    task.end);
  });

  tasks_.clear();
  for (const Job& job : jobs_) add_tasks(job, nullptr, job.count, 4);
  pool_.run(int(tasks_.size()), [&](int i, int) {
    const Job& job = *tasks_[i].job;
    for (int pair = job.first + tasks_[i].begin; pair < job.first + tasks_[i].end; ++pair) {
      float* gate = s_.gate + size_t(pair) * hidden;
      kernels_.gate_up(gate, s_.up + size_t(pair) * hidden, hidden, c.activation);
      if (job.weights.down.width < 16) quantise_vector(gate, hidden, s_.hidden_q, pair);
    }
  });

  tasks_.clear();
  for (const Job& job : jobs_) add_tasks(job, &job.weights.down, c.dim, rows_per_task(int(jobs_.size()) * c.dim));
  pool_.run(int(tasks_.size()), [&](int i, int) {
    const Task& task = tasks_[i];
    kernels_.matmul(*task.matrix, inputs(*task.job, s_.gate, s_.hidden_q, hidden, false),
                    out + size_t(task.job->first) * c.dim, c.dim, task.begin, task.end);
  });
}

// [0, count) of a job in pieces: rows of a matrix, or pairs when there is none.
void Engine::add_tasks(const Job& job, const Matrix* matrix, int count, int piece) {
  for (int begin = 0; begin < count; begin += piece)
    tasks_.push_back({&job, matrix, begin, std::min(begin + piece, count)});
}

// x += out, both (tokens, dim)
void Engine::add_to_residual(const float* out, int tokens) {
  const size_t dim = config_.dim;
  pool_.run(tokens, [&](int t, int) { kernels_.add_scaled(s_.x + t * dim, out + t * dim, 1.0f, int(dim)); });
}

// y (tokens, rows) = x . matrix, rows split over threads
void Engine::matmul(const Matrix& matrix, const Activations& x, float* y) {
  const int rows = std::clamp(matrix.rows / (pool_.threads() * 8) / 16 * 16, 16, 1024);
  pool_.run((matrix.rows + rows - 1) / rows, [&](int i, int) {
    kernels_.matmul(matrix, x, y, matrix.rows, i * rows, std::min((i + 1) * rows, matrix.rows));
  });
}

Activations Engine::prepare(const float* values, int count, int cols, const QuantisedBuffer& into, bool quantised) {
  Activations x;
  x.values = values;
  x.codes = into.codes;
  x.scales = into.scales;
  for (int i = 0; i < 3; ++i) x.sums[i] = into.sums[i];
  x.count = count;
  x.cols = cols;
  if (quantised) pool_.run(count, [&](int t, int) { quantise_vector(values + size_t(t) * cols, cols, into, t); });
  return x;
}

void Engine::quantise_vector(const float* values, int cols, const QuantisedBuffer& into, int vector) {
  const size_t blocks = (cols + kBlock - 1) / kBlock, v = vector;
  kernels_.quantise(values, cols, into.codes + v * blocks * kBlock, into.scales + v * blocks,
                    into.sums[0] + v * blocks * 2, into.sums[1] + v * blocks, into.sums[2] + v * ((blocks + 1) / 2));
}

float* Engine::cached(float* cache, int layer, int head) const {
  return cache + (size_t(layer) * config_.kv_heads + head) * config_.context * config_.head_dim;
}

}  // namespace edge_moe
