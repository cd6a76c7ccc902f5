// The layers on the processor, by one table of kernels on a pool of threads.
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
  void dense_layer(int layer, const Step& step) override;
  void to_router(int layer, const Step& step, const RouterWants& wants, const Routing& r) override;
  void ahead_logits(int next_layer, const Routing& r) override;
  void experts(int layer, const Step& step, std::span<const ExpertJob> jobs, const Routing& r, bool last) override;
  std::span<const float> logits(const Step& step, int rows) override;
  bool take_kv_overflow() override { return kv_overflow_.exchange(false); }
  void finish() override {}
  bool asynchronous() const override { return false; }

 private:
  struct Task {
    const ExpertJob* job;
    const Matrix* matrix;  // null: the activation
    int begin, end;        // rows of the matrix, or pairs of the job
  };

  // attention.cpp, latent_attention.cpp
  void any_attention(int layer, const Step& step, bool received);
  void attention(int layer, const Step& step, bool received);
  void attend(int layer, const Step& step, int first_token, int tokens, int first_head, int heads, int thread);
  void latent_attention(int layer, const Step& step);
  void attend_latent(int layer, const Step& step, int first_token, int tokens, int first_head, int heads, int thread);
  void note_overflow(const float* values, size_t count);  // of what goes into a KV cache of halves
  void attention_norm(int layer, int tokens);
  void attention_output(int layer, int tokens);
  void received_attention(int layer, const Step& step);
  KeyValues cached(int layer, int head) const;
  template <typename T>
  void store(int layer, int head, int position, const float* key, const float* value);
  uint8_t* cached_latents(int layer) const;

  void mlp_norm(int layer, int tokens);
  void importance(const Step& step, float* of_tokens);
  void shared_expert(int layer, int tokens);
  void run_jobs(std::span<const ExpertJob> jobs, float* out);
  void add_tasks(const ExpertJob& job, const Matrix* matrix, int count, int piece);
  void add_to_residual(const float* out, int tokens);
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
  Arena kv_arena_, scratch_arena_;
  std::vector<Arena> shared_;
  uint8_t *keys_,
      *values_;  // (layers, kv_heads), each as KeyValues; over latents keys_ alone (layers, context, cached)
  Scratch s_;
  std::vector<Task> tasks_;
  std::atomic<bool> kv_overflow_{false};
};

}  // namespace edge_moe
