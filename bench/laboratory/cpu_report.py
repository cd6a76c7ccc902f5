"""Measures the speed on the CPU and writes the report bench/reports/cpu.md.

    python -m bench.laboratory.cpu_report [--quick] > bench/reports/cpu.md

It uses random bundles with Qwen3-30B-A3B's layer shapes and a vocabulary of 4,096 tokens, and measures speed by width,
the kernels alone, llama.cpp for comparison if the extra `peers` is installed, decoding under caps relative to the
disk's bound, and growing context, layers and experts. Every row has its own process, as peak memory is per process. It
takes about 25 minutes and 8 GB of disk.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from edge_moe import _core
from edge_moe.bench import CONFIGS
from edge_moe.bench.bandwidth import machine_bandwidth
from edge_moe.bench.bench import Measurement
from edge_moe.bench.conditions import processor, stolen
from edge_moe.bench.kernel_bandwidth import COLS, GROUP, kernel_bandwidth
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.devices.probe import default_threads
from edge_moe.runtime.child import answer, call

from . import peers
from .markdown import table
from .paging_bound import ROUNDS, TOKENS, paging_bound

CONFIG = CONFIGS / "qwen3-30b-a3b.json"
VOCAB, LAYERS = 4096, 4
BUNDLES = ((2, 4), (2, 8), (3, 8), (4, 4), (4, 8), (8, 8))  # widths of experts and trunk
PAGED = (4, 8)
DEPTHS = (0, 128, 512, 1024, 2048, 4096, 8192)
MORE_LAYERS, MORE_EXPERTS = (2, 4, 8, 12), (32, 64, 128, 256)
TESTS = {"prompt": 128, "generate": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and llama.cpp only with 4 layers")
    quick = parser.parse_args().quick
    began = stolen()
    with tempfile.TemporaryDirectory() as directory:
        sections = [
            by_width(Path(directory), 2 if quick else 5),
            kernels_alone(),
            *beside_peers(quick),
            under_caps(Path(directory)),
            growth(Path(directory), 2 if quick else 3),
        ]
    taken = f"A hypervisor kept {stolen() - began:.0f} s from its cores meanwhile."
    print("# Speed on the CPU\n\n" + f"{processor()}, {default_threads()} threads. {taken}\n\n" + "\n\n".join(sections))


def by_width(directory: Path, repeats: int) -> str:
    """Tokens a second by widths of experts and trunk, with everything in memory."""
    rows, machine = [], None
    for experts, trunk in BUNDLES:
        bundle = made(directory, width=experts, trunk_width=trunk)
        prompt, generated = measured(bundle, repeats)
        rows.append(
            [f"{experts}", f"{trunk}", gigabytes(generated.size_bytes), speed(prompt), speed(generated)]
            + [f"{generated.weights_gbps:.1f}", f"{generated.peak_memory_bytes / 1e6:.0f} MB"]
        )
        machine = machine or machine_bandwidth(bundle, default_threads())
        if (experts, trunk) != PAGED:
            remove(bundle)
    titles = ["width", "trunk", "bundle", "pp128 tok/s", "tg32 tok/s", "GB/s of weights", "peak"]
    return (
        "## By width\n\n"
        f"Four layers, every expert in memory; memory reads at {machine['memory_gbps']:.1f} GB/s on all threads. Means "
        f"and deviations of {repeats} runs.\n\n" + table(titles, rows)
    )


def kernels_alone() -> str:
    """The kernels' share of the memory's bandwidth."""
    tell("kernels")
    counts = sorted({1, default_threads()})
    found = [kernel_bandwidth(threads, _core.WIDTHS[:-1]) for threads in counts]
    rows = [
        [str(same[0].width)] + [cell for its in same for cell in (f"{its.gbps:.1f}", f"{its.share:.0%}")]
        for same in zip(*found, strict=True)
    ]
    heads = [head for count in counts for head in (f"GB/s, {count} thread{'s' * (count > 1)}", "of reading alone")]
    return (
        f"## Kernels alone\n\nOne token times a matrix of 0.5 GB in groups of {GROUP}, {COLS} inputs a row, each "
        "thread with rows of its own. Reading alone is NumPy's maximum of the same bytes in the same round; "
        "medians.\n\n" + table(["width", *heads], rows)
    )


def beside_peers(quick: bool) -> list[str]:
    """Our engine and llama.cpp in turns, if llama.cpp is installed."""
    if missing := [name for name in peers.NEEDED if importlib.util.find_spec(name) is None]:
        return [f"## Beside llama.cpp\n\nNot measured: {', '.join(missing)} not installed (extra `peers`)."]
    sections, build = [], "\n\nllama.cpp's own library was built again, without the fault that bench/peers.py names."
    for layers in (4,) if quick else (4, 12):
        report = peers.compare(list(peers.WIDTHS), layers=layers, rounds=3 if quick else 5, tell=tell)
        sections.append(f"## Beside llama.cpp, {layers} layers\n\n" + peers.markdown(report))
        if "LLAMA_CPP_LIB_PATH" in os.environ:
            sections[-1] += build
    return sections


def under_caps(directory: Path) -> str:
    """Decoding under caps, relative to the bound of the disk."""
    tell("caps")
    rows = []
    for its in paging_bound(made(directory, width=PAGED[0], trunk_width=PAGED[1])):
        rows.append(
            [f"{its.ram_bytes / 1e6:.0f} MB", str(its.slots) if its.slots else "resident", f"{its.hit_rate:.0%}"]
            + [f"{its.read_bytes_per_token / 1e6:.1f}", f"{statistics.median(its.tps):.1f}"]
            + [f"{statistics.median(its.disk_gbps):.2f}", f"{its.share:.2f}" if its.share else ""]
            + [f"{its.peak_memory_bytes / 1e6:.0f} MB"]
        )
    titles = ["cap", "slots", "hits", "MB read/token", "tok/s", "disk GB/s", "of the bound", "peak"]
    return (
        f"## Under a cap\n\nWidth {PAGED[0]}, from the floor to every expert in memory; {ROUNDS} rounds of {TOKENS} "
        "tokens. The bound is 1 / (compute + missed bytes / bandwidth of the disk): compute of the last row, the "
        "bandwidth of unbuffered reads between the rounds. Above 1, reading was done while computing. Random weights "
        "route almost evenly, the hardest case for a cache; for recorded text see "
        "[cache_policies.md](cache_policies.md).\n\n" + table(titles, rows)
    )


def growth(directory: Path, repeats: int) -> str:
    """Tokens a second as context, layers and experts grow."""
    bundle = made(directory, width=PAGED[0], trunk_width=PAGED[1])
    depths = measured(bundle, repeats, depths=DEPTHS)
    remove(bundle)
    rows = [["context", f"{depth:,}", *map(speed, depths[2 * i : 2 * i + 2])] for i, depth in enumerate(DEPTHS)]
    for layers in MORE_LAYERS:
        rows.append(["layers", str(layers), *map(speed, once(directory, repeats, layers=layers))])
    for experts in MORE_EXPERTS:
        rows.append(["experts", str(experts), *map(speed, once(directory, repeats, experts=experts))])
    return (
        f"## As work grows\n\nWidth {PAGED[0]}, every expert in memory. Context: tokens before those measured; "
        f"means and deviations of {repeats} runs.\n\n" + table(["what", "", "pp128 tok/s", "tg32 tok/s"], rows)
    )


def once(directory: Path, repeats: int, **shape) -> list[Measurement]:
    bundle = made(directory, width=PAGED[0], trunk_width=PAGED[1], **shape)
    try:
        return measured(bundle, repeats)
    finally:
        remove(bundle)


def made(directory: Path, layers: int = LAYERS, experts: int | None = None, **widths) -> Path:
    """Make a random bundle of these shapes, if there is none yet; remove() deletes it."""
    config = CONFIG
    if experts:
        config = directory / "config.json"
        config.write_text(json.dumps({**json.loads(CONFIG.read_text()), "num_experts": experts}))
    out = directory / f"{layers}-{experts}-{'-'.join(map(str, widths.values()))}.emoe"
    if not out.exists():
        tell(f"{out.stem}")
        make_synthetic(config, out, layers=layers, vocab=VOCAB, **widths)
    return out


def remove(bundle: Path) -> None:
    for file in bundle.iterdir():
        file.unlink()
    bundle.rmdir()


def measured(bundle: Path, repeats: int, depths=(0,)) -> list[Measurement]:
    """Measure a row for each test and depth in another process."""
    asked = {"bundle": str(bundle), "ram": "20GB", "repeats": repeats, "depths": depths, **TESTS}
    return [Measurement(**row) for row in call("bench.laboratory.cpu_report", asked, "measuring was killed")]


def _measure(**asked) -> list[dict]:
    from dataclasses import asdict

    from edge_moe.bench.bench import measure

    return [asdict(row) for row in measure(**asked)[0]]


def speed(row: Measurement) -> str:
    digits = 0 if row.tps_mean >= 200 else 1
    return f"{row.tps_mean:.{digits}f} ± {row.tps_sd:.{digits}f}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    answer(_measure) if sys.argv[1:] and sys.argv[1].startswith("{") else main()
