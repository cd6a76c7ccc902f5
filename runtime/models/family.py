"""A family of models: how its config.json becomes a ModelConfig, and the names of tensors in its checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..config import MAX_EXPERTS, MAX_LAYERS, Layer, Mixer, ModelConfig
from ..config_keys import Keys
from ..layers.attention import Attention
from ..layers.compressed import CompressedAttention
from ..layers.delta_net import DeltaNet
from ..layers.indexer import Indexer
from ..layers.latent import LatentAttention
from ..layers.mamba import Mamba
from ..layers.mlp import Dense, Experts, RouterConfig
from ..layers.short_conv import ShortConv
from ..rope_config import TYPES, read_rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
NAMES = {  # names of tensors in most checkpoints, by canonical name: of a layer's, and of those before and after layers
    "embedding": "embed_tokens.weight",
    "output_norm": "norm.weight",
    "output_norm_bias": "norm.bias",
    "attention_norm": "input_layernorm.weight",
    "attention_norm_bias": "input_layernorm.bias",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp_norm_bias": "post_attention_layernorm.bias",
    **{part: f"self_attn.{part}_proj.weight" for part in ("q", "k", "v", "o", "q_a", "q_b", "kv_b")},
    **{f"{part}_bias": f"self_attn.{part}_proj.bias" for part in "qkvo"},
    **{f"{part}_norm": f"self_attn.{part}_norm.weight" for part in "qk"},
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    **{f"{part}_norm": f"self_attn.{part}_layernorm.weight" for part in ("q_a", "kv_a")},
    **{f"dense.{part}": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
    "router": "mlp.gate.weight",
    "router_bias": "mlp.gate.e_score_correction_bias",
    "router_logit_bias": "mlp.gate.bias",
    "sinks": "self_attn.sinks",
    "index.q": "self_attn.indexer.wq_b.weight",
    "index.k": "self_attn.indexer.wk.weight",
    "index.k_norm": "self_attn.indexer.k_norm.weight",
    "index.k_norm_bias": "self_attn.indexer.k_norm.bias",
    "index.weights": "self_attn.indexer.weights_proj.weight",
    **{f"shared.{part}": f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
    "shared_router": "mlp.shared_expert_gate.weight",
}


Shape = tuple[int, ...]
Rows = tuple[tuple[int, int], ...]  # runs of rows of a stored tensor: the first one, and how many


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint stores the experts of a layer.

    If `gate` and `up` contain `{}`, they are the names of one expert's matrices, with the expert's number in place of
    `{}`. Otherwise all are (experts, rows, cols): `gate`, `up` and `down` name a tensor each, or `up` is empty and
    `gate` names one with both, (experts, gate rows then up rows, dim). Experts without a gate have an empty `gate`.

    `biases` are the names of two tensors (experts, rows) with what is added to the products of fused gate and up and of
    down, for a family whose experts have that.
    """

    gate: str
    up: str
    down: str
    names: Mapping[str, str] = field(default_factory=dict)  # of other tensors whose names differ in this layout
    transposed: bool = False  # fused tensors are (experts, dim, gate columns then up columns), (experts, hidden, dim)
    interleaved: bool = False  # fused gate and up rows (if transposed, columns) take turns, gate first
    biases: tuple[str, str] = ("", "")

    @property
    def first(self) -> str:
        """The name of the first tensor."""
        return self.gate or self.up


def separate(path: str, gate: str, up: str, down: str, **names) -> Layout:
    """Three matrices for each expert, as in most checkpoints on the Hugging Face Hub."""
    return Layout(*(f"{path}.{{}}.{part}.weight" for part in (gate, up, down)), **names)


def fused(path: str = "mlp.experts", transposed: bool = False) -> Layout:
    """Two tensors for all experts of a layer, as in transformers 5, which can also save them."""
    return Layout(f"{path}.gate_up_proj", "", f"{path}.down_proj", transposed=transposed)


@dataclass(frozen=True, slots=True)
class Packed:
    """One tensor of a layer that contains the rows of several of the layer's matrices."""

    name: str
    rows: Callable[
        [Any], Mapping[str, Rows]
    ]  # of each matrix, by canonical name; called with a layer's attention or None


def conv_stored(shape: Shape) -> Shape:
    """The shape in which checkpoints store a convolution's weights (kernel, channels)."""
    return shape[1], 1, shape[0]


def conv_read(weights: np.ndarray) -> np.ndarray:
    """The weights of a convolution, (kernel, channels), from those that are stored, channels first."""
    return np.ascontiguousarray(weights.reshape(len(weights), -1).T)


USUAL_LAYOUTS = (separate("mlp.experts", "gate_proj", "up_proj", "down_proj"), fused())


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type` of config.json."""

    model_type: str
    parse: Callable[[Keys], ModelConfig]
    defaults: Mapping[str, object]  # values of absent keys, where they differ from those of other families
    names: Mapping[str, str] = field(default_factory=dict)  # of tensors, where they differ from NAMES
    mlx_names: Mapping[str, str] = field(default_factory=dict)  # where they differ again in what mlx-lm saves
    layouts: tuple[Layout, ...] = USUAL_LAYOUTS  # the first layout that matches a checkpoint is used
    text: str = ""  # key of the language model's config, if config.json has other parts
    prefixes: tuple[str, ...] = ("model.", "")  # of the tensors' names; "" for a checkpoint saved without the head
    layers: tuple[str, ...] = ("layers",)  # names of the list of layers
    heads: tuple[str, ...] = ("lm_head.weight",)  # names of the output head
    packed: tuple[Packed, ...] = ()
    stored_as: Mapping[str, Callable[[Shape], Shape]] = field(default_factory=dict)  # shapes with dimensions of 1
    conversions: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)  # of stored values


def model(keys: Keys, layers: tuple[Layer, ...], **values) -> ModelConfig:
    """A ModelConfig of these layers, with the keys that all families share; hidden_act unless `activation` is given."""
    values["activation"] = values.get("activation") or _activation(keys)
    config = ModelConfig(
        architecture=keys.kind,
        dim=keys.count("hidden_size"),
        vocab=keys.count("vocab_size"),
        context=keys.count("max_position_embeddings"),
        layers=layers,
        norm_eps=keys.number("rms_norm_eps"),
        tied_head=keys.flag("tie_word_embeddings"),
        eos_tokens=tokens(keys.nullable("eos_token_id")),
        **values,
    )
    _check(config, keys.where)
    return config


def _activation(keys: Keys) -> str:
    activation = keys.any("hidden_act")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"{keys.where}: hidden_act {activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[activation]


def stack(keys: Keys, attention: Mixer | Sequence[Mixer], experts: Experts, dense: tuple[int, ...] = ()):
    """The layers of a model. attention: of all layers, or of each; the layers in `dense` have no experts."""
    mlp, count = Dense(keys.count("intermediate_size")) if dense else experts, layer_count(keys)
    of_layers = attention if isinstance(attention, Sequence) else [attention] * count
    return tuple(Layer(its, mlp if layer in dense else experts) for layer, its in enumerate(of_layers))


def layer_count(keys: Keys) -> int:
    return keys.count("num_hidden_layers", limit=MAX_LAYERS)


def expert_count(keys: Keys, *names: str) -> int:
    return keys.count(*names, limit=MAX_EXPERTS)


def experts(
    keys: Keys,
    router: RouterConfig,
    count: tuple[str, ...] = ("num_experts", "num_local_experts"),
    hidden: str = "moe_intermediate_size",
    **values,
) -> Experts:
    """Routed experts with the keys of most families. count, hidden: names of the keys for their number and size."""
    return Experts(expert_count(keys, *count), keys.count("num_experts_per_tok"), keys.count(hidden), router, **values)


def experts_and_shared(
    keys: Keys, router: RouterConfig, count: tuple[str, ...] = ("n_routed_experts", "num_local_experts")
) -> Experts:
    """Routed and shared experts without a gate, with DeepSeek's keys."""
    return experts(keys, router, count, shared_hidden=shared_of(keys), shared_gate=False)


def grouped(
    keys: Keys,
    partial: float | None = None,
    interleaved: bool = False,
    ntk_alpha: bool = False,
    types: tuple[str, ...] = TYPES,
    **values,
) -> Attention:
    """Grouped-query attention with most families' keys. partial, interleaved, ntk_alpha, types: see read_rope()."""
    heads, dim = keys.count("num_attention_heads"), keys.count("hidden_size")
    head_dim = keys.count("head_dim", default=max(dim // heads, 1))
    rope = read_rope(keys, head_dim, partial=partial, interleaved=interleaved, ntk_alpha=ntk_alpha, types=types)
    return Attention(heads, keys.count("num_key_value_heads", default=heads), head_dim, rope, **values)


def latent(keys: Keys) -> LatentAttention:
    """Attention over a latent, with DeepSeek's keys."""
    no_bias(keys)
    rope_dim, nope_dim = keys.count("qk_rope_head_dim"), keys.count("qk_nope_head_dim")
    interleaved = keys.flag("rope_interleave", True)
    return LatentAttention(
        heads=keys.count("num_attention_heads"),
        q_rank=keys.count("q_lora_rank") if keys.nullable("q_lora_rank") is not None else 0,
        kv_rank=keys.count("kv_lora_rank"),
        nope_dim=nope_dim,
        value_dim=keys.count("v_head_dim"),
        rope=read_rope(keys, rope_dim, of=nope_dim + rope_dim, interleaved=interleaved, scales_softmax=True),
    )


def sparse_latent(keys: Keys, interleaved: bool) -> LatentAttention:
    """Attention over a latent, to positions that an indexer chooses. interleaved: the rotated pairs of the indexer."""
    for key, only in (("rope_interleave", True), ("indexer_rope_interleave", interleaved)):
        if keys.flag(key, only) != only:
            value = str(not only).lower()
            raise ValueError(f"{keys.where}: {key} {value} is not supported for {keys.kind}")
    attention = latent(keys)
    if not attention.q_rank:
        raise ValueError(f"{keys.where}: q_lora_rank is null, but the indexer of {keys.kind} needs queries' latents")
    rope = replace(attention.rope, interleaved=interleaved, softmax_factor=1.0)
    indexer = Indexer(keys.count("index_n_heads"), keys.count("index_head_dim"), rope)
    return replace(attention, top=keys.count("index_topk"), indexer=indexer)


def no_bias(keys: Keys) -> None:
    """Raise ValueError if attention_bias is on, for a family whose models have none."""
    if keys.flag("attention_bias", False):
        raise ValueError(
            f"{keys.where}: attention_bias true is not supported for {keys.kind} (it biases the output projection too)"
        )


def layer_kinds(keys: Keys, known: tuple[str, ...], default: list[str] | None = None) -> list[str]:
    """The kind of each layer by layer_types, one of `known`. default: if it is missing; None: it must not be."""
    count, kinds = layer_count(keys), keys.nullable("layer_types")
    kinds = default if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in known for kind in kinds):
        raise ValueError(f"{keys.where}: layer_types is {kinds!r}, expected {' or '.join(known)} for every layer")
    return kinds


def windows(keys: Keys) -> tuple[bool, ...]:
    """Whether each layer's attention has the sliding window, by layer_types or, if it is missing, every other one."""
    names = ("sliding_attention", "full_attention")
    kinds = layer_kinds(keys, names, [names[layer % 2] for layer in range(layer_count(keys))])
    return tuple(kind == names[0] for kind in kinds)


def no_windows(keys: Keys) -> None:
    """Raise ValueError if config.json has sliding windows, for a family whose models have none."""
    if keys.flag("use_sliding_window", False):
        raise ValueError(f"{keys.where}: use_sliding_window is not supported for {keys.kind}; set it to false")
    kinds = keys.any("layer_types", default=[])
    if not isinstance(kinds, list) or any(one != "full_attention" for one in kinds):
        raise ValueError(f"{keys.where}: layer_types is {kinds!r}, expected full_attention in every layer")


def grouped_router(keys: Keys, score: str = "sigmoid", selection_bias: bool = True) -> RouterConfig:
    """DeepSeek-V3's router: experts are chosen within the best groups, by score plus a load-balancing bias."""
    for key, only in (("scoring_func", score), ("topk_method", "noaux_tc")):
        if (value := keys.any(key, default=only)) != only:
            raise ValueError(f"{keys.where}: {key} {value!r} is not supported for {keys.kind}; supported is {only}")
    return RouterConfig(
        score=score,
        renormalise=keys.flag("norm_topk_prob"),
        selection_bias=selection_bias,
        groups=keys.count("n_group"),
        top_groups=keys.count("topk_group"),
        group_score="top2sum",
        scale=keys.number("routed_scaling_factor"),
    )


def shared_of(keys: Keys, key: str = "n_shared_experts") -> int:
    """The total inner size of the shared experts; 0 if there are none."""
    return expert_count(keys, key) * keys.count("moe_intermediate_size") if keys.nullable(key) else 0


def first_dense(keys: Keys) -> tuple[int, ...]:
    """The layers without experts: the first ones, and of the rest all but every moe_layer_freq-th."""
    first, step = keys.any("first_k_dense_replace"), keys.count("moe_layer_freq", default=1)
    if type(first) is not int or first < 0:
        raise ValueError(f"{keys.where}: first_k_dense_replace is {first!r}, expected a whole number from 0")
    return tuple(layer for layer in range(layer_count(keys)) if layer < first or layer % step)


def dense_by_type(keys: Keys, first: int) -> tuple[int, ...]:
    """The dense layers, by mlp_layer_types or, if it is missing, by first_k_dense_replace, which is `first` by default.

    Families with mlp_layer_types have no moe_layer_freq.
    """
    count, kinds = layer_count(keys), keys.raw.get("mlp_layer_types")
    if kinds is None:
        its = keys.any("first_k_dense_replace", default=first)
        return first_dense(keys.changed(first_k_dense_replace=its, moe_layer_freq=None))
    if not isinstance(kinds, list) or len(kinds) < count or any(one not in ("dense", "sparse") for one in kinds):
        raise ValueError(f"{keys.where}: mlp_layer_types is {kinds!r}, expected dense or sparse for every layer")
    return tuple(layer for layer in range(count) if kinds[layer] == "dense")


def tokens(value) -> tuple[int, ...]:
    """The token ids of a key that has one, several or none."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(int(token) for token in values if isinstance(token, int)))


def _check(config: ModelConfig, where: str) -> None:
    if not config.moe_layers:
        raise ValueError(f"{where}: no layer has experts")
    router, experts = config.router, config.experts
    experts_a_group = experts // router.groups
    problems = [
        *(problem for attention in config.attentions for problem in _attention_problems(attention)),
        (config.top_k > experts, "num_experts_per_tok is larger than the number of experts"),
        (experts % router.groups, "n_routed_experts must be a multiple of n_group"),
        (router.groups > 1 and experts_a_group < 2, "a group must have at least two experts"),
        (router.top_groups > router.groups, "topk_group is larger than n_group"),
        (config.top_k > router.top_groups * experts_a_group, "num_experts_per_tok is more than topk_group groups have"),
    ]
    for wrong, message in problems:
        if wrong:
            raise ValueError(f"{where}: {message}")


def _attention_problems(attention: Mixer) -> list[tuple[int, str]]:
    if isinstance(attention, ShortConv):
        return []
    if isinstance(attention, Mamba):
        return [(attention.heads % attention.kv_heads, "mamba_num_heads must be a multiple of n_groups")]
    if isinstance(attention, DeltaNet):
        shared = attention.heads % attention.kv_heads
        return [(shared, "linear_num_value_heads must be a multiple of linear_num_key_heads")]
    if isinstance(attention, CompressedAttention):
        return [
            (attention.heads % attention.groups, "num_attention_heads must be a multiple of o_groups"),
            (attention.rope.dim % 2 or not attention.rope.dim, "the rotated dimensions of a head must be even"),
            (
                attention.index is not None and attention.rope.dim > attention.index.dim,
                "index_head_dim is smaller than the rotated dimensions of a head",
            ),
        ]
    indexer = attention.indexer if isinstance(attention, LatentAttention) else None
    rope_key = "qk_rope_head_dim" if isinstance(attention, LatentAttention) else "head_dim"
    return [
        (attention.heads % attention.kv_heads, "num_attention_heads must be a multiple of num_key_value_heads"),
        (attention.rope.span % 2, f"{rope_key} must be even"),
        (indexer is not None and indexer.rope.dim > indexer.dim, "qk_rope_head_dim is larger than index_head_dim"),
    ]
