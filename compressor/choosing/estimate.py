"""Memory plans for models that are not compressed, or not even downloaded, from the shapes in their config.json."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import numpy as np

from ... import _core
from ...devices.probe import default_threads
from ...runtime.bundle import Bundle
from ...runtime.bundle_records import part_shapes
from ...runtime.child import answer
from ...runtime.config import ModelConfig, trunk_shapes
from ...runtime.config_file import parse_config, read_json
from ...runtime.device import device_name
from ...runtime.engine_config import KV_TYPES
from ...runtime.mlx.memory import widened_bytes
from ...runtime.model_path import raise_if_other_format
from ...runtime.plan import Plan, check_sequences, make_plan, resolve_ram
from ...runtime.runtime import DEFAULT_CONTEXT
from ...runtime.tokenizer import tokenizer_of
from ..rounding.quantise import largest_group
from ..source.quantisation import quantisation_of, scale_blocks
from ..source.small_files import small_files
from . import targets
from .sizes import (
    EDGES,
    GROUP,
    RECIPES,
    TRUNK_WIDTH,
    Part,
    Sizes,
    mixed_sizes,
    packed_sizes,
    sizes_by_bits,
    widths_by_kind,
)

Options = ParamSpec("Options")
SHOWN_BITS = (2.0, 2.5, 3.0, 3.5, 4.5)  # the rows of the comparison at one cap
COMMAND_LINE_BYTES = 14_000_000  # upper bound of what the command line adds to the library: typer and pydantic
MLX_BYTES = 10_000_000  # of its library, once it is imported
RING_BYTES = 36_000_000  # of its ring of processes, for which 34.7 MB were measured
TABLE_BYTES, RECORD_BYTES = 2_500_000, 1_200  # memory for reading bundle.json: in all, and for each expert; 4.7 MB were
#                                               measured for 2,000 experts


@dataclass(frozen=True, slots=True)
class Estimate:
    """A plan and the bytes that its tokens read; without a bundle, also the parts and the largest contexts."""

    plan: Plan
    layers: int
    bits: float  # mean bits of an expert weight, scales, biases and padding included
    trunk_bits: float  # the same for the trunk
    trunk_read_bytes: int  # read per token: the trunk without the other rows of the embedding
    disk_bytes: int  # of the bundle without its tables
    hit_rate: float  # expected share of expert uses that find the expert in memory
    calibrated: bool  # whether the hit rate is from calibration's frequencies; else uniform use is assumed
    parts: tuple[Part, ...] = ()  # this and the following fields are empty for a bundle
    largest_context: int = 0  # the maximum of tokens at which the floor is within the cap; 0: not even one
    largest_resident_context: int = 0  # the same with every expert in memory
    assumed: str = ""  # what the sizes assume
    others: tuple["Estimate", ...] = ()  # the same cap at SHOWN_BITS

    def __str__(self) -> str:
        return str(self.plan)

    def as_dict(self) -> dict:
        """The plan's keys, the sizes and the hit rate; without a bundle, also `parts` and the largest contexts."""
        more = {
            "parts": [part.as_dict() for part in self.parts],
            "largest_context": self.largest_context,
            "largest_resident_context": self.largest_resident_context,
        }
        known = {
            "bits_per_weight": self.bits,
            "disk_bytes": self.disk_bytes,
            "expected_hit_rate": self.hit_rate,
            "calibrated": self.calibrated,
        }
        return self.plan.as_dict() | known | (more if self.parts else {})


def _on_small_files(function: Callable[Options, "Estimate"]) -> Callable[Options, "Estimate"]:
    """The function called with the directory of a model's small files instead of what names the model."""

    @wraps(function)
    def called(model: str | Path, *arguments, **options) -> Estimate:
        with small_files(model) as path:
            return function(path, *arguments, **options)

    return called


@_on_small_files
def estimate(
    model: str | Path,
    ram: int | str = "auto",
    *,
    context: int | None = None,
    bits: float | None = None,
    size: int | str | None = None,
    width: int | None = None,
    widths: dict[str, int] | None = None,
    trunk_width: int | None = None,
    keep_experts: int | float | None = None,
    recipe: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    kv: str = KV_TYPES[0],
    sequences: int = 1,
) -> Estimate:
    """The plan of a bundle, a checkpoint's directory or a config.json; a plan below its floor is returned, not refused.

    Options that a bundle does not take: bits and size, as for compress(), with the same default of 2.5 bits; width,
    trunk_width and widths, in bits, as for widths_by_kind(); recipe, the name of a published mix, instead of these;
    keep_experts, the number of experts that a layer keeps or, as a float, their share. sequences: conversations, each
    with its own KV cache, as for Runtime(). device: where the model would run; a GPU is assumed to share the
    processor's memory, and what its driver takes is not in the plan. The interpreter's memory is that of this process,
    including the tokenizer if there is one. Raises ValueError for bad options, and what reading the config or the
    bundle raises.
    """
    path = Path(model)
    choices = {"bits": bits, "size": size, "width": width, "widths": widths, "trunk_width": trunk_width}
    choices["recipe"] = recipe
    given = [name for name, value in {**choices, "keep_experts": keep_experts}.items() if value is not None]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such bundle, model directory or config.json")
    bundle = Bundle.open(path, parts=True) if (path / "bundle.json").is_file() else None
    if bundle and given:
        raise ValueError(f"{path}: a bundle has its widths and experts already; leave {given[0]} out")
    ranks = bundle.part.count if bundle and bundle.part else 1
    if ranks > 1 and device_name(device) != "mlx":
        raise ValueError(f"{path}: is {bundle.part}, of a bundle, which device mlx runs; plan it with --device mlx")
    config = bundle.sizes if bundle else _config_of(path, keep_experts)
    sizes, assumed = _bundle_sizes(bundle) if bundle else _config_sizes(config, str(path), **choices)
    context = min(DEFAULT_CONTEXT, config.context) if context is None else context
    if not 1 <= context <= config.context:
        raise ValueError(f"context is {context}, expected 1 to {config.context}, the model's own")
    check_sequences(sequences)
    tokenizer = tokenizer_of(path)
    table_bytes = 0 if bundle else TABLE_BYTES + RECORD_BYTES * config.expert_count
    fixed = {
        "ram_bytes": resolve_ram(ram),
        "interpreter_bytes": _core.resident_bytes() + table_bytes + _mlx_bytes(device_name(device), ranks),
        "threads": threads or default_threads(),
        "kv": kv,
        "device": device_name(device),
        "sequences": sequences,
        "logits_rows": sequences,
        "ranks": ranks,
        "refuse": False,
    }
    del tokenizer  # its memory has been counted

    def plan(sizes: Sizes, context: int) -> Plan:
        names = ("trunk_bytes", "all_experts_bytes", "slot_bytes", "table_bytes")
        each = {name: getattr(sizes, name) for name in names}
        if fixed["device"] == "mlx":
            weights = sum(math.prod(shape) for shape in trunk_shapes(config).values())
            each["trunk_bytes"] += widened_bytes(bundle.trunk) if bundle else weights // 8  # in groups of 64
        return make_plan(config, context=context, **each, **fixed)

    def made(sizes: Sizes, **more) -> Estimate:
        planned = plan(sizes, context)
        return Estimate(planned, **_about(config, sizes, planned, bundle), **more)

    if bundle:
        return made(sizes)

    def largest(needed: str) -> int:
        """The maximum context at which the plan's field `needed`, which grows with the context, is within the cap."""
        counts = range(1, config.context + 1)
        return bisect_left(counts, True, key=lambda n: getattr(plan(sizes, n), needed) > fixed["ram_bytes"])

    others = ()
    if recipe is None and largest_group(GROUP, config.dim, config.expert_hidden):
        others = tuple(made(mixed_sizes(config, each, trunk_width or TRUNK_WIDTH)) for each in SHOWN_BITS)
    contexts = {"largest_context": largest("floor_bytes"), "largest_resident_context": largest("resident_bytes")}
    return made(sizes, parts=sizes.parts, assumed=assumed, others=others, **contexts)


def _mlx_bytes(device: str, ranks: int) -> int:
    """Bytes of memory that MLX takes for itself."""
    return (MLX_BYTES + (RING_BYTES if ranks > 1 else 0)) if device == "mlx" else 0


def _about(config: ModelConfig, sizes: Sizes, plan: Plan, bundle: Bundle | None) -> dict:
    """The fields of Estimate that follow from the sizes and the plan."""
    shapes = part_shapes(bundle.config, bundle.part) if bundle else trunk_shapes(config)
    embedding, dim = shapes.get("embedding", (1, config.dim))
    weights = sum(math.prod(shape) for shape in shapes.values())
    bits = 8 * sizes.trunk_bytes / weights
    is_read = config.tied_head and (bundle is None or bundle.part is None or bundle.part.is_last)
    unread = 0 if is_read else round((embedding - 1) * dim * bits / 8)
    frequency = np.array([expert.frequency for expert in bundle.experts.values()]) if bundle else np.zeros(0)
    calibrated = bool(frequency.any())
    share = plan.experts_bytes / plan.all_experts_bytes
    return {
        "layers": config.layer_count,
        "bits": 8 * sizes.all_experts_bytes / (config.expert_count * config.expert_weights),
        "trunk_bits": bits,
        "trunk_read_bytes": sizes.trunk_bytes - unread,
        "disk_bytes": sizes.trunk_bytes + sizes.all_experts_bytes + sizes.table_bytes,
        "hit_rate": _hits_of_most_used(bundle, frequency, plan.experts_bytes) if calibrated else share,
        "calibrated": calibrated,
    }


def _hits_of_most_used(bundle: Bundle, frequency: np.ndarray, room_bytes: int) -> float:
    """Hit rate if the most used records, as many as fit into room_bytes, are in memory.

    frequency: (experts of all layers,), the share of routing choices of the expert's layer.
    """
    uses = frequency * [bundle.config.top_k_of(expert.layer) for expert in bundle.experts.values()]
    nbytes = np.array([expert.nbytes for expert in bundle.experts.values()])
    order = np.argsort(-uses / nbytes, kind="stable")
    fits = np.cumsum(nbytes[order]) <= room_bytes
    return float(uses[order][fits].sum() / uses.sum())


def keep_experts_of(config: ModelConfig, keep: int | float) -> ModelConfig:
    """The config with `keep` experts a layer or, if `keep` is a float, with that share of them, rounded up.

    Raises ValueError for fewer than top_k or more than the model has.
    """
    is_share = isinstance(keep, float) and 0 < keep <= 1
    count = math.ceil(keep * config.experts - 1e-9) if is_share else keep
    if isinstance(keep, float) != is_share or not config.top_k <= count <= config.experts:
        raise ValueError(
            f"keep_experts is {keep}, expected {config.top_k}, which a token uses, to {config.experts}, "
            "or a share of them such as 0.75"
        )
    kept = tuple(range(count))
    return replace(config, kept=tuple(kept if config.has_experts(layer) else () for layer in range(config.layer_count)))


def _bundle_sizes(bundle: Bundle) -> tuple[Sizes, str]:
    slot_bytes = max(expert.nbytes for expert in bundle.experts.values())
    return Sizes((), bundle.trunk_bytes, bundle.expert_bytes, slot_bytes, bundle.table_bytes), ""


def _config_of(path: Path, keep_experts: int | float | None) -> ModelConfig:
    """The model's config, with its experts reduced to keep_experts."""
    file = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise_if_other_format(path)
    raw = read_json(file)
    scale_blocks(quantisation_of(file.parent, raw), str(file))
    config = parse_config(raw, where=str(file))
    return config if keep_experts is None else keep_experts_of(config, keep_experts)


def _config_sizes(
    config: ModelConfig, where: str, *, bits: float | None, size: int | str | None, recipe: str | None, **widths
) -> tuple[Sizes, str]:
    """The sizes of a model that is not compressed yet, and what they assume."""
    if recipe is not None:
        sizes = _recipe_sizes(config, recipe, {"bits": bits, "size": size, **widths})
        assumed = f"the bits a weight of the published mix {recipe!r}, which is another format"
    elif bits is not None or size is not None or (widths["width"] is None and widths["widths"] is None):
        sizes, assumed = _sizes_as_compressed(config, bits, size, widths, where)
    else:
        chosen = widths_by_kind(widths["width"], widths["trunk_width"], widths["widths"])
        sizes = packed_sizes(config, chosen, where)
        told = [part.name for part in sizes.parts if part.name in chosen]
        told += [edge for edge in EDGES if chosen[edge] != chosen[edge.removeprefix("edge_")]]
        assumed = "widths " + ", ".join(f"{name} {chosen[name]}" for name in told)
    experts = config.experts_of(config.moe_layers[0])
    return sizes, f"computed from the config: {assumed}; {experts} of {config.experts} experts a layer"


def _sizes_as_compressed(
    config: ModelConfig, bits: float | None, size: int | str | None, widths: dict, where: str
) -> tuple[Sizes, str]:
    """The sizes that compress() aims at with bits or size before it measures, and what they assume."""
    if given := [name for name in ("width", "widths") if widths[name] is not None]:
        raise ValueError(f"bits and size apply to all experts together; leave {given[0]} out")
    asked = targets.check(targets.Options(bits=bits, size=size, trunk_width=widths["trunk_width"]), config)
    if asked.bits == 16:
        return packed_sizes(config, widths_by_kind(16), where), "all weights as they are"
    trunk_width = widths["trunk_width"] or TRUNK_WIDTH
    bits = asked.bits or _bits_within(config, asked.size, trunk_width)
    told = f"{bits:.3g} bits of an expert weight, {trunk_width} bits of all others"
    return mixed_sizes(config, bits, trunk_width), told + ("" if widths["trunk_width"] else " at the most")


def _bits_within(config: ModelConfig, size_bytes: int, trunk_width: int) -> float:
    """Bits of an expert weight in a bundle of size_bytes, tables included."""
    entries = len(trunk_shapes(config)) + config.expert_count
    least = mixed_sizes(config, 1, trunk_width)
    fixed = least.trunk_bytes + least.table_bytes + targets.TABLE_BYTES * entries + targets.OTHER_BYTES
    bits = 8 * (size_bytes - fixed) / (config.expert_weights * config.expert_count)
    least = targets.true_bits(config, (1, 1, 1), largest_group(128, config.dim, config.expert_hidden))
    if bits < least:
        experts = math.ceil(least * config.expert_weights * config.expert_count / 8)
        raise ValueError(
            f"size is {size_bytes:,} bytes, expected at least {fixed + experts:,}: {experts:,} for experts of width 1 "
            f"and {fixed:,} for the rest; raise it, lower trunk_width, or keep fewer experts"
        )
    return min(bits, 16)


def _recipe_sizes(config: ModelConfig, recipe: str, widths: dict) -> Sizes:
    if given := [name for name, value in widths.items() if value is not None]:
        raise ValueError(f"recipe {recipe!r} has its own widths; leave {given[0]} out")
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}, expected one of {', '.join(RECIPES)}")
    architecture, bits_of = RECIPES[recipe]
    if config.architecture != architecture:
        raise ValueError(f"recipe {recipe!r} is for {architecture}, the model is {config.architecture}")
    return sizes_by_bits(config, bits_of)


def _rest_bytes(model: str, context: int | None) -> int:
    """Bytes of memory that running the model from the command line takes in addition to experts and trunk."""
    plan = estimate(model, "1000TB", context=context, width=1).plan
    return plan.resident_bytes - plan.all_experts_bytes - plan.trunk_bytes + COMMAND_LINE_BYTES


if __name__ == "__main__":
    answer(_rest_bytes)
