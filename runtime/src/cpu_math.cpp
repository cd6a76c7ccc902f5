// The layers on the processor, without attention, which is in attention.cpp and latent_attention.cpp.
#include "cpu_math.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "../../devices/lane_math.h"
#include "rope.h"

namespace edge_moe {

namespace {

class CpuDevice : public Device {
 public:
  explicit CpuDevice(const Kernels& kernels) : kernels_(kernels) {}
  const char* name() const override { return kernels_.name; }
  const Kernels& host() const override { return kernels_; }
  std::unique_ptr<DeviceMemory> memory(size_t bytes, size_t room, int, size_t, bool) const override {
    return std::make_unique<HostMemory>(bytes, room);
  }
  std::unique_ptr<LayerMath> math(const EngineConfig& config, const Trunk& trunk, ThreadPool& pool) const override {
    return std::make_unique<CpuMath>(config, trunk, kernels_, pool);
  }

 private:
  const Kernels& kernels_;
};

}  // namespace

std::unique_ptr<Device> cpu_device(const Kernels& kernels) { return std::make_unique<CpuDevice>(kernels); }

EngineMemory cpu_memory(const EngineConfig& c) {
  Scratch unused;
  return {c.sequences * c.kv_cache_bytes(), c.states_bytes(), carve_scratch(c, unused, nullptr)};
}

CpuMath::CpuMath(const EngineConfig& config, const Trunk& trunk, const Kernels& kernels, ThreadPool& pool)
    : config_(config),
      kernels_(kernels),
      pool_(pool),
      ends_(end_weights(config, trunk)),
      kv_offsets_(config.kv_offsets()),
      state_offsets_(config.state_offsets()),
      window_offsets_(config.window_offsets()) {
  const EngineConfig& c = config_;
  for (int layer = 0; layer < c.layers; ++layer) layers_.push_back(layer_weights(c, trunk, layer));
  const EngineMemory memory = cpu_memory(c);
  kv_arena_ = Arena(memory.kv_cache);
  state_arena_ = Arena(c.state_buffers() * state_offsets_.back());
  window_arena_ = Arena(c.snapshots * window_offsets_.back());
  scratch_arena_ = Arena(memory.scratch);
  carve_scratch(c, s_, scratch_arena_.data());
  for (size_t kind = 0; kind < c.attentions.size(); ++kind)
    fill_rope(c.attentions[kind].rope_frequency, c.attentions[kind].rope_scale, 0, c.context, s_.rope[kind].cos,
              s_.rope[kind].sin);
  std::fill_n(s_.ones, ones_of(c), 1.0f);
  std::iota(s_.all_tokens, s_.all_tokens + c.chunk, 0);
  tasks_.reserve(4096);
}

uint8_t* CpuMath::shared(size_t bytes) { return shared_.emplace_back(bytes).data(); }

void CpuMath::begin(const Step&, std::span<const int32_t> ids) {
  const size_t dim = config_.dim, width = config_.width();
  for (size_t t = 0; t < ids.size(); ++t) {
    float* x = s_.x + t * width;
    kernels_.dequantise_row(ends_.embedding, ids[t], x);
    for (size_t i = 0; config_.embedding_scale != 1 && i < dim; ++i) x[i] *= config_.embedding_scale;
    for (size_t at = dim; at < width; at += dim) std::copy_n(x, dim, x + at);
  }
}

void CpuMath::any_attention(int layer, const Step& step, bool received) {
  if (!config_.has_attention(layer)) return;
  if (config_.attention(layer).kv_rank)
    latent_attention(layer, step);
  else if (config_.attention(layer).shared_rows)
    row_attention(layer, step);
  else if (config_.attention(layer).recurrent())
    recurrence(layer, step);
  else
    attention(layer, step, received);
}

// y (dim,) = the norm of one vector of the residual stream
void CpuMath::norm(const Norm& norm, const float* x, float* y) const {
  if (norm.bias)
    kernels_.layer_norm(x, norm.weight, norm.bias, config_.norm_eps, y, config_.dim);
  else
    kernels_.rms_norm(x, norm.weight, config_.norm_eps, y, config_.dim);
}

// The same for each token, x and y (tokens, dim), where there is such a norm. y may be x.
void CpuMath::norm_each(const Norm& its, const float* x, int tokens, float* y) {
  const size_t dim = config_.dim;
  if (its.weight) pool_.run(tokens, [&](int t, int) { norm(its, x + t * dim, y + t * dim); });
}

// The input of an MLP.
void CpuMath::mlp_norm(const Norm& its, int tokens) {
  const EngineConfig& c = config_;
  pool_.run(tokens, [&](int t, int) {
    float* normed = s_.normed + size_t(t) * c.dim;
    norm(its, s_.x + size_t(t) * c.dim, normed);
    quantise_vector(normed, c.dim, s_.normed_q, t);
  });
}

// The input of a layer's routed experts or dense MLP.
void CpuMath::mlp_input(int layer, int tokens) {
  const LayerWeights& w = layers_[layer];
  if (!w.mlp_mix) return mlp_norm(w.mlp_norm, tokens);
  mixed(w.mlp_norm, w.mlp_mix, nullptr, tokens, s_.shares, s_.normed);
  prepare(s_.normed, tokens, config_.dim, s_.normed_q, true);
}

void CpuMath::dense_layer(int layer, const Step& step) {
  any_attention(layer, step, false);
  if (config_.dense[layer]) {
    mlp_input(layer, step.tokens);
    const ExpertJob job = {layers_[layer].dense, s_.all_tokens, step.tokens, 0, -1};
    run_jobs({&job, 1}, s_.shared);
    add_to_residual(layers_[layer].mlp_post_norm, s_.shared, step.tokens);
  }
  scale_residual(layer, step.tokens);
}

void CpuMath::to_router(int layer, const Step& step, const RouterWants& wants, const Routing& r) {
  const LayerWeights& w = layers_[layer];
  any_attention(layer, step, wants.importance);
  mlp_input(layer, step.tokens);
  norm_each(w.router_norm, s_.x, step.tokens, s_.sum);
  float_matmul(w.router, w.router_norm.weight ? s_.sum : s_.normed, step.tokens, r.router_logits);
  for (int rule = 0; rule < 2; ++rule)
    if (wants.mask_routers[rule]) float_matmul(*wants.mask_routers[rule], s_.normed, step.tokens, r.mask_scores[rule]);
  if (wants.importance) importance(layer, step, r.importance);
}

void CpuMath::importance(int layer, const Step& step, float* of_tokens) {
  const EngineConfig& c = config_;
  const int heads = c.attention(layer).heads;
  pool_.run(step.tokens, [&](int t, int) {
    double norm = 0, received = 0;
    for (int i = 0; i < c.dim; ++i) norm += std::abs(s_.normed[size_t(t) * c.dim + i]);
    for (int head = 0; head < heads; ++head) received += s_.received[size_t(head) * c.chunk + t];
    of_tokens[t] = float(norm * received / heads / (step.tokens - t));
  });
}

void CpuMath::ahead_logits(int next_layer, const Routing& r) {
  const LayerWeights& next = layers_[next_layer];
  if (next.mlp_mix)
    mixed(next.mlp_norm, next.mlp_mix, nullptr, 1, nullptr, s_.ahead_normed);
  else
    norm(next.before_router(), s_.x, s_.ahead_normed);
  float_matmul(layers_[next_layer].router, s_.ahead_normed, 1, r.ahead_logits);
}

void CpuMath::experts(int layer, const Step& step, std::span<const ExpertJob> jobs, const Routing& r, bool last) {
  const EngineConfig& c = config_;
  const int top_k = c.top_k[layer];
  run_jobs(jobs, s_.down);
  if (!last) return;
  // summed in order of rank, whatever the order of computation
  float* sums = c.sums_experts() ? s_.sum : s_.x;
  pool_.run(step.tokens, [&](int t, int) {
    if (c.sums_experts()) std::fill_n(sums + size_t(t) * c.dim, c.dim, 0.0f);
    for (int place = t * top_k; place < (t + 1) * top_k; ++place)
      if (r.routed[place] >= 0)
        kernels_.add_scaled(sums + size_t(t) * c.dim, s_.down + size_t(r.pair_of[place]) * c.dim,
                            r.routing_weights[place], c.dim);
  });
  if (c.sums_experts())
    finish_sum(layer, step.tokens);
  else if (c.shared_hidden)
    shared_expert(layer, step.tokens, s_.x);
}

// From the experts' sums to the residual stream.
void CpuMath::finish_sum(int layer, int tokens) {
  const LayerWeights& w = layers_[layer];
  norm_each(w.experts_post_norm, s_.sum, tokens, s_.sum);
  if (config_.shared_hidden) shared_expert(layer, tokens, s_.sum);
  norm_each(w.mlp_post_norm, s_.sum, tokens, s_.sum);
  add_to_streams(s_.sum, 1.0f, tokens);
  scale_residual(layer, tokens);
}

// y (tokens, dim) += the shared expert
void CpuMath::shared_expert(int layer, int tokens, float* y) {
  const EngineConfig& c = config_;
  const LayerWeights& w = layers_[layer];
  if (w.shared_norm.weight) mlp_norm(w.shared_norm, tokens);
  if (w.shared_router) float_matmul(w.shared_router, s_.normed, tokens, s_.shared_gate);
  const ExpertJob job = {w.shared, s_.all_tokens, tokens, 0, -1};
  run_jobs({&job, 1}, s_.shared);
  norm_each(w.shared_post_norm, s_.shared, tokens, s_.shared);
  pool_.run(tokens, [&](int t, int) {
    const float gate = w.shared_router ? sigmoid(s_.shared_gate[t]) : 1.0f;
    kernels_.add_scaled(y + size_t(t) * c.dim, s_.shared + size_t(t) * c.dim, gate * c.residual_scale, c.dim);
  });
}

std::span<float> CpuMath::logits(std::span<const int32_t> tokens) {
  const EngineConfig& c = config_;
  const int rows = int(tokens.size());
  if (ends_.output_mix)
    mixed(ends_.output_norm, ends_.output_mix, tokens.data(), rows, nullptr, s_.normed);
  else
    pool_.run(rows, [&](int i, int) {
      norm(ends_.output_norm, s_.x + size_t(tokens[i]) * c.dim, s_.normed + size_t(i) * c.dim);
    });
  const Matrix& head = ends_.head;
  if (rows) matmul(head, prepare(s_.normed, rows, c.dim, s_.normed_q, head.takes_rounded()), s_.logits);
  return {s_.logits, size_t(rows) * c.vocab};
}

// The MLP of each job, in three passes over the rows of all jobs: gate, if there is one, and up; activation; down.
void CpuMath::run_jobs(std::span<const ExpertJob> jobs, float* out) {
  const EngineConfig& c = config_;
  if (jobs.empty()) return;
  const int hidden = jobs[0].weights.up.rows;
  const int total_rows = (jobs[0].weights.gate.rows + hidden) * int(jobs.size());
  auto inputs = [&](const ExpertJob& job, const float* values, const Quantised& q, int cols, bool gathered) {
    Activations x = activations(values, q, cols, gathered ? 0 : job.first, job.count);
    x.rows = gathered ? job.tokens : nullptr;
    return x;
  };
  // Rows of a task: about 8 tasks per thread, so that threads end together; a multiple of 16.
  auto rows_per_task = [&](int rows) { return std::clamp(rows / (pool_.threads() * 8) / 16 * 16, 16, 256); };

  tasks_.clear();
  for (const ExpertJob& job : jobs) {
    add_tasks(job, &job.weights.gate, job.weights.gate.rows, rows_per_task(total_rows));
    add_tasks(job, &job.weights.up, hidden, rows_per_task(total_rows));
  }
  pool_.run(int(tasks_.size()), [&](int i, int) {
    const Task& task = tasks_[i];
    float* y = (task.matrix == &task.job->weights.gate ? s_.gate : s_.up) + size_t(task.job->first) * hidden;
    kernels_.matmul(*task.matrix, inputs(*task.job, s_.normed, s_.normed_q, c.dim, true), y, hidden, task.begin,
                    task.end);
  });

  tasks_.clear();
  for (const ExpertJob& job : jobs) add_tasks(job, nullptr, job.count, 4);
  pool_.run(int(tasks_.size()), [&](int i, int) {
    const ExpertJob& job = *tasks_[i].job;
    for (int pair = job.first + tasks_[i].begin; pair < job.first + tasks_[i].end; ++pair) {
      float* gate = s_.gate + size_t(pair) * hidden;
      kernels_.gate_up(gate, s_.up + size_t(pair) * hidden, hidden, c.activation);
      if (job.weights.down.takes_rounded()) quantise_vector(gate, hidden, s_.hidden_q, pair);
    }
  });

  tasks_.clear();
  for (const ExpertJob& job : jobs) add_tasks(job, &job.weights.down, c.dim, rows_per_task(int(jobs.size()) * c.dim));
  pool_.run(int(tasks_.size()), [&](int i, int) {
    const Task& task = tasks_[i];
    kernels_.matmul(*task.matrix, inputs(*task.job, s_.gate, s_.hidden_q, hidden, false),
                    out + size_t(task.job->first) * c.dim, c.dim, task.begin, task.end);
  });
}

// Split [0, count) of a job into tasks: rows of a matrix, or pairs if there is no matrix.
void CpuMath::add_tasks(const ExpertJob& job, const Matrix* matrix, int count, int piece) {
  for (int begin = 0; begin < count; begin += piece)
    tasks_.push_back({&job, matrix, begin, std::min(begin + piece, count)});
}

// x += the norm of out, if there is one, times the residual scale; out (tokens, dim) is changed
void CpuMath::add_to_residual(const Norm& post_norm, float* out, int tokens) {
  norm_each(post_norm, out, tokens, out);
  add_to_streams(out, config_.residual_scale, tokens);
}

// x += factor * out, or each stream its share of that; with hyper-connections, its shares of all streams, too
void CpuMath::add_to_streams(const float* out, float factor, int tokens) {
  const size_t dim = config_.dim, streams = config_.streams, width = config_.width();
  if (config_.hyper())
    return pool_.run(tokens, [&](int t, int) {
      const float *after = s_.shares + t * config_.shares(), *between = after + streams;
      float *x = s_.x + t * width, *next = s_.wide + t * width;
      std::fill_n(next, width, 0.0f);
      for (size_t to = 0; to < streams; ++to) {
        for (size_t from = 0; from < streams; ++from)
          kernels_.add_scaled(next + to * dim, x + from * dim, between[from * streams + to], int(dim));
        kernels_.add_scaled(next + to * dim, out + t * dim, after[to] * factor, int(dim));
      }
      std::copy_n(next, width, x);
    });
  pool_.run(tokens, [&](int t, int) {
    for (size_t at = t * streams; at < (t + 1) * streams; ++at) {
      const float share = streams > 1 ? s_.shares[at] * factor : factor;
      kernels_.add_scaled(s_.x + at * dim, out + t * dim, share, int(dim));
    }
  });
}

void CpuMath::scale_residual(int layer, int tokens) {
  const size_t width = config_.width();
  const float scale = layers_[layer].layer_scale;
  if (scale == 1) return;
  pool_.run(tokens, [&](int t, int) {
    for (size_t i = t * width; i < (t + 1) * width; ++i) s_.x[i] *= scale;
  });
}

// y (tokens, rows) = x . matrix of each product, with the rows of all products split over the threads
void CpuMath::matmuls(std::initializer_list<Product> products, const Activations& x) {
  int all_rows = 0, tasks = 0;
  for (const Product& product : products) all_rows += product.matrix.rows;
  const int rows = std::clamp(all_rows / (pool_.threads() * 8) / 16 * 16, 16, 1024);
  for (const Product& product : products) tasks += (product.matrix.rows + rows - 1) / rows;
  pool_.run(tasks, [&](int i, int) {
    const Product* product = products.begin();
    for (int its; i >= (its = (product->matrix.rows + rows - 1) / rows); ++product) i -= its;
    const Matrix& matrix = product->matrix;
    kernels_.matmul(matrix, x, product->y, matrix.rows, i * rows, std::min((i + 1) * rows, matrix.rows));
  });
}

// The same for a matrix of floats.
void CpuMath::float_matmul(const Matrix& matrix, const float* x, int count, float* y) {
  Activations floats;
  floats.values = x, floats.count = count, floats.cols = matrix.cols;
  matmul(matrix, floats, y);
}

Activations CpuMath::prepare(const float* values, int count, int cols, const Quantised& into, bool quantised) {
  if (quantised) pool_.run(count, [&](int t, int) { quantise_vector(values + size_t(t) * cols, cols, into, t); });
  return activations(values, into, cols, 0, count);
}

void CpuMath::quantise_vector(const float* values, int cols, const Quantised& into, int vector) {
  kernels_.quantise(values, cols, into.from(size_t(vector), cols));
}

}  // namespace edge_moe
