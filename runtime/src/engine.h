// The forward pass of a Mixture-of-Experts transformer over a bundle: trunk in memory, experts as they are needed.
//
// What a token needs is decided here, on the host: routing, pruning, whose records are read and who is evicted. What
// is computed of it is a LayerMath's, on the processor or a GPU.
//
// Everything is allocated when an Engine is made: `engine_memory` says how much, so a plan can be drawn up first.
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
#include "threads.h"
#include "trunk.h"

namespace edge_moe {

// What an Engine of this configuration allocates on a device, beside the trunk and the slots.
EngineMemory engine_memory(const EngineConfig& config, bool cuda);

// Totals that any thread may read while the one in step() adds to them.
struct EngineStats {
  std::atomic<uint64_t> tokens{0};        // through step()
  std::atomic<uint64_t> experts_used{0};  // (token, layer, expert) triples computed
  std::atomic<uint64_t> moe_tokens{0};    // (token, layer) pairs routed
  std::atomic<double> dropped_weight{0};  // share of routing weight that pruning took away, summed over those pairs
};

// What one sequence took part in. Sums over sequences are the totals: what a record costs that several of them use in a
// step is counted for the first.
struct SequenceStats {
  uint64_t tokens = 0, experts_used = 0, moe_tokens = 0;
  double dropped_weight = 0;
  uint64_t expert_hits = 0, expert_misses = 0, bytes_read = 0;  // what is read ahead is nobody's
};

class Engine {
 public:
  // The mask routers of a rule: of each layer (top_k, dim + 2 * top_k + 1) values, or none; no layers: there are none.
  using MaskRouters = std::vector<std::span<const float>>;

  // The trunk is in memory of the device. Records are mapped for the processor alone.
  Engine(const EngineConfig& config, std::unique_ptr<Device> device, Trunk trunk, ExpertStore store, size_t slot_bytes,
         int readers, const MaskRouters& otp = {}, const MaskRouters& loss = {});

  enum class Want { kNothing, kLast, kAll };

  // Tokens of one sequence, and the logits that are wanted of them.
  struct Part {
    int sequence;
    std::span<const int32_t> tokens;
    Want want;
  };

  // Run the parts' tokens (at most `chunk` together, each below vocab) at the next positions of their sequences, of
  // which none has two parts, and return the logits wanted, part by part: (rows, vocab), valid until the next call. A
  // sequence's logits do not depend on the others. On an error all positions are what they were before. unwanted(),
  // asked by this thread now and then, ends the call with Interrupted. Throws KvOverflow, too.
  std::span<const float> step(std::span<const Part> parts, std::function<bool()> unwanted = {});

  // Reading ahead of the next layer while one is computed, where it pays; off or on, results are the same.
  void set_prefetch(bool on) { may_prefetch_ = on; }

  // Which experts a sequence's tokens keep from now on. What is in the KV cache stays as it was computed.
  void set_prune(int sequence, PruneRule rule);

  int position(int sequence) const { return sequences_.at(sequence).position; }

  // Forget all but the first positions of a sequence: so many, or fewer where its state can be brought back to these
  // alone. Returns how many there are now.
  int truncate(int sequence, int positions);
  // The first positions of a sequence into another, which has these alone then.
  void copy_positions(int from, int to, int positions);
  const SequenceStats& stats(int sequence) const { return sequences_.at(sequence).stats; }

  // Memory for experts of so many bytes from now on; see Residency::resize. Not while step() runs.
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
    PruneRule rule;
    SequenceStats stats;
  };

  std::vector<MaskRouter> load_mask_routers(const MaskRouters& from);
  const MaskRouter* mask_router(int layer, Prune rule) const;
  void plan_step(std::span<const Part> parts);
  void layers(const Step& step);
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
  void prefetch_next(int layer);
  RouterRule router_rule(int layer) const;

  EngineConfig config_;
  std::unique_ptr<Device> device_;
  Trunk trunk_;
  ExpertStore store_;
  Residency residency_;
  ThreadPool pool_;
  std::unique_ptr<LayerMath> math_;
  std::vector<std::vector<float>> router_bias_;  // (layers,), each (experts,) or none
  std::vector<Sequence> sequences_;
  std::vector<MaskRouter> otp_, loss_;  // (layers,), or none
  std::vector<int> first_record_;       // (layers,): the store's number of a layer's expert 0
  Routing r_;
  std::vector<TokenSpan> spans_;  // of the step that runs, as the next three
  std::vector<int32_t> ids_, rows_;
  bool may_prefetch_ = true, prefetch_ = false;  // allowed; for this token
  PrefetchGate gate_;
  EngineStats stats_;
  Interrupt* interrupt_ = nullptr;  // of the step() that runs
  std::vector<ExpertJob> jobs_;
  std::vector<int> pending_;  // experts of a layer that tokens use
  std::vector<int> used_;     // records that are pinned because the device may still read them
};

}  // namespace edge_moe
