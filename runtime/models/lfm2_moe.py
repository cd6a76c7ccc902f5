"""LFM2-8B-A1B and 24B-A2B: three or so layers of gated short convolutions to one of attention; a sigmoid router with a
load-balancing bias, dense first layers."""

from ..config import Mixer, ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from ..layers.short_conv import ShortConv
from .family import (
    Family,
    Packed,
    Rows,
    conv_read,
    conv_stored,
    experts,
    fused,
    grouped,
    layer_count,
    layer_kinds,
    model,
    separate,
    stack,
)

KINDS = ("conv", "full_attention")
MLP = {"gate": "w1", "up": "w3", "down": "w2"}


def parse(keys: Keys) -> ModelConfig:
    if keys.flag("conv_bias"):
        raise ValueError(f"{keys.where}: conv_bias true is not supported for {keys.kind}; supported is false")
    tied = keys.any("tie_word_embeddings", "tie_embedding")
    keys = keys.changed(rms_norm_eps=keys.number("norm_eps"), tie_word_embeddings=tied)
    convolution = ShortConv(keys.count("hidden_size"), keys.count("conv_L_cache"))
    mixers: dict[str, Mixer] = dict(zip(KINDS, (convolution, grouped(keys, qk_norm="head")), strict=True))
    router = RouterConfig(
        "sigmoid",
        renormalise=keys.flag("norm_topk_prob"),
        sum_eps=1e-6,
        selection_bias=keys.flag("use_expert_bias"),
        scale=keys.number("routed_scaling_factor"),
    )
    first = keys.any("num_dense_layers")
    if type(first) is not int or first < 0:
        raise ValueError(f"{keys.where}: num_dense_layers is {first!r}, expected a whole number from 0")
    dense = tuple(range(min(first, layer_count(keys))))
    return model(keys, stack(keys, [mixers[kind] for kind in layer_kinds(keys, KINDS)], experts(keys, router), dense))


def _joined(mixer: Mixer) -> dict[str, Rows]:
    """The rows of in_proj: the factors of the convolution's inputs, those of its outputs, and the inputs."""
    if not isinstance(mixer, ShortConv):
        return {}
    count = mixer.value_dim
    return {f"conv.{part}": ((at * count, count),) for at, part in enumerate(("write", "gate", "in"))}


FAMILY = Family(
    "lfm2_moe",
    parse,
    {
        "conv_L_cache": 3,
        "conv_bias": False,
        "eos_token_id": 2,
        "norm_eps": 1e-5,
        "norm_topk_prob": True,
        "num_dense_layers": 2,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": True,
        "use_expert_bias": True,
    },
    names={
        "output_norm": "embedding_norm.weight",
        "attention_norm": "operator_norm.weight",
        "mlp_norm": "ffn_norm.weight",
        **{f"{part}_norm": f"self_attn.{part}_layernorm.weight" for part in "qk"},
        "o": "self_attn.out_proj.weight",
        "conv.weights": "conv.conv.weight",
        "conv.o": "conv.out_proj.weight",
        "router": "feed_forward.gate.weight",
        "router_bias": "feed_forward.expert_bias",
        **{f"dense.{part}": f"feed_forward.{name}.weight" for part, name in MLP.items()},
    },
    mlx_names={f"dense.{part}": f"feed_forward.{part}_proj.weight" for part in MLP},
    layouts=(separate("feed_forward.experts", *MLP.values()), fused("feed_forward.experts")),
    packed=(Packed("conv.in_proj.weight", _joined),),
    stored_as={"conv.weights": conv_stored},
    conversions={"conv.weights": conv_read},
)
