"""llama-bench's table for a bundle under a cap: prompt tokens a second, generated tokens a second, and their price.

Both tests feed random token ids of a fixed seed, as llama-bench does: ppN reads a prompt of N tokens into an empty
context, tgN feeds N tokens one at a time. A test has one warm-up run, then `repeats` timed ones with the experts that
the runs before left in memory. Random tokens have no topic, so under a cap they hit fewer experts than text does.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edge_moe.bench.bandwidth import machine_bandwidth
from edge_moe.devices.probe import default_threads
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of the table; speeds are in tokens a second, over all timed runs where nothing else is said."""

    model: str
    architecture: str
    size_bytes: int  # trunk and experts
    params: int
    bits_per_weight: float  # of the experts
    device: str
    threads: int
    ram_bytes: int  # the cap
    resident: bool  # every expert in memory
    test: str  # pp512, tg128
    prune: str
    experts_used: float  # a token and layer
    tps_mean: float
    tps_sd: float
    repeats: int
    hit_rate: float  # of expert look-ups
    read_bytes_per_token: float  # from storage
    weights_gbps: float | None  # bytes of weights that generating computes with, a second; None for prompts
    peak_memory_bytes: int  # of the process, so far


@dataclass(frozen=True, slots=True)
class Report:
    rows: list[Measurement]
    memory_gbps: float
    disk_gbps: float | None  # unbuffered; None where the file system has no such reads
    plan: dict

    def as_dict(self) -> dict:
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


def bench(
    bundle: str | Path,
    *,
    ram: int | str = "auto",
    prompt: int = 512,
    generate: int = 128,
    repeats: int = 5,
    threads: int | None = None,
    seed: int = 0,
    prune: list[float | str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Measure a bundle; prompt or generate 0 leaves that test out, and both are cut to the model's context.

    prune: as for Runtime, a row for each; none: off, and bundle where it is calibrated.

    Raises ValueError for counts below 0 or nothing to do, and what Runtime raises.
    """
    if prompt < 0 or generate < 0 or repeats < 1 or prompt + generate == 0:
        raise ValueError(
            f"prompt {prompt}, generate {generate}, repeats {repeats}: expected at least one test and one repeat"
        )
    opened = Bundle.open(bundle)
    longest, prune = opened.config.context, prune or ["off", *(["bundle"] if opened.pruning else [])]
    prompt, generate = min(prompt, longest), min(generate, longest)
    machine = machine_bandwidth(bundle, threads or default_threads())
    with Runtime(bundle, ram, max(prompt, generate), threads=threads) as runtime:
        ids = np.random.default_rng(seed).integers(0, runtime.config.vocab, max(prompt, generate)).tolist()
        tests = [(f"pp{prompt}", _prompt_run, prompt), (f"tg{generate}", generate_run, generate)]
        rows = [
            _measure(runtime, name, functools.partial(run, prune=how), ids[:count], repeats, how, progress)
            for name, run, count in tests
            for how in prune
            if count > 0
        ]
        return Report(rows, machine["memory_gbps"], machine["disk_gbps"], runtime.plan.as_dict())


def bench_synthetic(
    config: str | Path,
    *,
    layers: int | None = None,
    width: int = 4,
    vocab: int | None = None,
    keep: str | Path | None = None,
    **options,
) -> Report:
    """Measure a random bundle of a config's shapes; see make_synthetic() and bench(). keep: leave the bundle there."""
    import tempfile

    from edge_moe.bench.synthetic import make_in_child

    config = Path(config)
    name = config.resolve().name if config.is_dir() else config.stem
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(keep) if keep else Path(temporary) / (name + (f"-{layers}L" if layers else "") + ".emoe")
        make_in_child(temporary, config, out, layers, width, vocab)
        return bench(out, **options)


def _measure(runtime: Runtime, name: str, run, ids: list[int], repeats: int, prune, progress) -> Measurement:
    seconds = []
    run(runtime, ids)
    before = runtime.stats
    for done in range(repeats):
        began = time.perf_counter()
        run(runtime, ids)
        seconds.append(time.perf_counter() - began)
        if progress:
            progress(name, done + 1, repeats)
    stats, bundle = runtime.stats, runtime.bundle
    used = {key: stats[key] - before[key] for key in before}
    tps = len(ids) / np.array(seconds)
    return Measurement(
        model=bundle.path.name.removesuffix(".emoe"),
        architecture=runtime.config.architecture,
        size_bytes=bundle.nbytes,
        params=parameters(bundle),
        bits_per_weight=bundle.bits_per_weight,
        device=runtime.device,
        threads=runtime.threads,
        ram_bytes=runtime.plan.ram_bytes,
        resident=runtime.plan.resident,
        test=name,
        prune=str(prune),
        experts_used=used["experts_used"] / max(used["moe_tokens"], 1),
        tps_mean=float(tps.mean()),
        tps_sd=float(tps.std(ddof=1)) if repeats > 1 else 0.0,
        repeats=repeats,
        hit_rate=used["expert_hits"] / max(used["expert_hits"] + used["expert_misses"], 1),
        read_bytes_per_token=used["bytes_read"] / (repeats * len(ids)),
        weights_gbps=_weight_bytes(bundle, used) * float(tps.mean()) / 1e9 if name.startswith("tg") else None,
        peak_memory_bytes=stats["peak_memory_bytes"],
    )


def _prompt_run(runtime: Runtime, ids: list[int], prune) -> None:
    runtime.reset()
    runtime.generate(ids, 1, prune=prune)


def generate_run(runtime: Runtime, ids: list[int], prune) -> None:
    """Decode a text: each call finds all but its last token in the KV cache and computes that one."""
    runtime.reset()
    for count in range(1, len(ids) + 1):
        runtime.generate(ids[:count], 1, prune=prune)


def _weight_bytes(bundle: Bundle, used: dict) -> float:
    """Bytes of weights that one generated token is computed with: trunk, one row of the embedding, its experts."""
    shapes = trunk_shapes(bundle.config)
    embedding = next(t for t in bundle.trunk if t.name == "embedding")
    rest = 0 if "head" not in shapes else _tensor_bytes(embedding)
    record = bundle.expert_bytes / len(bundle.experts)
    return bundle.trunk_bytes - rest + used["experts_used"] / max(used["tokens"], 1) * record


def _tensor_bytes(tensor) -> int:
    count = tensor.rows * tensor.cols
    return count * tensor.width // 8 + (4 * count // tensor.group if tensor.width < 16 else 0)


def parameters(bundle: Bundle) -> int:
    """Weights of the whole model."""
    trunk = sum(tensor.rows * tensor.cols for tensor in bundle.trunk)
    return trunk + len(bundle.experts) * bundle.config.expert_weights
