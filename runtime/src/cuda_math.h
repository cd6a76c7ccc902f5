// The layers on an NVIDIA GPU, computed with the kernels of devices/cuda. The host routes and queues work in one
// stream; it waits only for the results that it has to read.
#pragma once

#include <vector>

#include "../../devices/cuda/delta.h"
#include "../../devices/cuda/index.h"
#include "../../devices/cuda/rows.h"
#include "../../devices/cuda/sparse.h"
#include "../../devices/cuda/streams.h"
#include "cuda_memory.h"
#include "cuda_scratch.h"
#include "layer_math.h"
#include "layer_weights.h"

namespace edge_moe {

EngineMemory cuda_memory(const EngineConfig& config);

// The first GPU. host: the processor's kernels, for routing. graphs: launch the parts of a decode step that do not
// depend on paging as CUDA graphs. Throws std::runtime_error where there is no GPU, or this build has no code for one.
std::unique_ptr<Device> cuda_device(const Kernels& host, bool graphs);

class CudaMath : public LayerMath {
 public:
  CudaMath(const EngineConfig& config, const Trunk& trunk, CudaMemory& memory, bool graphs);
  ~CudaMath() override;

  uint8_t* shared(size_t bytes) override;
  void begin(const Step& step, std::span<const int32_t> ids) override;
  void ngrams(int layer, const Step& step, const float* rows) override;
  void dense_layer(int layer, const Step& step) override;
  void to_router(int layer, const Step& step, const RouterWants& wants, const Routing& r) override;
  void ahead_logits(int, const Routing&) override {}  // to_router() has computed them
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
  void finish() override;
  bool asynchronous() const override { return true; }

 private:
  // A captured graph of one layer and sequence, and the request that it was captured for.
  struct LayerGraph {
    cuda::Graph graph = nullptr;
    const Matrix* mask_routers[2] = {};
    int ahead = 0;
    int most = -1;  // upper bound of the positions that it serves
  };

  void copy_angles(const AttentionConfig& attention, size_t kind);
  void up_to_router(int layer, const Step& step, const RouterWants& wants, const Routing& r, int most = -1);
  void launch_graph(int layer, const Step& step, const RouterWants& wants, const Routing& r);
  void attention(int layer, const Step& step, bool received, int most = -1);
  void project(int layer, int tokens);
  void store_keys(int layer, int sequence, size_t number, const cuda::Span& span);
  void latent_project(int layer, int tokens);
  void recurrence(int layer, const Step& step);
  void attend_latents(int layer, int sequence, const cuda::Span& span);
  void choose_positions(int layer, int sequence, const cuda::Span& span);
  void attention_output(int layer, int tokens, float* attended);
  void row_attention(int layer, const Step& step, int most);
  void row_projections(int layer, int tokens);
  cuda::RowHeads row_heads(int layer) const;
  cuda::RowCache row_cache(int sequence, int layer) const;
  void norm(const Norm& norm, const float* x, int tokens, float* y, const cuda::VectorBuffer& into);
  void mlp_norm(const Norm& norm, int tokens);
  void block_input(const Norm& norm, const Mix& mix, int tokens);
  void mixed(const Norm& norm, const Mix& mix, int first, int count, float* shares, float* y,
             const cuda::VectorBuffer& into);
  void collapsed(const Norm& norm, const Mix& mix, int first, int count, float* shares, float* y,
                 const cuda::VectorBuffer& into);
  void add_to_streams(const float* out, float factor, int tokens);
  void add_to_residual(const Norm& post_norm, float* out, int tokens);
  void scale_residual(int layer, int tokens);
  void finish_sum(int layer, int tokens);
  void mlp(const ExpertWeights& weights, int tokens, float* out);
  void chosen_experts(std::span<const ExpertJob> jobs, const Routing& r, int places);
  void many_tokens(std::span<const ExpertJob> jobs, const Routing& r, int pairs);
  void copy_routing(int pairs, const Routing& r);
  void multiply(std::span<const cuda::ProductJob> jobs, const float* values, const cuda::VectorBuffer& quantised);
  void multiply(const Matrix& matrix, int tokens, float* y, const float* values, const cuda::VectorBuffer& quantised);
  Choice choice(const AttentionConfig& attention) const;
  cuda::StateBuffers state_buffers(int layer, size_t span) const;
  cuda::Heads heads(int layer) const;
  cuda::LatentHeads latent_heads(int layer) const;
  cuda::LayerCache cache(int sequence, int layer) const;
  cuda::LatentCache latent_cache(int sequence, int layer) const;
  cuda::IndexHeads index_heads(int layer) const;
  cuda::IndexCache index_cache(int sequence, int layer) const;

  const EngineConfig& config_;
  CudaMemory& memory_;
  const bool use_graphs_;
  EndWeights ends_;
  std::vector<LayerWeights> layers_;
  const std::vector<size_t> kv_offsets_;      // of each layer in a sequence's part of the cache, and its end
  const std::vector<size_t> state_offsets_;   // of each layer in a state buffer, and its end
  const std::vector<size_t> window_offsets_;  // of each layer in a snapshot of windows, and its end
  CudaScratch s_;
  CudaShared host_;
  CudaBlock kv_cache_, states_, windows_, scratch_, shared_block_;
  std::vector<CudaBlock> shared_;  // given out by shared()
  CudaStream stream_;
  cuda::Event routed_;
  std::vector<LayerGraph> graphs_;  // by sequence and layer
  bool copied_ = false;             // has copy_routing() been called for this layer?
  std::vector<cuda::ProductJob> packed_, floats_, products_;
  std::vector<cuda::ExpertJob> chosen_;
  std::vector<cuda::Rows> rows_;
};

}  // namespace edge_moe
