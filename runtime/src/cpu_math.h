// The layers on the processor, computed with one table of kernels on a pool of threads.
#pragma once

#include <atomic>
#include <initializer_list>
#include <vector>

#include "device.h"
#include "host_memory.h"
#include "layer_math.h"
#include "layer_weights.h"
#include "os.h"
#include "scratch.h"
#include "threads.h"

namespace edge_moe {

EngineMemory cpu_memory(const EngineConfig& config);

class CpuMath : public LayerMath {
 public:
  CpuMath(const EngineConfig& config, const Trunk& trunk, const Kernels& kernels, ThreadPool& pool);

  uint8_t* shared(size_t bytes) override;
  void begin(const Step& step, std::span<const int32_t> ids) override;
  void ngrams(int layer, const Step& step, const float* rows) override;
  void dense_layer(int layer, const Step& step) override;
  void to_router(int layer, const Step& step, const RouterWants& wants, const Routing& r) override;
  void ahead_logits(int next_layer, const Routing& r) override;
  void experts(int layer, const Step& step, std::span<const ExpertJob> jobs, const Routing& r, bool last) override;
  void copy_positions(int from, int to, int positions) override;
  void copy_state(int from, int to) override;
  void save_windows(int sequence, int slot, int position) override;
  void load_windows(int slot, int sequence, int position) override;
  uint8_t* layer_cache(int sequence, int layer) const override;
  uint8_t* kept_windows(int slot, int layer) const override;
  uint8_t* state_buffer(int buffer) const override;
  void copy(void* to, const void* from, size_t bytes) override;
  std::span<float> logits(std::span<const int32_t> tokens) override;
  int take_kv_overflow() override { return kv_overflow_.exchange(-1); }
  void finish() override {}
  bool asynchronous() const override { return false; }

 private:
  struct Task {
    const ExpertJob* job;
    const Matrix* matrix;  // null: the activation
    int begin, end;        // rows of the matrix, or pairs of the job
  };

  // attention.cpp, latent_attention.cpp, row_attention.cpp, recurrence.cpp
  void any_attention(int layer, const Step& step, bool received);
  void attention(int layer, const Step& step, bool received);
  void attend(int layer, const TokenSpan& span, int first_token, int tokens, int first_head, int heads, int thread);
  void latent_attention(int layer, const Step& step);
  void attend_latent(int layer, const TokenSpan& span, int first_token, int tokens, int first_head, int heads,
                     int thread);
  template <typename Rows, typename End>
  void attend_rows(const float* queries, int count, int cols, int n, int end, const End& end_of, const Rows& rows,
                   const float* sinks, float* const* out, int thread);
  void row_attention(int layer, const Step& step);
  void pool_rows(const PoolWeights& w, const Step& step, int layer, size_t at, int dim, bool overlaps, float* values,
                 const float* gates);
  void attend_shared(int layer, const Step& step, const TokenSpan& span, int in_span, int first_head, int heads,
                     int thread);
  void grouped_output(int layer, int tokens);

  // indexer.cpp
  struct IndexQuery {
    int token, sequence;
    int end;  // of the positions that it sees
  };
  void store_index_key(int layer, const TokenSpan& span, int in_span);
  void store_block_keys(int layer, const Step& step);
  void store_row(int sequence, uint8_t* rows, size_t place, const float* row, size_t n);
  void cache_index_key(int layer, int sequence, size_t place, const float* key);
  void choose_positions(int layer, const Step& step);
  void choose_positions(int layer, std::span<const IndexQuery> queries);
  void index_scores(int layer, const IndexQuery& query, int begin, int end, float* scores, int thread);
  uint8_t* index_keys(int sequence, int layer) const;
  void recurrence(int layer, const Step& step);
  void heads_of_key(int layer, const TokenSpan& span, int kv_head);
  void convolve_channels(int layer, const TokenSpan& span, int begin, int end);
  float* state(int buffer, int layer) const;
  void note_overflow(int sequence, const float* values, size_t count);  // of what goes into a KV cache of halves
  void attention_norm(int layer, int tokens);

  // streams.cpp
  void mixed(const Norm& norm, const Mix& mix, const int32_t* tokens, int count, float* shares, float* y);
  void collapsed(const Norm& norm, const Mix& mix, const int32_t* tokens, int count, float* shares, float* y);
  float product(const float* a, const float* b) const;
  void attention_output(int layer, const float* values, int tokens);
  void received_attention(int layer, const Step& step);
  KeyValues cached(int sequence, int layer, int head) const;
  KeyValues gathered(const KeyValues& cache, const int32_t* positions, int count, int thread) const;
  template <typename Run>
  void in_runs(int layer, const KeyValues& cache, int begin, int end, const Run& run) const;
  template <typename T>
  void store(int sequence, int layer, int head, int position, const float* key, const float* value);

  // Runs task(span, i, thread) for i in [0, count(span)) of every span, all in one run of the pool.
  template <typename Count, typename Task>
  void run_spans(const Step& step, const Count& count, const Task& task) {
    int all = 0;
    for (const TokenSpan& span : step.spans) all += count(span);
    pool_.run(all, [&](int i, int thread) {
      const TokenSpan* span = step.spans.data();
      for (int its; i >= (its = count(*span)); ++span) i -= its;
      task(*span, i, thread);
    });
  }

  void norm(const Norm& norm, const float* x, float* y) const;
  void norm_each(const Norm& norm, const float* x, int tokens, float* y);
  void mlp_norm(const Norm& norm, int tokens);
  void mlp_input(int layer, int tokens);
  void importance(int layer, const Step& step, float* of_tokens);
  void shared_expert(int layer, int tokens, float* y);
  void finish_sum(int layer, int tokens);
  void run_jobs(std::span<const ExpertJob> jobs, float* out);
  void add_tasks(const ExpertJob& job, const Matrix* matrix, int count, int piece);
  void add_to_residual(const Norm& post_norm, float* out, int tokens);
  void add_to_streams(const float* out, float factor, int tokens);
  void scale_residual(int layer, int tokens);
  struct Product {
    const Matrix& matrix;
    float* y;  // (tokens, rows)
  };
  void matmul(const Matrix& matrix, const Activations& x, float* y) { matmuls({{matrix, y}}, x); }
  void matmuls(std::initializer_list<Product> products, const Activations& x);
  void float_matmul(const Matrix& matrix, const float* x, int count, float* y);
  Activations prepare(const float* values, int count, int cols, const Quantised& into, bool quantised);
  void quantise_vector(const float* values, int cols, const Quantised& into, int vector);

  const EngineConfig& config_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  EndWeights ends_;
  std::vector<LayerWeights> layers_;
  const std::vector<size_t> kv_offsets_;      // of each layer in a sequence's part of the arena, and its end
  const std::vector<size_t> state_offsets_;   // of each layer in a state buffer, and its end
  const std::vector<size_t> window_offsets_;  // of each layer in a snapshot of windows, and its end
  Arena window_arena_;                        // by slot and layer; see EngineConfig::window_offsets
  Arena state_arena_;                         // by buffer and layer; see EngineConfig::state_offsets
  Arena kv_arena_, scratch_arena_;  // by sequence and layer: keys and then values of each KV head, as KeyValues;
                                    // or latents (context, cached); then an indexer's keys
  std::vector<Arena> shared_;
  Scratch s_;
  std::vector<Task> tasks_;
  std::atomic<int> kv_overflow_{-1};  // in the KV cache of this sequence
};

}  // namespace edge_moe
