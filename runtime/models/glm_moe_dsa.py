"""GLM-5: DeepSeek-V3.2's layers at another size; some attend to the positions that a layer before has chosen."""

from dataclasses import replace

from ..config import ModelConfig
from ..config_keys import Keys
from .family import Family, dense_by_type, experts_and_shared, grouped_router, layer_count, model, sparse_latent, stack

KINDS = {"F": "full", "S": "shared"}  # the letters of index_topk_pattern

DEFAULTS = {
    "eos_token_id": 1,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 2048,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 2048,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
}


def parse(keys: Keys) -> ModelConfig:
    full = sparse_latent(keys, interleaved=True)
    attention = [full if kind == "full" else replace(full, indexer=None) for kind in indexer_types(keys)]
    routed = experts_and_shared(keys, grouped_router(keys))
    return model(keys, stack(keys, attention, routed, dense_by_type(keys, first=3)))


def indexer_types(keys: Keys) -> list[str]:
    """Whether each layer has an indexer (full) or not (shared): a list, a pattern or a period, the first that is there.

    With index_topk_freq, every freq-th layer has one, counted from layer index_skip_topk_offset - 1, and all before.
    """
    count, key = layer_count(keys), "indexer_types"
    kinds = keys.raw.get(key)
    if kinds is None and (kinds := keys.raw.get("index_topk_pattern")) is not None:
        key = "index_topk_pattern"
        kinds = [KINDS.get(letter, letter) for letter in kinds] if isinstance(kinds, str) else kinds
    if kinds is None:
        every, first = keys.any("index_topk_freq", default=1), keys.any("index_skip_topk_offset", default=2)
        for name, value in (("index_topk_freq", every), ("index_skip_topk_offset", first)):
            if type(value) is not int or value < 0:
                raise ValueError(f"{keys.where}: {name} is {value!r}, expected a whole number from 0")
        passed = (max(layer - first + 1, 0) for layer in range(count))
        return ["shared" if past % max(every, 1) else "full" for past in passed]
    if not isinstance(kinds, list) or len(kinds) < count or any(kind not in KINDS.values() for kind in kinds):
        raise ValueError(f"{keys.where}: {key} is {keys.raw[key]!r}, expected full or shared for every layer")
    if kinds[0] == "shared":
        raise ValueError(f"{keys.where}: {key} is shared for layer 0, which no layer precedes that chooses positions")
    return kinds[:count]


FAMILY = Family("glm_moe_dsa", parse, DEFAULTS)
