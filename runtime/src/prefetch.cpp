// Reading ahead: which experts the next layer will want, by its router on this layer's input, as the residual stream
// changes little from one layer to the next. It is advice to the readers and can never change a result.
#include "engine.h"

namespace edge_moe {

void Engine::prefetch_next(int layer) {
  const EngineConfig& c = config_;
  const int next = layer + 1;
  if (next == c.layers || !c.experts[next]) return;
  const LayerWeights& w = layers_[next];
  kernels_.rms_norm(s_.x, w.mlp_norm, c.norm_eps, s_.ahead_normed, c.dim);
  Activations x;
  x.values = s_.ahead_normed, x.count = 1, x.cols = c.dim;
  matmul(w.router, x, s_.ahead_logits);
  route(kernels_, router_rule(next), s_.ahead_logits, c.experts[next], c.top_k[next], s_.group_scores, s_.ahead_ids,
        s_.ahead_weights);
  for (int i = 0; i < c.top_k[next]; ++i) s_.ahead_ids[i] += first_record_[next];
  cache_.read_ahead({s_.ahead_ids, size_t(c.top_k[next])});
}

}  // namespace edge_moe
