"""gpt-oss: attention sinks, a sliding window in every other layer, biases of all products, a clamped activation."""

from ..config import Layer, ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family, Layout, experts, grouped, model, windows

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def parse(keys: Keys) -> ModelConfig:
    if keys.raw.get("rope_parameters") is None and not keys.raw.get("rope_scaling"):
        keys = keys.changed(rope_parameters=YARN)
    biased = keys.flag("attention_bias")
    has_window = windows(keys)
    size = keys.count("sliding_window") if any(has_window) else 0
    full, windowed = (grouped(keys, bias=biased, output_bias=biased, sinks=True, window=window) for window in (0, size))
    # A softmax over the chosen experts' logits is one over all experts, scaled to sum to one over the chosen.
    router = RouterConfig(renormalise=True, logit_bias=True)
    routed = experts(keys, router, ("num_local_experts",), "intermediate_size", output_bias=True)
    return model(
        keys,
        tuple(Layer(windowed if its else full, routed) for its in has_window),
        activation="clamped_swiglu",
        swiglu_alpha=keys.number("swiglu_alpha"),
        swiglu_limit=keys.above_zero("swiglu_limit"),
    )


BIASES = ("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias")
PROJECTIONS = ("mlp.experts.gate_up_proj", "", "mlp.experts.down_proj")
FAMILY = Family(
    "gpt_oss",
    parse,
    {
        "attention_bias": True,
        "head_dim": 64,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    names={"router": "mlp.router.weight", "router_logit_bias": "mlp.router.bias"},
    layouts=(
        Layout(*PROJECTIONS, transposed=True, interleaved=True, biases=BIASES),
        Layout(*(name and f"{name}_blocks" for name in PROJECTIONS), interleaved=True, biases=BIASES),
    ),
)
