// What a model is, and the sizes of one run of it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "../../devices/format.h"
#include "../../devices/kernels.h"

namespace edge_moe {

// What a layer has in place of attention: a state of fixed size for each sequence, with a convolution's past inputs.
enum class Recurrence { kNone, kDeltaNet, kShortConv, kMamba };

// The maximum of a count per layer.
inline size_t most(const std::vector<int>& counts) {
  return counts.empty() ? 0 : size_t(*std::max_element(counts.begin(), counts.end()));
}

// One kind of attention, shared by some of the layers; see runtime/layers/attention.py, latent.py, compressed.py,
// delta_net.py, short_conv.py and mamba.py.
struct AttentionConfig {
  int heads = 0, kv_heads = 0;
  int head_dim = 0;   // of queries and keys
  int v_dim = 0;      // of values
  int rope_dim = 0;   // how many of head_dim are rotated: the first ones; of a latent and of shared rows the last ones
  int rope_span = 0;  // the pairs are (i, i + rope_span/2): rope_dim, or more if pairs are left out
  std::vector<float> rope_frequency;  // (rope_dim/2,) radians per position
  float rope_scale = 1;               // factor of cos and sin
  bool rope_interleaved = false;      // rotated pairs are neighbours
  float softmax_scale = 1;            // factor of the products of queries and keys
  bool qk_norm_full = false;          // one norm over all heads at once, else per head; no weights: no norm
  bool norm_after_rope = false;       // the norms per head follow the rotation
  bool keys_as_values = false;        // values are the projections of the keys, before their norm and rotation
  bool v_norm = false;                // values are scaled to a root mean square of one, per head
  float qkv_clip = 0;                 // 0: off
  int sliding_window = 0;             // 0: none

  // Attention over a latent (MLA): keys and values are computed from one latent per token, and only latents are cached.
  int kv_rank = 0;  // size of the latent; 0: none
  int q_rank = 0;   // size of the queries' latent; 0: queries are projected from the input
  float latent_norm_eps = 1e-6f;
  std::vector<float> query_scales;  // factor of queries at positions below query_context, below twice that...; empty: 1
  int query_context = 1;

  // Attention to rows of head_dim values that are key and value of all heads at once: those of a window and, after
  // every pool_rate tokens, a compressed one. A row that overlaps takes the pool_rate tokens before these, too.
  bool shared_rows = false;
  int pool_rate = 0;  // 0: only the window
  bool pool_overlaps = false;
  int out_groups = 0, out_rank = 0;  // of the output: each group of heads has out_rank products, which o takes

  // Sparse attention: a query attends to the positions that an indexer scores highest, index_top blocks of index_block;
  // see runtime/layers/indexer.py and block_index.py. Over latents a block is one position, and a layer without an
  // indexer of its own uses those that the layers before it have chosen. Over keys and values a query also attends to
  // the positions after the last whole block. Of shared rows, blocks are the tokens of compressed ones.
  int index_top = 0;               // 0: it attends to all
  int index_block = 1;             // positions
  int index_heads = 0;             // of the layer's indexer; 0: none
  int index_dim = 0;               // of its queries, and of the key of a block; rope_dim are rotated as in head_dim
  bool index_interleaved = false;  // rotated pairs are neighbours
  float index_norm_eps = 1e-6f;    // of the queries' and keys' norms
  float index_scale = 1;           // factor of the products of queries and keys

  bool output_gate = false;  // the input of o is multiplied by the sigmoid of o_gate's product

  // In place of attention: each sequence has a state for each of `heads`, (head_dim, v_dim), and no keys or values are
  // cached. Delta nets and Mamba-2, which calls them C and B, have kv_heads queries and keys. A short convolution is
  // one head without queries, keys and state, whose v_dim values are the channels.
  Recurrence recurrence = Recurrence::kNone;
  int conv_kernel = 0;      // tokens that an output of the convolution depends on
  Gate gate = Gate::kSilu;  // of the outputs of a delta net
  float least_step = 0;     // of Mamba-2: the minimum of its time steps

  bool recurrent() const { return recurrence != Recurrence::kNone; }
  bool has_keys() const { return !kv_rank && !shared_rows && !recurrent(); }
  bool has_state() const { return recurrent() && recurrence != Recurrence::kShortConv; }
  int conv_channels() const { return 2 * kv_dim() + heads * v_dim; }
  // Where queries, keys and values begin in the channels: in this order or, of Mamba-2, in the opposite one.
  int q_at() const { return recurrence == Recurrence::kMamba ? heads * v_dim + kv_dim() : 0; }
  int k_at() const { return recurrence == Recurrence::kMamba ? heads * v_dim : kv_dim(); }
  int v_at() const { return recurrence == Recurrence::kMamba ? 0 : 2 * kv_dim(); }
  size_t state_values() const {
    return recurrent() ? size_t(heads) * head_dim * v_dim + conv_past_values() : pool_values() + index_sum_values();
  }
  size_t conv_past_values() const { return size_t(conv_kernel - 1) * conv_channels(); }
  // For each token: how much of it is written to a state, or the factors of a short convolution's inputs.
  int write_values() const { return recurrence == Recurrence::kShortConv ? v_dim : heads; }

  int latent_cached() const { return kv_rank + rope_dim; }
  int q_dim() const { return heads * head_dim; }
  int kv_dim() const { return kv_heads * head_dim; }
  float query_scale(int position) const { return query_scales.empty() ? 1.0f : query_scales[position / query_context]; }

  // What the KV cache stores for a layer, as rows of positions: its latents, its shared rows, or the keys of each KV
  // head and then the values of each. After these, compressed rows, and the keys of an indexer, in key blocks.
  size_t cached_rows() const { return kv_rank || shared_rows ? 1 : recurrent() ? 0 : 2 * size_t(kv_heads); }
  size_t cached_values() const { return size_t(kv_rank ? latent_cached() : head_dim); }  // per row and position
  size_t index_values() const { return index_heads ? size_t(index_dim) : 0; }            // per block

  // The keys of a block that is not whole yet are summed in the sequence's state, and so are compressed rows; see
  // PoolSums.
  size_t pool_values() const { return pool_rate ? size_t(pool_overlaps ? 2 : 1) * 3 * head_dim : 0; }
  size_t index_sum_values() const { return index_block > 1 ? (shared_rows ? 6 : 1) * index_values() : 0; }
  // How many positions a query that sees the first `end` attends to: at most index_most(), if it does not see all.
  // Of shared rows, the compressed ones are counted.
  bool is_sparse(int end) const { return index_top && end / index_block > index_top; }
  int index_most() const {
    return !index_top ? 0 : shared_rows ? index_top : index_top * index_block + index_block - 1;
  }
  int index_count(int end) const { return shared_rows ? index_top : index_top * index_block + end % index_block; }
};

// Embeddings of n-grams that a layer adds to the residual stream; see runtime/layers/ngrams.py.
struct NGramConfig {
  int layer = 0;
  std::vector<int64_t> factors;             // of a token's id and of the ids before it, in a hash
  std::vector<std::vector<int64_t>> sizes;  // of n-grams of two tokens, of three, ...: the rows that each hash can pick
  int cols = 0;                             // of the table
  int end = 0;                              // the token that ends a text
  int conv_kernel = 1;                      // its inputs are longest() tokens apart

  int longest() const { return int(factors.size()); }
  int past() const { return (conv_kernel - 1) * longest(); }  // tokens before its own that the convolution reaches
  int heads() const {
    size_t heads = 0;
    for (const auto& hashes : sizes) heads += hashes.size();
    return int(heads);
  }
  int inputs() const { return heads() * cols; }  // what a token reads of the table
};

// How router logits become the routing weights of experts; see RouterRule.
enum class RouterScore { kSoftmax, kSigmoid, kSqrtSoftplus, kSparsemixer };

// runtime/config.py's ModelConfig, and the sizes of this run.
struct EngineConfig {
  int layers = 0, dim = 0, vocab = 0;
  std::vector<AttentionConfig> attentions;  // the different kinds
  std::vector<int> attention_of;            // (layers,): the kind of each layer; -1: it has none
  std::vector<NGramConfig> ngrams;          // of the layers that have embeddings of n-grams
  int streams = 1;                          // that the residual stream has; see runtime/layers/streams.py, hyper.py
  int mix_rank = 0;                         // of the gates' matrices; 0: the streams are mixed by hyper-connections
  int mix_iterations = 0;                   // of these: normalisations of the matrices that mix the streams
  float mix_eps = 0;                        // added to what they divide by
  int expert_hidden = 0;
  std::vector<int> experts, top_k;  // (layers,): of each layer; 0 in a layer without experts
  std::vector<int> hashed;          // (layers,): experts in a row of the layer's table of each token's; 0: routed
  std::vector<int> dense;           // (layers,): inner size of each layer's dense MLP; 0: it has none
  Activation activation;            // of every MLP
  bool layer_norm = false;          // the norms of the residual stream are LayerNorms with a bias, not RMSNorms
  bool post_norms = false;          // RMSNorms of what attention and MLP add to the residual stream
  bool own_norms = false;           // of router, routed experts and shared expert; see LayerWeights
  bool layer_scale = false;         // the residual stream is multiplied by one number after each layer
  float norm_eps = 1e-6f;
  float embedding_scale = 1;  // factor of embeddings before they enter the residual stream
  float residual_scale = 1;   // factor of what attention and MLPs add to it
  float logits_scale = 1;
  float logits_cap = 0;  // logits are logits_cap * tanh(logit / logits_cap); 0: off
  int shared_hidden = 0;

  bool has_attention(int layer) const { return attention_of[layer] >= 0; }
  // Of a layer without attention: one without heads.
  const AttentionConfig& attention(int layer) const {
    static const AttentionConfig none;
    return has_attention(layer) ? attentions[attention_of[layer]] : none;
  }
  size_t width() const { return size_t(streams) * dim; }  // values that the residual stream has per token
  bool hyper() const { return streams > 1 && !mix_rank; }
  // What a mix tells for each token: each stream's share of what comes out and, of hyper-connections, of each stream.
  size_t shares() const { return hyper() ? size_t(streams) * (streams + 1) : streams; }
  const NGramConfig* ngrams_of(int layer) const {  // null: none
    for (const NGramConfig& its : ngrams)
      if (its.layer == layer) return &its;
    return nullptr;
  }
  size_t ngram_inputs() const {
    size_t most = 0;
    for (const NGramConfig& its : ngrams) most = std::max(most, size_t(its.inputs()));
    return most;
  }
  bool all_have_keys() const {
    for (int layer = 0; layer < layers; ++layer)
      if (!has_attention(layer) || !attention(layer).has_keys()) return false;
    return true;
  }
  bool has_latents() const {
    return most_of([](const AttentionConfig& a) { return a.kv_rank; }) > 0;
  }
  bool has_shared_rows() const {
    return most_of([](const AttentionConfig& a) { return a.shared_rows; }) > 0;
  }
  // The maximum of count(attention) over the kinds.
  template <typename Count>
  size_t most_of(const Count& count) const {
    size_t largest = 0;
    for (const AttentionConfig& attention : attentions) largest = std::max(largest, size_t(count(attention)));
    return largest;
  }
  // The maximum of positions that are chosen for a query; 0: every query attends to all that it sees.
  size_t index_most() const {
    return most_of([](const AttentionConfig& a) { return a.index_most(); });
  }
  // Whether experts' outputs are summed before the residual stream gets them, as norms or a factor follow.
  bool sums_experts() const { return post_norms || own_norms || layer_scale || streams > 1; }
  size_t key_positions() const { return align_up(context, kKeyBlock); }
  // The maximum of what a query attends to: all positions or, of shared rows, the compressed ones and the window.
  size_t score_positions() const {
    const size_t rows = most_of([this](const AttentionConfig& a) {
      return a.pool_rate ? context / a.pool_rate + std::min(a.sliding_window, context) : 0;
    });
    return std::max(key_positions(), align_up(rows, kKeyBlock));
  }

  // The KV cache of a layer with a window is as long as the window and a step, or a key block: position p is at place
  // p % cached_positions.
  size_t cached_positions(int layer) const {
    const int window = attention(layer).sliding_window;
    const size_t step = std::max(size_t(chunk), size_t(kKeyBlock));
    return window ? std::min(key_positions(), align_up(window - 1 + step, kKeyBlock)) : key_positions();
  }
  bool is_window(int layer) const { return cached_positions(layer) < key_positions(); }
  bool has_windows() const {
    for (int layer = 0; layer < layers; ++layer)
      if (is_window(layer)) return true;
    return false;
  }
  // How many key blocks have the keys of a layer's window that the next token sees, which is what a snapshot keeps.
  size_t window_blocks(int layer) const {
    return (attention(layer).sliding_window - 1 + kKeyBlock - 1) / kKeyBlock + 1;
  }
  // The offset of each layer's part in a snapshot of windows, and last the bytes of all.
  std::vector<size_t> window_offsets() const {
    return offsets([this](int layer) {
      const size_t row = is_window(layer) ? window_blocks(layer) * kKeyBlock * kv_position_bytes(layer) : 0;
      return attention(layer).cached_rows() * row;
    });
  }

  // The router's rule; see RouterRule.
  RouterScore router_score = RouterScore::kSoftmax;
  float router_threshold = 0;  // of kSparsemixer
  bool renormalise = false, group_top2sum = false;
  float router_logits_scale = 1, router_sum_eps = 1e-20f;
  float routing_scale = 1;  // factor of routing weights, residual scale included
  int groups = 1, top_groups = 1;
  std::vector<std::vector<int>> expert_groups;  // (layers, experts): group of each expert; empty if groups is 1

  int sequences = 1;       // with a KV cache each
  int snapshots = 0;       // of recurrent states and windows, of all sequences together
  int context = 0;         // positions in each
  bool half_cache = true;  // keys and values, or latents, in half precision, else floats
  int chunk = 0;           // maximum of tokens in one step()
  int logits_rows = 1;     // maximum of rows of logits in one step()
  int threads = 1;
  bool spin = true;  // idle threads spin for some microseconds before they sleep

  // Sizes of one sequence's cache, per layer.
  size_t kv_value_bytes() const { return half_cache ? sizeof(uint16_t) : sizeof(float); }
  size_t kv_position_bytes(int layer) const { return attention(layer).cached_values() * kv_value_bytes(); }
  size_t kv_row_bytes(int layer) const { return cached_positions(layer) * kv_position_bytes(layer); }
  size_t index_key_bytes(int layer) const { return attention(layer).index_values() * kv_value_bytes(); }
  size_t index_keys(int layer) const { return align_up(key_positions() / attention(layer).index_block, kKeyBlock); }
  size_t pool_rows(int layer) const {
    const AttentionConfig& a = attention(layer);
    return a.pool_rate ? align_up(key_positions() / a.pool_rate, kKeyBlock) : 0;
  }
  size_t pool_offset(int layer) const { return attention(layer).cached_rows() * kv_row_bytes(layer); }
  size_t index_keys_offset(int layer) const { return pool_offset(layer) + pool_rows(layer) * kv_position_bytes(layer); }
  size_t kv_layer_bytes(int layer) const {
    return index_keys_offset(layer) + index_keys(layer) * index_key_bytes(layer);
  }
  // Calls row(offset in the layer's cache, bytes of the first positions) for each row; rows are in whole key blocks.
  template <typename Row>
  void each_kv_row(int layer, size_t positions, const Row& row) const {
    const AttentionConfig& a = attention(layer);
    const size_t all = align_up(positions, kKeyBlock), whole = std::min(all, cached_positions(layer));
    for (size_t i = 0; i < a.cached_rows(); ++i) row(i * kv_row_bytes(layer), whole * kv_position_bytes(layer));
    if (a.pool_rate) row(pool_offset(layer), positions / a.pool_rate * kv_position_bytes(layer));
    if (a.index_heads) row(index_keys_offset(layer), align_up(all / a.index_block, kKeyBlock) * index_key_bytes(layer));
  }
  // Calls block(offset in the layer's cache, offset among these blocks, bytes) for the key blocks of a layer's window
  // that have keys which the token at `position` sees.
  template <typename Block>
  void each_window_block(int layer, int position, const Block& block) const {
    const size_t bytes = kKeyBlock * kv_position_bytes(layer), row = kv_row_bytes(layer);
    const int count = int(window_blocks(layer)), end = (position - 1) / kKeyBlock + 1, places = int(row / bytes);
    size_t at = 0;
    for (size_t first = 0; first < pool_offset(layer); first += row)
      for (int i = std::max(0, end - count); i < end; ++i, at += bytes) block(first + i % places * bytes, at, bytes);
  }
  size_t kv_cache_bytes() const {
    size_t bytes = 0;
    for (int layer = 0; layer < layers; ++layer) bytes += kv_layer_bytes(layer);
    return bytes;
  }
  // The recurrent state of one sequence: the offset of each layer's part, and last the bytes of all layers. The states
  // of the heads come first, then the convolution's past inputs, (conv_kernel - 1, conv_channels), and those of the
  // embeddings of n-grams, (past, width). Of compressed rows the sums come first, then those of their indexer's keys.
  std::vector<size_t> state_offsets() const {
    return offsets([this](int layer) { return align_up(state_values(layer) * sizeof(float), kPartAlignment); });
  }
  size_t state_values(int layer) const {
    const NGramConfig* its = ngrams_of(layer);
    return attention(layer).state_values() + (its ? its->past() * width() : 0);
  }
  bool is_recurrent() const { return state_offsets().back() > 0; }
  // Recurrent states and snapshots.
  size_t states_bytes() const { return state_buffers() * state_offsets().back() + snapshots * window_offsets().back(); }
  // How many states there is memory for: of each sequence the present one and, during a step, the next one.
  int state_buffers() const { return is_recurrent() ? 2 * sequences + snapshots : 0; }

  // The offset of each layer's cache, and last the bytes of all layers.
  std::vector<size_t> kv_offsets() const {
    return offsets([this](int layer) { return kv_layer_bytes(layer); });
  }

 private:
  // Where each layer begins if they lie one after another, and last where all end. bytes_of(layer): of each.
  template <typename Bytes>
  std::vector<size_t> offsets(const Bytes& bytes_of) const {
    std::vector<size_t> begins = {0};
    for (int layer = 0; layer < layers; ++layer) begins.push_back(begins.back() + bytes_of(layer));
    return begins;
  }
};

struct EngineMemory {
  size_t kv_cache = 0, states = 0, scratch = 0;  // bytes
};

}  // namespace edge_moe
