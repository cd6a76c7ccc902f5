"""ERNIE 4.5: interleaved rotary pairs; a softmax router with a load-balancing bias, shared experts, dense
first layers."""

from dataclasses import replace

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import Experts, RouterConfig
from .family import USUAL_LAYOUTS, Family, expert_count, grouped, layer_count, model, shared_of, stack

BIAS = "moe_statics.e_score_correction_bias"


def parse(keys: Keys) -> ModelConfig:
    if keys.flag("use_bias"):
        raise ValueError(f"{keys.where}: use_bias true is not supported for {keys.kind} (it biases MLPs and head, too)")
    experts = Experts(
        expert_count(keys, "moe_num_experts", "num_experts"),
        keys.count("moe_k", "num_experts_per_tok"),
        keys.count("moe_intermediate_size"),
        RouterConfig(renormalise=True, selection_bias=True),
        shared_hidden=shared_of(keys, "moe_num_shared_experts"),
        shared_gate=False,
    )
    return model(keys, stack(keys, grouped(keys, interleaved=True), experts, dense(keys)))


def dense(keys: Keys) -> tuple[int, ...]:
    """The dense layers: those outside the range that has experts, and inside it all but every moe_layer_interval-th."""
    count, step = layer_count(keys), keys.count("moe_layer_interval")
    first, last = keys.any("moe_layer_start_index"), keys.any("moe_layer_end_index", default=-1)
    for key, value in (("moe_layer_start_index", first), ("moe_layer_end_index", last)):
        if type(value) is not int or value < -1:
            raise ValueError(f"{keys.where}: {key} is {value!r}, expected the number of a layer")
    last = count - 1 if last == -1 else last
    return tuple(layer for layer in range(count) if not first <= layer <= last or (layer + 1) % step)


FAMILY = Family(
    "ernie4_5_moe",
    parse,
    {
        "eos_token_id": 2,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 2,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    layouts=(
        replace(USUAL_LAYOUTS[0], names={"router_bias": f"mlp.{BIAS}"}),
        replace(USUAL_LAYOUTS[1], names={"router_bias": f"mlp.gate.{BIAS}"}),
    ),
    stored_as={"router_bias": lambda shape: (1, *shape)},
)
