"""The memory that the mlx device takes, which is planned before MLX is imported."""

import math

from ..bundle_records import TrunkTensor
from ..config import Mixer, ModelConfig, Recurrent
from ..layers.attention import SCORES
from ..layers.compressed import CompressedAttention
from ..layers.indexer import SCORES as INDEX_SCORES
from ..layers.latent import LatentAttention
from ..layers.short_conv import ShortConv

MOST_WIRED = 0.65  # of a Mac's memory: more has made systems stop
VALUE_BYTES = {"float16": 2, "float32": 4}
CACHE_PART = 4  # MLX keeps at most a quarter of the scratch memory that it has freed
MESSAGE_COPIES = 5  # of MLX, of NumPy, and of Python before and after it is put together
LEAST_SCRATCH = 8_000_000  # of graphs, constants and small arrays


def kept_of(attention: Mixer | None, context: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what a layer caches of `context` tokens, by name."""
    return {} if attention is None or isinstance(attention, Recurrent) else attention.kept(context)


def cached_values(attention: Mixer | None, context: int) -> int:
    """How many values a layer caches of `context` tokens."""
    return sum(math.prod(shape) for shape in kept_of(attention, context).values())


def state_values(config: ModelConfig, layer: int) -> int:
    """How many values a layer's recurrent state has."""
    its, ngrams = config.layers[layer].attention, config.layers[layer].ngrams
    values = ngrams.past * config.width if ngrams else 0
    if isinstance(its, ShortConv):
        return values + (its.conv_kernel - 1) * its.value_dim
    if isinstance(its, Recurrent):
        values += its.heads * its.head_dim * its.value_dim + (its.conv_kernel - 1) * its.channels
    if isinstance(its, CompressedAttention) and its.rate:
        widths = its.head_dim + (its.index.dim if its.index else 0)
        values += its.tokens_before * 2 * (1 + its.overlapped) * widths
    return values


def engine_memory(
    config: ModelConfig,
    context: int,
    chunk: int,
    *,
    logits_rows: int = 1,
    kv: str = "float16",
    sequences: int = 1,
    snapshots: int = 0,
    slot_bytes: int = 0,
    ranks: int = 1,
    **_: object,
) -> tuple[int, int, int]:
    """Bytes of the KV cache, recurrent states and scratch memory. slot_bytes: of the largest record. ranks: processes
    that run the model together."""
    cached = sum(cached_values(layer.attention, context) for layer in config.layers)
    kv_cache = sequences * cached * VALUE_BYTES[kv]
    states = 4 * (2 * sequences + snapshots) * sum(state_values(config, at) for at in range(config.layer_count))
    scratch = _scratch(config, context, chunk, logits_rows, slot_bytes)
    return kv_cache, states, scratch + (_message_bytes(config, context, chunk, logits_rows) if ranks > 1 else 0)


def _message_bytes(config: ModelConfig, context: int, chunk: int, logits_rows: int) -> int:
    """Bytes of the streams, chosen positions and logits that go from rank to rank, with their copies on the way."""
    sent = 4 * chunk * config.width + chunk * context * config.chooses_positions
    return MESSAGE_COPIES * max(sent, 4 * logits_rows * config.vocab)


def _scratch(config: ModelConfig, context: int, chunk: int, logits_rows: int, slot_bytes: int) -> int:
    """Bytes of what a step holds at once: the streams, and the most of attention, experts, another MLP and logits."""
    dim, inner = config.dim, max(config.shared_hidden, *config.dense_hidden)
    attention = max(_attention_values(layer.attention, config.dim, context, chunk) for layer in config.layers)
    rows = chunk * (config.top_k * (3 * dim + config.expert_hidden) + 4 * config.expert_hidden)
    experts = 4 * rows + 4 * config.top_k * slot_bytes
    streams = 4 * chunk * 8 * (config.width + dim)
    logits = 4 * logits_rows * config.vocab * 3
    ngrams = max((4 * chunk * 6 * (its.ngrams.inputs + config.width) for its in config.layers if its.ngrams), default=0)
    most = max(4 * attention, experts, 4 * chunk * (4 * inner + dim), logits, ngrams)
    return (LEAST_SCRATCH + streams + most) * CACHE_PART // (CACHE_PART - 1)


def _attention_values(its: Mixer | None, dim: int, context: int, chunk: int) -> int:
    """About how many values attention holds at once."""
    if its is None:
        return 0
    if isinstance(its, Recurrent):
        states = its.heads * its.head_dim * its.value_dim
        return chunk * (6 * dim + 8 * (getattr(its, "channels", dim) + its.heads * its.value_dim)) + 4 * states
    heads = its.heads * (its.kv_rank + its.rope.dim if isinstance(its, LatentAttention) else its.head_dim)
    cached = cached_values(its, context)
    rows = chunk * (8 * heads + 4 * -(-cached // context))
    index = getattr(its, "indexer", None) or getattr(its, "index", None)
    of_index = 4 * min(INDEX_SCORES, chunk * context * index.heads) + 4 * chunk * context if index else 0
    scores = 4 * min(max(SCORES, its.heads * context), its.heads * chunk * context)
    return rows + 3 * cached + max(scores, of_index)


def widened_bytes(trunk: tuple[TrunkTensor, ...]) -> int:
    """Bytes of the trunk's scales and biases in float32, beside the file's."""
    return sum(2 * 4 * its.rows * (its.cols // its.group) for its in trunk if its.encoding.codec == "affine")
