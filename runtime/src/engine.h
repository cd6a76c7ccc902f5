// The forward pass of a Mixture-of-Experts transformer over a bundle: the trunk in memory, experts loaded on demand.
//
// The engine runs on the host and decides routing, pruning, which records are read and which are evicted. A LayerMath
// computes the layers, on the processor or a GPU.
//
// Everything is allocated when an Engine is made; `engine_memory` returns how much, so a plan can be made beforehand.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "interrupt.h"
#include "layer_math.h"
#include "prefetch.h"
#include "prune.h"
#include "residency.h"
#include "router.h"
#include "row_tables.h"
#include "saved.h"
#include "states.h"
#include "threads.h"
#include "trunk.h"

namespace edge_moe {

// The memory that an Engine of this configuration allocates on a device, besides the trunk and the slots.
EngineMemory engine_memory(const EngineConfig& config, bool cuda);

size_t table_bytes(const EngineConfig& config);
size_t router_table_bytes(const EngineConfig& config);

// Totals that any thread may read while the one in step() adds to them.
struct EngineStats {
  std::atomic<uint64_t> tokens{0};        // processed by step()
  std::atomic<uint64_t> experts_used{0};  // (token, layer, expert) triples computed
  std::atomic<uint64_t> moe_tokens{0};    // (token, layer) pairs routed
  std::atomic<double> dropped_weight{0};  // share of routing weight removed by pruning, summed over those pairs
};

// Counters of one sequence. Summed over sequences they give the totals: a record that several sequences use in a step
// is counted for the first of them.
struct SequenceStats {
  uint64_t tokens = 0, experts_used = 0, moe_tokens = 0;
  double dropped_weight = 0;
  uint64_t expert_hits = 0, expert_misses = 0, bytes_read = 0;  // without records that were read ahead
};

class Engine {
 public:
  // The mask routers of a rule: per layer (top_k, dim + 2 * top_k + 1) values, or none; empty without mask routers.
  // routers.
  using MaskRouters = std::vector<std::span<const float>>;

  // The trunk is in the device's memory. Only the processor can use mapped records.
  Engine(const EngineConfig& config, std::unique_ptr<Device> device, Trunk trunk, ExpertStore store, size_t slot_bytes,
         int readers, const MaskRouters& otp = {}, const MaskRouters& loss = {},
         const std::vector<TableFile>& tables = {});

  enum class Want { kNothing, kLast, kAll };

  // Tokens of one sequence, and which of their logits to return.
  struct Part {
    int sequence;
    std::span<const int32_t> tokens;
    Want want;
  };

  // Run the parts' tokens (at most `chunk` together, each below vocab) at the next positions of their sequences (one
  // part per sequence) and return the requested logits, part by part: (rows, vocab), valid until the next call. A
  // sequence's logits do not depend on the other sequences. On an error no position changes. This thread calls
  // unwanted() now and then; if it returns true, throws Interrupted. Also throws KvOverflow.
  std::span<const float> step(std::span<const Part> parts, std::function<bool()> unwanted = {});

  // Whether to read records of the next layer ahead, where that pays; results do not depend on it.
  void set_prefetch(bool on) { may_prefetch_ = on; }

  // Set the rule by which a sequence's tokens keep experts from now on. The KV cache stays as it was computed.
  void set_prune(int sequence, PruneRule rule);

  int position(int sequence) const { return sequences_.at(sequence).position; }

  // Truncate a sequence to its first `positions` positions, or to fewer if its state can only be restored to fewer.
  // Returns how many are left.
  int truncate(int sequence, int positions);
  // The maximum number of first positions, up to `positions`, that truncate() would leave.
  int restorable(int sequence, int positions) const;
  // Keep the state of a sequence at its position, so that it can be truncated to it; see States.
  void snapshot(int sequence);
  // Copy the first positions of a sequence, which restorable() has returned, to another one, which then has only these.
  void copy_positions(int from, int to, int positions);

  // Write what a sequence knows of its first positions, which restorable() has returned, in pieces of at most kSaved
  // bytes, and read that for the tokens `ids` in place of all that a sequence knew. After an error in load() it is
  // empty. The bytes depend on the model, the cache's type, and the tokens with the rule they were computed by.
  static constexpr size_t kSaved = 1 << 20;
  size_t saved_bytes(int positions) const;
  void save(int sequence, int positions, const std::function<void(std::span<const uint8_t>)>& write);
  void load(int sequence, std::span<const int32_t> ids, const std::function<void(std::span<uint8_t>)>& read);

  const SequenceStats& stats(int sequence) const { return sequences_.at(sequence).stats; }

  // Resize the memory for experts to `bytes`; see Residency::resize. Not while step() runs.
  void resize_slots(size_t bytes);

  const EngineConfig& config() const { return config_; }
  const Residency& residency() const { return residency_; }
  const ExpertStore& store() const { return store_; }
  ExpertStore& store() { return store_; }
  const EngineStats& stats() const { return stats_; }
  const Device& device() const { return *device_; }

 private:
  struct Sequence {
    int position = 0;
    std::vector<int32_t> ids;  // (context,): the tokens, only for embeddings of n-grams
    // Positions up to `written` have been written to windows, each over an earlier one, and none before `restored` -
    // window is there.
    int written = 0, restored = 0;
    PruneRule rule;
    SequenceStats stats;
  };

  uint8_t* memory_of(const SavedPiece& piece, int sequence, int slot, int buffer) const;

  // Where the state of a sequence after some of its positions is: in a snapshot, or, with null, in the sequence itself.
  struct Origin {
    int positions;
    const States::Snapshot* snapshot;
  };
  Origin origin(int sequence, int positions) const;  // after at most so many positions
  bool windows_hold(const Sequence& its, int positions) const;

  std::vector<MaskRouter> load_mask_routers(const MaskRouters& from);
  const MaskRouter* mask_router(int layer, Prune rule) const;
  void plan_step(std::span<const Part> parts);
  void layers(const Step& step);
  void read_ngrams(const Step& step);
  void add_ngrams(int layer, const Step& step);
  void cap_logits(std::span<float> logits);
  void check_wanted() const {
    if (interrupt_) interrupt_->check();
  }
  void experts(int layer, const Step& step);
  bool acquire(const Step& step, int first_record, int e);
  void release_used();
  void abandon();
  void route_tokens(int layer, const Step& step);
  void prune_tokens(int layer, const TokenSpan& span, bool alone);
  Sequence& sequence_of(const Step& step, int token);
  int next_experts(int layer) const;
  void prefetch_for(int next);
  RouterRule router_rule(int layer, int token_id) const;
  std::vector<int16_t> load_router_table(const std::string& name, int layer) const;

  EngineConfig config_;
  std::unique_ptr<Device> device_;
  Trunk trunk_;
  ExpertStore store_;
  Residency residency_;
  ThreadPool pool_;
  std::unique_ptr<LayerMath> math_;
  std::vector<std::vector<float>> router_bias_, expert_scale_;  // (layers,), each (experts,) or none
  std::vector<std::vector<int16_t>> router_table_;              // (layers,), each (vocab, hashed) or none
  std::vector<Sequence> sequences_;
  States states_;
  std::vector<MaskRouter> otp_, loss_;  // (layers,), or none
  std::vector<int> first_record_;       // (layers,): record of a layer's expert 0
  Routing r_;
  std::vector<float*> table_values_;  // of each EngineConfig::ngrams: (chunk, inputs)
  std::vector<int64_t> table_rows_;   // (tokens, heads)
  std::unique_ptr<RowTables> tables_;
  std::vector<TokenSpan> spans_;  // of the current step, as are ids_ and rows_
  std::vector<int32_t> ids_, rows_;
  bool may_prefetch_ = true, prefetch_ = false;  // allowed; for this token
  PrefetchGate gate_;
  EngineStats stats_;
  Interrupt* interrupt_ = nullptr;  // of the current step()
  std::vector<ExpertJob> jobs_;
  std::vector<int> pending_;  // experts of a layer that are used by some token
  std::vector<int> used_;     // records kept pinned because the device may still be reading them
};

}  // namespace edge_moe
