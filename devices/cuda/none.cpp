// The functions of device.h and every launch in a build without CUDA: open() throws, and no other is ever called.
#include "delta.h"
#include "index.h"
#include "prefill.h"
#include "rows.h"
#include "sparse.h"
#include "streams.h"

namespace edge_moe::cuda {

namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(
      "this build of edge-moe has no code for NVIDIA GPUs; install it again, where CUDA's nvcc is, with "
      "pip install -Ccmake.define.EDGE_MOE_CUDA=ON, or use device cpu");
}

}  // namespace

const char* build() { return "none"; }
Properties open() { refuse(); }
int multiprocessors() { refuse(); }

void* allocate(size_t) { refuse(); }
void* allocate_shared(size_t) { refuse(); }
void release(void*) noexcept {}
void release_shared(void*) noexcept {}
Stream make_stream() { refuse(); }
void release_stream(Stream) noexcept {}
void copy(void*, const void*, size_t, Stream) { refuse(); }
void wait(Stream) { refuse(); }
Event make_event() { refuse(); }
void release_event(Event) noexcept {}
void record(Event, Stream) { refuse(); }
void wait_for(Event) { refuse(); }
void begin_capture(Stream) { refuse(); }
Graph end_capture(Stream) { refuse(); }
void launch(Graph, Stream) { refuse(); }
void release_graph(Graph) noexcept {}
void check_launch() {}

void quantise(const float*, int, const VectorBuffer&, Stream) { refuse(); }
void product(const ProductJob*, int, const VectorBuffer&, Stream) { refuse(); }
void gate_up(const ExpertJob*, int, int, const VectorBuffer&, const VectorBuffer&, const Activation&, Stream) {
  refuse();
}
void down(const ExpertJob*, int, const VectorBuffer&, float*, const RankedSum&, Stream) { refuse(); }
void products(const ProductJob*, int, const VectorBuffer&, Stream) { refuse(); }

void rms_norm(const float*, const float*, float, int, int, float*, const VectorBuffer&, Stream, int) { refuse(); }
void layer_norm(const float*, const float*, const float*, float, int, int, float*, const VectorBuffer&, Stream) {
  refuse();
}
void embed(const Matrix&, const int32_t*, int, float, float*, Stream) { refuse(); }
void float_product(const ProductJob*, int, const float*, Stream) { refuse(); }
void add_bias(float*, const float*, int, int, Stream) { refuse(); }
void activate(const Rows*, int, float*, const float*, int, const Activation&, const VectorBuffer&, Stream) { refuse(); }
void ranked_sum(float*, const float*, const float*, const int32_t*, int, int, int, Stream) { refuse(); }
void add_gated(float*, const float*, const float*, float, int, int, Stream) { refuse(); }
void fill(float*, float, size_t, Stream) { refuse(); }
void scale(float*, float, size_t, Stream) { refuse(); }
void store_keys(const Projections&, const Heads&, const LayerCache&, const Span&, Stream) { refuse(); }
void attend(const float*, const Heads&, const LayerCache&, const Span&, float*, float*, Stream) { refuse(); }
void softmax(const Heads&, size_t, const Span&, const Choice&, float*, Stream) { refuse(); }
void add_received(const float*, const Heads&, size_t, const Span&, float*, size_t, Stream) { refuse(); }
void importance(const float*, const float*, size_t, int, int, int, float*, Stream) { refuse(); }

void store_latents(float*, float*, const float*, const float*, const float*, const LatentHeads&, const LatentCache&,
                   const Span&, Stream) {
  refuse();
}
void attend_latents(const float*, const Matrix&, const LatentHeads&, const LatentCache&, const Span&, const Choice&,
                    float*, float*, float*, Stream) {
  refuse();
}

void store_index_keys(float*, float*, const float*, const float*, const float*, const float*, const IndexHeads&,
                      const IndexCache&, const Span&, Stream) {
  refuse();
}
void index_scores(const float*, const float*, const IndexHeads&, const IndexCache&, const Span&, int, float*, Stream) {
  refuse();
}
void choose_top(const float*, size_t, const Span&, int, int, bool, int32_t*, int32_t*, Stream) { refuse(); }
void store_block_keys(float*, float*, const BlockIndex&, const IndexHeads&, const IndexCache&, const StateBuffers&,
                      const Span&, Stream) {
  refuse();
}
void attend_chosen(const float*, const Heads&, const LayerCache&, const Span&, const Choice&, float*, float*, Stream) {
  refuse();
}

void repeat(const float*, int, int, int, float*, Stream) { refuse(); }
void mix_inputs(float*, int, float*, int, float, int, Stream) { refuse(); }
void mix(const float*, const float*, int, int, int, float, float*, Stream) { refuse(); }
void add_shares(float*, const float*, const float*, float, int, int, int, Stream) { refuse(); }
void gate_ngrams(const float*, const float*, const NGramNorms&, int, int, int, float*, float*, Stream) { refuse(); }
void add_sum(float*, const float*, const float*, size_t, Stream) { refuse(); }

void normed(const float*, float, int, int, float*, Stream) { refuse(); }
void collapse(const float*, const float*, const HyperMix&, int, int, int, float*, float*, Stream) { refuse(); }
void add_mixed(float*, const float*, const float*, float, int, int, int, Stream) { refuse(); }

void store_rows(float*, float*, float*, const RowTables&, const RowHeads&, const RowCache&, const Span&, Stream) {
  refuse();
}
void pool_rows(float*, const float*, const Pool&, const RowTables&, int, bool, const StateBuffers&, const RowCache&,
               const IndexCache&, const Span&, Stream) {
  refuse();
}
void attend_rows(const float*, const float*, const RowTables&, const RowHeads&, int, int, const RowCache&,
                 const RowChoice&, const Span&, float*, float*, float*, Stream) {
  refuse();
}

void convolve(float*, const float*, const Taps&, const StateBuffers&, const Span&, Stream) { refuse(); }
void mamba_outputs(const float*, const float*, const float*, const float*, float, const RecurrentNet&, const Span&,
                   float*, Stream) {
  refuse();
}
void delta_inputs(float*, float*, float*, const float*, const float*, const RecurrentNet&, const Span&, Stream) {
  refuse();
}
void delta_rule(const float*, const float*, const float*, const RecurrentNet&, const StateBuffers&, const Span&, float*,
                Stream) {
  refuse();
}

}  // namespace edge_moe::cuda
