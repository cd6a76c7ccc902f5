// The forward pass; compare runtime/reference.py, which has the same sections in the same order.
#include "engine.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "../../devices/lane_math.h"
#include "cpu_math.h"
#include "cuda_math.h"

namespace edge_moe {

EngineMemory engine_memory(const EngineConfig& c, bool cuda) {
  Routing unused;
  EngineMemory memory = cuda ? cuda_memory(c) : cpu_memory(c);
  memory.scratch += carve_routing(c, unused, nullptr) + table_bytes(c) + router_table_bytes(c);
  return memory;
}

Engine::Engine(const EngineConfig& config, std::unique_ptr<Device> device, Trunk trunk, ExpertStore store,
               size_t slot_bytes, int readers, const MaskRouters& otp, const MaskRouters& loss,
               const std::vector<TableFile>& tables)
    : config_(config),
      device_(std::move(device)),
      trunk_(std::move(trunk)),
      store_(std::move(store)),
      residency_(store_, *device_, slot_bytes, readers, double(kHalfLifeTokens) * config.layers),
      pool_(config.threads, config.spin),
      math_(device_->math(config_, trunk_, pool_)),
      states_(config.sequences, config.snapshots, config.state_buffers()) {
  const EngineConfig& c = config_;
  carve_routing(c, r_, math_->shared(carve_routing(c, r_, nullptr)));
  for (int layer = 0; layer < c.layers; ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    router_bias_.push_back(trunk_.host_vector(prefix + "router_bias", c.experts[layer]));
    expert_scale_.push_back(trunk_.host_vector(prefix + "expert_scale", c.experts[layer]));
    router_table_.push_back(load_router_table(prefix + "router_table", layer));
  }
  first_record_.resize(c.layers);
  std::exclusive_scan(c.experts.begin(), c.experts.end(), first_record_.begin(), 0);
  otp_ = load_mask_routers(otp);
  loss_ = load_mask_routers(loss);
  sequences_.resize(c.sequences);
  size_t heads = 0;
  for (const NGramConfig& its : c.ngrams) {
    table_values_.push_back(reinterpret_cast<float*>(math_->shared(c.chunk * its.inputs() * sizeof(float))));
    heads = std::max(heads, size_t(its.heads()));
  }
  for (Sequence& its : sequences_) its.ids.resize(c.ngrams.empty() ? 0 : c.context);
  table_rows_.reserve(c.chunk * heads);
  tables_ = std::make_unique<RowTables>(tables, table_values_, c.chunk * heads, readers, device_->host());
  spans_.reserve(c.sequences), ids_.reserve(c.chunk), rows_.reserve(c.logits_rows);
  jobs_.reserve(most(c.experts));
  pending_.reserve(most(c.experts));
  used_.reserve(most(c.experts));
}

// The experts of each token, (vocab, hashed); empty in a layer that chooses them.
std::vector<int16_t> Engine::load_router_table(const std::string& name, int layer) const {
  const int count = config_.hashed[layer];
  if (!count) return {};
  const std::vector<float> table = trunk_.host_vector(name, count * config_.vocab);
  if (table.empty()) throw DamagedFile(trunk_.path() + ": tensor " + name + " is missing");
  for (float expert : table)
    if (!(expert >= -1 && expert < float(config_.experts[layer])))
      throw DamagedFile(trunk_.path() + ": tensor " + name + " has " + std::to_string(expert) + ", not an expert");
  return {table.begin(), table.end()};
}

std::vector<MaskRouter> Engine::load_mask_routers(const MaskRouters& from) {
  const EngineConfig& c = config_;
  if (from.empty()) return {};
  auto room = [&](size_t values) { return align_up(values * sizeof(float), kPartAlignment); };
  size_t bytes = 0, at = 0;
  for (size_t top_k : c.top_k) bytes += room(top_k * c.dim) + room(top_k * (2 * top_k + 1));
  uint8_t* memory = math_->shared(bytes);
  std::vector<MaskRouter> routers(c.layers);
  for (int layer = 0; layer < c.layers; ++layer) {
    if (from[layer].empty()) continue;
    const size_t top_k = c.top_k[layer], dim = c.dim, others = 2 * top_k + 1;
    float* of_input = reinterpret_cast<float*>(memory + at);
    float* of_weights = reinterpret_cast<float*>(memory + at + room(top_k * dim));
    for (size_t k = 0; k < top_k; ++k) {
      const float* row = from[layer].data() + k * (dim + others);
      std::copy_n(row, dim, of_input + k * dim);
      std::copy_n(row + dim, others, of_weights + k * others);
    }
    routers[layer].of_input = float_matrix(of_input, int(top_k), int(dim));
    routers[layer].of_weights = of_weights;
    at += room(top_k * dim) + room(top_k * others);
  }
  return routers;
}

void Engine::set_prune(int sequence, PruneRule rule) {
  const bool by_threshold = rule.kind == Prune::kRatio || rule.kind == Prune::kShare;
  if (by_threshold && rule.threshold.size() != size_t(config_.layers))
    throw std::invalid_argument("pruning needs one threshold a layer");
  if ((rule.kind == Prune::kOtp && otp_.empty()) || (rule.kind == Prune::kLoss && loss_.empty()))
    throw std::invalid_argument("pruning by mask routers needs a bundle that has them");
  if (rule.protect > 0 && !config_.all_have_keys())
    throw std::invalid_argument(
        "this rule protects tokens by the attention they receive, which only attention with keys in every layer tells; "
        "choose another rule or calibrate the bundle again");
  sequences_.at(sequence).rule = std::move(rule);
}

// Turn the parts into spans of one pass, their ids, and the tokens whose logits are wanted.
void Engine::plan_step(std::span<const Part> parts) {
  const EngineConfig& c = config_;
  spans_.clear(), ids_.clear(), rows_.clear();
  for (const Part& part : parts) {
    if (part.sequence < 0 || part.sequence >= c.sequences) throw std::invalid_argument("there is no such sequence");
    const Sequence& sequence = sequences_[part.sequence];
    const int tokens = int(part.tokens.size()), first = int(ids_.size());
    if (tokens < 1 || first + tokens > c.chunk) throw std::invalid_argument("a step takes 1 to chunk tokens");
    if (sequence.position + tokens > c.context) throw std::invalid_argument("the context is full");
    for (const TokenSpan& span : spans_)
      if (span.sequence == part.sequence) throw std::invalid_argument("a sequence takes part in a step once");
    if (parts.size() > 1 && tokens > 1 && sequence.rule.protect > 0)
      throw std::invalid_argument("a prompt whose tokens are protected from pruning is computed in a step of its own");
    for (int32_t id : part.tokens)
      if (id < 0 || id >= c.vocab) throw std::invalid_argument("token id out of range");
    spans_.push_back({part.sequence, sequence.position, first, tokens, states_.live(part.sequence)});
    ids_.insert(ids_.end(), part.tokens.begin(), part.tokens.end());
    const int rows = part.want == Want::kNothing ? 0 : part.want == Want::kLast ? 1 : tokens;
    for (int row = tokens - rows; row < tokens; ++row) rows_.push_back(first + row);
  }
  if (spans_.empty()) throw std::invalid_argument("a step takes 1 to chunk tokens");
  if (rows_.size() > size_t(c.logits_rows))
    throw std::invalid_argument("more rows of logits wanted than were planned for");
  for (TokenSpan& span : spans_) {
    span.next_state = states_.next(span.sequence);
    Sequence& its = sequences_[span.sequence];
    its.written = std::max(its.written, span.position + span.count);
  }
}

std::span<const float> Engine::step(std::span<const Part> parts, std::function<bool()> unwanted) {
  plan_step(parts);
  const Step step = {spans_, int(ids_.size())};
  const ResidencyStats stats = residency_.stats();
  prefetch_ = step.tokens == 1 && !residency_.holds_all() && may_prefetch_ &&
              gate_.open(stats.read_ahead, stats.read_ahead_used);
  std::span<float> logits;
  Interrupt interrupt(std::move(unwanted));
  interrupt_ = &interrupt;
  pool_.set_interrupt(interrupt_);
  try {
    read_ngrams(step);
    math_->begin(step, ids_);
    math_->take_kv_overflow();  // clears that of an abandoned pass
    layers(step);
    if (const int sequence = math_->take_kv_overflow(); sequence >= 0) throw KvOverflow(sequence);
    logits = math_->logits(rows_);
    if (config_.logits_scale != 1)
      for (float& logit : logits) logit *= config_.logits_scale;
    if (config_.logits_cap != 0) cap_logits(logits);
    check_wanted();
    release_used();
  } catch (...) {
    abandon();
    throw;
  }
  interrupt_ = nullptr;
  pool_.set_interrupt(nullptr);
  store_.end_use();
  for (const TokenSpan& span : spans_) {
    states_.commit(span.sequence);
    sequences_[span.sequence].position += span.count;
    sequences_[span.sequence].stats.tokens += span.count;
  }
  stats_.tokens += step.tokens;
  return logits;
}

void Engine::cap_logits(std::span<float> logits) {
  constexpr size_t kPiece = 16384;
  pool_.run(int((logits.size() + kPiece - 1) / kPiece), [&](int i, int) {
    for (float& logit : logits.subspan(i * kPiece).first(std::min(kPiece, logits.size() - i * kPiece)))
      logit = soft_cap(logit, config_.logits_cap);
  });
}

Engine::Sequence& Engine::sequence_of(const Step& step, int token) {
  for (const TokenSpan& span : step.spans)
    if (token < span.first + span.count) return sequences_[span.sequence];
  throw std::logic_error("a token is in a span");
}

void Engine::layers(const Step& step) {
  for (int layer = 0; layer < config_.layers; ++layer) {
    add_ngrams(layer, step);
    if (config_.experts[layer])
      experts(layer, step);
    else
      math_->dense_layer(layer, step);
    check_wanted();
    residency_.tick();
  }
}

// Release the records pinned for the device; only once it has finished with them.
void Engine::release_used() {
  for (int record : used_) residency_.release(record);
  used_.clear();
}

// After an error: the device must stop reading the slots before they may be refilled.
void Engine::abandon() {
  interrupt_ = nullptr;
  pool_.set_interrupt(nullptr);
  states_.abandon();
  tables_->finish();
  try {
    math_->finish();
  } catch (...) {  // the device has failed and computes no more
  }
  release_used();
}

void Engine::resize_slots(size_t bytes) {
  math_->finish();  // ends graphs and kernels that read slots
  release_used();
  residency_.resize(bytes);
}

int Engine::truncate(int sequence, int positions) {
  Sequence& its = sequences_.at(sequence);
  const auto [left, snapshot] = origin(sequence, positions);
  if (snapshot) {
    states_.touch(*snapshot);
    states_.restore(sequence, snapshot);
    math_->load_windows(snapshot->slot, sequence, left);
  } else if (!left) {
    states_.restore(sequence, nullptr);
  }
  if (snapshot || !left) its.written = its.restored = left;
  states_.drop(sequence, left);
  return its.position = left;
}

int Engine::restorable(int sequence, int positions) const { return origin(sequence, positions).positions; }

void Engine::snapshot(int sequence) {
  if (!config_.is_recurrent() && !config_.has_windows()) return;
  const int position = sequences_.at(sequence).position;
  if (const States::Snapshot* its = states_.keep(sequence, position))
    math_->save_windows(sequence, its->slot, position);
}

void Engine::copy_positions(int from, int to, int positions) {
  if (from == to) throw std::invalid_argument("a sequence is not copied to itself");
  const auto [found, snapshot] = origin(from, positions);
  if (found != positions)
    throw std::invalid_argument("the state of that position is not there any more; take a snapshot there");
  Sequence& its = sequences_.at(to);
  states_.drop(to, -1);
  states_.restore(to, nullptr);
  if (snapshot) states_.touch(*snapshot);
  if (config_.is_recurrent() && positions) {
    const int state = snapshot ? snapshot->buffer : states_.live(from);
    math_->copy_state(state, states_.replace(to));
  }
  if (positions) math_->copy_positions(from, to, positions);
  if (snapshot) math_->load_windows(snapshot->slot, to, positions);
  const bool in_cache = !snapshot && positions;  // the windows are those of the other sequence
  its.written = in_cache ? sequences_.at(from).written : positions;
  its.restored = in_cache ? sequences_.at(from).restored : positions;
  if (!its.ids.empty()) std::copy_n(sequences_.at(from).ids.data(), positions, its.ids.data());
  its.position = positions;
}

size_t Engine::saved_bytes(int positions) const {
  size_t bytes = 0;
  each_saved_piece(config_, positions, false, [&](const SavedPiece& piece) { bytes += piece.bytes; });
  return bytes;
}

uint8_t* Engine::memory_of(const SavedPiece& piece, int sequence, int slot, int buffer) const {
  uint8_t* memory = piece.of == SavedPiece::kCache      ? math_->layer_cache(sequence, piece.layer)
                    : piece.of == SavedPiece::kSnapshot ? math_->kept_windows(slot, piece.layer)
                                                        : math_->state_buffer(buffer);
  return memory + piece.at;
}

void Engine::save(int sequence, int positions, const std::function<void(std::span<const uint8_t>)>& write) {
  const auto [found, snapshot] = origin(sequence, positions);
  if (found != positions) throw std::invalid_argument("the state of that position is not there any more");
  const int slot = snapshot ? snapshot->slot : -1, buffer = snapshot ? snapshot->buffer : states_.live(sequence);
  if (snapshot) states_.touch(*snapshot);
  std::vector<uint8_t> host(kSaved);
  each_saved_piece(config_, positions, snapshot != nullptr, [&](const SavedPiece& piece) {
    const uint8_t* from = memory_of(piece, sequence, slot, buffer);
    for (size_t at = 0; at < piece.bytes; at += kSaved) {
      const size_t bytes = std::min(kSaved, piece.bytes - at);
      math_->copy(host.data(), from + at, bytes);
      write({host.data(), bytes});
    }
  });
}

void Engine::load(int sequence, std::span<const int32_t> ids, const std::function<void(std::span<uint8_t>)>& read) {
  const int positions = int(ids.size());
  if (positions > config_.context) throw std::invalid_argument("there are more positions than the context has");
  truncate(sequence, 0);
  Sequence& its = sequences_.at(sequence);
  const int buffer = positions && config_.is_recurrent() ? states_.replace(sequence) : -1;
  std::vector<uint8_t> host(kSaved);
  try {
    each_saved_piece(config_, positions, false, [&](const SavedPiece& piece) {
      uint8_t* to = memory_of(piece, sequence, -1, buffer);
      for (size_t at = 0; at < piece.bytes; at += kSaved) {
        const size_t bytes = std::min(kSaved, piece.bytes - at);
        read({host.data(), bytes});
        math_->copy(to + at, host.data(), bytes);
      }
    });
  } catch (...) {
    truncate(sequence, 0);
    throw;
  }
  if (!its.ids.empty()) std::copy(ids.begin(), ids.end(), its.ids.begin());
  its.position = positions;
  // Of a layer with a window only the last positions were saved, whatever its cache has room for.
  its.written = its.restored =
      config_.most_of([](const AttentionConfig& a) { return a.sliding_window; }) ? positions : 0;
}

Engine::Origin Engine::origin(int sequence, int positions) const {
  const Sequence& its = sequences_.at(sequence);
  if (positions < 0 || positions > its.position) throw std::invalid_argument("there are not as many positions");
  if (!positions || positions == its.position || (!config_.is_recurrent() && windows_hold(its, positions)))
    return {positions, nullptr};
  const States::Snapshot* snapshot = states_.latest(sequence, positions);
  return {snapshot ? snapshot->position : 0, snapshot};
}

// Whether all keys and values that the next token after so many positions sees are there.
bool Engine::windows_hold(const Sequence& its, int positions) const {
  if (positions < its.restored) return false;
  for (int layer = 0; layer < config_.layers; ++layer)
    if (config_.is_window(layer)) {
      const int first = positions - (config_.attention(layer).sliding_window - 1);
      if (std::max(first, 0) < its.written - int(config_.cached_positions(layer))) return false;
    }
  return true;
}

// Pin an expert of a layer, counting a use for each of its pairs; false if too much is pinned.
bool Engine::acquire(const Step& step, int first_record, int e) {
  const int first = r_.first_pair[e], record = first_record + e;
  const Residency::Acquired acquired = residency_.acquire(record, r_.first_pair[e + 1] - first);
  if (acquired == Residency::Acquired::kNoSlot) return false;
  const bool hit = acquired == Residency::Acquired::kHit;
  SequenceStats& stats = sequence_of(step, r_.pair_token[first]).stats;
  ++(hit ? stats.expert_hits : stats.expert_misses);
  if (!hit) stats.bytes_read += store_.records()[record].padded;
  return true;
}

void Engine::experts(int layer, const Step& step) {
  const int experts = config_.experts[layer], first_record = first_record_[layer];
  RouterWants wants;
  for (const TokenSpan& span : step.spans) {
    const PruneRule& rule = sequences_[span.sequence].rule;
    if (const MaskRouter* router = mask_router(layer, rule.kind))
      wants.mask_routers[rule.kind == Prune::kLoss] = &router->of_input;
    wants.importance = wants.importance || (rule.protect > 0 && span.count > 1);
  }
  wants.ahead = prefetch_ ? next_experts(layer) : 0;
  math_->to_router(layer, step, wants, r_);
  check_wanted();
  release_used();
  route_tokens(layer, step);

  // expert-major: experts in memory are pinned first and computed while readers fetch the others
  residency_.read_ahead({});  // too late for records not begun yet
  pending_.clear();
  for (int e = 0; e < experts; ++e)
    if (r_.first_pair[e + 1] > r_.first_pair[e]) pending_.push_back(e);
  // holds() is called once per expert: its answer changes if a read ahead fails meanwhile.
  std::partition(pending_.begin(), pending_.end(), [&](int e) { return residency_.holds(first_record + e); });
  if (store_.mapped()) store_.verify_together(first_record, pending_, pool_);
  if (pending_.empty()) return math_->experts(layer, step, {}, r_, true);  // a table's experts may all be dropped
  size_t acquired = 0, computed = 0;  // of pending_: [0, computed) done, [computed, acquired) pinned
  int ahead = wants.ahead;
  try {
    while (computed < pending_.size()) {
      while (acquired < pending_.size() && acquire(step, first_record, pending_[acquired])) ++acquired;
      if (const int next = std::exchange(ahead, 0)) prefetch_for(next);
      jobs_.clear();
      for (size_t i = computed; i < acquired; ++i) {
        const int e = pending_[i], record = first_record + e, first = r_.first_pair[e];
        const uint8_t* bytes = residency_.bytes(record);
        if (!bytes) continue;
        jobs_.push_back(
            {store_.weights(record, bytes), r_.pair_token + first, r_.first_pair[e + 1] - first, first, record});
        std::swap(pending_[i], pending_[computed + jobs_.size() - 1]);
      }
      if (jobs_.empty()) {
        check_wanted();
        if (used_.empty()) {
          residency_.wait(Interrupt::kAskEvery);
        } else {  // slots of used records may be the ones needed
          math_->finish();
          release_used();
        }
        continue;
      }
      math_->experts(layer, step, jobs_, r_, computed + jobs_.size() == pending_.size());
      for (const ExpertJob& job : jobs_) used_.push_back(job.record);
      computed += jobs_.size();
      check_wanted();
      if (!math_->asynchronous()) release_used();
    }
  } catch (...) {
    for (size_t i = computed; i < acquired; ++i) residency_.release(first_record + pending_[i]);
    throw;
  }
}

}  // namespace edge_moe
