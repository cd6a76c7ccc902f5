"""The memory plan, made before anything is loaded: how the cap is divided, its floor, the error below the floor."""

import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product

from .. import _core
from ..devices.probe import cgroup_limit_bytes, memory_limit_bytes
from .config import ModelConfig
from .engine_config import KV_TYPES, engine_memory
from .plan_table import plan_text
from .sampling import whole_number

CHUNKS = (512, 256, 128, 64, 32, 16)  # tokens per prefill step, in order of preference
READERS = 4  # threads that fetch records: reads of 128 KiB to 2 MB with 8 or 16 were no faster (0.96 to 1.04 times)
READER_BYTES = 64 * 1024  # stack of a reader, the kernel's included
TABLE_READER_BYTES = READER_BYTES + 3 * 4096  # of a reader of tables' rows, with the blocks of the file that it reads
THREAD_BYTES = 48 * 1024  # stack of a computing thread: 8 kB measured, and 28 kB for the kernel
INTERPRETER_SPARE = 12_000_000  # what Python may still allocate: text, sampling; half of it for encoding a text
TOKEN_BYTES = 64  # Python's memory per token of context: an int, and its place in three lists
LOGIT_BYTES = 64  # memory per logit of a step that sampling or scoring may hold: float64 copies, an order, a sum
SCRATCH_PART = 8  # when paging, upper bound of a step's scratch: 1/8 of the memory that slots could have
SNAPSHOTS_PART = 16  # upper bound of snapshots: 1/16 of the cap
MOST_SEQUENCES = 256
AUTO_SHARE = 0.8  # share of free memory for ram="auto"
UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power}
    UNITS |= dict.fromkeys((f"{_letter}I", f"{_letter}IB"), 1024**_power)
THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?")
LEAST_BYTES = 100_000  # minimum without a unit: a smaller number is gigabytes or megabytes whose unit was forgotten


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes by purpose; str(plan) is a table of them.

    `total_bytes` is at most `ram_bytes`, the cap; `floor_bytes` is the minimum cap.
    """

    ram_bytes: int
    context: int  # tokens the KV cache holds
    chunk: int  # tokens per prefill step
    trunk_bytes: int
    kv_cache_bytes: int
    state_bytes: int  # of layers that keep a state in place of keys and values, and of snapshots
    state_saves_bytes: int  # of KV cache, which those layers would take with the attention of the others
    snapshots: int  # of recurrent states and windows, which prompts can go on from
    scratch_bytes: int
    io_buffers_bytes: int
    interpreter_bytes: int  # Python, stacks of threads, and spare_bytes
    slot_bytes: int  # of the largest slot: the largest record
    slots: int  # approximately: the number of records of mean size that fit; 0 when resident
    resident: bool  # every expert is in memory, through the memory map
    experts_bytes: int  # in memory: all records if resident, else slots
    all_experts_bytes: int  # on disk
    floor_bytes: int
    resident_bytes: int  # minimum cap at which every expert is resident
    working_set_experts: int  # experts that one token uses in all layers together
    working_set_bytes: int  # of working_set_experts records of mean size
    spare_bytes: int = 0  # of interpreter_bytes: not allocated yet, but may be
    kv: str = KV_TYPES[0]  # type of the KV cache
    sequences: int = 1  # number of sequences, with a KV cache of `context` tokens each
    table_bytes: int = 0  # of tables of n-gram embeddings, which stay on disk
    table_rows: int = 0  # that a token reads of them

    @property
    def total_bytes(self) -> int:
        return (
            self.trunk_bytes
            + self.kv_cache_bytes
            + self.state_bytes
            + self.scratch_bytes
            + self.io_buffers_bytes
            + self.interpreter_bytes
            + self.experts_bytes
        )

    @property
    def holds_working_set(self) -> bool:
        """Whether all experts that one token uses, of mean size, fit in memory; else each token reads from storage."""
        return self.experts_bytes >= self.working_set_bytes

    @property
    def working_set_cap_bytes(self) -> int:
        """A cap at which they fit: the knee of the curve of speed over cap."""
        experts = self.working_set_bytes
        scratch = max(self.scratch_bytes, math.ceil(experts / (SCRATCH_PART - 1)))  # of a longer step, if it fits
        buffers = max(self.io_buffers_bytes, READERS * READER_BYTES)
        fixed = self.trunk_bytes + self.kv_cache_bytes + self.state_bytes + self.interpreter_bytes + buffers
        return min(max(fixed + scratch + experts, self.floor_bytes), self.resident_bytes)

    def __str__(self) -> str:
        return plan_text(self)

    def as_dict(self) -> dict:
        return {
            **asdict(self),
            "total_bytes": self.total_bytes,
            "working_set_cap_bytes": self.working_set_cap_bytes,
        }


class EdgeMoeError(Exception):
    """The base class of edge_moe's own errors; other errors are Python's, such as ValueError."""


class BelowFloor(EdgeMoeError, MemoryError):
    """The cap is below the floor. `plan.floor_bytes` includes the memory of the process in which it was refused."""

    def __init__(self, plan: Plan, why: str = ""):
        super().__init__(refusal(plan) + why)
        self.plan = plan


def parse_bytes(size: int | float | str) -> int:
    """Convert "8GB" (decimal), "8GiB" or "8Gi" (binary), "8,000MB", or a number of bytes to bytes.

    Raises ValueError for anything else, and for a number without a unit that is too small to be meant as bytes.
    """
    number: float
    if isinstance(size, int) and not isinstance(size, bool):
        number, unit = size, ""
    else:
        text = str(size).strip().upper().replace(" ", "")
        digits = text.rstrip("KMGTIB")
        unit = text[len(digits) :]
        try:
            number = float(digits.replace(",", "") if THOUSANDS.fullmatch(digits) else digits)
            round(number * UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            raise ValueError(f"size {size!r} is not understood; write 8GB, 8GiB, 500MB or a number of bytes") from None
    value = round(number * UNITS[unit])
    if number <= 0 or (unit and value == 0):
        raise ValueError(f"size {size!r} must be above 0")
    if unit in ("", "B") and value < LEAST_BYTES:
        meant = f"{max(number, 0.01):.0%}" if number < 1 else f"{number:g}{'GB' if number <= 1024 else 'MB'}"
        raise ValueError(f"size {size!r} means {value:,} bytes; did you mean {meant}?")
    return value


def check_sequences(sequences: int) -> None:
    """Raise TypeError or ValueError unless a Runtime can have this number of sequences."""
    if not 1 <= whole_number("sequences", sequences) <= MOST_SEQUENCES:
        raise ValueError(f"sequences is {sequences}, expected 1 to {MOST_SEQUENCES}")


def resolve_ram(ram: int | float | str) -> int:
    """The cap in bytes: as given, or a share of the memory that is free now within the cgroup's limit.

    "50%" is half of that, "max" all of it, "auto" 80 %.
    """
    text = str(ram).strip().lower()
    share = {"auto": AUTO_SHARE, "max": 1.0}.get(text)
    if text.endswith("%"):
        with suppress(ValueError):
            share = float(text[:-1]) / 100
        if share is None or not 0 < share <= 1:
            raise ValueError(f"size {ram!r} is not a share of memory; write 1% to 100%")
    if share is None:
        return parse_bytes(ram)
    # This process's memory counts as free, but part of it, such as shared libraries, may be charged to another cgroup.
    free = memory_limit_bytes(_core.free_bytes()) + _core.resident_bytes()
    return int(share * min(free, cgroup_limit_bytes() or free))


def make_plan(
    config: ModelConfig,
    *,
    trunk_bytes: int,
    all_experts_bytes: int,
    slot_bytes: int,
    ram_bytes: int,
    context: int,
    interpreter_bytes: int,
    loading_bytes: int = 0,
    logits_rows: int = 1,
    reserve_bytes: int = 0,
    threads: int = 1,
    kv: str = KV_TYPES[0],
    device: str = "cpu",
    sequences: int = 1,
    table_bytes: int = 0,
    ranks: int = 1,
    most_chunk: int | None = None,
    refuse: bool = True,
) -> Plan:
    """Divide the cap: trunk, KV cache, scratch, I/O buffers, interpreter, and experts from the rest.

    Having every expert resident takes precedence over a longer prefill chunk; when paging, the chunk's scratch takes at
    most an eighth of the memory that slots could have. Snapshots take at most a sixteenth of the cap. loading_bytes:
    the process's peak so far; a cap below it is exceeded already, however much has been freed. Raises BelowFloor, which
    names the floor, if the cap is below it (the floor has room for as many of the largest records as a token uses in
    one layer, or for all experts if they take less), unless `refuse` is off; the plan then has too little memory to
    run. config: of the layers that run here. reserve_bytes: memory that the program around the Runtime may take. ranks:
    processes that run the model together. most_chunk: what they have agreed on.
    """
    working_set = sum(config.top_k_of(layer) for layer in config.moe_layers)
    least_bytes = _least_slots(config) * slot_bytes
    spare_bytes = INTERPRETER_SPARE + TOKEN_BYTES * context * sequences + LOGIT_BYTES * config.vocab * logits_rows
    spare_bytes += reserve_bytes
    interpreter_bytes += spare_bytes + THREAD_BYTES * (threads - 1)
    of_tables = TABLE_READER_BYTES * READERS if config.tables else 0
    mapped = device == "cpu"  # if all records fit, the memory map of their files is used
    read_bytes = _read_bytes(slot_bytes, device)
    recurrent = len(config.recurrent_layers)
    attending = sum(layer.attention is not None for layer in config.layers) - recurrent
    sizes = {"logits_rows": logits_rows, "threads": threads, "kv": kv, "sequences": sequences}
    sizes |= {"ranks": ranks} if ranks > 1 else {}

    def plan(chunk: int, resident: bool, keeps: bool = True) -> Plan:
        """keeps: whether there are snapshots."""
        without, one = (
            engine_memory(config, context, chunk, device, slot_bytes, snapshots=n, **sizes)[1] for n in (0, 1)
        )
        most = ram_bytes // SNAPSHOTS_PART // (one - without) if keeps and one > without else 0
        snapshots = min(sequences + 1, most)
        kv_cache, states, scratch = engine_memory(
            config, context, chunk, device, slot_bytes, snapshots=snapshots, **sizes
        )
        fixed = trunk_bytes + kv_cache + states + scratch + interpreter_bytes
        io_buffers = of_tables + (0 if resident and mapped else read_bytes)
        experts = all_experts_bytes if resident else max(0, min(ram_bytes - fixed - io_buffers, all_experts_bytes))
        return Plan(
            ram_bytes=ram_bytes,
            context=context,
            chunk=chunk,
            trunk_bytes=trunk_bytes,
            kv_cache_bytes=kv_cache,
            state_bytes=states,
            snapshots=snapshots,
            state_saves_bytes=kv_cache * recurrent // max(attending, 1),
            scratch_bytes=scratch,
            io_buffers_bytes=io_buffers,
            interpreter_bytes=interpreter_bytes,
            slot_bytes=slot_bytes,
            slots=0 if resident else _mean_slots(experts, config, all_experts_bytes),
            resident=resident,
            experts_bytes=experts,
            all_experts_bytes=all_experts_bytes,
            floor_bytes=fixed + of_tables + read_bytes + least_bytes,
            resident_bytes=fixed + of_tables + all_experts_bytes + (0 if mapped else read_bytes),
            working_set_experts=working_set,
            working_set_bytes=round(working_set * all_experts_bytes / config.expert_count),
            spare_bytes=spare_bytes,
            kv=kv,
            sequences=sequences,
            table_bytes=table_bytes,
            table_rows=sum(layer.ngrams.heads for layer in config.layers if layer.ngrams),
        )

    rows = min(logits_rows, context)
    chunks = [chunk for chunk in sorted({min(chunk, context) for chunk in CHUNKS}, reverse=True) if chunk >= rows]
    chunks = [chunk for chunk in chunks if most_chunk is None or chunk <= most_chunk] or [rows]
    smallest = plan(chunks[-1], False, keeps=False)
    resident_bytes = max(smallest.resident_bytes, loading_bytes)
    floor_bytes = min(max(smallest.floor_bytes, loading_bytes), resident_bytes)

    def limited(plan: Plan) -> Plan:
        return replace(plan, floor_bytes=floor_bytes, resident_bytes=resident_bytes)

    smallest = limited(smallest)
    if ram_bytes < floor_bytes:
        if refuse:
            why = f"; this process had, or would have while it loads, {loading_bytes / 1e6:,.0f} MB"
            raise BelowFloor(smallest, why if loading_bytes > ram_bytes else "")
        return smallest
    for keeps, chunk in product((True, False), chunks):
        if (candidate := plan(chunk, True, keeps)).total_bytes <= ram_bytes:
            return limited(candidate)
    for chunk in chunks:
        candidate = plan(chunk, False)
        room = ram_bytes - candidate.total_bytes + candidate.experts_bytes + candidate.scratch_bytes
        if candidate.experts_bytes >= least_bytes and candidate.scratch_bytes * SCRATCH_PART <= room:
            return limited(candidate)
    return smallest


def with_cap(plan: Plan, config: ModelConfig, ram_bytes: int, interpreter_bytes: int, device: str) -> Plan:
    """Change the cap of a plan whose Runtime has allocated everything but its experts. Raises BelowFloor.

    interpreter_bytes: what Python and the rest of the process have allocated so far, and may still allocate.
    """
    read_bytes = _read_bytes(plan.slot_bytes, device)
    of_tables = TABLE_READER_BYTES * READERS if config.tables else 0
    fixed = (
        of_tables + plan.trunk_bytes + plan.kv_cache_bytes + plan.state_bytes + plan.scratch_bytes + interpreter_bytes
    )
    least_bytes = _least_slots(config) * plan.slot_bytes
    plan = replace(
        plan,
        ram_bytes=ram_bytes,
        interpreter_bytes=interpreter_bytes,
        resident_bytes=fixed + plan.all_experts_bytes + plan.io_buffers_bytes - of_tables,
        floor_bytes=fixed + min(read_bytes + least_bytes, plan.all_experts_bytes + plan.io_buffers_bytes - of_tables),
    )
    if plan.resident and ram_bytes >= plan.resident_bytes:
        return plan
    if ram_bytes < plan.floor_bytes:
        raise BelowFloor(plan)
    resident_bytes = fixed + plan.all_experts_bytes + read_bytes
    plan = replace(plan, io_buffers_bytes=of_tables + read_bytes, resident=False, resident_bytes=resident_bytes)
    return with_slots(plan, config, min(ram_bytes - fixed - read_bytes, plan.all_experts_bytes))


def with_slots(plan: Plan, config: ModelConfig, nbytes: int) -> Plan:
    """The plan with `nbytes` of memory for experts, or as it is if it has that."""
    if nbytes == plan.experts_bytes:
        return plan
    slots = _mean_slots(nbytes, config, plan.all_experts_bytes)
    return replace(plan, resident=False, experts_bytes=nbytes, slots=slots)


def _least_slots(config: ModelConfig) -> int:
    """The minimum number of slots: as many as a token uses in one layer."""
    return max(config.top_k_of(layer) for layer in config.moe_layers)


def _mean_slots(nbytes: int, config: ModelConfig, all_experts_bytes: int) -> int:
    return nbytes * config.expert_count // all_experts_bytes


def _read_bytes(slot_bytes: int, device: str) -> int:
    """The readers' memory. For an NVIDIA GPU, each reader may need a buffer for a record."""
    return READERS * (READER_BYTES + (slot_bytes if device == "cuda" else 0))


def refusal(plan: Plan) -> str:
    """The message for a plan below its floor; rounds the cap down and the floor up, so that a cap at the floor
    works."""
    return (
        f"a cap of {plan.ram_bytes // 1_000_000:,} MB is below the floor of {math.ceil(plan.floor_bytes / 1e6):,} MB "
        f"(trunk {plan.trunk_bytes / 1e6:,.0f}, KV cache {plan.kv_cache_bytes / 1e6:,.0f}, "
        + (f"states {plan.state_bytes / 1e6:,.0f}, " if plan.state_bytes else "")
        + f"interpreter {plan.interpreter_bytes / 1e6:,.0f}, scratch {plan.scratch_bytes / 1e6:,.0f} MB, the rest for "
        f"slots); raise the cap, or lower the context ({plan.context} tokens) or the widths"
    )
