"""Rotary position as config.json has it: one object of two names, and keys beside it.

transformers 5 writes `rope_parameters`; the hub's `rope_scaling` and `rope_theta` are older. Where both objects are
there transformers takes `rope_scaling` and forgets the other with its theta, so the two are read together here and
refused where that would make a difference. Angles are computed in rope.py.
"""

from dataclasses import dataclass

from .config_keys import Keys, check_agree

DEFAULT_THETA = 1e4  # where the architecture has none of its own
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
NEW, OLD = "rope_parameters", "rope_scaling"


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): how rotary angles are stretched beyond the context that was trained first."""

    factor: float
    original_context: int  # tokens
    beta_fast: float  # turns within original_context from which on an angle is left as it is
    beta_slow: float  # turns up to which it is divided by factor
    mscale: float  # how much the factor adds to keys and queries; 0 is not given
    mscale_all_dim: float  # likewise, but to all of their dimensions: by the scale of the softmax


@dataclass(frozen=True, slots=True)
class Rope:
    """Base and scaling of the angles. `factor` and `mscale_all_dim` are those of linear scaling."""

    theta: float
    factor: float = 1.0
    mscale_all_dim: float = 0.0
    yarn: YarnScaling | None = None


def read_rope(keys: Keys, kind: str, context: int) -> Rope:
    """Read the rotary position of an architecture. context: the model's, in tokens.

    Raises ValueError for a type that is not supported and for spellings that disagree.
    """
    rope = _merged(keys)
    deepseek = kind == "deepseek_v3"
    scaling = rope.any("rope_type", "type", default="default")
    supported = ("default", "linear", "yarn") if deepseek else ("default", "linear")
    if scaling not in supported:
        raise ValueError(f"{keys.where}: rope type {scaling!r} is not supported; supported are {', '.join(supported)}")
    if rope.number("partial_rotary_factor", default=1.0) != 1.0:
        raise ValueError(f"{keys.where}: partial_rotary_factor other than 1 is not supported")
    factor = 1.0 if scaling == "default" else rope.number("factor")
    theta = rope.number("rope_theta", default=_default_theta(keys))
    if theta <= 0 or factor <= 0:
        raise ValueError(f"{keys.where}: rope_theta and factor must be above 0, found {theta} and {factor}")
    if scaling == "yarn":
        return Rope(theta, yarn=_yarn(rope, theta, factor, context))
    # transformers' deepseek_v3 applies it for every type but the default one, the others for none
    applies = deepseek and scaling == "linear"
    return Rope(theta, factor, rope.number("mscale_all_dim", default=0.0) if applies else 0.0)


def _yarn(rope: Keys, theta: float, factor: float, context: int) -> YarnScaling:
    for key, only in (("attention_factor", None), ("truncate", True)):
        if rope.raw.get(key, only) not in (only, None):
            raise ValueError(f"{rope.where}: {key} of rope type yarn is not supported; leave it out")
    yarn = YarnScaling(
        factor,
        rope.count("original_max_position_embeddings", default=context),
        *(rope.number(key, default=default) for key, default in YARN_DEFAULTS.items()),
    )
    if yarn.beta_fast <= 0 or yarn.beta_slow <= 0 or theta <= 1:
        raise ValueError(f"{rope.where}: rope type yarn needs beta_fast and beta_slow above 0 and rope_theta above 1")
    return yarn


def _merged(keys: Keys) -> Keys:
    """All that is said of rotary position, as one object."""
    where, new, old = keys.where, _object(keys, NEW), _object(keys, OLD)
    for key in new.keys() & old.keys():
        if key != "rope_type" or new[key] != "default":  # which names no scaling to disagree with
            check_agree(where, f"{NEW}.{key}", new[key], f"{OLD}.{key}", old[key])
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if (beside := keys.raw.get(key)) is not None:
            for name, its in ((NEW, new), (OLD, old)):
                check_agree(where, key, beside, f"{name}.{key}", its.get(key, beside))
            new.setdefault(key, beside)
    theta = keys.any("rope_theta", default=_default_theta(keys))  # that goes with the old object
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
    """One of the two objects without its nulls, `type` spelled `rope_type`."""
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
