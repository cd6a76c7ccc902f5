// A layer's part of the trunk, by name; see layer_weights.h.
#include "layer_weights.h"

#include <string>

namespace edge_moe {

namespace {

Norm norm(const EngineConfig& c, const Trunk& trunk, const std::string& name) {
  const size_t size = c.hyper() ? c.dim : c.width();  // gates take normed streams
  return {trunk.vector(name, int(size)), c.layer_norm ? trunk.vector(name + "_bias", c.dim) : nullptr};
}

Mix mix(const EngineConfig& c, const Trunk& trunk, const std::string& name) {
  if (c.streams == 1) return {};
  if (!c.hyper())
    return {trunk.matrix(name + ".down"), trunk.matrix(name + ".up"), trunk.matrix_if_any(name + ".share")};
  Mix its{};
  its.weights = trunk.matrix(name + ".weights");
  const bool before_head = its.weights.rows == c.streams;
  its.base = trunk.vector(name + ".base", its.weights.rows);
  its.scale = trunk.vector(name + ".scale", before_head ? 1 : 3);
  return its;
}

NGramWeights ngram_weights(const EngineConfig& c, const Trunk& trunk, const std::string& prefix,
                           const NGramConfig& its) {
  const auto vector = [&](const char* name, int rows) {
    return trunk.vector(prefix + "ngrams." + name, rows * int(c.width()));
  };
  return {trunk.matrix(prefix + "ngrams.key"),
          trunk.matrix(prefix + "ngrams.value"),
          vector("key_norm", 1),
          vector("query_norm", 1),
          vector("conv_norm", 1),
          vector("conv", its.conv_kernel)};
}

// name: of its tensors, "pool" or "index"; norm: of the vector.
PoolWeights pool_weights(const Trunk& trunk, const std::string& name, const char* norm, int rate, int dim) {
  PoolWeights w{trunk.matrix(name + ".kv"), trunk.matrix(name + ".gate")};
  w.bias = trunk.vector(name + ".bias", rate * w.values.rows), w.norm = trunk.vector(name + norm, dim);
  return w;
}

// The name of a layer's output projection.
const char* output_of(const AttentionConfig& a) {
  switch (a.recurrence) {
    case Recurrence::kDeltaNet:
      return "delta.o";
    case Recurrence::kShortConv:
      return "conv.o";
    case Recurrence::kMamba:
      return "mamba.o";
    case Recurrence::kNone:
      return "o";
  }
  return "";
}

}  // namespace

LayerWeights layer_weights(const EngineConfig& c, const Trunk& trunk, int layer) {
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  auto matrix = [&](const char* name) { return trunk.matrix(prefix + name); };
  auto vector = [&](const char* name, int n) { return trunk.vector_if_any(prefix + name, n); };
  const AttentionConfig& a = c.attention(layer);
  const int q_dim = a.q_dim(), kv_dim = a.kv_dim();
  const bool has_attention = c.has_attention(layer), has_mlp = c.experts[layer] || c.dense[layer];
  LayerWeights w{};
  if (has_attention) w.attention_norm = norm(c, trunk, prefix + "attention_norm");
  if (has_mlp) w.mlp_norm = norm(c, trunk, prefix + "mlp_norm");
  if (has_attention) w.attention_mix = mix(c, trunk, prefix + "attention_mix");
  if (has_mlp) w.mlp_mix = mix(c, trunk, prefix + "mlp_mix");
  if (const NGramConfig* its = c.ngrams_of(layer)) w.ngrams = ngram_weights(c, trunk, prefix, *its);
  const auto rms_norm = [&](bool present, const char* name) {
    return Norm{present ? trunk.vector(prefix + name, c.dim) : nullptr, nullptr};
  };
  w.attention_post_norm = rms_norm(c.post_norms && has_attention, "attention_post_norm");
  w.mlp_post_norm = rms_norm(c.post_norms && has_mlp, "mlp_post_norm");
  w.layer_scale = c.layer_scale ? trunk.number(prefix + "layer_scale") : 1.0f;
  if (has_attention) w.o = matrix(output_of(a)), w.o.output_bias = vector("o_bias", c.dim);
  if (a.kv_rank) {
    w.kv_a = matrix("kv_a"), w.kv_b = matrix("kv_b");
    w.kv_a_norm = trunk.vector(prefix + "kv_a_norm", a.kv_rank);
    w.q = matrix(a.q_rank ? "q_b" : "q");
    if (a.q_rank) w.q_a = matrix("q_a"), w.q_a_norm = trunk.vector(prefix + "q_a_norm", a.q_rank);
    if (a.index_heads)
      w.index = {matrix("index.q"),
                 matrix("index.k"),
                 matrix("index.weights"),
                 nullptr,
                 trunk.vector(prefix + "index.k_norm", a.index_dim),
                 trunk.vector(prefix + "index.k_norm_bias", a.index_dim)};
  } else if (a.shared_rows) {
    w.q_a = matrix("q_a"), w.q_a_norm = trunk.vector(prefix + "q_a_norm", a.q_rank), w.q = matrix("q_b");
    w.kv_a = matrix("kv"), w.kv_a_norm = trunk.vector(prefix + "kv_norm", a.head_dim);
    w.sinks = trunk.vector(prefix + "sinks", a.heads), w.o_a = matrix("o_a");
    if (a.pool_rate) w.pool = pool_weights(trunk, prefix + "pool", ".norm", a.pool_rate, a.head_dim);
    if (a.index_heads) {
      w.index.q = matrix("index.q"), w.index.weights = matrix("index.weights");
      w.index.pool = pool_weights(trunk, prefix + "index", ".k_norm", a.pool_rate, a.index_dim);
    }
  } else if (a.recurrence == Recurrence::kShortConv) {
    w.qkv = matrix("conv.in"), w.write = matrix("conv.write"), w.o_gate = matrix("conv.gate");
    w.conv = trunk.vector(prefix + "conv.weights", a.conv_kernel * a.conv_channels());
  } else if (a.recurrence == Recurrence::kMamba) {
    w.qkv = matrix("mamba.xbc"), w.o_gate = matrix("mamba.gate"), w.decay = matrix("mamba.step");
    w.conv = trunk.vector(prefix + "mamba.conv", a.conv_kernel * a.conv_channels());
    w.conv_bias = vector("mamba.conv_bias", a.conv_channels());
    w.decay_bias = trunk.vector(prefix + "mamba.step_bias", a.heads);
    w.decay_rate = trunk.vector(prefix + "mamba.decay_rate", a.heads);
    w.skip = trunk.vector(prefix + "mamba.skip", a.heads);
    w.o_norm = trunk.vector(prefix + "mamba.norm", a.heads * a.v_dim);
  } else if (a.recurrence == Recurrence::kDeltaNet) {
    w.qkv = matrix("delta.qkv"), w.o_gate = matrix("delta.gate");
    w.write = matrix("delta.write"), w.decay = matrix("delta.decay");
    w.conv = trunk.vector(prefix + "delta.conv", a.conv_kernel * a.conv_channels());
    w.decay_bias = trunk.vector(prefix + "delta.decay_bias", a.heads);
    w.decay_rate = trunk.vector(prefix + "delta.decay_rate", a.heads);
    w.o_norm = trunk.vector(prefix + "delta.norm", a.v_dim);
  } else if (has_attention) {
    w.q = matrix("q"), w.k = matrix("k");
    if (!a.keys_as_values) w.v = matrix("v");
    if (a.output_gate) w.o_gate = matrix("o_gate");
    w.q_bias = vector("q_bias", q_dim), w.k_bias = vector("k_bias", kv_dim);
    w.v_bias = a.keys_as_values ? w.k_bias : vector("v_bias", kv_dim);
    w.q_norm = vector("q_norm", a.qk_norm_full ? q_dim : a.head_dim);
    w.k_norm = vector("k_norm", a.qk_norm_full ? kv_dim : a.head_dim);
    w.sinks = vector("sinks", a.heads);
    if (a.index_heads) {
      w.index.q = matrix("index.q"), w.index.k = matrix("index.k");
      w.index.q_norm = trunk.vector(prefix + "index.q_norm", a.index_dim);
      w.index.k_norm = trunk.vector(prefix + "index.k_norm", a.index_dim);
    }
  }
  // An MLP without a gate has an empty matrix in its place.
  const auto mlp = [&](const std::string& name) {
    return ExpertWeights{trunk.matrix_if_any(prefix + name + ".gate"), trunk.matrix(prefix + name + ".up"),
                         trunk.matrix(prefix + name + ".down")};
  };
  if (c.dense[layer]) w.dense = mlp("dense");
  if (!c.experts[layer]) return w;
  w.router = matrix("router"), w.router.output_bias = vector("router_logit_bias", c.experts[layer]);
  w.router_norm = rms_norm(c.own_norms, "router_norm");
  w.experts_post_norm = rms_norm(c.own_norms, "experts_post_norm");
  w.shared_norm = rms_norm(c.own_norms && c.shared_hidden, "shared_norm");
  w.shared_post_norm = rms_norm(c.own_norms && c.shared_hidden, "shared_post_norm");
  w.router_bias = vector("router_bias", c.experts[layer]);
  if (c.shared_hidden) w.shared = mlp("shared");
  w.shared_router = trunk.matrix_if_any(prefix + "shared_router");
  return w;
}

EndWeights end_weights(const EngineConfig& c, const Trunk& trunk) {
  EndWeights w{trunk.matrix("embedding"), trunk.matrix_if_any("head"), norm(c, trunk, "output_norm"),
               mix(c, trunk, "output_mix")};
  if (!w.head) w.head = w.embedding;
  w.head.output_bias = trunk.vector_if_any("head_bias", c.vocab);
  return w;
}

Matrix rows_of(const Matrix& m, int first, int count) {
  Matrix rows = m;
  rows.rows = count;
  rows.codes += codes_bytes(first, m.cols, m.width);
  const CodecTraits& codec = traits(m.codec);
  const auto moved = [&](const uint16_t* of_groups) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(of_groups);
    return reinterpret_cast<const uint16_t*>(bytes + size_t(first) * (m.cols / m.group) * codec.scale_bytes);
  };
  if (codec.parts > kScales) rows.scales = moved(m.scales);
  if (codec.parts > kBiases) rows.biases = moved(m.biases);
  if (m.output_bias) rows.output_bias += first;
  return rows;
}

}  // namespace edge_moe
