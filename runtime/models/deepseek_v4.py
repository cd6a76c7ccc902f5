"""DeepSeek-V4: a residual stream of several streams that are mixed, attention over a window and compressed rows, and
first layers that look experts up by token."""

from dataclasses import replace

from ..config import Layer, ModelConfig
from ..config_keys import Keys, check_agree
from ..layers.compressed import CompressedAttention, CompressedIndex
from ..layers.hyper import HyperConnections
from ..layers.mlp import RouterConfig
from ..layers.rope import Rope
from ..rope_config import NEW, OLD, merged_rope, read_rope
from .family import Family, experts_and_shared, fused, layer_count, model, no_bias, separate

WINDOW, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
KINDS = {0: WINDOW, 4: SPARSE, 128: HEAVY}  # of layers, by compress_ratios
FIRST_HEAVY = 2  # layers, after which the two kinds take turns, if config.json does not say which kinds they have
RATES = {SPARSE: ("compress_rate_csa", 4), HEAVY: ("compress_rate_hca", 128)}  # older keys, and defaults
MLPS = ("hash_moe", "moe")
HASHED_LAYERS = 3  # unless config.json says which
ROTATED = 64 / 512  # of each head, likewise
SCORES = ("sqrtsoftplus", "sigmoid", "softmax")
ONLY = {  # values of keys that other models have otherwise
    "hidden_act": "silu",
    "mlp_bias": False,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "topk_method": "noaux_tc",
}
MOST_STREAMS, MOST_ITERATIONS = 16, 1000  # more than any model has


def parse(keys: Keys) -> ModelConfig:
    no_bias(keys)
    for key, only in ONLY.items():
        if (value := keys.any(key, default=only)) != only:
            raise ValueError(f"{keys.where}: {key} is {value!r}, supported for {keys.kind} is {only!r}")
    if (score := keys.any("scoring_func")) not in SCORES:
        raise ValueError(f"{keys.where}: scoring_func is {score!r}, supported are {', '.join(SCORES)}")
    router = RouterConfig(score, renormalise=True, selection_bias=True, scale=keys.number("routed_scaling_factor"))
    chosen, attentions = experts_and_shared(keys, router), _attentions(keys)
    mlps = dict(zip(MLPS, (replace(chosen, hashed=True), chosen), strict=True))
    return model(
        keys,
        tuple(Layer(attentions[kind], mlps[mlp]) for kind, mlp in zip(_kinds(keys), _mlps(keys), strict=True)),
        streams=HyperConnections(
            keys.count("hc_mult", limit=MOST_STREAMS),
            keys.count("hc_sinkhorn_iters", limit=MOST_ITERATIONS),
            keys.number("hc_eps"),
        ),
        activation="clamped_swiglu",
        swiglu_alpha=1.0,
        swiglu_limit=keys.above_zero("swiglu_limit"),
        swiglu_shift=0.0,
    )


def _attentions(keys: Keys) -> dict[str, CompressedAttention]:
    """The attention of each kind of layer."""
    ropes, rates = _ropes(keys), _rates(keys)
    plain = CompressedAttention(
        heads=keys.count("num_attention_heads"),
        q_rank=keys.count("q_lora_rank"),
        head_dim=keys.count("head_dim"),
        rope=ropes["main"],
        window=keys.count("sliding_window"),
        groups=keys.count("o_groups"),
        group_rank=keys.count("o_lora_rank"),
    )
    index = CompressedIndex(keys.count("index_n_heads"), keys.count("index_head_dim"), keys.count("index_topk"))
    heavy = replace(plain, rope=ropes["compress"], rate=rates[HEAVY])
    return {WINDOW: plain, SPARSE: replace(heavy, rate=rates[SPARSE], overlapped=True, index=index), HEAVY: heavy}


def _rates(keys: Keys) -> dict[str, int]:
    """The tokens of a compressed row, by kind of layer."""
    given, rates = keys.raw.get("compress_rates") or {}, {}
    if not isinstance(given, dict):
        raise ValueError(f"{keys.where}: compress_rates is {given!r}, expected an object of kinds of layers and rates")
    for kind, (older, default) in RATES.items():
        rate, other = given.get(kind), keys.raw.get(older)
        if None not in (rate, other):
            check_agree(keys.where, f"compress_rates.{kind}", rate, older, other)
        rate = next(one for one in (rate, other, default) if one is not None)
        rates[kind] = Keys({f"compress_rates.{kind}": rate}, keys.where).count(f"compress_rates.{kind}")
    return rates


def _kinds(keys: Keys) -> list[str]:
    """The kind of each layer's attention. Both keys may go on for layers that predict several tokens."""
    count, ratios = layer_count(keys), keys.raw.get("compress_ratios")
    kinds = [HEAVY if at < FIRST_HEAVY or at % 2 == 0 else SPARSE for at in range(count)]
    if ratios is not None:
        good = isinstance(ratios, list) and len(ratios) >= count
        if not good or any(type(ratio) is not int or ratio not in KINDS for ratio in ratios):
            known = " or ".join(map(str, KINDS))
            raise ValueError(f"{keys.where}: compress_ratios is {ratios!r}, expected {known} for every layer")
        kinds = [KINDS[ratio] for ratio in ratios[:count]]
    given = _of_layers(keys, "layer_types", tuple(KINDS.values()))
    if given and ratios is not None:
        check_agree(keys.where, "layer_types", given, "compress_ratios", kinds)
    return given or kinds


def _mlps(keys: Keys) -> list[str]:
    """The kind of each layer's MLP."""
    count, hashed = layer_count(keys), keys.raw.get("num_hash_layers")
    first = HASHED_LAYERS if hashed is None else hashed
    if type(first) is not int or first < 0:
        raise ValueError(f"{keys.where}: num_hash_layers is {first!r}, expected a whole number from 0")
    kinds = [MLPS[0] if at < first else MLPS[1] for at in range(count)]
    given = _of_layers(keys, "mlp_layer_types", MLPS)
    if given and hashed is not None:
        check_agree(keys.where, "mlp_layer_types", given, "num_hash_layers", kinds)
    return given or kinds


def _of_layers(keys: Keys, name: str, known: tuple[str, ...]) -> list[str]:
    """The value of each layer, one of `known`; empty if the key is missing."""
    count, kinds = layer_count(keys), keys.raw.get(name)
    if kinds is None:
        return []
    if not isinstance(kinds, list) or len(kinds) < count or any(kind not in known for kind in kinds[:count]):
        raise ValueError(f"{keys.where}: {name} is {kinds!r}, expected {' or '.join(known)} for every layer")
    return kinds[:count]


def _ropes(keys: Keys) -> dict[str, Rope]:
    """RoPE of layers without compressed rows, `main`, and of those with them, `compress`.

    config.json has an object with these two or, flat, the scaling of the second, with the thetas beside it.
    """
    head_dim, given = keys.count("head_dim"), keys.raw.get(NEW)
    nested = isinstance(given, dict) and all(isinstance(given.get(name), dict) for name in ("main", "compress"))
    if nested and keys.raw.get(OLD):
        raise ValueError(f"{keys.where}: {OLD} replaces the main and compress of {NEW}; remove the one that is wrong")
    if nested:
        ropes = {name: given[name] for name in ("main", "compress")}
        for name, its in ropes.items():
            for key in ("rope_theta", "partial_rotary_factor"):
                if its.get(key) is None:
                    raise ValueError(f"{keys.where}: {NEW} has no {key} for {name}")
    else:
        theta, share = keys.number("rope_theta"), _share(keys, head_dim)
        flat = merged_rope(keys.changed(partial_rotary_factor=None))
        check_agree(keys.where, "rope_theta", theta, f"{NEW}.rope_theta", flat.get("rope_theta", theta))
        check_agree(keys.where, "partial_rotary_factor", share, f"{NEW}'s", flat.get("partial_rotary_factor", share))
        compress = {**flat, "rope_theta": keys.number("compress_rope_theta"), "partial_rotary_factor": share}
        if compress.get("rope_type") == "yarn":
            compress.setdefault("attention_factor", 1.0)
        ropes = {"main": {"rope_theta": theta, "partial_rotary_factor": share}, "compress": compress}

    def read(its: dict) -> Rope:
        alone = keys.changed(**{NEW: its, OLD: None, "rope_theta": None, "partial_rotary_factor": None})
        return read_rope(alone, head_dim, partial=1.0, interleaved=True, own_scale=True)

    return {name: read(its) for name, its in ropes.items()}


def _share(keys: Keys, head_dim: int) -> float:
    """The share of a head's dimensions that is rotated."""
    given, rotated = keys.raw.get("partial_rotary_factor"), keys.raw.get("qk_rope_head_dim")
    share = keys.number("partial_rotary_factor", default=ROTATED)
    if rotated is not None:
        its = keys.count("qk_rope_head_dim")
        share = its / head_dim if given is None else share
        check_agree(keys.where, "partial_rotary_factor times head_dim", int(share * head_dim), "qk_rope_head_dim", its)
    return share


ATTENTION = {  # names of an attention's tensors, in transformers and on the hub
    "q_a": ("q_a_proj", "wq_a"),
    "q_a_norm": ("q_a_norm", "q_norm"),
    "q_b": ("q_b_proj", "wq_b"),
    "kv": ("kv_proj", "wkv"),
    "kv_norm": ("kv_norm", "kv_norm"),
    "o_a": ("o_a_proj", "wo_a"),
    "o": ("o_b_proj", "wo_b"),
    "pool.kv": ("compressor.kv_proj", "compressor.wkv"),
    "pool.gate": ("compressor.gate_proj", "compressor.wgate"),
    "pool.norm": ("compressor.kv_norm", "compressor.norm"),
    "index.q": ("compressor.indexer.q_b_proj", "indexer.wq_b"),
    "index.kv": ("compressor.indexer.kv_proj", "indexer.compressor.wkv"),
    "index.gate": ("compressor.indexer.gate_proj", "indexer.compressor.wgate"),
    "index.k_norm": ("compressor.indexer.kv_norm", "indexer.compressor.norm"),
    "index.weights": ("compressor.indexer.scorer.weights_proj", "indexer.weights_proj"),
}
PLAIN = {  # likewise, of those whose names do not end in weight
    "sinks": ("sinks", "attn_sink"),
    "pool.bias": ("compressor.position_bias", "compressor.ape"),
    "index.bias": ("compressor.indexer.position_bias", "indexer.compressor.ape"),
}
MIX = {"weights": "fn", "base": "base", "scale": "scale"}


def _names(at: int, attention: str, mlp: str, mix: str, head_mix: str) -> dict[str, str]:
    """The names of tensors. at: 0 as transformers has them, 1 as on the hub."""
    forms = {"attention": ("attn", mix), "mlp": ("ffn", mix), "output": ("head", head_mix)}
    mixes = {(name, part): form.format(of, its) for name, (of, form) in forms.items() for part, its in MIX.items()}
    return {
        **{part: f"{attention}.{names[at]}.weight" for part, names in ATTENTION.items()},
        **{part: f"{attention}.{names[at]}" for part, names in PLAIN.items()},
        **{f"{name}_mix.{part}": its for (name, part), its in mixes.items()},
        "router": f"{mlp}.gate.weight",
        "router_bias": f"{mlp}.gate.{('e_score_correction_bias', 'bias')[at]}",
        "router_table": f"{mlp}.gate.tid2eid",
    }


SHARED = {"gate": "w1", "up": "w3", "down": "w2"}
ON_HUB = {
    **_names(1, "attn", "ffn", "hc_{}_{}", "hc_{}_{}"),
    **{f"shared.{part}": f"ffn.shared_experts.{its}.weight" for part, its in SHARED.items()},
    "embedding": "embed.weight",
    "attention_norm": "attn_norm.weight",
    "mlp_norm": "ffn_norm.weight",
}
SAVED = {  # by transformers, where it writes the hub's names and they differ
    **ON_HUB,
    **{f"output_mix.{part}": f"hc_head.hc_{its}" for part, its in MIX.items()},
    "embedding": "embed_tokens.weight",
    "kv_norm": "attn.norm.weight",
}
EXPERTS = ("ffn.experts", *SHARED.values())
FAMILY = Family(
    "deepseek_v4",
    parse,
    {
        "attention_bias": False,
        "compress_rope_theta": 160_000.0,
        "eos_token_id": 1,
        "hc_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_size": 4096,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 512,
        "max_position_embeddings": 1_048_576,
        "mlp_bias": False,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 43,
        "num_key_value_heads": 1,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1024,
        "rope_theta": 10_000.0,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "vocab_size": 129_280,
    },
    names=_names(0, "self_attn", "mlp", "{}_hc.{}", "hc_{}.hc_{}"),
    layouts=(separate(*EXPERTS, names=ON_HUB), separate(*EXPERTS, names=SAVED), fused()),
    heads=("lm_head.weight", "head.weight"),
)
