"""Reading the RoPE parameters of a config.json: one object with two possible names, and keys beside it.

transformers 5 writes `rope_parameters`; `rope_scaling` and `rope_theta` are the older spelling. If both objects are
present, transformers takes `rope_scaling` and ignores the other with its theta, so the two are merged here, and refused
if that would make a difference. layers/rope.py computes the angles.
"""

from .config_keys import MAX_NUMBER, Keys, check_agree
from .layers.rope import LongRope, Rope, Stretch, YarnScaling, magnitude

DEFAULT_THETA = 1e4  # for architectures without a default of their own
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
TYPES = ("default", "linear", "yarn")  # that all families have but those that say else
FACTORS = {"proportional": 1.0}  # of a scaling type, where config.json may leave it out
NEW, OLD = "rope_parameters", "rope_scaling"


def read_rope(
    keys: Keys,
    head_dim: int,
    *,
    of: int = 0,
    partial: float | None = None,
    interleaved: bool = False,
    scales_softmax: bool = False,
    ntk_alpha: bool = False,
    types: tuple[str, ...] = TYPES,
    own_scale: bool = False,
) -> Rope:
    """Read the RoPE parameters of attention heads with `head_dim` dimensions to which RoPE may apply.

    of: size of the whole head, if larger; partial: the default share of head_dim that is rotated, None if it is always
    all; scales_softmax: whether the architecture applies a scaling type's factor to the softmax; ntk_alpha: whether it
    has type dynamic with a fixed alpha; types: the scaling types that it has; own_scale: whether type yarn may have an
    attention_factor. Raises ValueError for an unsupported type and for spellings that disagree.
    """
    rope, where = _merged(keys), keys.where
    scaling = rope.any("rope_type", "type", default="default")
    theta = rope.number("rope_theta", default=_default_theta(keys))
    if ntk_alpha and scaling == "dynamic" and rope.raw.get("alpha") and head_dim > 2:
        theta *= rope.number("alpha") ** (head_dim / (head_dim - 2))
        scaling = "default"
    if scaling not in types:
        raise ValueError(f"{where}: rope type {scaling!r} is not supported; supported are {', '.join(types)}")
    share = rope.number("partial_rotary_factor", default=1.0 if partial is None else partial)
    if of and share == head_dim / of:
        share = 1.0
    if (partial is None and scaling != "proportional" and share != 1.0) or not 0 < share <= 1:
        raise ValueError(f"{where}: partial_rotary_factor other than 1 is not supported for {keys.kind}, found {share}")
    factor = 1.0 if scaling in ("default", "longrope") else rope.number("factor", default=FACTORS.get(scaling))
    if theta <= 0 or factor <= 0:
        raise ValueError(f"{where}: rope_theta and factor must be above 0, found {theta} and {factor}")
    values = {"dim": int(head_dim * share), "theta": theta, "interleaved": interleaved}
    if scaling == "proportional":  # the first pairs of all of head_dim's, with the angles that they have there
        values |= {"dim": 2 * int(head_dim * share // 2), "of": head_dim}
    mscale = rope.number("mscale_all_dim", default=0.0) if scales_softmax and scaling != "default" else 0.0
    if mscale:
        values["softmax_factor"] = magnitude(factor, mscale) ** 2
    if scaling == "longrope":
        return Rope(**values, long=_long_rope(rope, values["dim"] // 2, keys.count("max_position_embeddings")))
    if scaling == "yarn":
        return Rope(**values, yarn=_yarn(rope, theta, factor, keys.count("max_position_embeddings"), own_scale))
    return Rope(**values, factor=factor)


def rope_number(keys: Keys, name: str, default: float) -> float:
    """A number among the RoPE parameters, for keys that only one family has."""
    return _merged(keys).number(name, default=default)


def rope_count(keys: Keys, name: str, default: int) -> int:
    """An integer from 1 among the RoPE parameters, likewise."""
    return _merged(keys).count(name, default=default)


def merged_rope(keys: Keys) -> dict:
    """All RoPE parameters of a config.json as one object, with the theta beside it, if there is one."""
    return _merged(keys).raw


def _yarn(rope: Keys, theta: float, factor: float, context: int, own_scale: bool) -> YarnScaling:
    given = rope.raw.get("attention_factor") is not None
    if given and not own_scale:
        raise ValueError(f"{rope.where}: attention_factor of rope type yarn is not supported; leave it out")
    yarn = YarnScaling(
        factor,
        rope.count("original_max_position_embeddings", default=context),
        *(rope.number(key, default=default) for key, default in YARN_DEFAULTS.items()),
        truncate=rope.flag("truncate", True),
        own_scale=rope.above_zero("attention_factor") if given else 0.0,
    )
    if yarn.beta_fast <= 0 or yarn.beta_slow <= 0 or theta <= 1:
        raise ValueError(f"{rope.where}: rope type yarn needs beta_fast and beta_slow above 0 and rope_theta above 1")
    return yarn


def _long_rope(rope: Keys, pairs: int, context: int) -> LongRope:
    def stretch(length: str) -> Stretch:
        key = f"{length}_factor"
        factors = rope.any(key)
        if not isinstance(factors, list) or len(factors) != pairs:
            found = f"{len(factors)} values" if isinstance(factors, list) else repr(factors)
            wanted = f"a list of {pairs} numbers, one for each pair of dimensions that is turned"
            raise ValueError(f"{rope.where}: {key} is {found}, expected {wanted}")
        for factor in factors:
            if type(factor) not in (int, float) or not 0 < factor <= MAX_NUMBER:
                raise ValueError(f"{rope.where}: {key} has {factor!r}, expected numbers above 0 to {MAX_NUMBER:g}")
        return Stretch(tuple(map(float, factors)), rope.above_zero(f"{length}_mscale"))

    original = rope.count("original_max_position_embeddings", default=context)
    return LongRope(original, stretch("short"), stretch("long"))


def _merged(keys: Keys) -> Keys:
    """All RoPE parameters of a config.json as one object."""
    where, new, old = keys.where, _object(keys, NEW), _object(keys, OLD)
    for key in new.keys() & old.keys():
        if key != "rope_type" or new[key] != "default":  # the default type has no scaling that could disagree
            check_agree(where, f"{NEW}.{key}", new[key], f"{OLD}.{key}", old[key])
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if (beside := keys.raw.get(key)) is not None:
            for name, its in ((NEW, new), (OLD, old)):
                check_agree(where, key, beside, f"{name}.{key}", its.get(key, beside))
            new.setdefault(key, beside)
    theta = keys.any("rope_theta", default=_default_theta(keys))  # belongs to the old object
    if old and "rope_theta" not in old and new.get("rope_theta", theta) != theta:
        raise ValueError(
            f"{where}: {OLD} replaces {NEW}, but rope_theta {new['rope_theta']!r} is in {NEW} alone; "
            f"write all of it into {NEW}"
        )
    rope = {**new, **old}
    return Keys(rope, where)


def _default_theta(keys: Keys) -> float:
    return keys.defaults.get("rope_theta", DEFAULT_THETA)


def _object(keys: Keys, name: str) -> dict:
    """One of the two objects, without nulls, and with `type` renamed to `rope_type`."""
    value = keys.raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{keys.where}: {name} is {value!r}, expected an object")
    if nested := [key for key, its in value.items() if isinstance(its, dict)]:
        raise ValueError(f"{keys.where}: {name} has an object for {nested[0]!r}; one for all layers is supported")
    value = {key: its for key, its in value.items() if its is not None}
    if "type" in value:
        kind = value.pop("type")
        check_agree(keys.where, f"{name}.rope_type", value.setdefault("rope_type", kind), f"{name}.type", kind)
    return value
