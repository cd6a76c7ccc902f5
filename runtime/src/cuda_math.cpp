// The layers on a GPU, without attention, which is in cuda_attention.cpp.
#include "cuda_math.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "../../devices/cuda/prefill.h"
#include "rope.h"

namespace edge_moe {

namespace {

constexpr int kFewTokens = 2;        // upper bound of tokens that are multiplied one by one
constexpr int kLongestNorm = 12288;  // maximum of values that the norm's kernel keeps in 48 KiB
constexpr int kLongestKey = 352;     // maximum of a delta net's head_dim: 32 columns of its state in 48 KiB
constexpr int kFirstPositions = 256;

class CudaDevice : public Device {
 public:
  CudaDevice(const Kernels& host, bool graphs) : host_(host), graphs_(graphs) {}
  const char* name() const override { return "cuda"; }
  const Kernels& host() const override { return host_; }
  std::unique_ptr<DeviceMemory> memory(size_t bytes, size_t, int lanes, size_t piece, bool again) const override {
    return memory_->filled(bytes, lanes, piece, again);
  }
  std::unique_ptr<LayerMath> math(const EngineConfig& config, const Trunk& trunk, ThreadPool&) const override {
    return std::make_unique<CudaMath>(config, trunk, *memory_, graphs_);
  }
  size_t uncounted_bytes() const override { return memory_->uncounted; }
  bool in_place() const override { return memory_->in_place; }
  bool reads_maps() const override { return false; }

 private:
  const Kernels& host_;
  const bool graphs_;
  std::unique_ptr<CudaMemory> memory_ = std::make_unique<CudaMemory>();
};

bool packed(const ExpertWeights& w) { return w.gate.takes_rounded() && w.up.takes_rounded() && w.down.takes_rounded(); }

}  // namespace

std::unique_ptr<Device> cuda_device(const Kernels& host, bool graphs) {
  return std::make_unique<CudaDevice>(host, graphs);
}

EngineMemory cuda_memory(const EngineConfig& c) {
  CudaScratch scratch;
  CudaShared shared;
  return {c.sequences * c.kv_cache_bytes(), c.states_bytes(),
          carve_cuda(c, scratch, nullptr) + carve_cuda(c, shared, nullptr)};
}

CudaMath::CudaMath(const EngineConfig& config, const Trunk& trunk, CudaMemory& memory, bool graphs)
    : config_(config),
      memory_(memory),
      use_graphs_(graphs),
      ends_(end_weights(config, trunk)),
      kv_offsets_(config.kv_offsets()),
      state_offsets_(config.state_offsets()),
      window_offsets_(config.window_offsets()),
      kv_cache_(memory, config.sequences * config.kv_cache_bytes(), false),
      states_(memory, config.state_buffers() * state_offsets_.back(), false),
      windows_(memory, config.snapshots * window_offsets_.back(), false),
      scratch_(memory, carve_cuda(config, s_, nullptr), false),
      shared_block_(memory, carve_cuda(config, host_, nullptr), true) {
  const EngineConfig& c = config_;
  const auto longest_norm = [](const AttentionConfig& a) { return std::max(a.q_rank, a.qk_norm_full ? a.q_dim() : 0); };
  if (std::max(size_t(c.dim), c.most_of(longest_norm)) > kLongestNorm)
    throw std::invalid_argument("this model's vectors are longer than the CUDA kernels take; use device cpu");
  if (c.most_of([](const AttentionConfig& a) { return a.recurrent() ? a.head_dim : 0; }) > kLongestKey)
    throw std::invalid_argument("this model's keys are longer than the CUDA kernels take; use device cpu");
  for (int layer = 0; layer < c.layers; ++layer) layers_.push_back(layer_weights(c, trunk, layer));
  carve_cuda(c, s_, scratch_.data());
  carve_cuda(c, host_, shared_block_.data());
  graphs_.resize(size_t(c.sequences) * c.layers);
  packed_.reserve(3 * most(c.experts)), floats_.reserve(3 * most(c.experts)), products_.reserve(3 * most(c.experts));
  chosen_.reserve(most(c.experts)), rows_.reserve(most(c.experts));
  routed_ = cuda::make_event();

  for (size_t kind = 0; kind < c.attentions.size(); ++kind) copy_angles(c.attentions[kind], kind);
}

// Copy the cos and sin of all positions, block by block, and the scales of queries.
void CudaMath::copy_angles(const AttentionConfig& a, size_t kind) {
  const EngineConfig& c = config_;
  if (const size_t scales = a.query_scales.size()) {
    cuda::copy(s_.query_scales[kind], a.query_scales.data(), scales * sizeof(float), stream_);
    cuda::wait(stream_);
  }
  const int half = a.rope_dim / 2, at_once = std::max(1, 65536 / std::max(1, half));
  std::vector<float> cos(size_t(at_once) * half), sin(cos.size());
  for (int first = 0; first < c.context && half; first += at_once) {
    const int count = std::min(at_once, c.context - first);
    const size_t at = size_t(first) * half, bytes = size_t(count) * half * sizeof(float);
    fill_rope(a.rope_frequency, a.rope_scale, first, count, cos.data(), sin.data());
    cuda::copy(s_.rope[kind].cos + at, cos.data(), bytes, stream_);
    cuda::copy(s_.rope[kind].sin + at, sin.data(), bytes, stream_);
    cuda::wait(stream_);
  }
}

CudaMath::~CudaMath() {
  for (const LayerGraph& graph : graphs_)
    if (graph.graph) cuda::release_graph(graph.graph);
  cuda::release_event(routed_);
}

uint8_t* CudaMath::shared(size_t bytes) { return shared_.emplace_back(memory_, bytes, true).data(); }

void CudaMath::begin(const Step& step, std::span<const int32_t> ids) {
  for (size_t i = 0; i < step.spans.size(); ++i) host_.positions[i] = step.spans[i].position - step.spans[i].first;
  std::copy(ids.begin(), ids.end(), host_.ids);
  cuda::copy(s_.positions, host_.positions, step.spans.size() * sizeof(int32_t), stream_);
  if (state_offsets_.back()) {  // the model has recurrent layers
    for (size_t i = 0; i < step.spans.size(); ++i)
      host_.states[2 * i] = step.spans[i].state, host_.states[2 * i + 1] = step.spans[i].next_state;
    cuda::copy(s_.states, host_.states, 2 * step.spans.size() * sizeof(int32_t), stream_);
  }
  const EngineConfig& c = config_;
  float* embedded = c.streams > 1 ? s_.normed : s_.x;
  cuda::embed(ends_.embedding, host_.ids, step.tokens, c.embedding_scale, embedded, stream_);
  if (c.streams > 1) cuda::repeat(embedded, step.tokens, c.dim, c.streams, s_.x, stream_);
}

void CudaMath::dense_layer(int layer, const Step& step) {
  attention(layer, step, false);
  if (config_.dense[layer]) {
    block_input(layers_[layer].mlp_norm, layers_[layer].mlp_mix, step.tokens);
    mlp(layers_[layer].dense, step.tokens, s_.shared);
    add_to_residual(layers_[layer].mlp_post_norm, s_.shared, step.tokens);
  }
  scale_residual(layer, step.tokens);
}

void CudaMath::to_router(int layer, const Step& step, const RouterWants& wants, const Routing& r) {
  const LayerWeights& w = layers_[layer];
  copied_ = false;
  if (use_graphs_ && step.tokens == 1)
    launch_graph(layer, step, wants, r);
  else
    up_to_router(layer, step, wants, r);
  cuda::record(routed_, stream_);
  // while the host is routing
  if (config_.shared_hidden) {
    if (w.shared_norm.weight) mlp_norm(w.shared_norm, step.tokens);
    if (w.shared_router) multiply(w.shared_router, step.tokens, s_.shared_gate, s_.normed, {});
    mlp(w.shared, step.tokens, s_.shared);
    if (w.shared_post_norm.weight) norm(w.shared_post_norm, s_.shared, step.tokens, s_.shared, {});
    if (w.shared_norm.weight) mlp_norm(w.mlp_norm, step.tokens);  // again, for the routed experts
  }
  cuda::wait_for(routed_);
}

void CudaMath::up_to_router(int layer, const Step& step, const RouterWants& wants, const Routing& r, int most) {
  const EngineConfig& c = config_;
  const LayerWeights& w = layers_[layer];
  attention(layer, step, wants.importance, most);
  block_input(w.mlp_norm, w.mlp_mix, step.tokens);
  if (w.router_norm.weight) norm(w.router_norm, s_.x, step.tokens, s_.sum, {});
  multiply(w.router, step.tokens, r.router_logits, w.router_norm.weight ? s_.sum : s_.normed, {});
  for (int rule = 0; rule < 2; ++rule)
    if (wants.mask_routers[rule]) multiply(*wants.mask_routers[rule], step.tokens, r.mask_scores[rule], s_.normed, {});
  if (wants.importance)
    cuda::importance(s_.normed, s_.received, size_t(c.chunk), c.attention(layer).heads, step.tokens, c.dim,
                     r.importance, stream_);
  if (wants.ahead) {
    const LayerWeights& next = layers_[wants.ahead];
    if (next.mlp_mix)
      mixed(next.mlp_norm, next.mlp_mix, 0, 1, nullptr, s_.ahead_normed, {});
    else
      norm(next.before_router(), s_.x, 1, s_.ahead_normed, {});
    multiply(next.router, 1, r.ahead_logits, s_.ahead_normed, {});
  }
}

// The same for one token, as a graph. It is captured at the first request of its kind for a layer, with launches for up
// to twice the present positions, and captured again once they exceed that.
void CudaMath::launch_graph(int layer, const Step& step, const RouterWants& wants, const Routing& r) {
  const TokenSpan& span = step.spans.front();
  LayerGraph& graph = graphs_[size_t(span.sequence) * config_.layers + layer];
  if (!graph.graph || graph.ahead != wants.ahead || span.position > graph.most ||
      !std::equal(graph.mask_routers, graph.mask_routers + 2, wants.mask_routers)) {
    if (graph.graph) cuda::release_graph(graph.graph);
    graph = {nullptr, {wants.mask_routers[0], wants.mask_routers[1]}, wants.ahead, kFirstPositions - 1};
    while (graph.most < span.position) graph.most = 2 * graph.most + 1;
    graph.most = std::min(graph.most, config_.context - 1);
    cuda::begin_capture(stream_);
    try {
      up_to_router(layer, step, wants, r, graph.most);
    } catch (...) {
      cuda::release_graph(cuda::end_capture(stream_));
      throw;
    }
    graph.graph = cuda::end_capture(stream_);
  }
  cuda::launch(graph.graph, stream_);
}

// y (tokens, dim) = the norm of vectors of the residual stream; rounded to int8 as well if `into` has codes
void CudaMath::norm(const Norm& norm, const float* x, int tokens, float* y, const cuda::VectorBuffer& into) {
  const EngineConfig& c = config_;
  if (norm.bias)
    cuda::layer_norm(x, norm.weight, norm.bias, c.norm_eps, tokens, c.dim, y, into, stream_);
  else
    cuda::rms_norm(x, norm.weight, c.norm_eps, tokens, c.dim, y, into, stream_);
}

// The input of attention or MLP, in s_.normed.
void CudaMath::block_input(const Norm& its, const Mix& mix, int tokens) {
  if (mix)
    mixed(its, mix, 0, tokens, s_.shares, s_.normed, s_.normed_q);
  else
    norm(its, s_.x, tokens, s_.normed, s_.normed_q);
}

// The input of an MLP.
void CudaMath::mlp_norm(const Norm& its, int tokens) { norm(its, s_.x, tokens, s_.normed, s_.normed_q); }

// x += the norm of out, if there is one, times the residual scale; out (tokens, dim) is changed
void CudaMath::add_to_residual(const Norm& post_norm, float* out, int tokens) {
  if (post_norm.weight) norm(post_norm, out, tokens, out, {});
  add_to_streams(out, config_.residual_scale, tokens);
}

void CudaMath::scale_residual(int layer, int tokens) {
  const float factor = layers_[layer].layer_scale;
  if (factor != 1) cuda::scale(s_.x, factor, tokens * config_.width(), stream_);
}

// From the experts' sums and the shared expert's output to the residual stream.
void CudaMath::finish_sum(int layer, int tokens) {
  const EngineConfig& c = config_;
  const LayerWeights& w = layers_[layer];
  if (w.experts_post_norm.weight) norm(w.experts_post_norm, s_.sum, tokens, s_.sum, {});
  if (c.shared_hidden)
    cuda::add_gated(s_.sum, s_.shared, w.shared_router ? s_.shared_gate : nullptr, c.residual_scale, tokens, c.dim,
                    stream_);
  if (w.mlp_post_norm.weight) norm(w.mlp_post_norm, s_.sum, tokens, s_.sum, {});
  add_to_streams(s_.sum, 1.0f, tokens);
  scale_residual(layer, tokens);
}

// out (tokens, dim) = the MLP of the normed tokens
void CudaMath::mlp(const ExpertWeights& w, int tokens, float* out) {
  const EngineConfig& c = config_;
  const int hidden = w.up.rows;
  const cuda::VectorBuffer hidden_q = s_.hidden_q.of_length(hidden);
  if (tokens == 1 && packed(w)) {
    const cuda::ExpertJob job = {w.gate, w.up, w.down, 0, 0};
    cuda::gate_up(&job, 1, hidden, s_.normed_q, hidden_q, c.activation, stream_);
    cuda::down(&job, 1, hidden_q, out, {nullptr, 0, c.dim, {}, {}}, stream_);
    return;
  }
  const cuda::ProductJob jobs[] = {cuda::whole(w.up, tokens, s_.up), cuda::whole(w.gate, tokens, s_.gate)};
  const cuda::Rows rows = {0, tokens};
  multiply({jobs, w.gate.rows ? 2u : 1u}, s_.normed, s_.normed_q);
  cuda::activate(&rows, 1, s_.gate, s_.up, hidden, c.activation, hidden_q, stream_);
  multiply(w.down, tokens, out, s_.gate, hidden_q);
}

void CudaMath::experts(int layer, const Step& step, std::span<const ExpertJob> jobs, const Routing& r, bool last) {
  const EngineConfig& c = config_;
  const int top_k = c.top_k[layer], tokens = step.tokens;
  const bool all_packed =
      std::all_of(jobs.begin(), jobs.end(), [](const ExpertJob& job) { return packed(job.weights); });
  const bool in_one_go = tokens == 1 && top_k <= cuda::kMostPlaces && all_packed;
  float* sums = c.sums_experts() ? s_.sum : s_.x;
  if (last && c.sums_experts()) cuda::fill(sums, 0.0f, size_t(tokens) * c.dim, stream_);
  if (jobs.empty()) {
    // no token has an expert
  } else if (in_one_go) {
    chosen_experts(jobs, r, last ? top_k : 0);
  } else {
    many_tokens(jobs, r, tokens * top_k);
  }
  if (!last) return;
  if (!in_one_go && !jobs.empty()) {
    copy_routing(tokens * top_k, r);
    cuda::ranked_sum(sums, s_.down, s_.routing_weights, s_.pair_of, tokens, top_k, c.dim, stream_);
  }
  if (c.sums_experts())
    finish_sum(layer, tokens);
  else if (c.shared_hidden)
    cuda::add_gated(s_.x, s_.shared, layers_[layer].shared_router ? s_.shared_gate : nullptr, c.residual_scale, tokens,
                    c.dim, stream_);
}

// Experts of a single token, and their weighted sum if `places` is not 0.
void CudaMath::chosen_experts(std::span<const ExpertJob> jobs, const Routing& r, int places) {
  const EngineConfig& c = config_;
  const cuda::VectorBuffer hidden_q = s_.hidden_q.of_length(c.expert_hidden);
  cuda::RankedSum sum = {c.sums_experts() ? s_.sum : s_.x, places, c.dim, {}, {}};
  for (int k = 0; k < places; ++k) {
    sum.weights[k] = r.routing_weights[k];
    sum.pairs[k] = r.routed[k] < 0 ? -1 : r.pair_of[k];
  }
  chosen_.clear();
  for (const ExpertJob& job : jobs) {
    const ExpertWeights& w = job.weights;
    chosen_.push_back({w.gate, w.up, w.down, 0, job.first});
  }
  const int count = int(chosen_.size());
  cuda::gate_up(chosen_.data(), count, c.expert_hidden, s_.normed_q, hidden_q, c.activation, stream_);
  cuda::down(chosen_.data(), count, hidden_q, s_.down, sum, stream_);
}

// Experts of several tokens; pairs: number of (token, expert) pairs of the layer.
void CudaMath::many_tokens(std::span<const ExpertJob> jobs, const Routing& r, int pairs) {
  const EngineConfig& c = config_;
  const int hidden = c.expert_hidden, dim = c.dim;
  const cuda::VectorBuffer hidden_q = s_.hidden_q.of_length(hidden);
  copy_routing(pairs, r);
  products_.clear(), rows_.clear();
  for (const ExpertJob& job : jobs) {
    const int32_t* tokens = s_.pair_token + (job.tokens - r.pair_token);
    const size_t at = size_t(job.first) * hidden;
    if (job.weights.gate.rows)
      products_.push_back({job.weights.gate, s_.gate + at, size_t(hidden), tokens, 0, 1, job.count});
    products_.push_back({job.weights.up, s_.up + at, size_t(hidden), tokens, 0, 1, job.count});
    rows_.push_back({job.first, job.count});
  }
  multiply(products_, s_.normed, s_.normed_q);
  cuda::activate(rows_.data(), int(rows_.size()), s_.gate, s_.up, hidden, c.activation, hidden_q, stream_);
  products_.clear();
  for (const ExpertJob& job : jobs)
    products_.push_back(
        {job.weights.down, s_.down + size_t(job.first) * dim, size_t(dim), nullptr, job.first, 1, job.count});
  multiply(products_, s_.gate, hidden_q);
}

// Copy the routing to memory that kernels of many threads read.
void CudaMath::copy_routing(int pairs, const Routing& r) {
  if (std::exchange(copied_, true)) return;
  for (int i = 0; i < pairs; ++i)
    if (r.routed[i] < 0) r.pair_of[i] = -1;
  const size_t bytes = size_t(pairs) * sizeof(int32_t);
  cuda::copy(s_.pair_of, r.pair_of, bytes, stream_);
  cuda::copy(s_.pair_token, r.pair_token, bytes, stream_);
  cuda::copy(s_.routing_weights, r.routing_weights, bytes, stream_);
}

// Multiply each job with the kernel for its width and number of tokens. values: the vectors as floats; quantised: as
// int8, if a matrix is packed.
void CudaMath::multiply(std::span<const cuda::ProductJob> jobs, const float* values,
                        const cuda::VectorBuffer& quantised) {
  packed_.clear(), floats_.clear();
  int tokens = 0;
  for (const cuda::ProductJob& job : jobs) {
    (job.matrix.takes_rounded() ? packed_ : floats_).push_back(job);
    tokens = std::max(tokens, job.count);
  }
  if (!packed_.empty())
    (tokens > kFewTokens ? cuda::products : cuda::product)(packed_.data(), int(packed_.size()), quantised, stream_);
  if (!floats_.empty()) cuda::float_product(floats_.data(), int(floats_.size()), values, stream_);
}

void CudaMath::multiply(const Matrix& matrix, int tokens, float* y, const float* values,
                        const cuda::VectorBuffer& quantised) {
  const cuda::ProductJob job = cuda::whole(matrix, tokens, y);
  multiply({&job, 1}, values, quantised);
}

std::span<float> CudaMath::logits(std::span<const int32_t> tokens) {
  const EngineConfig& c = config_;
  const int rows = int(tokens.size());
  for (int first = 0, end; first < rows; first = end) {  // runs of consecutive tokens
    for (end = first + 1; end < rows && tokens[end] == tokens[end - 1] + 1;) ++end;
    float* normed = s_.normed + size_t(first) * c.dim;
    if (ends_.output_mix)
      mixed(ends_.output_norm, ends_.output_mix, tokens[first], end - first, nullptr, normed, s_.normed_q.from(first));
    else
      norm(ends_.output_norm, s_.x + size_t(tokens[first]) * c.dim, end - first, normed, s_.normed_q.from(first));
  }
  if (rows) {
    multiply(ends_.head, rows, s_.logits, s_.normed, s_.normed_q);
    cuda::copy(host_.logits, s_.logits, size_t(rows) * c.vocab * sizeof(float), stream_);
  }
  finish();
  return {host_.logits, size_t(rows) * c.vocab};
}

void CudaMath::finish() { cuda::wait(stream_); }

}  // namespace edge_moe
