"""The target of compress(): its options, their validation, and the bytes that they allow for the experts."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from ... import _core
from ...runtime.bundle_records import record_alignment, record_bytes
from ...runtime.child import call
from ...runtime.config import ModelConfig, trunk_shapes
from ...runtime.plan import READER_BYTES, READERS, parse_bytes
from ...runtime.row_tables import row_bytes
from ..passes.calibrate import check_tokens, paths_of
from ..rounding.quantise import largest_group
from ..source.checkpoint import Checkpoint
from ..source.copied_files import copied_bytes
from ..writing.writer import KEPT, Packing, table_packing
from .drop_experts import SCORES

METHODS = ("pmq", "mc", "mc-release", "uniform", "rtn", "keep")
MC_WIDTHS = (1, 2, 3)
DEFAULT_BITS = 2.5
DEFAULT_TOKENS = 49_152
DEFAULT_GROUP = 64
TRUNK_WIDTH = 8  # if it is not chosen from measures
MEASURED_GROUP = 128  # for methods that choose widths
HIT_SHARE = 0.9  # hit rate that a bundle made for paging aims at, by calibration's frequencies
TABLE_BYTES = 600  # upper bound for each tensor and expert in bundle.json and headers
OTHER_BYTES = 4_000  # for the certificate and the rest of bundle.json


@dataclass(frozen=True, slots=True)
class Options:
    """The options of compress(), which documents them."""

    bits: float | None = None
    width: int | None = None
    size: int | str | None = None
    ram: int | str | None = None
    context: int | None = None
    paged: bool = False
    method: str = "pmq"
    calibration: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    tokens: int = DEFAULT_TOKENS
    group: int | None = None
    trunk_width: int | None = None
    drop_experts: float = 0.0
    drop_score: str = "mixture"
    drop_counts: str = "sensitivity"
    adjust_top_k: bool = False
    act_order: bool = False
    certificate: bool = True
    seed: int = 0
    threads: int | None = None
    resume: bool = True
    force: bool = False

    @property
    def calibrates(self) -> bool:
        return self.method not in ("rtn", "keep") and self.bits != 16 and self.width != 16

    @property
    def chooses_trunk(self) -> bool:
        """Whether the trunk's widths are chosen from measures."""
        return self.method == "pmq" and self.trunk_width is None and self.calibrates


def check(o: Options, config: ModelConfig) -> Options:
    """Validate the options and return them with sizes in bytes, paths, and the default target filled in.

    Raises ValueError for an option out of range and for options that exclude each other."""
    _one_of("method", o.method, METHODS)
    _one_of("group", o.group, (None, *_core.GROUPS))
    _one_of("trunk_width", o.trunk_width, (None, *_core.WIDTHS))
    _one_of("drop_score", o.drop_score, SCORES)
    _one_of("drop_counts", o.drop_counts, ("equal", "sensitivity"))
    if sum(value is not None for value in (o.bits, o.width, o.size)) > 1:
        raise ValueError("bits, width and size exclude each other; give one of them")
    if o.method == "keep":
        if o.bits or o.width or o.size is not None or o.group:
            raise ValueError("method keep takes no bits, width, size or group: experts stay as the checkpoint has them")
        o = replace(o, width=KEPT.widths[0], group=KEPT.group)
    elif o.width is not None:
        if o.method not in ("uniform", "rtn"):
            raise ValueError(f"width is one width for all experts; method {o.method} chooses widths, give bits instead")
        _one_of("width", o.width, _core.WIDTHS)
    check_tokens(o.tokens)
    if not 0 <= o.drop_experts < 1:
        raise ValueError(f"drop_experts is {o.drop_experts}, expected a share from 0 up to 1, such as 0.25")
    if o.adjust_top_k and not o.drop_experts:
        raise ValueError("adjust_top_k needs drop_experts: without it every layer keeps the model's top_k")
    if o.drop_experts and not o.calibrates:
        raise ValueError("dropping experts needs calibration; choose method pmq, mc or uniform and fewer bits than 16")
    targets = o.bits is not None or o.width is not None or o.size is not None
    if o.paged and (targets or o.ram is None):
        raise ValueError("paged needs ram and no other target: the bundle is made for paging under that cap")
    if o.paged and o.method not in ("pmq", "uniform"):
        raise ValueError(
            f"paged needs to know how often experts are used, which method {o.method} does not measure; "
            "use pmq or uniform"
        )
    if o.context is not None and o.ram is None:
        raise ValueError("context needs ram: it says how much memory running takes")
    bits = DEFAULT_BITS if not targets and o.ram is None else o.bits
    o = replace(
        o,
        bits=bits,
        size=None if o.size is None else parse_bytes(o.size),
        ram=None if o.ram is None else parse_bytes(o.ram),
        calibration=paths_of(o.calibration),
        held_out=paths_of(o.held_out),
    )
    lossless = bits == 16 or o.width == 16
    fitting = o.group or DEFAULT_GROUP if lossless else largest_group(o.group or 128, config.dim, config.expert_hidden)
    if fitting is None:
        raise ValueError(
            f"experts are {config.expert_hidden} x {config.dim}, not multiples of 32: they cannot be grouped; "
            "only bits 16 is possible"
        )
    if o.group is not None:
        o = replace(o, group=fitting)
    least = 1.0 if lossless else min(true_bits(config, (1, 1, 1), group) for group in groups(o, config))
    if bits is not None and not least - 1e-9 <= bits <= 16:
        raise ValueError(f"bits is {bits:g}, expected {least:.3g} to 16 (experts of width 1 take {least:.3g})")
    return o


def _one_of(name: str, value, allowed) -> None:
    if value not in allowed:
        shown = ", ".join(str(one) for one in allowed if one is not None)
        raise ValueError(f"{name} is {value!r}, expected one of {shown}")


def groups(o: Options, config: ModelConfig, fine: bool = False) -> list[int]:
    """The group sizes that experts may have: as asked for, or the method's own that fit the matrices.

    fine: include those that pmq uses only at few bits.
    """
    if o.group is not None:
        return [o.group]
    wanted = {"uniform": _core.GROUPS, "rtn": (DEFAULT_GROUP,)}.get(o.method, (MEASURED_GROUP,))
    if fine and o.method == "pmq":
        wanted = (DEFAULT_GROUP, MEASURED_GROUP)
    return sorted({largest_group(group, config.dim, config.expert_hidden) for group in wanted})


def true_bits(config: ModelConfig, widths: tuple[int, int, int], group: int) -> float:
    """Bits per weight of one expert on disk, scales, biases and padding included."""
    return 8 * record_bytes(config, widths, group, record_alignment(config)) / config.expert_weights


def uniform_packing(config: ModelConfig, bits: float, groups: list[int]) -> Packing:
    """The largest packing for all experts within `bits` bits a weight; ties go to the widest codes."""
    options = [Packing((width,) * 3, group) for width in _core.WIDTHS if width < 16 for group in groups]
    cost = {packing: true_bits(config, packing.widths, packing.group) for packing in options}
    fitting = [packing for packing in options if cost[packing] <= bits + 1e-9]
    if not fitting:
        raise ValueError(f"{bits:.3g} bits a weight is below {min(cost.values()):.3g}, what experts of width 1 take")
    return max(fitting, key=lambda packing: (round(cost[packing], 9), packing.widths))


def packed_bytes(shape: tuple[int, ...], packing: Packing) -> int:
    """Bytes of one trunk tensor."""
    width, count = packing.widths[0], int(np.prod(shape))
    return count * width // 8 + (2 * 2 * count // packing.group if width < 16 else 0)


def expert_budget(o: Options, checkpoint: Checkpoint, config: ModelConfig, trunk: dict[str, Packing]) -> float:
    """Bytes for the experts of `config`, from bits, size or ram. Raises ValueError, naming the minimum, if too few."""
    if o.bits is not None:
        return o.bits * config.expert_weights * config.expert_count / 8
    least = config.expert_count * min(
        record_bytes(config, (1, 1, 1), group, record_alignment(config)) for group in groups(o, config)
    )
    if o.size is not None:
        fixed, total, what = fixed_bytes(checkpoint, config, trunk), o.size, "size"
    else:
        fixed, total, what = running_bytes(checkpoint, o, trunk), o.ram, "ram"
    if total < fixed + least:
        raise ValueError(
            f"{what} is {total:,} bytes, expected at least {fixed + least:,}: {least:,} for experts of width 1 and "
            f"{fixed:,} for the rest; raise it, lower trunk_width, or drop experts"
        )
    return total - fixed


def fixed_bytes(checkpoint: Checkpoint, config: ModelConfig, trunk: dict[str, Packing]) -> int:
    """Upper bound of a bundle's bytes on disk without the experts: trunk, copied files and tables."""
    fixed = trunk_bytes(config, trunk) + row_table_bytes(config, trunk["embedding"])
    fixed += copied_bytes(checkpoint.directory)
    return fixed + TABLE_BYTES * (len(trunk) + config.expert_count) + OTHER_BYTES + 2 * _core.DATA_ALIGNMENT


def trunk_bytes(config: ModelConfig, trunk: dict[str, Packing]) -> int:
    """Bytes of all trunk tensors."""
    shapes = trunk_shapes(config)
    return sum(packed_bytes(shapes[name], packing) for name, packing in trunk.items())


def row_table_bytes(config: ModelConfig, embedding: Packing) -> int:
    """Bytes of the rows of n-gram tables, given the packing of the embedding."""
    return sum(
        rows * row_bytes(table_packing(embedding, cols).encodings[0], cols) for rows, cols in config.tables.values()
    )


def running_bytes(checkpoint: Checkpoint, o: Options, trunk: dict[str, Packing]) -> int:
    """Bytes of memory that running takes without the experts, at the context asked for."""
    return _rest_bytes(checkpoint.directory, o.context) + trunk_bytes(checkpoint.config, trunk)


@cache
def _rest_bytes(model: Path, context: int | None) -> int:
    """The same without the trunk, from a plan that is made in a process of its own."""
    arguments = {"model": str(model), "context": context}
    return call("edge_moe.compressor.choosing.estimate", arguments, "the process that makes the plan was killed")


def paged_budget(o: Options, checkpoint: Checkpoint, frequency: np.ndarray, trunk: dict[str, Packing]) -> float:
    """Bytes for the experts such that the hot ones fit under the cap.

    frequency: (experts of all layers,), uses a token in calibration. Raises ValueError, naming the minimum, if too few.
    """
    config, hot = checkpoint.config, int(np.count_nonzero(hot_experts(frequency)))
    fixed = running_bytes(checkpoint, o, trunk) + READERS * READER_BYTES
    least = hot * min(record_bytes(config, (1, 1, 1), group, record_alignment(config)) for group in groups(o, config))
    if o.ram < fixed + least:
        raise ValueError(
            f"ram is {o.ram:,} bytes, expected at least {fixed + least:,}: {least:,} for the {hot} experts used most, "
            f"of width 1, and {fixed:,} for the rest; raise it, lower the context, or drop experts"
        )
    return (o.ram - fixed) * len(frequency) / hot


def hot_experts(frequency: np.ndarray) -> np.ndarray:
    """Whether each expert is hot, (experts of all layers,): among the most used, which make HIT_SHARE of all uses."""
    order = np.argsort(-frequency, kind="stable")
    count = int(np.searchsorted(np.cumsum(frequency[order]), HIT_SHARE * frequency.sum())) + 1
    hot = np.zeros(len(frequency), bool)
    hot[order[:count]] = True
    return hot
