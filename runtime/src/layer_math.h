// The arithmetic of the layers on one device. Engine says what is computed, by which experts and when; this has the
// trunk, the KV cache and the tokens' residual stream.
//
// Calls come in the order of the model. A device may still be at work when one returns, but not when those return that
// give the host something to read: to_router, ahead_logits, logits and finish wait for all that was asked before.
#pragma once

#include <span>
#include <stdexcept>

#include "engine_config.h"
#include "expert_store.h"
#include "prune.h"

namespace edge_moe {

// A key or value of a sequence was too large for a KV cache in half precision.
struct KvOverflow : std::runtime_error {
  explicit KvOverflow(int sequence)
      : std::runtime_error("a key or value is beyond what float16 holds"), sequence(sequence) {}
  int sequence;
};

// Tokens of one sequence in a forward pass: those from `first` on, at positions from `position` on.
struct TokenSpan {
  int sequence, position, first, count;
};

// The tokens of one forward pass: of several sequences, a span of each, one after the other. What is computed of a
// token depends on its own sequence alone.
struct Step {
  std::span<const TokenSpan> spans;
  int tokens;
};

// One expert on some tokens: inputs of tokens[i], its outputs are pair first + i.
struct ExpertJob {
  ExpertWeights weights;
  const int32_t* tokens;
  int count, first, record;
};

// What routing works in, on the host, where the device can read it: pieces of LayerMath::shared().
struct Routing {
  float *router_logits, *routing_weights;  // (chunk, experts), (chunk, top_k): the most of any layer
  float* group_scores;                     // (threads, 2, groups)
  int32_t *routed, *pair_of, *pair_token;  // (chunk, top_k): expert ids; pair of (token, k); token of a pair
  int32_t* first_pair;                     // (experts+1,)
  float* mask_scores[2];                   // (chunk, top_k): by the mask routers of otp, of loss
  float* dropped;                          // (chunk,): share of a token's routing weight that pruning drops
  float* importance;                       // (chunk,): |input| x attention received from the chunk's tokens
  int32_t* by_importance;                  // (chunk,)
  uint8_t* protects;                       // (chunk,): 1 for a token that pruning leaves alone
  float *ahead_logits, *ahead_weights;     // of the next layer for one token: (experts,), (top_k,)
  int32_t* ahead_ids;                      // (top_k,)
};

// Set every pointer of `r` to its piece of `base` and return the bytes that all take; with null, only count them.
size_t carve_routing(const EngineConfig& config, Routing& r, uint8_t* base);

// What a layer is asked for besides its router's logits.
struct RouterWants {
  const Matrix* mask_routers[2] = {};  // otp, loss: their products into mask_scores; null: none
  bool importance = false;             // of each token; only of a pass of one span
  bool ahead = false;                  // ahead_logits() of the next layer will be asked for
};

class LayerMath {
 public:
  virtual ~LayerMath() = default;

  // Memory that the host and the device both read and write, for as long as this lives.
  virtual uint8_t* shared(size_t bytes) = 0;

  // Begin a pass: the residual stream is the tokens' embeddings.
  virtual void begin(const Step& step, std::span<const int32_t> ids) = 0;

  // A layer without experts.
  virtual void dense_layer(int layer, const Step& step) = 0;

  // A layer with experts, up to its router: logits and what else is wanted into `r`. Waits.
  virtual void to_router(int layer, const Step& step, const RouterWants& wants, const Routing& r) = 0;

  // The next layer's router on the residual stream as it is now, of one token, into r.ahead_logits. Waits.
  virtual void ahead_logits(int next_layer, const Routing& r) = 0;

  // Some experts of the layer, jobs[i] in any order; `last` when no more come: then the tokens' weighted sums, in order
  // of rank, and the shared expert go into the residual stream.
  virtual void experts(int layer, const Step& step, std::span<const ExpertJob> jobs, const Routing& r, bool last) = 0;

  // The longest beginning, of at most so many positions, that the state of a sequence can be brought back to. A KV
  // cache keeps each position by itself, and has them all.
  virtual int restorable(int /*sequence*/, int positions) { return positions; }

  // What the KV cache of a sequence has of the first positions, into another's.
  virtual void copy_positions(int from, int to, int positions) = 0;

  // Output norm and head of some of the pass's tokens: (tokens, vocab), valid until the next call. Waits.
  virtual std::span<float> logits(std::span<const int32_t> tokens) = 0;

  // The sequence in whose KV cache a key or value has become infinite since this was last asked, or -1. A device that
  // does not tell says -1; then logits show it, where they are not finite.
  virtual int take_kv_overflow() { return -1; }

  // Wait until all that was asked for is done, and experts' weights are not read any more.
  virtual void finish() = 0;

  // Is experts() still at work when it returns?
  virtual bool asynchronous() const = 0;
};

}  // namespace edge_moe
