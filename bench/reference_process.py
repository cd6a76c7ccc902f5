"""Running the model that a bundle is compared with in another process, so that both stay under one cap.

The other process has a part of the cap. It sends logits for one window after another through a pipe, a few rows at a
time, and ends at the end of its input.
"""

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .. import _core
from ..runtime.child import ERRORS
from ..runtime.config import ModelConfig, trunk_shapes
from ..runtime.plan import LOGIT_BYTES, parse_bytes, resolve_ram
from ..runtime.score import LOGITS_ROWS

SPARE_BYTES = 12_000_000  # by which a process may have grown before its plan is made
WHOLE_BYTES = 16_000_000  # maximum of a window's logits that are returned as one array
MODULE = "edge_moe.bench.reference_process"


class ReferenceProcess:
    """A function from token ids (tokens,) to the logits (tokens, vocab) of a bundle or checkpoint; a context manager.

    For a large window it returns Rows, whose slices can be read once and in order. Raises what opening the model
    raises, and MemoryError if ram_bytes is too little for it.
    """

    def __init__(self, model: str | Path, ram_bytes: int, context: int, threads: int | None = None):
        given = {"model": str(model), "ram": ram_bytes, "context": context, "threads": threads}
        command = [sys.executable, "-m", MODULE, json.dumps(given)]
        self._model, self._rows = model, None
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self.vocab: int = self._answer()["vocab"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ReferenceProcess":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __call__(self, window) -> "np.ndarray | Rows":
        if self._rows is not None:
            self._rows.drain()
        ids = np.ascontiguousarray(window, "<i4")
        try:
            self._child.stdin.write(struct.pack("<q", len(ids)) + ids.tobytes())
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the answer has the error
        self._answer()
        self._rows = Rows(self._child.stdout, (len(ids), self.vocab))
        return self._rows[: len(ids)] if 4 * len(ids) * self.vocab <= WHOLE_BYTES else self._rows

    def close(self) -> None:
        """End the process."""
        self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()

    def _answer(self) -> dict:
        line = self._child.stdout.readline()
        if not line:
            raise OSError(f"{self._model}: the process that computes its predictions was ended; raise ram")
        answer = json.loads(line)
        if "error" in answer:
            raise ERRORS.get(answer["error"], OSError)(answer["message"])
        return answer


class Rows:
    """The logits (rows, vocab) of one window, read from a pipe: slices must be taken in order, each once."""

    def __init__(self, pipe, shape: tuple[int, int]):
        self.shape, self._pipe, self._at = shape, pipe, 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        self._skip(rows.start or 0)
        return self._read(rows.stop - self._at)

    def drain(self) -> None:
        self._skip(self.shape[0])

    def _skip(self, to: int) -> None:
        while self._at < to:
            self._read(min(LOGITS_ROWS, to - self._at))

    def _read(self, rows: int) -> np.ndarray:
        values = np.empty((rows, self.shape[1]), np.float32)
        view = memoryview(values).cast("B")
        while view:
            if not (done := self._pipe.readinto(view)):
                raise OSError("the process that computes the reference's predictions was ended; raise ram")
            view = view[done:]
        self._at += rows
        return values


def shares(bundle: str | Path, model: str | Path, ram: int | str, context: int) -> tuple[int, int]:
    """Divide a cap between the bundle that is scored and the model that it is compared with.

    Each gets its minimum, and the rest is divided by the memory that each could use. Raises MemoryError if the cap is
    below the sum of the minima.
    """
    total = resolve_ram(ram)
    least, most = np.array([_needs(path, total, context) for path in (bundle, model)], np.int64).T
    if total < least.sum():
        raise MemoryError(
            f"scoring {bundle} beside {model} takes {least.sum() / 1e6:,.0f} MB, the cap is {total / 1e6:,.0f} MB; "
            "raise ram, or lower the context"
        )
    wanted, rest = most - least, total - int(least.sum())
    mine = int(least[0] + min(wanted[0], rest * wanted[0] // max(int(wanted.sum()), 1)))
    mine = max(mine, total - int(most[1]))  # and what the other process cannot use
    return mine, total - mine


def _needs(path: str | Path, total: int, context: int) -> tuple[int, int]:
    """The bytes that a process needs to compute a model's logits, at minimum and with all of the model in memory."""
    from ..compressor.choosing.estimate import estimate

    if (Path(path) / "bundle.json").is_file():
        plan = estimate(path, total, context=context).plan
        more = SPARE_BYTES + LOGIT_BYTES * LOGITS_ROWS * _vocab(path)
        return plan.floor_bytes + more, plan.resident_bytes + more
    from ..compressor.source.checkpoint import Checkpoint

    with Checkpoint(path) as checkpoint:
        return checkpoint_bytes(checkpoint.config, context)


def _vocab(path: str | Path) -> int:
    from ..runtime.config_file import load_config

    return load_config(path).vocab


def checkpoint_bytes(config: ModelConfig, context: int) -> tuple[int, int]:
    """The bytes of the reference forward pass over `context` tokens, at minimum and with every tensor in memory."""
    sizes = {name: int(np.prod(shape)) for name, shape in trunk_shapes(config).items()}
    expert = config.expert_weights
    attention = max(its.pass_values(context, context) for its in config.attentions)
    rows = 4 * (context * (8 * config.dim + 2 * config.vocab + 4 * config.top_k * config.dim) + attention)
    least = _core.resident_bytes() + SPARE_BYTES + 10 * max(*sizes.values(), expert) + 4 * expert + rows
    return least, least + 4 * (sum(sizes.values()) + expert * config.expert_count)


def _serve(model: str, ram: int, context: int, threads: int | None) -> None:
    """Answer windows of ids from stdin with logits on stdout, until end of input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both processes; the parent ends this one
    out, ids_of = sys.stdout.buffer, sys.stdin.buffer
    try:
        vocab, blocks_of = _opened(model, ram, context, threads)
        _say(out, vocab=vocab)
        while len(count := ids_of.read(8)) == 8:
            ids = np.frombuffer(ids_of.read(4 * struct.unpack("<q", count)[0]), "<i4")
            blocks = blocks_of(ids)
            first = next(blocks)
            _say(out, tokens=len(ids))
            out.write(memoryview(first).cast("B"))
            for block in blocks:
                out.write(memoryview(block).cast("B"))
            out.flush()
    except BrokenPipeError:
        pass
    except (ValueError, OSError, MemoryError) as error:
        kind = next((name for name, kind in ERRORS.items() if isinstance(error, kind)), "OSError")
        _say(out, error=kind, message=str(error))


def _opened(model: str, ram: int, context: int, threads: int | None):
    """The vocabulary size of a model, and a function from ids to blocks of logits (rows, vocab) float32."""
    if (Path(model) / "bundle.json").is_file():
        from ..runtime.runtime import Runtime

        runtime = Runtime(model, ram, context, threads=threads, logits_rows=LOGITS_ROWS, prune="off")
        return runtime.config.vocab, lambda ids: (np.ascontiguousarray(b) for b in runtime.logits_blocks(ids))
    from ..compressor.source.checkpoint import Checkpoint
    from .evaluate import checkpoint_logits

    with Checkpoint(model) as checkpoint:
        least, _ = checkpoint_bytes(checkpoint.config, context)
    config, logits = checkpoint_logits(model, max(parse_bytes(ram) - least, 0), context)

    def blocks(ids) -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(logits(ids), np.float32)

    return config.vocab, blocks


def _say(out, **answer) -> None:
    out.write(json.dumps(answer).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
