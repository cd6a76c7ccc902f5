"""Compares our speed with other engines' on this machine, with random models of the same shapes.

    python -m bench.laboratory.peers [--layers 4] [--rounds 5] [--types Q2_K,Q4_0,Q4_K_M] [--keep DIR] [--json]

The models have Qwen3-30B-A3B's layers and a vocabulary of 4,096 tokens, as a GGUF file of one of llama-quantize's mixes
and as bundles of about as many bytes. Engines take turns on every test, and a ratio is within one turn, so that a
machine whose speed drifts is fair to all. Load from other programs is not: an engine whose threads spin while waiting
loses more to it than one whose threads sleep. So a turn starts when the machine is quiet, and is repeated if it did not
stay quiet; after too many such turns the quietest count. The first type is also run in memory cgroups that hold about
half of the file.

llama.cpp that GCC compiled for a processor with AMX may end with an illegal instruction (ggml-org/llama.cpp#26954);
LLAMA_CPP_LIB_PATH names the directory of another build for llama_cpp to load.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from edge_moe.bench import CONFIGS
from edge_moe.bench.bandwidth import memory_read_gbps
from edge_moe.bench.bench import weight_bytes
from edge_moe.bench.conditions import busy_seconds, processor
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.devices.probe import default_threads
from edge_moe.runtime.bundle import Bundle

from . import cgroup
from .engines import Child, Model
from .gguf_model import MIXES, bytes_per_token, make_gguf

CONFIG = CONFIGS / "qwen3-30b-a3b.json"
VOCAB = 4096
CONTEXT = 512
WIDTHS = {"Q2_K": 2, "Q4_0": 4, "Q4_K_M": 4}  # ours of about as many bytes
KEPT = "MXFP4"  # a type whose experts we keep as they are
TRUNK_WIDTHS = (4, 8)  # the first is closest to a GGUF file, the second our default
TESTS = (("pp", 128), ("pp", 512), ("tg", 32))
QUIET = 0.15  # maximum share of the cores that other programs and the hypervisor may take in a turn
TRIES = 4  # maximum of turns, as a multiple of the rounds
WAIT_S = 10.0  # maximum wait for the machine to be quiet before a turn
LOOK_S = 0.5
FORGET_TRIES = 20
PAGED_TESTS = (("tg", 8),)
MLX_TESTS = (("pp", 16), ("tg", 4))  # MLX's CPU backend is a correctness path
MLX_ROUNDS = 2
PAGED_ROUNDS = 3
PAGED_SHARE = 1.75  # size of the GGUF file over the cgroup's limit
NEEDED = ("llama_cpp", "gguf")


@dataclass(frozen=True, slots=True)
class Row:
    """One engine and test. Speeds are tokens a second by turn; ratios are to the peer in the same turn."""

    type: str  # of the GGUF file that it is compared with
    engine: str
    label: str
    test: str  # pp128, tg32
    file_bytes: int
    token_bytes: float  # bytes of the weights used for one generated token
    limit_bytes: int | None  # of the memory cgroup
    peak_bytes: int | None  # of the memory cgroup, page cache included
    killed: bool  # at the limit; then there are no speeds
    tps: list[float]
    ratios: list[float]  # empty for the peer itself
    others: float  # maximum over turns of the share of the cores taken by others

    @property
    def weights_gbps(self) -> float | None:
        """GB/s of the weights used for generating; None for prompts."""
        return self.token_bytes * statistics.median(self.tps) / 1e9 if self.test.startswith("tg") and self.tps else None


@dataclass(frozen=True, slots=True)
class Turn:
    """One test, run once by every engine."""

    seconds: list[float]  # by engine
    others: float  # share of the cores taken by other programs and the hypervisor


@dataclass(frozen=True, slots=True)
class Report:
    rows: list[Row]
    config: Path
    layers: int
    threads: int
    processor: str
    memory_gbps: float
    versions: dict[str, str]
    notes: list[str]

    def as_dict(self) -> dict:
        return asdict(self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--types", default=",".join(WIDTHS), help="of GGUF files: " + ", ".join(MIXES))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the models in DIR, and use those from before")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"{' and '.join(missing)} not found; pip install 'edge-moe[peers]'")
    tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    report = compare(a.types.split(","), layers=a.layers, rounds=a.rounds, keep=a.keep, tell=tell)
    print(json.dumps(report.as_dict()) if a.json else markdown(report))


def compare(
    types: list[str],
    *,
    layers: int = 4,
    rounds: int = 5,
    keep: Path | None = None,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Make and measure the models of each type, and those of the first type in cgroups if these can be created.

    Raises ValueError for a type that is not in WIDTHS, OSError for an engine that fails.
    """
    if unknown := [kind for kind in types if kind not in WIDTHS]:
        raise ValueError(f"type {unknown[0]!r} is not compared here; use some of {', '.join(WIDTHS)}")
    threads, rows, notes = threads or default_threads(), [], []
    for kind in types:
        with tempfile.TemporaryDirectory() as directory:
            tell(f"{kind}: writing models")
            models = make_models(kind, keep or Path(directory), layers, threads)
            rows += run_rounds(kind, models, TESTS, rounds, tell=tell)
            if kind == types[0]:
                try:
                    rows += run_paged(kind, models, tell)
                except PermissionError as error:
                    notes.append(f"Nothing was run in a cgroup: {error}.")
            if WIDTHS[kind] == 4 and not any(row.engine == "mlx-lm" for row in rows):
                if importlib.util.find_spec("mlx_lm"):
                    rows += run_mlx(models, tell)
                else:
                    notes.append("mlx_lm is not installed, and was left out.")
    return report_of(rows, CONFIG, layers, threads, notes)


def report_of(rows: list[Row], config: Path, layers: int, threads: int, notes: list[str]) -> Report:
    """The rows with the conditions of this machine."""
    versions = {name: importlib.metadata.version(name) for name in ("edge-moe", "llama-cpp-python")}
    return Report(rows, config, layers, threads, processor(), memory_read_gbps(threads), versions, notes)


def make_models(kind: str, directory: Path, layers: int, threads: int, config: Path | None = None) -> list[Model]:
    """Make the GGUF file, which is first, and our bundles; existing files in `directory` are reused.

    config: the config.json whose shapes they have; None: CONFIG.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config, common = config or CONFIG, {"vocab": VOCAB, "context": CONTEXT, "threads": threads}
    file = directory / f"{config.stem}-{kind}-{layers}L.gguf"
    if not file.exists():
        make_gguf(config, partial := file.with_suffix(".partial"), kind, layers, VOCAB)
        partial.rename(file)
    models = []
    for trunk_width in TRUNK_WIDTHS:
        experts = {"mxfp4": True} if kind == KEPT else {"width": WIDTHS[kind]}
        name = "mxfp4" if kind == KEPT else f"width-{WIDTHS[kind]}"
        path = directory / f"{config.stem}-{name}-trunk-{trunk_width}-{layers}L.emoe"
        if not path.exists():
            make_synthetic(config, path, layers, vocab=VOCAB, trunk_width=trunk_width, **experts)
        bundle = Bundle.open(path)
        token_bytes = weight_bytes(bundle, bundle.config.top_k * len(bundle.config.moe_layers))
        label = f"{name.replace('-', ' ')}, trunk {trunk_width}"
        models.append(Model("edge-moe", label, str(path), bundle.nbytes, token_bytes, **common))
    read = bytes_per_token(bundle.config, kind)
    return [Model("llama.cpp", kind, str(file), file.stat().st_size, read, **common), *models]


def run_rounds(
    kind: str,
    models: list[Model],
    tests: tuple[tuple[str, int], ...],
    rounds: int,
    limit_bytes: int | None = None,
    quiet: float = QUIET,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Load every model, warm up, and let them take turns; returns a row for each model and test.

    Ratios are relative to the first model, the peer. limit_bytes: of a memory cgroup for each model. quiet: a turn is
    repeated if others took a larger share of the cores. Tokens differ by turn.
    """
    turns = {test: [] for test in tests}
    with ExitStack() as stack:
        groups = [cgroup.make(limit_bytes) if limit_bytes else None for _ in models]
        for group in filter(None, groups):
            stack.callback(group.remove)
        children = [stack.enter_context(Child(model, group)) for model, group in zip(models, groups, strict=True)]
        for number in range(TRIES * rounds + 1):
            for test, its in turns.items():
                if sum(turn.others <= quiet for turn in its) < rounds:
                    turn = take_turn(children, test, number)
                    its += [turn] if number else []  # the first turn is a warm-up
                    tell(f"{kind} {test[0]}{test[1]}: turn {number}, {turn.others:.0%} of the cores with others")
        peaks = [group.peak_bytes if group else None for group in groups]
    rows = []
    for (name, tokens), its in turns.items():
        kept = sorted(its, key=lambda turn: turn.others)[:rounds]
        others = max(turn.others for turn in kept)
        for at, model in enumerate(models):
            tps = [tokens / turn.seconds[at] for turn in kept]
            ratios = [turn.seconds[0] / turn.seconds[at] for turn in kept] if at else []
            rows.append(_row(kind, model, f"{name}{tokens}", limit_bytes, peaks[at], tps, ratios, others))
    return rows


def take_turn(children: list[Child], test: tuple[str, int], number: int) -> Turn:
    """One run of every engine, in an order that rotates from turn to turn."""
    if children[0].model.clock == "wall":
        wait_until_quiet(WAIT_S)
    seconds, began, busy = [0.0] * len(children), time.perf_counter(), busy_seconds()
    own = lambda: sum(child.cpu_seconds for child in children)  # noqa: E731
    before = own()
    for step in range(len(children)):
        at = (number + step) % len(children)
        seconds[at] = children[at].run(*test, seed=number)
    others = busy_seconds() - busy - (own() - before)
    return Turn(seconds, max(others, 0.0) / (time.perf_counter() - began) / os.cpu_count())


def wait_until_quiet(seconds: float) -> None:
    """Return when the cores have been idle for a moment, or after `seconds`."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began, busy = time.perf_counter(), busy_seconds()
        time.sleep(LOOK_S)
        if (busy_seconds() - busy) / (time.perf_counter() - began) / os.cpu_count() < QUIET:
            break


def run_paged(kind: str, models: list[Model], tell: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Run the models in memory cgroups of the GGUF file's size divided by PAGED_SHARE, with a cold page cache.

    llama.cpp runs with its defaults, which repack at load and may be killed for it, and with its memory map only.
    """
    limit = int(models[0].file_bytes / PAGED_SHARE) // 10_000_000 * 10_000_000
    peer = replace(models[0], label=f"{kind}, mmap, no repacking", options={"repack": False})
    ours = [replace(model, options={"ram": limit}) for model in models[1:]]
    tell(f"{kind}: in a cgroup of {limit / 1e6:.0f} MB")
    for model in models:
        forget(Path(model.path))
    # The time goes into reads here, and the share of others includes the kernel's work for them.
    rows = run_rounds(kind, [peer, *ours], PAGED_TESTS, PAGED_ROUNDS, limit, quiet=1.0, tell=tell)
    group = cgroup.make(limit)
    try:
        Child(models[0], group).close()
    except OSError:
        repacked = replace(models[0], label=f"{kind}, default")
        rows += [_row(kind, repacked, f"{name}{n}", limit, group.peak_bytes, [], [], 0.0) for name, n in PAGED_TESTS]
    finally:
        group.remove()
    return rows


def run_mlx(models: list[Model], tell: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Run our bundle that is closest to mlx_lm's usual 4 bits, and mlx_lm with a random model of its shapes."""
    ours = models[1]
    peer = replace(ours, engine="mlx-lm", label="4 bits, group 64", options={"bits": 4})
    return run_rounds("mlx", [peer, ours], MLX_TESTS, MLX_ROUNDS, tell=tell)


def forget(path: Path) -> None:
    """Evict a file, or those of a directory, from the page cache: cached pages would not be charged to a new cgroup.

    Raises OSError if pages stay, as they do while a process has the file mapped.
    """
    for file in [path] if path.is_file() else path.iterdir():
        with open(file, "rb") as opened:
            for _ in range(FORGET_TRIES):
                os.fsync(opened)  # dirty pages cannot be evicted
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if not (left := cached_share(opened.fileno())):
                    break
                time.sleep(LOOK_S)  # the memory of a killed process is freed asynchronously
            else:
                raise OSError(f"{file}: {left:.0%} of it stays in the page cache; end what uses it")


def cached_share(handle: int) -> float:
    """The share of a file that is in the page cache."""
    with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        held = np.zeros(-(-view.nbytes // mmap.PAGESIZE), np.uint8)
        pages = [ctypes.c_void_p(array.ctypes.data) for array in (view, held)]
        code = ctypes.CDLL(None, use_errno=True).mincore(pages[0], ctypes.c_size_t(view.nbytes), pages[1])
        del view  # otherwise the map cannot be closed
    if code:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return float((held & 1).mean())


def markdown(report: Report) -> str:
    """The conditions, a table of the runs in full memory, and a table of those in cgroups."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        f"{report.processor}, {threads_of(report)}, memory reads at {report.memory_gbps:.1f} GB/s; {versions}.",
        f"{report.config.stem}'s shapes with {report.layers} layers and {VOCAB:,} tokens of vocabulary. Tokens a "
        "second: the median of all turns (lowest to highest); ratios are to the peer named first, the median of those "
        "within a turn. Others, a hypervisor included, had at most "
        f"{max(row.others for row in report.rows):.0%} of the cores.",
        *report.notes,
    ]
    free = [row for row in report.rows if row.limit_bytes is None]
    paged = [row for row in report.rows if row.limit_bytes is not None]
    tables = [_table([row for row in free if (row.type == "mlx") == mlx], []) for mlx in (False, True)]
    if paged:
        heading = f"In a memory cgroup of {paged[0].limit_bytes / 1e6:.0f} MB, starting with a cold page cache:"
        tables += [heading, _table(paged, ["peak of the cgroup"])]
    return "\n\n".join([*lines, *filter(None, tables)])


def threads_of(report: Report) -> str:
    return f"{report.threads} thread{'s' * (report.threads > 1)}"


def _table(rows: list[Row], extra: list[str]) -> str:
    """A table with a line for each engine and model and two columns for each test; empty without rows."""
    if not rows:
        return ""
    tests = list(dict.fromkeys(row.test for row in rows))
    columns = ["type", "engine", "model", "file", "read a token"]
    columns += [name for test in tests for name in (f"{test} tok/s", "ratio")] + ["GB/s of weights", *extra]
    models = {}
    for row in rows:
        models.setdefault((row.type, row.engine, row.label), []).append(row)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for names, its in models.items():
        cells = [*names, f"{its[0].file_bytes / 1e9:.2f} GB", f"{its[0].token_bytes / 1e6:.1f} MB"]
        for row in its:
            cells += [_speed(row), f"{statistics.median(row.ratios):.2f}" if row.ratios else ""]
        rates = [f"{row.weights_gbps:.1f}" for row in its if row.weights_gbps]
        cells += ["".join(rates[:1]), *([f"{its[0].peak_bytes / 1e6:.0f} MB"] if extra else [])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _speed(row: Row) -> str:
    if row.killed:
        return "killed at load"
    digits = 0 if min(row.tps) >= 100 else 1 if min(row.tps) >= 10 else 2
    return f"{statistics.median(row.tps):.{digits}f} ({min(row.tps):.{digits}f} to {max(row.tps):.{digits}f})"


def _row(kind: str, model: Model, test: str, limit: int | None, peak: int | None, tps, ratios, others: float) -> Row:
    names = (kind, model.engine, model.label, test, model.file_bytes, model.token_bytes)
    return Row(*names, limit, peak, not tps, tps, ratios, others)


if __name__ == "__main__":
    main()
