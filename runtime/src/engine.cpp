// The forward pass; read it beside runtime/reference.py, which has the same sections in the same order.
#include "engine.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "rope.h"

namespace edge_moe {

// Tokens after which a use counts half in the choice of who is evicted. On the reference model, decoding text with
// slots for 20, 30, 50 and 70 % of its experts: 35, 53, 79 and 94 % hits; with 512 tokens 30, 46, 72 and 90; with 4,
// 34, 50, 77 and 93; by recency alone 13, 49, 73 and 92.
static constexpr int kHalfLife = 32;

EngineMemory engine_memory(const EngineConfig& c) {
  Scratch unused;
  EngineMemory memory;
  const size_t a_token = c.kv_rank ? c.latent_cached() : 2 * c.kv_heads * c.head_dim;
  memory.kv_cache = size_t(c.layers) * c.key_positions() * a_token * (c.half_cache ? sizeof(uint16_t) : sizeof(float));
  memory.scratch = carve_scratch(c, unused, nullptr);
  return memory;
}

Engine::Engine(const EngineConfig& config, Trunk trunk, ExpertStore store, size_t slot_bytes, int readers,
               const Kernels& kernels, const MaskRouters& otp, const MaskRouters& loss)
    : config_(config),
      kernels_(kernels),
      trunk_(std::move(trunk)),
      store_(std::move(store)),
      cache_(store_, slot_bytes, readers, double(kHalfLife) * config.layers),
      pool_(config.threads) {
  const EngineConfig& c = config_;
  const EngineMemory memory = engine_memory(c);
  kv_arena_ = Arena(memory.kv_cache);
  scratch_arena_ = Arena(memory.scratch);
  carve_scratch(c, s_, scratch_arena_.data());
  keys_ = kv_arena_.data();
  values_ = keys_ + memory.kv_cache / 2;

  fill_rope(c.rope_frequency, c.rope_scale, c.context, s_.cos, s_.sin);
  std::iota(s_.all_tokens, s_.all_tokens + c.chunk, 0);

  embedding_ = trunk_.matrix("embedding");
  head_ = trunk_.matrix_if_any("head");
  if (!head_) head_ = embedding_;  // tied
  output_norm_ = trunk_.vector("output_norm", c.dim);
  for (int layer = 0; layer < c.layers; ++layer) layers_.push_back(layer_weights(layer));
  first_record_.resize(c.layers);
  std::exclusive_scan(c.experts.begin(), c.experts.end(), first_record_.begin(), 0);
  otp_ = load_mask_routers(otp, otp_arena_);
  loss_ = load_mask_routers(loss, loss_arena_);
  jobs_.reserve(most(c.experts) + 1);
  pending_.reserve(most(c.experts));
  tasks_.reserve(4096);
}

LayerWeights Engine::layer_weights(int layer) const {
  const EngineConfig& c = config_;
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  auto matrix = [&](const char* name) { return trunk_.matrix(prefix + name); };
  auto vector = [&](const char* name, int n) { return trunk_.vector_if_any(prefix + name, n); };
  const int q_dim = c.heads * c.head_dim, kv_dim = c.kv_heads * c.head_dim;
  LayerWeights w{};
  w.attention_norm = trunk_.vector(prefix + "attention_norm", c.dim);
  w.mlp_norm = trunk_.vector(prefix + "mlp_norm", c.dim);
  w.o = matrix("o");
  if (c.kv_rank) {
    w.kv_a = matrix("kv_a"), w.kv_b = matrix("kv_b");
    w.kv_a_norm = trunk_.vector(prefix + "kv_a_norm", c.kv_rank);
    w.q = matrix(c.q_rank ? "q_b" : "q");
    if (c.q_rank) w.q_a = matrix("q_a"), w.q_a_norm = trunk_.vector(prefix + "q_a_norm", c.q_rank);
  } else {
    w.q = matrix("q"), w.k = matrix("k"), w.v = matrix("v");
    w.q_bias = vector("q_bias", q_dim), w.k_bias = vector("k_bias", kv_dim), w.v_bias = vector("v_bias", kv_dim);
    w.q_norm = vector("q_norm", c.qk_norm_full ? q_dim : c.head_dim);
    w.k_norm = vector("k_norm", c.qk_norm_full ? kv_dim : c.head_dim);
  }
  if (!c.experts[layer]) {
    w.dense = {matrix("dense.gate"), matrix("dense.up"), matrix("dense.down")};
    return w;
  }
  w.router = matrix("router");
  w.router_bias = vector("router_bias", c.experts[layer]);
  if (c.shared_hidden) w.shared = {matrix("shared.gate"), matrix("shared.up"), matrix("shared.down")};
  w.shared_router = trunk_.matrix_if_any(prefix + "shared_router");
  return w;
}

std::vector<MaskRouter> Engine::load_mask_routers(const MaskRouters& from, Arena& arena) const {
  const EngineConfig& c = config_;
  if (from.empty()) return {};
  auto room = [&](size_t values) { return align_up(values * sizeof(float), kPartAlignment); };
  size_t bytes = 0, at = 0;
  for (size_t top_k : c.top_k) bytes += room(top_k * c.dim) + room(top_k * (2 * top_k + 1));
  arena = Arena(bytes);
  std::vector<MaskRouter> routers(c.layers);
  for (int layer = 0; layer < c.layers; ++layer) {
    if (from[layer].empty()) continue;
    const size_t top_k = c.top_k[layer], dim = c.dim, others = 2 * top_k + 1;
    float* of_input = reinterpret_cast<float*>(arena.data() + at);
    float* of_weights = reinterpret_cast<float*>(arena.data() + at + room(top_k * dim));
    for (size_t k = 0; k < top_k; ++k) {
      const float* row = from[layer].data() + k * (dim + others);
      std::copy_n(row, dim, of_input + k * dim);
      std::copy_n(row + dim, others, of_weights + k * others);
    }
    Matrix& matrix = routers[layer].of_input;
    matrix.codes = arena.data() + at;
    matrix.rows = int(top_k), matrix.cols = int(dim), matrix.width = 32;
    routers[layer].of_weights = of_weights;
    at += room(top_k * dim) + room(top_k * others);
  }
  return routers;
}

void Engine::set_prune(PruneRule rule) {
  const bool by_threshold = rule.kind == Prune::kRatio || rule.kind == Prune::kShare;
  if (by_threshold && rule.threshold.size() != size_t(config_.layers))
    throw std::invalid_argument("pruning needs one threshold a layer");
  if ((rule.kind == Prune::kOtp && otp_.empty()) || (rule.kind == Prune::kLoss && loss_.empty()))
    throw std::invalid_argument("pruning by mask routers needs a bundle that has them");
  if (rule.protect > 0 && config_.kv_rank)
    throw std::invalid_argument(
        "this rule protects tokens by the attention they receive, which attention over a latent does not tell; "
        "choose another rule or calibrate the bundle again");
  prune_ = std::move(rule);
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

  const CacheStats cache = cache_.stats();
  prefetch_ = tokens == 1 && !store_.mapped() && may_prefetch_ && gate_.open(cache.read_ahead, cache.read_ahead_used);
  for (int layer = 0; layer < c.layers; ++layer) {
    if (c.kv_rank)
      latent_attention(layer, tokens);
    else
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
  store_.end_use();
  position_ += tokens;
  stats_.tokens += tokens;
  return {s_.logits, size_t(rows) * c.vocab};
}

void Engine::rewind(int position) {
  if (position < 0 || position > position_) throw std::invalid_argument("rewind goes back only");
  position_ = position;
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
  cache_.read_ahead({});  // what was not begun comes too late
  pending_.clear();
  for (int e = 0; e < experts; ++e)
    if (s_.first_pair[e + 1] > s_.first_pair[e]) pending_.push_back(e);
  // Asked once for each: a read ahead that fails meanwhile would change the answer.
  std::partition(pending_.begin(), pending_.end(), [&](int e) { return cache_.holds(first_record + e); });
  size_t acquired = 0, computed = 0;  // of pending_: [0, computed) done, [computed, acquired) pinned
  bool ahead = prefetch_;
  try {
    while (computed < pending_.size()) {
      while (acquired < pending_.size() &&
             cache_.acquire(first_record + pending_[acquired]) != ExpertCache::Acquired::kNoSlot)
        ++acquired;
      if (std::exchange(ahead, false)) prefetch_next(layer);
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
    for (int place = t * top_k; place < (t + 1) * top_k; ++place)
      if (s_.routed[place] >= 0)
        kernels_.add_scaled(s_.x + size_t(t) * c.dim, s_.down + size_t(s_.pair_of[place]) * c.dim,
                            s_.routing_weights[place], c.dim);
  });

  // shared expert
  if (c.shared_hidden) {
    if (w.shared_router) {
      Activations x;
      x.values = s_.normed, x.count = tokens, x.cols = c.dim;
      matmul(w.shared_router, x, s_.shared_gate);
    }
    jobs_.assign(1, {w.shared, s_.all_tokens, tokens, 0, -1});
    run_jobs(s_.shared);
    pool_.run(tokens, [&](int t, int) {
      const float gate = w.shared_router ? sigmoid(s_.shared_gate[t]) : 1.0f;
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
    Activations x = activations(values, q, cols, gathered ? 0 : job.first, job.count);
    x.rows = gathered ? job.tokens : nullptr;
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
  if (quantised) pool_.run(count, [&](int t, int) { quantise_vector(values + size_t(t) * cols, cols, into, t); });
  return activations(values, into, cols, 0, count);
}

void Engine::quantise_vector(const float* values, int cols, const QuantisedBuffer& into, int vector) {
  const size_t blocks = (cols + kBlock - 1) / kBlock, v = vector;
  kernels_.quantise(values, cols, into.codes + v * blocks * kBlock, into.scales + v * blocks,
                    into.sums[0] + v * blocks * 2, into.sums[1] + v * blocks, into.sums[2] + v * ((blocks + 1) / 2));
}

}  // namespace edge_moe
