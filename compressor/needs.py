"""What compressing will need of memory, disk and time, and what a user may not expect: said before it starts."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .choosing import targets, trunk
from .choosing.sensitivity import sampled_sequences
from .choosing.targets import Options
from .duration import estimate_seconds
from .memory import Memory
from .passes.calibrate import HELD_OUT_TOKENS, Calibration, sequence_tokens
from .passes.texts import check_file, open_text, stdlib_text
from .pipeline import Compression
from .source.checkpoint import Checkpoint
from .writing.writer import record_bytes_of

WIDEST = 8  # bits that experts get at the most, unless all are left as they are


@dataclass(frozen=True, slots=True)
class Needs:
    """At the most, as calibration text may turn out shorter than asked for."""

    memory_bytes: int
    bundle_bytes: int
    work_bytes: int  # on disk beside the bundle until it is done
    free_bytes: int  # of the disk
    seconds: float  # about
    threads: int
    notes: tuple[str, ...] = ()  # what a user may not expect


def needs_of(model: str | Path, out: str | Path, options: dict) -> Needs:
    """What compress(model, out, **options) will need.

    Raises what compress() raises for options that cannot be, and OSError when the disk has not enough room.
    """
    with Checkpoint(model) as checkpoint:
        o = targets.check(Options(**options), checkpoint.config)
        for file in (*o.calibration, *o.held_out) if o.calibrates else ():
            check_file(file)
        compression = Compression(checkpoint, Path(out), o, tell=None)
        calibration = _asked_for(compression) if o.calibrates else None
        memory = Memory.plan(checkpoint, o, calibration)
        if o.calibrates and not (checkpoint.directory / "tokenizer.json").is_file():
            for file in o.calibration:  # which raise what the run would
                open_text(file, None, o.tokens)
            if not o.calibration:
                stdlib_text(None, o.seed)
        used = memory.fixed_bytes + memory.workers(compression.threads)[0] * memory.worker_bytes
        used += memory.stream_bytes if memory.streams_in_memory else 0
        work = _saved_bytes(compression, calibration) if o.calibrates else 0
        work += 0 if memory.streams_in_memory else memory.stream_bytes
        seconds, notes = estimate_seconds(compression, calibration, memory), _notes(compression)
        bundle, free = _bundle_bytes(compression), shutil.disk_usage(_existing(Path(out).parent)).free
    if bundle + work > free:
        raise OSError(
            f"{out}: compressing needs {math.ceil((bundle + work) / 1e6):,} MB of disk, there are "
            f"{free // 1_000_000:,} MB free; make room or choose another disk"
        )
    return Needs(used, bundle, work, free, seconds, compression.threads, notes)


def _notes(compression: Compression) -> tuple[str, ...]:
    o, checkpoint, notes = compression.o, compression.checkpoint, []
    if o.calibrates and not o.calibration:
        notes.append("calibrates on Python source, the default; --calibration FILE takes text like yours")
    if (o.bits == 16 or o.width == 16) and (types := compression.rounded_types()):
        notes.append(
            f"the checkpoint has weights in {' and '.join(types)}; 16 bits are bfloat16, so these are rounded to 8 "
            "significant bits"
        )
    if not (checkpoint.directory / "tokenizer.json").is_file():
        what = "no tokenizer.json"
        if (checkpoint.directory / "tokenizer.model").is_file():
            what += ", only tokenizer.model: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes it"
        notes.append(f"the checkpoint has {what}; the bundle will take token ids, not text")
    if checkpoint.remote:
        name = checkpoint.remote.model.name
        notes.append(f"downloads {name} into the hub's cache as it is needed, {checkpoint.remote.nbytes / 1e9:,.1f} GB")
    if unused := checkpoint.unused:
        more = f" and {len(unused) - 1:,} more tensors" if len(unused) > 1 else ""
        notes.append(f"no part of the model, and left out: {unused[0]}{more}")
    return tuple(notes)


def _asked_for(compression: Compression) -> Calibration:
    """The shapes of the calibration text that the options ask for, without any text."""
    o, length = compression.o, sequence_tokens(compression.config)
    ids, held_out = (
        np.broadcast_to(np.int64(0), (max(tokens // length, 1), length)) for tokens in (o.tokens, HELD_OUT_TOKENS)
    )
    return Calibration(ids, "", np.zeros(len(ids), np.int64), held_out, "")


def _saved_bytes(compression: Compression, calibration: Calibration) -> int:
    """Of the hidden states between two layers; the last layer's are removed when this one's are written."""
    config = compression.config
    tokens, kinds = calibration.ids.shape[1], len(trunk.kinds(config)) if compression.o.chooses_trunk else 0
    carried = sampled_sequences(config, *calibration.ids.shape) * tokens * (len(config.moe_layers) + kinds)
    measuring = calibration.ids.size + carried
    rounding = 3 * (calibration.ids.size + calibration.held_out.size)  # source, bundle, one width to compare with
    return 2 * 4 * config.width * max(measuring, rounding)


def _bundle_bytes(compression: Compression) -> int:
    """Of the whole directory, as far as it can be known before measuring."""
    o, config, checkpoint, widest = compression.o, compression.config, compression.checkpoint, compression.trunk
    if o.size is not None:
        return o.size
    if o.chooses_trunk:
        widest = trunk.packing_of(config, dict.fromkeys(trunk.kinds(config), trunk.WIDTHS[-1]))
    kept = config.expert_count * (1 - int(o.drop_experts * config.experts + 1e-9) / config.experts)
    weights = kept * config.expert_weights
    if o.bits == 16 or o.width == 16:
        bits = targets.true_bits(config, (16,) * 3, targets.DEFAULT_GROUP)
    else:
        bits = targets.true_bits(config, (o.width or WIDEST,) * 3, targets.groups(o, config)[0])
        if o.method == "keep":
            bits = 8 * record_bytes_of(config, compression.kept_packing) / config.expert_weights
        if o.paged and o.method != "uniform":  # uses will decide, up to the widest that is measured
            bits = max(targets.true_bits(config, (w,) * 3, group) for w, group in compression.measured_choices())
        elif not o.paged and o.width is None:
            budget = targets.expert_budget(o, checkpoint, config, compression.trunk)
            bits = min(bits, o.bits or 8 * budget / weights)
    return int(targets.fixed_bytes(checkpoint, config, widest) + bits * weights / 8)


def _existing(directory: Path) -> Path:
    while not directory.exists():
        directory = directory.parent
    return directory
