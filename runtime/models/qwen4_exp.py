"""Qwen4-Exp (Qwen3.8-Flash-Next) as a text model: Qwen3.5's layers, with a residual stream of several streams, an index
in place of full attention, and in some layers embeddings of n-grams. The vision part is ignored."""

import math
from dataclasses import replace

import numpy as np

from ..config import Mixer, ModelConfig
from ..config_keys import Keys
from ..layers.attention import Attention
from ..layers.block_index import BlockIndex
from ..layers.delta_net import GATES, DeltaNet
from ..layers.mlp import RouterConfig
from ..layers.ngrams import NGrams, factors_of, primes_from
from ..layers.streams import Streams
from .family import Family, Packed, Rows, tokens
from .qwen3_next import CONVERSIONS, DEFAULTS, NAMES, PACKED, STORED_AS, text_model

FULL = ("full_attention", "indexed_attention")  # names of attention with an index, as all of it has here
LONGEST, MOST_HEADS = 8, 64  # of n-grams, more than any model has


def parse(keys: Keys) -> ModelConfig:
    router = RouterConfig(renormalise=keys.flag("norm_topk_prob"))
    streams = Streams(keys.count("hc_count"), keys.count("hc_lowrank"))
    config = text_model(keys, router, full=FULL, partial=1.0, streams=streams)
    index, gate, ngrams = _index(keys), _gate(keys), _ngrams(keys)

    def changed(mixer: Mixer) -> Mixer:
        return replace(mixer, gate=gate) if isinstance(mixer, DeltaNet) else replace(mixer, index=index)

    layers = (
        replace(layer, attention=changed(layer.attention), ngrams=ngrams.get(at))
        for at, layer in enumerate(config.layers)
    )
    config = replace(config, layers=tuple(layers))
    for attention in config.attentions:
        if isinstance(attention, Attention) and attention.rope.span > index.head_dim:
            raise ValueError(f"{keys.where}: indexer_head_dim is {index.head_dim}, below the rotated dimensions")
    return config


def _index(keys: Keys) -> BlockIndex:
    block, budget = keys.count("indexer_compress_ratio"), keys.count("indexer_budget")
    if keys.count("indexer_kv_heads") != 1:
        raise ValueError(f"{keys.where}: indexer_kv_heads is {keys.any('indexer_kv_heads')}, supported is 1")
    if budget % block:
        raise ValueError(f"{keys.where}: indexer_budget must be a multiple of indexer_compress_ratio")
    return BlockIndex(keys.count("indexer_n_heads"), keys.count("indexer_head_dim"), block, budget // block)


def _gate(keys: Keys) -> str:
    gate = keys.nullable("output_gate_type") or keys.any("hidden_act")
    if gate not in GATES:
        raise ValueError(f"{keys.where}: output_gate_type {gate!r} is not supported; supported are {', '.join(GATES)}")
    return gate


def _ngrams(keys: Keys) -> dict[int, NGrams]:
    """By layer."""
    layers = sorted(set(keys.nullable("ple_layer_ids") or []))
    if not layers:
        return {}
    longest, heads = keys.count("ngram_size", limit=LONGEST), keys.count("heads_per_ngram", limit=MOST_HEADS)
    ends = tokens(keys.nullable("eos_token_id"))
    if not ends:
        raise ValueError(f"{keys.where}: eos_token_id is missing; embeddings of n-grams end at it")
    dim, count = keys.count("ple_embed_dim", default=keys.count("hidden_size")), (longest - 1) * heads
    if longest < 2 or dim % count:
        raise ValueError(f"{keys.where}: ple_embed_dim must be a multiple of the {count} hashes of n-grams")
    primes = primes_from(keys.count("ngram_vocab_size_base"), len(layers) * count)
    found = {}
    for number, layer in enumerate(layers):
        its = primes[number * count :][:count]
        multiple = keys.count("make_ngram_vocab_size_divisible_by")
        found[layer - 1] = NGrams(
            factors_of(keys.count("vocab_size"), longest, int(keys.number("seed")), number),
            tuple(tuple(its[at : at + heads]) for at in range(0, count, heads)),
            math.ceil(sum(its) / multiple) * multiple,
            dim // count,
            ends[0],
            keys.count("ple_conv_kernel_size"),
        )
    return found


def _index_rows(attention: Mixer) -> dict[str, Rows]:
    """The rows of index_qk_proj: the queries of the index, then its key."""
    its = attention.index if isinstance(attention, Attention) else None
    if its is None:
        return {}
    queries = its.heads * its.head_dim
    return {"index.q": ((0, queries),), "index.k": ((queries, its.head_dim),)}


def _mix(name: str) -> dict[str, str]:
    return {
        "norm": f"{name}.hc_norm.weight",
        "mix.down": f"{name}.input_mix_weight_down.weight",
        "mix.up": f"{name}.input_mix_weight_up.weight",
        "mix.share": f"{name}.block_inject_weight.weight",
    }


TABLE = "ple.ple_embedding.ngram_embedding.shard_{}.weight"
FAMILY = Family(
    "qwen4_exp",
    parse,
    {
        **DEFAULTS,
        "norm_topk_prob": True,
        "hc_count": 4,
        "hc_lowrank": 320,
        "ple_conv_kernel_size": 4,
        "ngram_size": 3,
        "heads_per_ngram": 8,
        "ngram_vocab_size_base": 20_000_000,
        "make_ngram_vocab_size_divisible_by": 128,
        "seed": 1234,
        "split_ngram_parts": 512,
    },
    {
        **NAMES,
        **{f"attention_{part}": name for part, name in _mix("attn_hyper_connection").items()},
        **{f"mlp_{part}": name for part, name in _mix("mlp_hyper_connection").items()},
        **{f"output_{part}": name for part, name in _mix("hyper_connection_mixer").items()},
        **{f"index.{part}_norm": f"self_attn.indexer.{part}_layernorm.weight" for part in "qk"},
        **{f"ngrams.{part}_norm": f"ple.norm_{part}.weight" for part in ("key", "query", "conv")},
        **{f"ngrams.{part}": f"ple.{part}_proj.weight" for part in ("key", "value")},
        "ngrams.conv": "ple.conv1d.weight",
        "ngrams.table": TABLE,
    },
    text="text_config",
    prefixes=("model.language_model.", "language_model."),
    packed=(*PACKED, Packed("self_attn.indexer.index_qk_proj.weight", _index_rows)),
    stored_as={**STORED_AS, "ngrams.conv": STORED_AS["delta.conv"]},
    conversions={
        **CONVERSIONS,
        **{f"index.{part}_norm": CONVERSIONS["q_norm"] for part in "qk"},
        **{f"ngrams.{part}_norm": CONVERSIONS["q_norm"] for part in ("key", "query", "conv")},
        "ngrams.conv": lambda weights: np.ascontiguousarray(weights.T),
    },
)
