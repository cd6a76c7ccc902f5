"""The plan of a model that is not compressed, or not even downloaded yet: its config.json says every size."""

from pathlib import Path

from edge_moe import _core
from edge_moe.compressor.pipeline import packed_bytes
from edge_moe.compressor.quantise import largest_group, trunk_packing
from edge_moe.devices.probe import default_threads
from edge_moe.runtime.bundle import Bundle, record_alignment, record_bytes
from edge_moe.runtime.config import ModelConfig, parse_config, read_json, trunk_shapes
from edge_moe.runtime.plan import Plan, make_plan, resolve_ram
from edge_moe.runtime.runtime import DEFAULT_CONTEXT
from edge_moe.runtime.tokenizer import Tokenizer

DEFAULT_WIDTH = 4
TRUNK_WIDTH = 8
GROUP = 64


def plan_for(
    model: str | Path,
    ram: int | str = "auto",
    *,
    context: int | None = None,
    width: int | None = None,
    threads: int | None = None,
) -> Plan:
    """The plan of a bundle, a checkpoint's directory or a config.json; a plan below its floor is returned, not refused.

    width: bits of every expert (default 4), for what is not a bundle yet; its trunk counts 8 bits. The interpreter
    counts as it is in this process, with the tokenizer where there is one. Raises ValueError for bad options and
    what reading the config or the bundle raises.
    """
    path = Path(model)
    if _is_bundle(path) and width is not None:
        raise ValueError(f"{path}: a bundle has its widths already; leave width out")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such bundle, model directory or config.json")
    config, sizes = _bundle_sizes(path) if _is_bundle(path) else _config_sizes(path, width or DEFAULT_WIDTH)
    context = min(DEFAULT_CONTEXT, config.context) if context is None else context
    if not 1 <= context <= config.context:
        raise ValueError(f"context is {context}, expected 1 to {config.context}, the model's own")
    tokenizer = Tokenizer(path) if (path / "tokenizer.json").is_file() else None
    plan = make_plan(
        config,
        **sizes,
        ram_bytes=resolve_ram(ram),
        context=context,
        interpreter_bytes=_core.resident_bytes(),
        threads=threads or default_threads(),
        refuse=False,
    )
    del tokenizer  # counted
    return plan


def assumptions(model: str | Path, width: int | None = None) -> str:
    """What plan_for() takes for granted about something that is not a bundle yet."""
    if _is_bundle(Path(model)):
        return ""
    width = width or DEFAULT_WIDTH
    return f"computed from the config: experts at {width} bits, the rest at {16 if width == 16 else TRUNK_WIDTH}"


def _is_bundle(path: Path) -> bool:
    return (path / "bundle.json").is_file()


def _bundle_sizes(path: Path) -> tuple[ModelConfig, dict]:
    bundle = Bundle.open(path)
    slot_bytes = max(expert.nbytes for expert in bundle.experts.values())
    return bundle.config, {
        "trunk_bytes": bundle.trunk_bytes,
        "all_experts_bytes": bundle.expert_bytes,
        "slot_bytes": slot_bytes,
    }


def _config_sizes(path: Path, width: int) -> tuple[ModelConfig, dict]:
    file = path / "config.json" if path.is_dir() else path
    config = parse_config(read_json(file), where=str(file))
    if width not in _core.WIDTHS:
        raise ValueError(f"width is {width}, expected one of {', '.join(map(str, _core.WIDTHS))}")
    group = largest_group(GROUP, config.dim, config.expert_hidden)
    if group is None and width < 16:
        raise ValueError(
            f"{file}: experts are {config.expert_hidden} x {config.dim}, not multiples of 32; use width 16"
        )
    shapes = trunk_shapes(config)
    trunk = trunk_packing(shapes, 16 if width == 16 else TRUNK_WIDTH, GROUP)
    record = record_bytes(config, (width,) * 3, group or GROUP, record_alignment(config))
    return config, {
        "trunk_bytes": sum(packed_bytes(shapes[name], packing) for name, packing in trunk.items()),
        "all_experts_bytes": record * config.experts * len(config.moe_layers),
        "slot_bytes": record,
    }
