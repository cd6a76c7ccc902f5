"""Checks and measures the CUDA device on this machine's GPU, for the reports bench/reports/cuda-GPU.json and .md.

    bench/gpu_check.sh [--quick]     builds what this needs and runs it

It checks the parity of every kernel with scalar.cpp, runs compute-sanitizer and the GPU's tests, compares each kernel
with reading, copying and multiplying alone and memory with its plan, and measures random models with Qwen3-30B-A3B's
layer shapes, resident and paged, against the CPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from edge_moe import _core
from edge_moe.bench import CONFIGS
from edge_moe.bench.bench import Measurement
from edge_moe.bench.conditions import processor
from edge_moe.bench.synthetic import make_in_child
from edge_moe.devices.nvidia import find_driver, nvcc_version
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.child import answer, call

from .markdown import table

CONFIG = CONFIGS / "qwen3-30b-a3b.json"
LAYERS, VOCAB = 8, 32768
WIDTHS = (4, 2)
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CEILINGS = {"gbps": "read", "tops": "tensor cores on bytes"}
UNITS = {"gbps": "GB/s", "tops": "TOPS"}
MEMORY = {
    "planned_bytes": "trunk, KV cache, scratch and experts, as planned",
    "gpu_bytes": "less free on the GPU than before",
    "uncounted_bytes": "of it not counted by the system as the process's",
    "total_bytes": "the whole plan",
    "peak_memory_bytes": "peak: the process's own, and what is not counted as that",
    "driver_bytes": "less available in the system when the GPU begins to be used, before any of this",
}
TOOL_S = 300  # time limit of one compute-sanitizer run
PAGED_SHARE = 0.5  # bytes of the slots, as a share of all experts' bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("programs", type=Path, help="where check_cuda and bench_cuda are")
    parser.add_argument("tests", type=Path, help="the project's tests")
    parser.add_argument("out", type=Path, help="the directory of the reports")
    parser.add_argument("--quick", action="store_true", help="no compute-sanitizer, one width, fewer repeats")
    given = parser.parse_args()
    report = {"conditions": {**conditions(), "quick": given.quick}}
    name = "cuda-" + "-".join(report["conditions"]["gpu"]["name"].lower().replace("/", " ").split())
    given.out.mkdir(parents=True, exist_ok=True)
    for section, make in {
        "parity": lambda: parity(given.programs),
        "sanitizer": lambda: {} if given.quick else {tool: sanitised(tool, given.programs) for tool in TOOLS},
        "gates": lambda: gates(given.tests),
        "kernels": lambda: kernels(given.programs),
        "memory": memory,
        "models": lambda: models(WIDTHS[:1] if given.quick else WIDTHS, 2 if given.quick else 5),
    }.items():
        report[section] = make()
        # written after each step, in case the next one fails
        (given.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (given.out / f"{name}.md").write_text(markdown(report))
    print(markdown(report))
    if failed := [what for what, passed in verdicts(report).items() if not passed]:
        sys.exit(f"failed: {', '.join(failed)}")


def conditions() -> dict:
    driver = find_driver()
    return {
        "gpu": _core.cuda_gpu(),
        "driver": driver.version if driver else None,
        "nvcc": nvcc_version(),
        "processor": processor(),
    }


def run(*command, seconds: float | None = None, **environment: str) -> dict:
    """Run a program; returns its exit status, None if it took too long, and the end of its output."""
    tell(" ".join(str(part) for part in command))
    try:
        ran = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return {"status": None, "said": f"stopped after {seconds:.0f} s"}
    if ran.returncode:
        tell(ran.stdout[-6000:])
    return {"status": ran.returncode, "said": ran.stdout[-2000:].strip()}


def parity(programs: Path) -> dict:
    """Compare every kernel with scalar.cpp, bit for bit."""
    return run(programs / "check_cuda")


def sanitised(tool: str, programs: Path) -> dict:
    """Run the kernels under compute-sanitizer."""
    if not shutil.which("compute-sanitizer"):
        return {"status": None, "said": "compute-sanitizer is not installed"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", programs / "check_cuda", "quick"]
    return run(*command, seconds=TOOL_S)


def gates(tests: Path) -> dict:
    """Run tests/test_cuda_engine.py on the GPU: transformers' logits, the CPU's bits, caps, errors."""
    return run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests / "test_cuda_engine.py")


def kernels(programs: Path) -> list[dict]:
    """The bytes or operations a second of each kernel, and their share of reading or multiplying alone."""
    ran = subprocess.run([programs / "bench_cuda"], stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    alone = {its["what"]: its for its in found}
    for its in found:
        unit = next(unit for unit in CEILINGS if unit in its)
        its["share"] = its[unit] / alone[CEILINGS[unit]][unit]
    return found


def models(widths: tuple[int, ...], repeats: int) -> list[dict]:
    """Rows of `edge-moe bench`: on the CPU; on the GPU resident, without graphs, and paged."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for width in widths:
            bundle = Path(directory) / f"{width}.emoe"
            tell(f"a random model of {width} bits")
            make_in_child(directory, CONFIG, bundle, LAYERS, width, VOCAB)
            opened = Bundle.open(bundle)
            given = {"bundle": str(bundle), "repeats": repeats, "prompt": 512, "generate": 128, "depths": (0, 4096)}
            whole = {"ram": "64GB", **given}
            for how, options in (
                ("resident", {"device": "cuda", **whole}),
                ("resident, no graphs", {"device": "cuda", "graphs": False, **whole}),
                ("processor", {"device": "cpu", **whole}),
                ("paged", {"device": "cuda", "paged": PAGED_SHARE * opened.expert_bytes, **given}),
            ):
                tell(f"{width} bits, {how}")
                found = call("bench.laboratory.cuda_report", options, "measuring was killed")
                rows += [{"how": how, "width": width, **row} for row in found]
            shutil.rmtree(bundle)
    return rows


def memory() -> dict:
    """The memory of a Runtime as counted by the GPU and the system, and its plan."""
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory) / "4.emoe"
        make_in_child(directory, CONFIG, bundle, 2, 4, VOCAB)
        return call("bench.laboratory.cuda_report", {"memory_of": str(bundle)}, "measuring was killed")


def _memory(bundle: str) -> dict:
    """Measure memory in a child process, which has not used the GPU before."""
    from edge_moe.runtime.runtime import Runtime

    before = _core.free_bytes()
    gpu = _core.cuda_gpu()
    begun = _core.free_bytes()
    with Runtime(bundle, "16GB", 4096, "cuda") as runtime:
        runtime.generate(list(range(600)), 32)
        plan, stats, in_place = runtime.plan, runtime.stats, runtime._engine.in_place
        taken = gpu["free_bytes"] - _core.cuda_gpu()["free_bytes"]
    return {
        "in_place": in_place,
        "driver_bytes": before - begun,  # of system memory, taken at the first use of the GPU
        "planned_bytes": plan.trunk_bytes
        + plan.kv_cache_bytes
        + plan.state_bytes
        + plan.scratch_bytes
        + plan.experts_bytes,
        "gpu_bytes": taken,  # decrease of its free memory
        "uncounted_bytes": stats["uncounted_bytes"],
        "peak_memory_bytes": stats["peak_memory_bytes"],
        "total_bytes": plan.total_bytes,
    }


def _answer(memory_of: str = "", **asked):
    return _memory(memory_of) if memory_of else _measure(**asked)


def _measure(graphs: bool = True, paged: float = 0, **asked) -> list[dict]:
    """Measure the rows of one way to run in a child process. paged: bytes of slots, instead of a cap."""
    from edge_moe.bench.bench import measure
    from edge_moe.runtime.plan import BelowFloor

    if not graphs:
        os.environ["EDGE_MOE_CUDA_GRAPHS"] = "0"
    if paged:
        try:
            measure(ram=10**6, **asked)
        except BelowFloor as refused:
            asked["ram"] = refused.plan.floor_bytes + int(paged)
    return [asdict(row) for row in measure(**asked)[0]]


def verdicts(report: dict) -> dict[str, bool]:
    """Whether each check passed, including compute-sanitizer's if it ran."""
    checks = {"parity": report["parity"]["status"] == 0, "gates": report["gates"]["status"] == 0}
    for tool, ran in report["sanitizer"].items():
        if ran["status"] is not None and "not supported" not in ran["said"]:
            checks[tool] = ran["status"] == 0
    return checks


def markdown(report: dict) -> str:
    gpu, about = report["conditions"]["gpu"], report["conditions"]
    memory = "shared with the processor" if gpu["integrated"] else "of its own"
    read = next(its["gbps"] for its in report["kernels"] if its["what"] == CEILINGS["gbps"])
    sections = [
        f"# The cuda device on {gpu['name']}\n\nCompute capability {gpu['compute_capability']}, "
        f"{gpu['multiprocessors']} multiprocessors, {gpu['memory_bytes'] / 1e9:.0f} GB {memory}; driver for CUDA "
        f"{about['driver']}, nvcc {about['nvcc']}; {about['processor']}. By `bench/gpu_check.sh"
        f"{' --quick' if about['quick'] else ''}`.",
        "## Checks\n\n" + table(["check", "", "last line"], check_rows(report)),
        "## Kernels alone\n\nOne token, or a prompt of 512, times matrices that no cache holds; medians. The share is "
        "of reading alone or of tensor cores alone.\n\n" + table(["what", "", "share"], kernel_rows(report["kernels"])),
        "## Memory\n\nOf two layers, resident, 4,096 tokens of context. Records are "
        + ("read to where kernels find them" if report["memory"]["in_place"] else "copied to the GPU's own memory")
        + ".\n\n"
        + table(["what", ""], [[text, megabytes(report["memory"][key])] for key, text in MEMORY.items()]),
        f"## Models\n\nRandom, Qwen3-30B-A3B's layer shapes, {LAYERS} layers, {VOCAB:,} tokens of vocabulary; means "
        "and deviations. The share is of the bytes of weights that a token needs at the speed of reading alone. Paged: "
        f"slots for {PAGED_SHARE:.0%} of the experts, routed almost evenly.\n\n"
        + table(["width", "how", "test", "tok/s", "share", "hits", "peak"], model_rows(report["models"], read)),
    ]
    return "\n\n".join(sections) + "\n"


def check_rows(report: dict) -> list[list[str]]:
    passed = verdicts(report)
    rows = []
    for name, ran in {"parity": report["parity"], **report["sanitizer"], "gates": report["gates"]}.items():
        said = ran["said"].splitlines()[-1:] or [""]
        rows.append([name, {True: "passed", False: "**FAILED**", None: "not run"}[passed.get(name)], said[0]])
    return rows


def kernel_rows(found: list[dict]) -> list[list[str]]:
    rows = []
    for its in found:
        unit = next(unit for unit in UNITS if unit in its)
        rows.append([its["what"], f"{its[unit]:.1f} {UNITS[unit]}", f"{its['share']:.0%}"])
    return rows


def model_rows(found: list[dict], read_gbps: float) -> list[list[str]]:
    rows = []
    for its in found:
        row = Measurement(**{key: value for key, value in its.items() if key not in ("how", "width")})
        share = f"{row.weights_gbps / read_gbps:.0%}" if row.weights_gbps and row.device == "cuda" else ""
        rows.append(
            [str(its["width"]), its["how"], row.test, f"{row.tps_mean:.1f} ± {row.tps_sd:.1f}", share]
            + [f"{row.hit_rate:.0%}", megabytes(row.peak_memory_bytes)]
        )
    return rows


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    answer(_answer) if sys.argv[1:] and sys.argv[1].startswith("{") else main()
