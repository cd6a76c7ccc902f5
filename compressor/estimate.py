"""The plan of a model that is not compressed, or not even downloaded yet: its config.json says every size."""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from edge_moe import _core
from edge_moe.compressor.sizes import EDGES, RECIPES, Part, Sizes, packed_sizes, sizes_by_bits, widths_by_kind
from edge_moe.compressor.source_formats import scale_blocks
from edge_moe.devices.probe import default_threads
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config import ModelConfig, parse_config, read_json
from edge_moe.runtime.device import device_name
from edge_moe.runtime.model_path import check_quantised, find_model, raise_if_other_format
from edge_moe.runtime.plan import KV_TYPES, Plan, make_plan, resolve_ram
from edge_moe.runtime.runtime import DEFAULT_CONTEXT
from edge_moe.runtime.tokenizer import tokenizer_of

TABLE_BYTES, RECORD_BYTES = 2_000_000, 1_000  # of memory that reading bundle.json takes: 8 MB more for 12,000 experts


@dataclass(frozen=True, slots=True)
class Estimate:
    """A plan, and for what is not a bundle yet its parts and how long a context the cap allows."""

    plan: Plan
    parts: tuple[Part, ...] = ()  # none for a bundle, nor the rest
    largest_context: int = 0  # tokens with which the plan is not below its floor; 0: with none
    largest_resident_context: int = 0  # tokens with which, besides, every expert is in memory
    assumed: str = ""  # what was taken for granted

    def as_dict(self) -> dict:
        """The plan's keys, and for what is not a bundle yet `parts` and both contexts."""
        more = {
            "parts": [part.as_dict() for part in self.parts],
            "largest_context": self.largest_context,
            "largest_resident_context": self.largest_resident_context,
        }
        return self.plan.as_dict() | (more if self.parts else {})


def estimate(
    model: str | Path,
    ram: int | str = "auto",
    *,
    context: int | None = None,
    width: int | None = None,
    widths: dict[str, int] | None = None,
    trunk_width: int | None = None,
    keep_experts: int | float | None = None,
    recipe: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    kv: str = KV_TYPES[0],
) -> Estimate:
    """The plan of a bundle, a checkpoint's directory or a config.json; a plan below its floor is returned, not refused.

    Of what is not a bundle yet: width, trunk_width and widths are bits as widths_by_kind() takes them; recipe: instead,
    a published mix by name; keep_experts: how many a layer keeps, or as a float their share. device: where it would be
    computed; a GPU is one that shares the processor's memory, and what its driver takes is not in the plan. The
    interpreter counts as it is in this process, with the tokenizer where there is one. Raises ValueError for bad
    options and what reading the config or the bundle raises.
    """
    path = find_model(model)
    choices = {"width": width, "widths": widths, "trunk_width": trunk_width, "recipe": recipe}
    given = [name for name, value in {**choices, "keep_experts": keep_experts}.items() if value is not None]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such bundle, model directory or config.json")
    is_bundle = (path / "bundle.json").is_file()
    if is_bundle:
        if given:
            raise ValueError(f"{path}: a bundle has its widths and experts already; leave {given[0]} out")
        config, sizes, assumed = *_bundle_sizes(path), ""
    else:
        config, sizes, assumed = _config_sizes(path, keep_experts, **choices)
    context = min(DEFAULT_CONTEXT, config.context) if context is None else context
    if not 1 <= context <= config.context:
        raise ValueError(f"context is {context}, expected 1 to {config.context}, the model's own")
    tokenizer = tokenizer_of(path)
    plan_with = partial(
        make_plan,
        config,
        trunk_bytes=sizes.trunk_bytes,
        all_experts_bytes=sizes.all_experts_bytes,
        slot_bytes=sizes.slot_bytes,
        ram_bytes=resolve_ram(ram),
        interpreter_bytes=_core.resident_bytes()
        + (0 if is_bundle else TABLE_BYTES + RECORD_BYTES * config.expert_count),
        threads=threads or default_threads(),
        kv=kv,
        device=device_name(device),
        refuse=False,
    )
    del tokenizer  # counted
    plan = plan_with(context=context)
    if is_bundle:
        return Estimate(plan)

    def largest(needed: str) -> int:
        """The most tokens with which the plan's field `needed` is within the cap; it grows with them."""
        counts = range(1, config.context + 1)
        return bisect_left(counts, True, key=lambda n: getattr(plan_with(context=n), needed) > plan.ram_bytes)

    return Estimate(plan, sizes.parts, largest("floor_bytes"), largest("resident_bytes"), assumed)


def keep_experts_of(config: ModelConfig, keep: int | float) -> ModelConfig:
    """The model with so many experts a layer, or with that share of them if `keep` is a float, rounded up.

    Raises ValueError for fewer than a token uses or more than there are.
    """
    is_share = isinstance(keep, float) and 0 < keep <= 1
    count = math.ceil(keep * config.experts - 1e-9) if is_share else keep
    if isinstance(keep, float) != is_share or not config.top_k <= count <= config.experts:
        raise ValueError(
            f"keep_experts is {keep}, expected {config.top_k}, which a token uses, to {config.experts}, "
            "or a share of them as 0.75"
        )
    kept = tuple(range(count))
    return replace(config, kept=tuple(() if layer in config.dense_layers else kept for layer in range(config.layers)))


def _bundle_sizes(path: Path) -> tuple[ModelConfig, Sizes]:
    bundle = Bundle.open(path)
    slot_bytes = max(expert.nbytes for expert in bundle.experts.values())
    return bundle.config, Sizes((), bundle.trunk_bytes, bundle.expert_bytes, slot_bytes)


def _config_sizes(
    path: Path, keep_experts: int | float | None, *, recipe: str | None, **widths
) -> tuple[ModelConfig, Sizes, str]:
    """The model as it would be, its sizes, and what was assumed."""
    file = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise_if_other_format(path)
    raw = read_json(file)
    check_quantised(raw, str(file))
    scale_blocks(raw.get("quantization_config"), str(file))
    config = parse_config(raw, where=str(file))
    if keep_experts is not None:
        config = keep_experts_of(config, keep_experts)
    if recipe is None:
        chosen = widths_by_kind(widths["width"], widths["trunk_width"], widths["widths"])
        sizes = packed_sizes(config, chosen, str(file))
        told = [part.name for part in sizes.parts if part.name in chosen]
        told += [edge for edge in EDGES if chosen[edge] != chosen[edge.removeprefix("edge_")]]
        assumed = "widths " + ", ".join(f"{name} {chosen[name]}" for name in told)
    else:
        sizes = _recipe_sizes(config, recipe, widths)
        assumed = f"the bits a weight of the published mix {recipe!r}, which is another format"
    experts = config.experts_of(config.moe_layers[0])
    assumed = f"computed from the config: {assumed}; {experts} of {config.experts} experts a layer"
    return config, sizes, assumed


def _recipe_sizes(config: ModelConfig, recipe: str, widths: dict) -> Sizes:
    if given := [name for name, value in widths.items() if value is not None]:
        raise ValueError(f"recipe {recipe!r} has its own widths; leave {given[0]} out")
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}, expected one of {', '.join(RECIPES)}")
    architecture, bits_of = RECIPES[recipe]
    if config.architecture != architecture:
        raise ValueError(f"recipe {recipe!r} is for {architecture}, the model is {config.architecture}")
    return sizes_by_bits(config, bits_of)
