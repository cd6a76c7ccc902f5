"""Checks and measures the mlx device on this Mac, for the reports bench/reports/mlx-CHIP.json and .md.

    bench/on_mac.sh [--quick]     installs what this needs and runs it

It runs the device's tests, measures the kernels, the costs of the host and the disk, and decodes with a random model of
Qwen3-30B-A3B's layer shapes: resident beside mlx_lm with as many bytes, and paged under caps, with each window. It runs
on Linux too, where MLX computes on the processor: slowly, which says nothing but that it works.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edge_moe.bench import CONFIGS
from edge_moe.bench.bandwidth import directory_read_gbps
from edge_moe.bench.conditions import processor
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.child import answer, call

from .engines import Child, Model
from .markdown import table

CONFIG = CONFIGS / "qwen3-30b-a3b.json"
WIDTH, VOCAB, CONTEXT = 4, 32768, 1024
SHARES = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the experts' bytes, beyond the floor
SPARE = 16_000_000  # bytes beyond the floor, as the interpreter grows meanwhile
WINDOWS = (0, 1, 2, 1000)  # units that are queued and not confirmed; the last: a whole token
READERS = (1, 2, 4, 8, 16)
SYSCTLS = ("hw.model", "hw.memsize", "machdep.cpu.brand_string", "iogpu.wired_limit_mb", "kern.osproductversion")
MODULE = "bench.laboratory.mac_report"
COUNTERS = ("tokens", "units", "replays", "read_backs", "expert_hits", "expert_misses", "bytes_read")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the directory of the reports")
    parser.add_argument("tests", type=Path, help="the project's tests")
    parser.add_argument("--quick", action="store_true", help="fewer layers, tokens and rounds")
    parser.add_argument("--layers", type=int, help="of the random model; by default 16, or 4 with --quick")
    given = parser.parse_args()
    sizes = {"prompt": 128 if given.quick else 512, "tokens": 16 if given.quick else 128}
    layers = given.layers or (4 if given.quick else 16)
    report: dict = {"conditions": {**conditions(), "quick": given.quick, "layers": layers, **sizes}}
    name = "mlx-" + "-".join(report["conditions"]["processor"].lower().split())
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory) / "m.emoe"
        for section, measure in {
            "gates": lambda: gates(given.tests),
            "costs": lambda: call(MODULE, {"of": "costs", "quick": given.quick}, "measuring was killed"),
            "disk": lambda: {count: directory_read_gbps(Path(directory), count) for count in READERS},
            "resident": lambda: beside_mlx_lm(bundle, layers, sizes, 2 if given.quick else 5),
            "caps": lambda: under_caps(bundle, sizes, 2 if given.quick else 3),
        }.items():
            tell(section)
            report[section] = measure()
            # written after each step, in case the next one fails
            (given.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (given.out / f"{name}.md").write_text(markdown(report))
    print(markdown(report))
    if report["gates"]["status"]:
        sys.exit("failed: gates")


def conditions() -> dict:
    import mlx.core as mx

    found = {"system": platform.platform(), "python": platform.python_version(), "mlx": mx.__version__}
    if sys.platform == "darwin":
        for name in SYSCTLS:
            ran = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True)
            found[name] = ran.stdout.strip()
        found["power"] = subprocess.run(["pmset", "-g", "batt"], capture_output=True, text=True).stdout.split("\n")[0]
    info = {key: value for key, value in mx.device_info().items() if isinstance(value, int | float | str)}
    return {**found, "processor": found.get("machdep.cpu.brand_string") or processor(), "device": info}


def gates(tests: Path) -> dict:
    """Run the tests of the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(tests.glob("test_mlx_*.py"))]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        tell(ran.stdout[-6000:])
    return {"status": ran.returncode, "said": ran.stdout.strip()[-2000:]}


def beside_mlx_lm(bundle: Path, layers: int, sizes: dict, rounds: int) -> list[dict]:
    """Tokens a second with every expert in memory, and mlx_lm's with as many bytes, in turns."""
    tell("a random model")
    opened = make_synthetic(CONFIG, bundle, layers=layers, width=WIDTH, vocab=VOCAB, trunk_width=WIDTH)
    options = {"vocab": VOCAB, "context": CONTEXT, "threads": 1, "file_bytes": opened.nbytes, "token_bytes": 0}
    models = [Model("edge-moe", "edge-moe", str(bundle), **options, options={"device": "mlx"})]
    try:
        models.append(Model("mlx-lm", f"mlx_lm {version('mlx-lm')}", str(bundle), **options, options={"bits": WIDTH}))
    except PackageNotFoundError:
        tell("mlx-lm is not installed; there is nothing to compare with")
    rows = []
    for kind, count in (("pp", sizes["prompt"]), ("tg", sizes["tokens"])):
        seconds: list[list[float]] = [[] for _ in models]
        children = [Child(model) for model in models]
        try:
            for turn in range(rounds + 1):
                for child, own in zip(children, seconds, strict=True):
                    own.append(child.run(kind, count, turn))
        finally:
            for child in children:
                child.close()
        rows += [
            {"engine": model.label, "test": f"{kind}{count}", "tps": count / statistics.median(own[1:])}
            for model, own in zip(models, seconds, strict=True)
        ]
    return rows


def under_caps(bundle: Path, sizes: dict, rounds: int) -> list[dict]:
    """Tokens a second under caps, with each window, each cap in a process of its own."""
    rows = []
    for share in SHARES:
        tell(f"{share:.0%} of the experts")
        asked = {"of": "cap", "bundle": str(bundle), "share": share, "rounds": rounds, **sizes}
        rows += call(MODULE, asked, "measuring was killed")
    return rows


def _answer(of: str, **asked):
    if of == "costs":
        from .mlx_costs import measure

        return measure(**asked)
    return _cap(**asked)


def _cap(bundle: str, share: float, rounds: int, prompt: int, tokens: int) -> list[dict]:
    """Measure one cap in a child process."""
    import numpy as np

    from edge_moe.bench.bench import generate_run, prompt_run
    from edge_moe.runtime.plan import BelowFloor
    from edge_moe.runtime.runtime import Runtime

    try:
        Runtime(bundle, 10**6, CONTEXT, "mlx").close()
        raise AssertionError("a megabyte is below every floor")
    except BelowFloor as refused:
        ram = refused.plan.floor_bytes + SPARE + int(share * Bundle.open(bundle).expert_bytes)
    with Runtime(bundle, ram, CONTEXT, "mlx", prune="off") as runtime:
        ids = np.random.default_rng(0).integers(0, runtime.config.vocab, max(prompt, tokens)).tolist()
        about = {"share": share, "ram_bytes": ram, "planned_bytes": runtime.plan.total_bytes}
        rows, seconds = [], []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            prompt_run(runtime, ids[:prompt], "off")
            seconds.append(time.perf_counter() - began)
        rows.append({**about, "test": f"pp{prompt}", "tps": prompt / statistics.median(seconds[1:])})
        for window in WINDOWS:
            runtime._engine.set_window(window)
            seconds, used = [], dict.fromkeys(COUNTERS, 0)
            for turn in range(rounds + 1):
                before, began = runtime.stats, time.perf_counter()
                generate_run(runtime, ids[:tokens], "off")
                seconds.append(time.perf_counter() - began)
                if turn:
                    used = {key: used[key] + runtime.stats[key] - before[key] for key in COUNTERS}
            rows.append(
                {
                    **about,
                    "test": f"tg{tokens}",
                    "window": window,
                    "tps": tokens / statistics.median(seconds[1:]),
                    **used,
                }
            )
        peak = runtime.stats["peak_memory_bytes"]
    return [{**row, "peak_bytes": peak} for row in rows]


def markdown(report: dict) -> str:
    about, costs = report["conditions"], report["costs"]
    resident = {(row["engine"], row["test"]): row["tps"] for row in report["resident"]}
    read = costs["read_gbps"]
    sections = [
        f"# The mlx device on {about['processor']}\n\n{about['system']}, MLX {about['mlx']}, computed by "
        f"{costs['computed_by']}. By `bench/on_mac.sh{' --quick' if about['quick'] else ''}`.",
        f"## Checks\n\n{'passed' if not report['gates']['status'] else '**FAILED**'}: "
        f"`{report['gates']['said'].splitlines()[-1]}`",
        f"## Kernels alone\n\nThe experts of one token at a time; reading alone: {read:.1f} GB/s. MLX's own: "
        "gather_qmm for as many experts, with bfloat16 inputs.\n\n"
        + table(["width", "GB/s", "of reading", "MLX's own"], [_kernel_row(its, read) for its in costs["kernels"]]),
        "## Costs of the host\n\nMicroseconds a unit of work, of {unit_us:.0f} itself: {submitted_us:.0f} more if each "
        "is submitted by itself, {waited_us:.0f} more if each is waited for.".format(**costs["costs"]),
        "## Disk\n\nGB/s by readers: "
        + ", ".join(f"{count}: {gbps:.2f}" if gbps else f"{count}: unknown" for count, gbps in report["disk"].items()),
        f"## Every expert in memory\n\nRandom, Qwen3-30B-A3B's layer shapes, {about['layers']} layers, {WIDTH} bits; "
        "engines in turns, medians.\n\n"
        + table(["engine", "test", "tok/s"], [[*key, f"{tps:.1f}"] for key, tps in resident.items()]),
        "## Under caps\n\nRandom tokens, which are routed almost evenly. window: units queued and not confirmed. A "
        "unit is replayed when it was computed without an expert that it needed.\n\n"
        + table(
            ["experts", "cap", "test", "window", "tok/s", "hits", "replays a token", "waits a token", "peak"],
            [_cap_row(row) for row in report["caps"]],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _kernel_row(its: dict, read: float) -> list[str]:
    stock = f"{its['stock_gbps']:.1f}" if its["stock_gbps"] else "none"
    return [str(its["width"]), f"{its['gbps']:.1f}", f"{its['gbps'] / read:.0%}", stock]


def _cap_row(row: dict) -> list[str]:
    window = {None: "", WINDOWS[-1]: "all"}.get(row.get("window"), str(row.get("window")))
    cells = [f"{row['share']:.0%}", f"{row['ram_bytes'] / 1e6:,.0f} MB", row["test"], window, f"{row['tps']:.1f}"]
    if "tokens" in row:
        looked = max(row["expert_hits"] + row["expert_misses"], 1)
        per_token = (row[name] / max(row["tokens"], 1) for name in ("replays", "read_backs"))
        cells += [f"{row['expert_hits'] / looked:.0%}", *(f"{count:.2f}" for count in per_token)]
    else:
        cells += [""] * 3
    return [*cells, f"{row['peak_bytes'] / 1e6:,.0f} MB"]


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    answer(_answer) if sys.argv[1:] and sys.argv[1].startswith("{") else main()
