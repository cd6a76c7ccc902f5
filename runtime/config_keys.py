"""Typed access to the keys of one config.json: what an absent key means, and which values are refused."""

MAX_NUMBER = 1e30  # beyond any model; a damaged file stops here
DEFAULTS = {  # of transformers' config classes: what a key that is absent means; null is not absent
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "eos_token_id": 2},
    "olmoe": {"rms_norm_eps": 1e-5, "norm_topk_prob": False, "eos_token_id": 50279},
    "qwen2_moe": {"num_key_value_heads": 16, "norm_topk_prob": False, "qkv_bias": True, "decoder_sparse_step": 1},
    "qwen3_moe": {"num_key_value_heads": 4, "norm_topk_prob": False, "decoder_sparse_step": 1},
    "deepseek_v3": {
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "q_lora_rank": 1536,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
    },
}
COMMON_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


class Keys:
    """The keys of one object of a config.json, read by name and checked.

    A key may have several names. Names that are given together must agree: which of them counts differs between
    versions of transformers.
    """

    def __init__(self, raw: dict, where: str, defaults: dict | None = None):
        self.raw, self.where, self.defaults = raw, where, defaults or {}

    def any(self, *names, default=None):
        given = [name for name in names if self.raw.get(name) is not None]
        for name in given[1:]:
            check_agree(self.where, given[0], self.raw[given[0]], name, self.raw[name])
        if given:
            return self.raw[given[0]]
        if names[0] in self.defaults and (default is None or names[0] not in self.raw):
            return self.defaults[names[0]]
        if default is None:
            raise ValueError(f"{self.where}: key {' or '.join(repr(name) for name in names)} is missing")
        return default

    def nullable(self, name: str):
        """The value as it is: None where it is null, or absent and without a default."""
        return self.raw.get(name, self.defaults.get(name))

    def count(self, *names, default=None, limit=2**31 - 1) -> int:
        value = self.any(*names, default=default)
        if type(value) is not int or not 0 < value <= limit:
            raise ValueError(f"{self.where}: {names[0]} is {value!r}, expected a whole number from 1 to {limit:,}")
        return value

    def number(self, *names, default=None) -> float:
        value = self.any(*names, default=default)
        if type(value) not in (int, float) or not 0 <= value <= MAX_NUMBER:
            raise ValueError(f"{self.where}: {names[0]} is {value!r}, expected a number from 0 to {MAX_NUMBER:g}")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.any(name, default=default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {name} is {value!r}, expected true or false")
        return value


def keys_of(kind: str, raw: dict, where: str) -> Keys:
    """The keys of a model's config.json; shapes have no defaults here, so a model without them is refused by name."""
    return Keys(raw, where, {**COMMON_DEFAULTS, **DEFAULTS[kind]})


def check_agree(where: str, name: str, value, other: str, other_value) -> None:
    """Raise ValueError where two spellings of one key have two values."""
    if value != other_value:
        raise ValueError(
            f"{where}: {name} is {value!r} and {other} is {other_value!r}, two spellings of one key; "
            "remove the one that is wrong"
        )
