// The arithmetic of the layers on one device. Engine decides what is computed, with which experts and when; LayerMath
// holds the trunk, the KV cache and the residual stream.
//
// Calls come in the order of the layers. A device may still be working when a call returns, except for to_router,
// ahead_logits, logits and finish, which wait for all work queued before, as the host reads their results.
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

// Tokens of one sequence in a forward pass: tokens [first, first + count) of the pass, at positions from `position` on.
// state: which of the state buffers has the recurrent state before them, -1 if it is zero; next_state: which one gets
// the state after them. Both are 0 in a model without recurrent layers.
struct TokenSpan {
  int sequence, position, first, count;
  int state = 0, next_state = 0;
};

// The tokens of one forward pass: one span per sequence, one after the other. The results of a token depend on its own
// sequence only.
struct Step {
  std::span<const TokenSpan> spans;
  int tokens;
};

// One expert on some tokens: the input of pair first + i is tokens[i].
struct ExpertJob {
  ExpertWeights weights;
  const int32_t* tokens;
  int count, first, record;
};

// The working memory of routing, on the host and readable by the device: pieces of LayerMath::shared().
struct Routing {
  float *router_logits, *routing_weights;  // (chunk, experts), (chunk, top_k): the maxima over layers
  float* group_scores;                     // (threads, 2, groups)
  int32_t *routed, *pair_of, *pair_token;  // (chunk, top_k): expert ids; pair of (token, k); token of a pair
  int32_t* first_pair;                     // (experts+1,)
  float* mask_scores[2];                   // (chunk, top_k): by the mask routers of otp, of loss
  float* dropped;                          // (chunk,): share of a token's routing weight that pruning drops
  float* importance;                       // (chunk,): |input| x attention received from the chunk's tokens
  int32_t* by_importance;                  // (chunk,)
  uint8_t* protects;                       // (chunk,): 1 for a token that pruning leaves unchanged
  float *ahead_logits, *ahead_weights;     // of the next layer for one token: (experts,), (top_k,)
  int32_t* ahead_ids;                      // (top_k,)
};

// Set every pointer of `r` to its piece of `base` and return the bytes that all take; with null, only count them.
size_t carve_routing(const EngineConfig& config, Routing& r, uint8_t* base);

// What to compute for a layer besides the logits of its router.
struct RouterWants {
  const Matrix* mask_routers[2] = {};  // otp, loss: their products go to mask_scores; null: none
  bool importance = false;             // of each token; only in a pass of one span
  int ahead = 0;                       // ahead_logits() of this later layer follows; 0: none
};

// Calls block(layer, in the layer's cache of a sequence, in its part of a snapshot, bytes) for the key blocks of all
// windows that have keys which the token at `position` sees.
template <typename Block>
void each_window_block(const EngineConfig& c, int position, const Block& block) {
  for (int layer = 0; layer < c.layers; ++layer)
    if (c.is_window(layer))
      c.each_window_block(layer, position,
                          [&](size_t place, size_t at, size_t bytes) { block(layer, place, at, bytes); });
}

class LayerMath {
 public:
  virtual ~LayerMath() = default;

  // Memory that the host and the device both read and write; freed with this object.
  virtual uint8_t* shared(size_t bytes) = 0;

  // Begin a pass: set the residual stream to the tokens' embeddings.
  virtual void begin(const Step& step, std::span<const int32_t> ids) = 0;

  // Add a layer's embeddings of n-grams to the residual stream, before the rest of the layer. rows: the table's,
  // (tokens, inputs), in memory from shared().
  virtual void ngrams(int layer, const Step& step, const float* rows) = 0;

  // Compute a layer without experts: attention, a dense MLP, or both.
  virtual void dense_layer(int layer, const Step& step) = 0;

  // Compute a layer with experts up to its router, and write logits and what else is wanted to `r`. Waits.
  virtual void to_router(int layer, const Step& step, const RouterWants& wants, const Routing& r) = 0;

  // Apply a later layer's router to the current residual stream of one token, into r.ahead_logits. Waits.
  virtual void ahead_logits(int layer, const Routing& r) = 0;

  // Compute some experts of the layer, jobs[i] in any order; none if no token has any. After the `last` jobs of a
  // layer, add the tokens' weighted sums, in order of rank, and the shared expert to the residual stream.
  virtual void experts(int layer, const Step& step, std::span<const ExpertJob> jobs, const Routing& r, bool last) = 0;

  // Copy the first positions of a sequence's KV cache to another sequence's.
  virtual void copy_positions(int from, int to, int positions) = 0;

  // Copy a state buffer to another one.
  virtual void copy_state(int from, int to) = 0;

  // Copy the windows of a sequence before `position` to the slot of a snapshot, and the other way round.
  virtual void save_windows(int sequence, int slot, int position) = 0;
  virtual void load_windows(int slot, int sequence, int position) = 0;

  // The device's memory of a layer's cache of a sequence, of its windows in the slot of a snapshot, and of a buffer of
  // recurrent state; and copying there or from there, which waits.
  virtual uint8_t* layer_cache(int sequence, int layer) const = 0;
  virtual uint8_t* kept_windows(int slot, int layer) const = 0;
  virtual uint8_t* state_buffer(int buffer) const = 0;
  virtual void copy(void* to, const void* from, size_t bytes) = 0;

  // Apply the output norm and the head to some tokens of the pass: (tokens, vocab), valid until the next call. Waits.
  virtual std::span<float> logits(std::span<const int32_t> tokens) = 0;

  // The sequence in whose KV cache a key or value has become infinite since the last call, or -1. A device that does
  // not check returns -1; the overflow then shows in logits that are not finite.
  virtual int take_kv_overflow() { return -1; }

  // Wait until all queued work is done and experts' weights are no longer read.
  virtual void finish() = 0;

  // Whether experts() may still be running on the device when it returns.
  virtual bool asynchronous() const = 0;
};

}  // namespace edge_moe
