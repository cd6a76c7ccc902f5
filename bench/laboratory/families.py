"""Compares our speed with llama.cpp's on this machine for models of newer families, as peers.py does for one.

    python -m bench.laboratory.families [--models gpt-oss-20b,lfm2-8b-a1b] [--rounds 5] [--keep DIR] [--cpu-seconds]

Random models have the shapes of bench/configs, with so many layers that every kind of layer is there. llama.cpp runs
gpt-oss with the MXFP4 codes of its experts and 8 bits for the rest, as it is published; we keep these codes.

On a machine that other programs use, an engine whose threads spin while waiting loses more than one whose threads
sleep. --cpu-seconds runs each engine with one thread and counts the CPU time of its process, at any load.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from edge_moe.bench import CONFIGS
from edge_moe.bench.conditions import processor
from edge_moe.devices.probe import default_threads

from . import peers
from .markdown import table

MODELS = {  # layers, types of the GGUF file
    "gpt-oss-20b": (4, ("MXFP4",)),
    "qwen3.6-35b-a3b": (4, ("Q4_0", "Q4_K_M")),
    "gemma-4-26b-a4b": (6, ("Q4_0",)),
    "lfm2-8b-a1b": (8, ("Q4_0", "Q4_K_M")),
    "nemotron-3-nano-30b-a3b": (6, ("Q4_0",)),
}
TESTS = (("pp", 512), ("tg", 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--types", help="of the GGUF files; default: all that a model is compared with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the models in DIR, and use those from before")
    parser.add_argument("--cpu-seconds", action="store_true", help="one thread, speed by the CPU time of each process")
    a = parser.parse_args()
    if missing := [name for name in peers.NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"{' and '.join(missing)} not found; pip install 'edge-moe[peers]'")
    if unknown := [name for name in a.models.split(",") if name not in MODELS]:
        sys.exit(f"model {unknown[0]!r} is not compared here; use some of {', '.join(MODELS)}")
    reports = []
    for name in a.models.split(","):
        layers, types = MODELS[name]
        types = tuple(kind for kind in types if not a.types or kind in a.types.split(","))
        if types:
            reports.append(compare(name, layers, types, a.rounds, a.keep, a.cpu_seconds))
    if not reports:
        sys.exit(f"none of {a.models} is compared with {a.types}")
    print(markdown(reports, a.cpu_seconds))


def compare(
    name: str, layers: int, types: tuple[str, ...], rounds: int, keep: Path | None = None, cpu_seconds: bool = False
) -> peers.Report:
    """Make and measure models of so many layers and these types, with the shapes of a config of bench/configs."""
    clock, threads, quiet = ("cpu", 1, 1.0) if cpu_seconds else ("wall", default_threads(), peers.QUIET)
    config, rows = CONFIGS / f"{name}.json", []
    for kind in types:
        with tempfile.TemporaryDirectory() as directory:
            tell(f"{name} {kind}: writing models")
            models = peers.make_models(kind, keep or Path(directory), layers, threads, config)
            models = [replace(model, clock=clock) for model in models]
            rows += peers.run_rounds(kind, models, TESTS, rounds, quiet=quiet, tell=tell)
    return peers.report_of(rows, config, layers, threads, [])


def markdown(reports: list[peers.Report], cpu_seconds: bool = False) -> str:
    """A summary of all models, then a section for each."""
    rows, memory = [], max(report.memory_gbps for report in reports)
    for report in reports:
        for peer, ours in paired(report.rows):
            rates = [f"{ratio:.2f}" for ratio in (statistics.median(ours[test].ratios) for test in ours)]
            generated = next(row for row in ours.values() if row.weights_gbps)
            theirs = next(row for row in peer.values() if row.weights_gbps)
            shares = [f"{row.weights_gbps / memory:.0%}" for row in (theirs, generated)]
            rows.append([report.config.stem, theirs.label, generated.label, *rates, *shares])
    titles = ["model", "llama.cpp", "edge-moe", *(f"{kind}{count} ratio" for kind, count in TESTS)]
    titles += ["llama.cpp's share of the bandwidth", "ours"]
    sections = [f"## {report.config.stem}\n\n{peers.markdown(report)}" for report in reports]
    seconds = "A second is one of CPU time of an engine's process, which has one thread. " if cpu_seconds else ""
    conditions = (
        f"{processor()}, {peers.threads_of(reports[0])}. Our speed over llama.cpp's, the median of the ratios within a "
        "turn; and the bytes of weights a second while decoding, over the most that the memory was seen to read a "
        f"second, {memory:.1f} GB. {seconds}"
    )
    return "\n\n".join(["# Newer families beside llama.cpp", conditions.strip(), table(titles, rows), *sections])


def paired(rows: list[peers.Row]) -> list[tuple[dict[str, peers.Row], dict[str, peers.Row]]]:
    """The rows by test of a peer and of each of our models that is compared with it."""
    groups: dict[tuple[str, str], dict[str, peers.Row]] = {}
    for row in rows:
        groups.setdefault((row.type, row.label), {})[row.test] = row
    of_peers = {kind: its for (kind, _), its in groups.items() if not next(iter(its.values())).ratios}
    return [(of_peers[kind], its) for (kind, _), its in groups.items() if its is not of_peers[kind]]


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
