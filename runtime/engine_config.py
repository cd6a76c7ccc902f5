"""What the core has to know of a model and of a run: its EngineConfig, and the memory that an engine with it takes."""

from .. import _core
from .config import Mixer, ModelConfig, Recurrent
from .layers.compressed import CompressedAttention
from .layers.delta_net import DeltaNet
from .layers.hyper import HyperConnections
from .layers.latent import LatentAttention
from .layers.mamba import Mamba
from .layers.ngrams import NGrams
from .mlx.memory import engine_memory as mlx_memory

KV_TYPES = ("float16", "float32")  # of the KV cache; the first is the default


def engine_config(
    config: ModelConfig,
    context: int,
    chunk: int,
    logits_rows: int = 1,
    threads: int = 1,
    kv: str = KV_TYPES[0],
    sequences: int = 1,
    snapshots: int = 0,
) -> _core.EngineConfig:
    """Convert a model's configuration and the sizes of a run to the core's EngineConfig."""
    if kv not in KV_TYPES:
        raise ValueError(f"kv is {kv!r}, expected one of {', '.join(KV_TYPES)}")
    c, router = _core.EngineConfig(), config.router
    for name in (
        *("dim", "vocab", "expert_hidden", "norm_eps", "shared_hidden"),
        *("embedding_scale", "residual_scale", "logits_scale", "logits_cap", "routing_scale"),
        *("post_norms", "own_norms", "layer_scale"),
    ):
        setattr(c, name, getattr(config, name))
    kinds, mixers = config.attentions, [layer.attention for layer in config.layers]
    c.layers, c.dense = config.layer_count, config.dense_hidden
    c.attention_of = [kinds.index(mixer) if mixer else -1 for mixer in mixers]
    c.attentions = [attention_config(kind, context, config.norm_eps) for kind in kinds]
    c.ngrams = [ngram_config(at, its.ngrams) for at, its in enumerate(config.layers) if its.ngrams]
    if streams := config.streams:
        c.streams = streams.count
        if isinstance(streams, HyperConnections):
            c.mix_iterations, c.mix_eps = streams.iterations, streams.eps
        else:
            c.mix_rank = streams.rank
    activation = config.swiglu_alpha, config.swiglu_limit, config.swiglu_shift
    c.activation = getattr(_core.Gate, config.activation), *activation
    c.hashed = [config.top_k if config.is_hashed(layer) else 0 for layer in range(config.layer_count)]
    c.experts = [config.experts_of(layer) for layer in range(config.layer_count)]
    c.top_k = [config.top_k_of(layer) for layer in range(config.layer_count)]
    c.layer_norm = {"rms": False, "layer": True}[config.norm]
    c.router_score, c.router_threshold = getattr(_core.RouterScore, router.score), router.threshold
    c.group_top2sum = {"max": False, "top2sum": True}[router.group_score]
    c.renormalise, c.router_sum_eps = router.renormalise, router.sum_eps
    c.router_logits_scale = router.logits_scale
    c.groups, c.top_groups = router.groups, router.top_groups
    if router.groups > 1:
        c.expert_groups = [config.groups_of(layer) for layer in range(config.layer_count)]
    c.context, c.chunk, c.logits_rows, c.threads = context, chunk, logits_rows, threads
    c.half_cache, c.sequences, c.snapshots = kv == "float16", sequences, snapshots
    return c


def attention_config(attention: Mixer, context: int, norm_eps: float) -> _core.AttentionConfig:
    """Convert one kind of attention, over `context` positions, to the core's AttentionConfig."""
    a = _core.AttentionConfig()
    a.heads, a.kv_heads, a.head_dim, a.v_dim = (
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        attention.value_dim,
    )
    if isinstance(attention, Recurrent):
        a.recurrence, a.conv_kernel = getattr(_core.Recurrence, attention.recurrence), attention.conv_kernel
        a.least_step = attention.least_step if isinstance(attention, Mamba) else 0
        if isinstance(attention, DeltaNet):
            a.gate = getattr(_core.Gate, attention.gate)
        return a
    rope = attention.rope.planned(context)
    a.rope_dim, a.rope_frequency, a.rope_scale = rope.dim, rope.frequency().tolist(), rope.scale
    a.rope_span, a.rope_interleaved, a.softmax_scale = rope.span, rope.interleaved, attention.softmax_scale
    if isinstance(attention, CompressedAttention):
        a.shared_rows, a.q_rank, a.sliding_window = True, attention.q_rank, attention.window
        a.pool_rate, a.pool_overlaps = attention.rate, attention.overlapped
        a.out_groups, a.out_rank = attention.groups, attention.group_rank
        index = attention.index
        if index and index.top < context // attention.rate:  # else a query sees no more rows than it may choose
            a.index_top, a.index_block, a.index_scale = index.top, attention.rate, index.scale
            a.index_heads, a.index_dim = index.heads, index.dim
    elif isinstance(attention, LatentAttention):
        a.q_rank, a.kv_rank, a.latent_norm_eps = attention.q_rank, attention.kv_rank, attention.norm_eps
        if 0 < attention.top < context:  # in a shorter context a query sees no more positions than it may choose
            a.index_top = attention.top
            if indexer := attention.indexer:
                a.index_heads, a.index_dim, a.index_scale = indexer.heads, indexer.dim, indexer.scale
                a.index_interleaved, a.index_norm_eps = indexer.rope.interleaved, indexer.norm_eps
        if attention.query_growth:
            a.query_context = attention.query_context
            a.query_scales = attention.query_scales(context)[:: a.query_context].tolist()
    else:
        a.qk_norm_full, a.norm_after_rope = attention.qk_norm == "full", attention.norm_after_rope
        a.qkv_clip, a.sliding_window, a.output_gate = attention.clip, attention.window, attention.output_gate
        a.keys_as_values, a.v_norm = attention.keys_as_values, attention.v_norm
        index = attention.index
        if index and index.blocks < context // index.block:  # else a query sees no more blocks than it may choose
            a.index_top, a.index_block, a.index_heads, a.index_dim = (
                index.blocks,
                index.block,
                index.heads,
                index.head_dim,
            )
            a.index_norm_eps, a.index_scale = norm_eps, index.scale
    return a


def ngram_config(layer: int, ngrams: NGrams) -> _core.NGramConfig:
    """Convert the embeddings of n-grams of a layer to the core's NGramConfig."""
    its = _core.NGramConfig()
    its.layer, its.factors, its.sizes = layer, list(ngrams.factors), [list(sizes) for sizes in ngrams.sizes]
    its.cols, its.end, its.conv_kernel = ngrams.cols, ngrams.end, ngrams.conv_kernel
    return its


def engine_memory(
    config: ModelConfig,
    context: int,
    chunk: int,
    device: str = "cpu",
    slot_bytes: int = 0,
    **sizes,
) -> tuple[int, int, int]:
    """Bytes of the KV cache, recurrent states and scratch memory. slot_bytes: of the largest record. sizes: further
    arguments of engine_config()."""
    if device == "mlx":
        return mlx_memory(config, context, chunk, slot_bytes=slot_bytes, **sizes)
    return _core.engine_memory(engine_config(config, context, chunk, **sizes), device)
