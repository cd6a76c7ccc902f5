// The engine's configuration for Python, and the memory that an engine with it allocates.
#include "bind_config.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "../../devices/python/arrays.h"
#include "engine.h"

using namespace edge_moe;

static void check_attention(const EngineConfig& c, const AttentionConfig& a) {
  expect(a.heads >= 1 && a.conv_kernel >= a.recurrent(), "heads, and conv_kernel of a recurrence, must be at least 1");
  expect(a.rope_dim <= a.head_dim && a.rope_frequency.size() * 2 == size_t(a.rope_dim),
         "rope_frequency must have one value a pair of rope_dim, which is at most head_dim");
  expect(a.rope_span >= a.rope_dim && a.rope_span <= a.head_dim && (a.rope_span == a.rope_dim || !a.kv_rank),
         "rope_span must be from rope_dim to head_dim; with a latent, rope_dim");
  expect(
      !a.shared_rows || (!a.kv_rank && !a.recurrent() && a.kv_heads == 1 && a.v_dim == a.head_dim && a.q_rank &&
                         a.sliding_window >= 1 && a.out_rank >= 1 && a.out_groups >= 1 && a.heads % a.out_groups == 0),
      "shared rows need one KV head, a q_rank, a window, and out_groups that divide heads");
  expect(a.pool_rate >= 0 && (!a.pool_rate || a.shared_rows), "pool_rate must be at least 0, and is of shared rows");
  expect(!a.shared_rows || !a.index_top || (a.index_heads && a.pool_rate && a.index_block == a.pool_rate),
         "index_block of shared rows must be pool_rate, with an indexer");
  expect(a.kv_heads >= 1 && a.heads % a.kv_heads == 0, "heads must be a multiple of kv_heads");
  expect(a.query_context >= 1, "query_context must be at least 1");
  expect(a.index_heads >= 0 && a.index_top >= (a.index_heads > 0) && !(a.index_top && a.recurrent()),
         "index_top must be at least 1 for an indexer, which only attention has");
  expect(
      a.index_block >= 1 &&
          (a.kv_rank ? a.index_block == 1 : a.shared_rows || !a.index_top || (a.index_heads && !a.sliding_window)),
      "index_block must be at least 1; over a latent it is 1, and other attention with index_top needs an indexer of "
      "its own and no window");
  expect(!a.index_heads || ((a.q_rank || !a.kv_rank) && a.index_dim >= a.rope_dim),
         "an indexer needs a q_rank if there is a latent, and an index_dim of at least rope_dim");
  expect(a.query_scales.empty() || a.query_scales.size() > size_t(std::max(c.context - 1, 0) / a.query_context),
         "query_scales must have a value for every position");
}

static void check_ngrams(const EngineConfig& c, const NGramConfig& its) {
  expect(its.layer >= 0 && its.layer < c.layers && its.cols >= 1 && its.conv_kernel >= 1,
         "ngrams need a layer, cols and a convolution");
  expect(c.streams > 1, "ngrams need a residual stream of several streams");
  expect(its.longest() >= 2 && its.sizes.size() + 1 == its.factors.size(),
         "sizes must have one list less than factors");
  for (const auto& hashes : its.sizes)
    for (int64_t size : hashes) expect(size >= 1, "a hash needs at least one row");
}

void check_config(const EngineConfig& c) {
  const size_t layers = c.layers;
  expect(c.threads >= 1, "threads must be at least 1");
  expect(c.sequences >= 1, "sequences must be at least 1");
  expect(c.snapshots >= 0, "snapshots must be at least 0");
  expect(c.experts.size() == layers && c.top_k.size() == layers, "experts and top_k must have one value a layer");
  for (size_t i = 0; i < layers; ++i)
    expect(c.top_k[i] <= c.experts[i] && c.top_k[i] >= (c.experts[i] > 0), "top_k must be 1 to a layer's experts");
  expect(c.attention_of.size() == layers && c.dense.size() == layers,
         "attention_of and dense must have one value a layer");
  for (int kind : c.attention_of)
    expect(kind == -1 || size_t(kind) < c.attentions.size(), "attention_of must be numbers of attentions, or -1");
  for (const AttentionConfig& a : c.attentions) check_attention(c, a);
  expect(c.streams >= 1 && c.mix_rank >= 0 && c.mix_iterations >= 0 &&
             (c.mix_rank > 0) + (c.mix_iterations > 0) == (c.streams > 1),
         "several streams need a mix_rank or mix_iterations, and one stream neither");
  expect(c.streams <= 16, "streams must be at most 16");
  expect(c.hashed.size() == layers, "hashed must have one value a layer");
  for (const NGramConfig& its : c.ngrams) check_ngrams(c, its);
  expect(c.top_groups >= 1 && c.top_groups <= c.groups, "top_groups must be 1 to groups");
  if (c.groups == 1) return;
  expect(c.expert_groups.size() == layers, "expert_groups must have one list a layer");
  for (size_t i = 0; i < layers; ++i) {
    expect(c.expert_groups[i].size() == size_t(c.experts[i]), "expert_groups must have one value an expert");
    for (int group : c.expert_groups[i])
      expect(group >= 0 && group < c.groups, "an expert's group is not one of groups");
  }
}

void bind_config(nb::module_& m) {
  nb::enum_<Recurrence>(m, "Recurrence", "What a layer has in place of attention; see engine_config.h.")
      .value("none", Recurrence::kNone)
      .value("delta_net", Recurrence::kDeltaNet)
      .value("short_conv", Recurrence::kShortConv)
      .value("mamba", Recurrence::kMamba);

  nb::class_<AttentionConfig>(m, "AttentionConfig", "One kind of attention; see engine_config.h.")
      .def(nb::init<>())
      .def_rw("heads", &AttentionConfig::heads)
      .def_rw("kv_heads", &AttentionConfig::kv_heads)
      .def_rw("head_dim", &AttentionConfig::head_dim)
      .def_rw("v_dim", &AttentionConfig::v_dim)
      .def_rw("rope_dim", &AttentionConfig::rope_dim)
      .def_rw("rope_span", &AttentionConfig::rope_span)
      .def_rw("rope_frequency", &AttentionConfig::rope_frequency)
      .def_rw("rope_scale", &AttentionConfig::rope_scale)
      .def_rw("rope_interleaved", &AttentionConfig::rope_interleaved)
      .def_rw("softmax_scale", &AttentionConfig::softmax_scale)
      .def_rw("qk_norm_full", &AttentionConfig::qk_norm_full)
      .def_rw("norm_after_rope", &AttentionConfig::norm_after_rope)
      .def_rw("keys_as_values", &AttentionConfig::keys_as_values)
      .def_rw("v_norm", &AttentionConfig::v_norm)
      .def_rw("qkv_clip", &AttentionConfig::qkv_clip)
      .def_rw("sliding_window", &AttentionConfig::sliding_window)
      .def_rw("kv_rank", &AttentionConfig::kv_rank)
      .def_rw("q_rank", &AttentionConfig::q_rank)
      .def_rw("latent_norm_eps", &AttentionConfig::latent_norm_eps)
      .def_rw("query_scales", &AttentionConfig::query_scales)
      .def_rw("query_context", &AttentionConfig::query_context)
      .def_rw("shared_rows", &AttentionConfig::shared_rows)
      .def_rw("pool_rate", &AttentionConfig::pool_rate)
      .def_rw("pool_overlaps", &AttentionConfig::pool_overlaps)
      .def_rw("out_groups", &AttentionConfig::out_groups)
      .def_rw("out_rank", &AttentionConfig::out_rank)
      .def_rw("index_top", &AttentionConfig::index_top)
      .def_rw("index_block", &AttentionConfig::index_block)
      .def_rw("index_heads", &AttentionConfig::index_heads)
      .def_rw("index_dim", &AttentionConfig::index_dim)
      .def_rw("index_interleaved", &AttentionConfig::index_interleaved)
      .def_rw("index_norm_eps", &AttentionConfig::index_norm_eps)
      .def_rw("index_scale", &AttentionConfig::index_scale)
      .def_rw("output_gate", &AttentionConfig::output_gate)
      .def_rw("recurrence", &AttentionConfig::recurrence)
      .def_rw("conv_kernel", &AttentionConfig::conv_kernel)
      .def_rw("least_step", &AttentionConfig::least_step)
      .def_rw("gate", &AttentionConfig::gate);

  nb::class_<NGramConfig>(m, "NGramConfig", "The embeddings of n-grams of a layer; see engine_config.h.")
      .def(nb::init<>())
      .def_rw("layer", &NGramConfig::layer)
      .def_rw("factors", &NGramConfig::factors)
      .def_rw("sizes", &NGramConfig::sizes)
      .def_rw("cols", &NGramConfig::cols)
      .def_rw("end", &NGramConfig::end)
      .def_rw("conv_kernel", &NGramConfig::conv_kernel);

  nb::enum_<RouterScore>(m, "RouterScore", "How router logits become routing weights; see router.h.")
      .value("softmax", RouterScore::kSoftmax)
      .value("sigmoid", RouterScore::kSigmoid)
      .value("sqrtsoftplus", RouterScore::kSqrtSoftplus)
      .value("sparsemixer", RouterScore::kSparsemixer);

  nb::class_<EngineConfig>(m, "EngineConfig",
                           "The shapes and rules of a model, and the sizes of one run; see engine_config.h.")
      .def(nb::init<>())
      .def_rw("layers", &EngineConfig::layers)
      .def_rw("dim", &EngineConfig::dim)
      .def_rw("vocab", &EngineConfig::vocab)
      .def_rw("attentions", &EngineConfig::attentions)
      .def_rw("attention_of", &EngineConfig::attention_of)
      .def_rw("ngrams", &EngineConfig::ngrams)
      .def_rw("streams", &EngineConfig::streams)
      .def_rw("mix_rank", &EngineConfig::mix_rank)
      .def_rw("mix_iterations", &EngineConfig::mix_iterations)
      .def_rw("mix_eps", &EngineConfig::mix_eps)
      .def_rw("hashed", &EngineConfig::hashed)
      .def_rw("experts", &EngineConfig::experts)
      .def_rw("top_k", &EngineConfig::top_k)
      .def_rw("expert_hidden", &EngineConfig::expert_hidden)
      .def_prop_rw(
          "activation",
          [](const EngineConfig& c) {
            return std::tuple(c.activation.gate, c.activation.alpha, c.activation.limit, c.activation.shift);
          },
          [](EngineConfig& c, const std::tuple<Gate, float, float, float>& its) {
            c.activation = {std::get<0>(its), std::get<1>(its), std::get<2>(its), std::get<3>(its)};
          })
      .def_rw("layer_norm", &EngineConfig::layer_norm)
      .def_rw("post_norms", &EngineConfig::post_norms)
      .def_rw("own_norms", &EngineConfig::own_norms)
      .def_rw("layer_scale", &EngineConfig::layer_scale)
      .def_rw("norm_eps", &EngineConfig::norm_eps)
      .def_rw("embedding_scale", &EngineConfig::embedding_scale)
      .def_rw("residual_scale", &EngineConfig::residual_scale)
      .def_rw("logits_scale", &EngineConfig::logits_scale)
      .def_rw("logits_cap", &EngineConfig::logits_cap)
      .def_rw("shared_hidden", &EngineConfig::shared_hidden)
      .def_rw("dense", &EngineConfig::dense)
      .def_rw("router_score", &EngineConfig::router_score)
      .def_rw("router_threshold", &EngineConfig::router_threshold)
      .def_rw("renormalise", &EngineConfig::renormalise)
      .def_rw("group_top2sum", &EngineConfig::group_top2sum)
      .def_rw("router_logits_scale", &EngineConfig::router_logits_scale)
      .def_rw("router_sum_eps", &EngineConfig::router_sum_eps)
      .def_rw("routing_scale", &EngineConfig::routing_scale)
      .def_rw("groups", &EngineConfig::groups)
      .def_rw("top_groups", &EngineConfig::top_groups)
      .def_rw("expert_groups", &EngineConfig::expert_groups)
      .def_rw("sequences", &EngineConfig::sequences)
      .def_rw("snapshots", &EngineConfig::snapshots)
      .def_rw("context", &EngineConfig::context)
      .def_rw("half_cache", &EngineConfig::half_cache)
      .def_rw("chunk", &EngineConfig::chunk)
      .def_rw("logits_rows", &EngineConfig::logits_rows)
      .def_rw("threads", &EngineConfig::threads)
      .def_rw("spin", &EngineConfig::spin);

  m.def(
      "engine_memory",
      [](const EngineConfig& config, const std::string& device) {
        check_config(config);
        EngineMemory memory = engine_memory(config, device == "cuda");
        return std::make_tuple(memory.kv_cache, memory.states, memory.scratch);
      },
      nb::arg("config"), nb::arg("device") = "cpu",
      "Bytes that an Engine of this configuration allocates: (kv_cache, states, scratch).");
}
