"""What a model is: the shapes and rules of one architecture, read from its config.json.

This file maps every supported architecture onto one ModelConfig; the names of its tensors are in
compressor/source/checkpoint.py. Both spellings of config.json are read: the hub's (`num_experts`, `rope_theta`) and
the one transformers 5 writes (`num_local_experts`, `rope_parameters`). Layers for multi-token prediction, which
a checkpoint may have behind the model's own, are no part of it.
"""

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from .config_keys import Keys, keys_of
from .files import MOST_JSON_BYTES, parse_json, read_bounded
from .model_path import check_pointer, utf8_path, what_it_is
from .rope_config import YarnScaling, read_rope

ARCHITECTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3")
EXPERTS_KEYS = {"deepseek_v3": ("n_routed_experts", "num_local_experts")}
MAX_LAYERS, MAX_EXPERTS = 1024, 4096  # beyond any model; a damaged file stops here
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How a layer turns router logits into chosen experts and their routing weights."""

    score: str = "softmax"  # softmax | sigmoid, over all experts, before the cut to top_k
    renormalise: bool = False  # chosen weights are scaled to sum to one
    selection_bias: bool = False  # one number an expert, added to its score for the choice, not for the weight
    groups: int = 1  # experts are chosen within top_groups of so many groups of neighbours
    top_groups: int = 1
    group_score: str = "max"  # max | top2sum, of a group's scores
    scale: float = 1.0  # of the weights, at last


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention: keys and values come from one small vector a token, which is all that is cached."""

    q_rank: int  # size of the queries' latent; 0: they come straight from the input
    kv_rank: int  # size of the keys' and values' latent
    nope_dim: int  # of a head's query and key, without position
    rope_dim: int  # of a head's query and of the one key that all heads share, with position
    v_dim: int  # of a head's value
    interleaved: bool = True  # position turns the pairs (2i, 2i + 1); else (i, i + rope_dim / 2), as everywhere else
    norm_eps: float = 1e-6  # of both latents' norms, whatever the model's other norms have

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds for a token and layer."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and rules of one model. Counts are in elements; `expert_hidden` is one expert's inner size."""

    architecture: str
    layers: int
    dim: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys
    context: int  # longest context the model was made for, in tokens
    experts: int
    top_k: int
    expert_hidden: int
    router: RouterConfig
    activation: str = "silu"
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # linear scaling: positions are divided by it
    rope_mscale: float = 0.0  # linear scaling: how much the factor adds to the scale of the softmax; 0 is nothing
    yarn: YarnScaling | None = None
    latent: LatentAttention | None = None  # instead of k and v for each KV head
    qkv_bias: bool = False
    qk_norm: str = "none"  # none | head (one norm per head) | full (over all heads at once)
    qkv_clip: float = 0.0  # q, k and v are clipped to +-this after the norm; 0 is off
    sliding_window: int = 0  # keys a query can see, itself included; 0 is all
    shared_hidden: int = 0  # inner size of the shared expert; 0 is none
    shared_gate: bool = True  # its output is weighted by a sigmoid gate
    dense_hidden: int = 0  # inner size of the MLP of the layers that have no experts
    dense_layers: tuple[int, ...] = ()
    tied_head: bool = False  # the output head is the embedding
    eos_tokens: tuple[int, ...] = ()
    kept: tuple[tuple[int, ...], ...] = ()  # by layer, the checkpoint's numbers of the experts left; () is all of them
    layer_top_k: tuple[int, ...] = ()  # by layer, 0 in a dense one; () is top_k everywhere

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.layers) if layer not in self.dense_layers)

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head's query and key that position turns."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def expert_weights(self) -> int:
        """Number of weights of one expert: gate, up and down."""
        return 3 * self.dim * self.expert_hidden

    @property
    def expert_count(self) -> int:
        """Experts of all layers together."""
        return sum(self.experts_of(layer) for layer in range(self.layers))

    def experts_of(self, layer: int) -> int:
        """Experts a layer has: those that were not dropped, none in a dense layer."""
        if layer in self.dense_layers:
            return 0
        return len(self.kept[layer]) if self.kept else self.experts

    def number_of(self, layer: int, expert: int) -> int | None:
        """An expert's number in this model by its number in the checkpoint; None when it was dropped."""
        if not self.kept:
            return expert
        at = bisect_left(self.kept[layer], expert)
        return at if at < len(self.kept[layer]) and self.kept[layer][at] == expert else None

    def top_k_of(self, layer: int) -> int:
        """Experts a token uses in a layer, none in a dense one."""
        if layer in self.dense_layers:
            return 0
        return self.layer_top_k[layer] if self.layer_top_k else self.top_k

    def groups_of(self, layer: int) -> tuple[int, ...]:
        """The router's group of each expert that a layer has; what was dropped moves no other to another group."""
        size = self.experts // self.router.groups
        numbers = self.kept[layer] if self.kept else range(self.experts_of(layer))
        return tuple(number // size for number in numbers)


def load_config(directory: str | Path) -> ModelConfig:
    """Read DIRECTORY/config.json (and the end tokens of generation_config.json, if it is there).

    Raises as parse_config() does, and ValueError for a path that is not UTF-8: what reads weights takes no other.
    """
    directory = utf8_path(directory)
    path = directory / "config.json"
    raw = read_json(path)
    generation = directory / "generation_config.json"
    if generation.exists():
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            raw = {**raw, "eos_token_id": [*_tokens(eos), *_tokens(raw.get("eos_token_id"))]}  # any of them ends a turn
    return parse_config(raw, where=str(path))


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> dict:
    """Read one JSON object of at most `most_bytes`. Raises FileNotFoundError or ValueError, both naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model directory has a config.json")
    content = read_bounded(path, most_bytes, "copy the file again")
    check_pointer(path, content)
    return parse_json(path, content, "copy the file again")


def parse_config(raw: dict, where: str = "config.json") -> ModelConfig:
    """Turn the keys of a Hugging Face config.json into a ModelConfig.

    Raises ValueError, naming the key, when the architecture is not supported or a needed key is missing or
    out of range. Keys that are not used are ignored.
    """
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{where}: architecture {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
            + what_it_is(raw)
        )
    get = keys_of(kind, raw, where)
    heads = get.count("num_attention_heads")
    dim = get.count("hidden_size")
    layers = get.count("num_hidden_layers", limit=MAX_LAYERS)
    deepseek = kind == "deepseek_v3"
    latent = _latent(get) if deepseek else None
    # transformers 5 writes rope_dim alone as DeepSeek's head_dim
    head_dim = latent.nope_dim + latent.rope_dim if latent else get.count("head_dim", default=max(dim // heads, 1))
    dense = _dense_layers(get, kind, layers)
    context = get.count("max_position_embeddings")
    rope = read_rope(get, kind, context)
    activation = get.any("hidden_act")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{where}: hidden_act {activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    if kind in ("olmoe", "qwen3_moe", "deepseek_v3") and get.flag("attention_bias", False):
        raise ValueError(
            f"{where}: attention_bias true is not supported for {kind} (it biases the output projection too)"
        )
    config = ModelConfig(
        architecture=kind,
        layers=layers,
        dim=dim,
        vocab=get.count("vocab_size"),
        heads=heads,
        kv_heads=heads if latent else get.count("num_key_value_heads", default=heads),
        head_dim=head_dim,
        context=context,
        experts=get.count(*EXPERTS_KEYS.get(kind, ("num_experts", "num_local_experts")), limit=MAX_EXPERTS),
        top_k=get.count("num_experts_per_tok"),
        expert_hidden=get.count("intermediate_size" if kind in ("mixtral", "olmoe") else "moe_intermediate_size"),
        router=_router(get, kind),
        activation=ACTIVATIONS[activation],
        norm_eps=get.number("rms_norm_eps"),
        rope_theta=rope.theta,
        rope_factor=rope.factor,
        rope_mscale=rope.mscale_all_dim,
        yarn=rope.yarn,
        latent=latent,
        qkv_bias=get.flag("qkv_bias") if kind == "qwen2_moe" else False,
        qk_norm={"qwen3_moe": "head", "olmoe": "full"}.get(kind, "none"),
        qkv_clip=get.number("clip_qkv", default=0.0) if kind == "olmoe" else 0.0,
        sliding_window=_sliding_window(get, kind),
        shared_hidden=_shared_hidden(get, kind),
        shared_gate=not deepseek,
        dense_hidden=get.count("intermediate_size") if dense else 0,
        dense_layers=dense,
        tied_head=get.flag("tie_word_embeddings"),
        eos_tokens=_tokens(get.nullable("eos_token_id")),
    )
    _check(config, where)
    return config


TRUNK_KINDS = ("shared", "attention", "dense", "embedding", "head")


def without_layer(name: str) -> str:
    """A tensor's canonical name without the layer that it is of, which may be none."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def trunk_kind(name: str) -> str:
    """Which of TRUNK_KINDS a matrix of the trunk is. name: canonical, with its layer or without."""
    first = without_layer(name).split(".")[0]
    return first if first in TRUNK_KINDS else "attention"


def trunk_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that is not a routed expert, by canonical name, in the order it is used."""
    dim, q_rows, kv_rows = config.dim, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {"embedding": (config.vocab, dim)}
    for layer in range(config.layers):
        parts = {"attention_norm": (dim,)}
        if config.latent:
            parts |= _latent_shapes(config, config.latent)
        else:
            parts |= {"q": (q_rows, dim), "k": (kv_rows, dim), "v": (kv_rows, dim)}
            if config.qkv_bias:
                parts |= {"q_bias": (q_rows,), "k_bias": (kv_rows,), "v_bias": (kv_rows,)}
            if config.qk_norm != "none":
                full = config.qk_norm == "full"
                parts |= {"q_norm": (q_rows if full else config.head_dim,)}
                parts |= {"k_norm": (kv_rows if full else config.head_dim,)}
            parts |= {"o": (dim, q_rows)}
        parts |= {"mlp_norm": (dim,)}
        if layer in config.dense_layers:
            parts |= _mlp_shapes("dense", dim, config.dense_hidden)
        else:
            parts |= {"router": (config.experts_of(layer), dim)}
            if config.router.selection_bias:
                parts |= {"router_bias": (config.experts_of(layer),)}
            if config.shared_hidden:
                parts |= {"shared_router": (1, dim)} if config.shared_gate else {}
                parts |= _mlp_shapes("shared", dim, config.shared_hidden)
        shapes |= {f"layers.{layer}.{part}": shape for part, shape in parts.items()}
    shapes["output_norm"] = (dim,)
    if not config.tied_head:
        shapes["head"] = (config.vocab, dim)
    return shapes


def _latent_shapes(config: ModelConfig, latent: LatentAttention) -> dict[str, tuple[int, ...]]:
    dim, heads, q_rows = config.dim, config.heads, config.heads * config.head_dim
    parts = {"q": (q_rows, dim)}
    if latent.q_rank:
        parts = {"q_a": (latent.q_rank, dim), "q_a_norm": (latent.q_rank,), "q_b": (q_rows, latent.q_rank)}
    return parts | {
        "kv_a": (latent.kv_rank + latent.rope_dim, dim),
        "kv_a_norm": (latent.kv_rank,),
        "kv_b": (heads * (latent.nope_dim + latent.v_dim), latent.kv_rank),
        "o": (dim, heads * latent.v_dim),
    }


def _mlp_shapes(prefix: str, dim: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.gate": (inner, dim), f"{prefix}.up": (inner, dim), f"{prefix}.down": (dim, inner)}


def _latent(get: Keys) -> LatentAttention:
    return LatentAttention(
        q_rank=get.count("q_lora_rank") if get.nullable("q_lora_rank") is not None else 0,
        kv_rank=get.count("kv_lora_rank"),
        nope_dim=get.count("qk_nope_head_dim"),
        rope_dim=get.count("qk_rope_head_dim"),
        v_dim=get.count("v_head_dim"),
        interleaved=get.flag("rope_interleave"),
    )


def _router(get: Keys, kind: str) -> RouterConfig:
    if kind != "deepseek_v3":
        return RouterConfig(renormalise=True if kind == "mixtral" else get.flag("norm_topk_prob"))
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if (value := get.any(key, default=only)) != only:
            raise ValueError(f"{get.where}: {key} {value!r} is not supported for {kind}; supported is {only}")
    return RouterConfig(
        score="sigmoid",
        renormalise=get.flag("norm_topk_prob"),
        selection_bias=True,
        groups=get.count("n_group"),
        top_groups=get.count("topk_group"),
        group_score="top2sum",
        scale=get.number("routed_scaling_factor"),
    )


def _shared_hidden(get: Keys, kind: str) -> int:
    if kind == "qwen2_moe":
        return get.count("shared_expert_intermediate_size")
    if kind == "deepseek_v3" and get.nullable("n_shared_experts"):
        return get.count("n_shared_experts", limit=MAX_EXPERTS) * get.count("moe_intermediate_size")
    return 0


def _dense_layers(get: Keys, kind: str, layers: int) -> tuple[int, ...]:
    if kind == "deepseek_v3":
        first, step = get.any("first_k_dense_replace"), get.count("moe_layer_freq", default=1)
        if type(first) is not int or first < 0:
            raise ValueError(f"{get.where}: first_k_dense_replace is {first!r}, expected a whole number from 0")
        return tuple(layer for layer in range(layers) if layer < first or layer % step)
    if not kind.startswith("qwen"):
        return ()
    step = get.count("decoder_sparse_step")
    dense = get.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(x) is not int for x in dense):
        raise ValueError(f"{get.where}: mlp_only_layers is {dense!r}, expected a list of layer numbers")
    return tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % step)


def _sliding_window(get: Keys, kind: str) -> int:
    if kind == "mixtral":
        return get.count("sliding_window") if get.raw.get("sliding_window") is not None else 0
    if get.flag("use_sliding_window", False):
        raise ValueError(f"{get.where}: use_sliding_window is not supported for {kind}; set it to false")
    kinds = get.any("layer_types", default=[])
    if not isinstance(kinds, list) or any(one != "full_attention" for one in kinds):
        raise ValueError(f"{get.where}: layer_types is {kinds!r}, expected full_attention in every layer")
    return 0


def _tokens(value) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(int(token) for token in values if isinstance(token, int)))


def _check(config: ModelConfig, where: str) -> None:
    router = config.router
    experts_a_group = config.experts // router.groups
    problems = [
        (config.heads % config.kv_heads, "num_attention_heads must be a multiple of num_key_value_heads"),
        (not config.latent and config.head_dim % 2, "head_dim must be even"),
        (config.latent and config.latent.rope_dim % 2, "qk_rope_head_dim must be even"),
        (config.top_k > config.experts, "num_experts_per_tok is larger than the number of experts"),
        (config.experts % router.groups, "n_routed_experts must be a multiple of n_group"),
        (router.groups > 1 and experts_a_group < 2, "a group must have at least two experts"),
        (router.top_groups > router.groups, "topk_group is larger than n_group"),
        (config.top_k > router.top_groups * experts_a_group, "num_experts_per_tok is more than topk_group groups have"),
        (not config.moe_layers, "no layer has experts"),
    ]
    for wrong, message in problems:
        if wrong:
            raise ValueError(f"{where}: {message}")
