"""How much memory compressing takes, drawn up before it starts, and what is kept on disk so that it fits."""

from dataclasses import dataclass

from .. import _core
from ..runtime.config import trunk_shapes
from ..runtime.plan import resolve_ram
from .certificate import LOGITS_BYTES
from .choosing.sensitivity import sampled_sequences
from .choosing.trunk import kinds
from .passes.calibrate import Calibration
from .passes.expert_rows import FIT_BYTES
from .passes.streams import BLOCK_ROWS
from .rounding.inputs import SQUARES
from .rounding.round_trunk import PIECE_WEIGHTS, widest_input

LIBRARY_BYTES = 120_000_000  # of scipy and the solver, which are loaded later
ROUNDING_STREAMS = 14  # of all calibration rows, alive at once at the most


@dataclass(frozen=True, slots=True)
class Memory:
    """The plan: bytes without the streams of hidden states, those of the streams, and where the streams are."""

    fixed_bytes: int
    worker_bytes: int  # of each expert worked on
    stream_bytes: int
    streams_in_memory: bool
    most_workers: int

    def workers(self, threads: int) -> tuple[int, int]:
        """(experts at a time, threads of each): experts side by side need no waiting for each other.

        Matrix products of many threads spin while they wait: beside another program on the same two cores, factoring a
        256 x 256 matrix took 328 ms with two threads and 1.9 ms with one.
        """
        workers = max(min(threads, self.most_workers), 1)
        return workers, max(threads // workers, 1)

    @classmethod
    def plan(cls, checkpoint, o, calibration: Calibration | None) -> "Memory":
        """Raises MemoryError when o.ram is below what the work takes, naming that."""
        config = checkpoint.config
        largest = max(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in trunk_shapes(config).values())
        matrix, widest = config.dim * config.expert_hidden, max(config.dim, config.expert_hidden)
        fixed = _core.resident_bytes() + LIBRARY_BYTES + 2 * 4 * largest
        worker, streams, trunk = 12 * 4 * matrix, 0, 0
        if calibration is not None:
            rows, tokens = calibration.ids.size + calibration.held_out.size, calibration.ids.shape[1]
            sample = sampled_sequences(config, *calibration.ids.shape) * tokens
            carried = sample * (len(config.moe_layers) + len(kinds(config)) * o.chooses_trunk)
            streams = max(ROUNDING_STREAMS * rows, 3 * (rows + carried)) * config.width * 4  # input, attended, output
            attention = 4 * max(its.pass_values(BLOCK_ROWS, tokens) for its in config.attentions)
            beside = max(attention, 6 * LOGITS_BYTES)
            fixed += 2 * 4 * rows * config.experts + beside
            # what the trunk's rounding takes beyond that: no logits are there yet
            trunk = attention + SQUARES * widest_input(config) ** 2 + 6 * 4 * PIECE_WEIGHTS - beside
            worker += SQUARES * widest * widest + 5 * min(FIT_BYTES, 4 * rows * config.dim)
        ram = resolve_ram("auto" if o.ram is None else o.ram)
        work = max(worker, trunk)  # one after the other
        if o.ram is not None and fixed + work > o.ram:
            raise MemoryError(f"compressing this model takes {fixed + work:,} bytes, ram is {o.ram:,}; raise ram")
        in_memory = fixed + work + streams <= ram
        room = ram - fixed - (streams if in_memory else 0)
        return cls(fixed, worker, streams, in_memory, max(room // worker, 1))
