"""llama-bench's table for a bundle under a cap: prefill and decode speed, hit rate, bytes read, and peak memory.

Both tests feed random token ids of a fixed seed, as llama-bench does: ppN reads a prompt of N tokens, tgN feeds N
tokens one at a time. They start with an empty context, or after the tokens of a depth, which are not timed. A test has
one warm-up run, then `repeats` timed runs with the experts that earlier runs left in memory. Random tokens have no
topic, so under a cap their hit rate is lower than that of text.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..runtime.bundle import Bundle
from ..runtime.codecs import trunk_parts
from ..runtime.config import trunk_shapes
from ..runtime.plan import Plan
from ..runtime.runtime import LAST, NOTHING, Runtime
from ..runtime.tensorfile import bytes_of
from .bandwidth import machine_bandwidth


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of the table. Speeds are in tokens a second; figures are over all timed runs unless stated otherwise."""

    model: str
    architecture: str
    size_bytes: int  # trunk and experts
    params: int
    bits_per_weight: float  # of the experts
    device: str
    threads: int
    ram_bytes: int  # the cap
    slots: int  # approximate: in experts of mean size; 0 if resident
    resident: bool  # every expert is in memory
    holds_working_set: bool  # all experts that one token uses fit in memory at once
    test: str  # pp512, tg128 @ d4096
    tokens: int  # computed by a timed run
    depth: int  # tokens in the context before the test
    prune: str
    experts_used: float  # per token and layer
    tps_mean: float
    tps_sd: float
    repeats: int
    hit_rate: float  # of expert look-ups
    read_bytes_per_token: float  # from storage
    weights_gbps: float | None  # bytes of weights used for generating, per second; None for prompts
    peak_memory_bytes: int  # of the process, so far


@dataclass(frozen=True, slots=True)
class Report:
    rows: list[Measurement]
    memory_gbps: float
    disk_gbps: float | None  # unbuffered; None if the file system does not support that
    plan: dict

    def as_dict(self) -> dict:
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


@dataclass(frozen=True, slots=True)
class Test:
    kind: str  # pp | tg
    tokens: int
    depth: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


def bench(
    bundle: str | Path,
    *,
    ram: int | str = "auto",
    prompt: int = 512,
    generate: int = 128,
    depths: Sequence[int] = (0,),
    repeats: int = 5,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    prune: list[float | str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Measure a bundle and the machine; arguments and errors are those of measure()."""
    options = {key: value for key, value in locals().items() if key != "bundle"}
    rows, plan = measure(bundle, **options)
    machine = machine_bandwidth(bundle, rows[0].threads)
    return Report(rows, machine["memory_gbps"], machine["disk_gbps"], plan.as_dict())


def bench_synthetic(
    config: str | Path,
    *,
    layers: int | None = None,
    width: int = 4,
    vocab: int | None = None,
    keep: str | Path | None = None,
    run: Callable = bench,
    **options,
):
    """Measure a random bundle with the shapes of a config; see make_synthetic(). keep: where to leave the bundle.

    run: bench() or sweep(), called with the options; its result is returned.
    """
    import tempfile

    from .synthetic import make_in_child

    config = Path(config)
    name = config.resolve().name if config.is_dir() else config.stem
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(keep) if keep else Path(temporary) / (name + (f"-{layers}L" if layers else "") + ".emoe")
        make_in_child(temporary, config, out, layers, width, vocab)
        return run(out, **options)


def measure(
    bundle: str | Path,
    *,
    ram: int | str = "auto",
    prompt: int = 512,
    generate: int = 128,
    depths: Sequence[int] = (0,),
    repeats: int = 5,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    prune: list[float | str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Measurement], Plan]:
    """Measure a row for each test, depth and pruning; returns the rows and the plan under which they ran.

    prompt, generate: tokens of each test, limited to the model's context; 0 omits the test. depths: numbers of tokens
    that are in the context before a test; the KV cache has room for the largest. prune: values as for Runtime; by
    default off, and also bundle if the bundle is calibrated.

    Raises ValueError for counts below 0, nothing to do or a depth beyond the model's context, and what Runtime raises.
    """
    opened = Bundle.open(bundle)
    bundle = opened.path
    tests = _tests(opened, prompt, generate, depths, repeats)
    prune = prune or ["off", *(["bundle"] if opened.pruning else [])]
    context = max(test.depth + test.tokens for test in tests)
    with Runtime(bundle, ram, context, device, threads) as runtime:
        ids = np.random.default_rng(seed).integers(0, runtime.config.vocab, context).tolist()
        rows = [_measure(runtime, test, ids, repeats, how, progress) for test in tests for how in prune]
        return rows, runtime.plan


def prompt_run(runtime: Runtime, ids: list[int], prune) -> None:
    """Read a prompt into an empty context."""
    hold(runtime, [], prune)
    compute(runtime, ids, runtime.plan.chunk)


def generate_run(runtime: Runtime, ids: list[int], prune) -> None:
    """Decode tokens one by one from an empty context, each with its logits."""
    hold(runtime, [], prune)
    compute(runtime, ids, 1)


def _tests(bundle: Bundle, prompt: int, generate: int, depths: Sequence[int], repeats: int) -> list[Test]:
    if prompt < 0 or generate < 0 or repeats < 1 or prompt + generate == 0:
        raise ValueError(
            f"prompt {prompt}, generate {generate}, repeats {repeats}: expected at least one test and one repeat"
        )
    if not depths or min(depths) < 0:
        raise ValueError(f"depths are {list(depths)}, expected numbers of tokens from 0 up")
    longest, asked = bundle.config.context, max(prompt, generate)
    for depth in depths:
        if depth and depth + asked > longest:
            raise ValueError(
                f"{bundle.path}: {asked:,} tokens at depth {depth:,} do not fit the model's context of {longest:,}; "
                "lower the depth or the tests' tokens"
            )
    counts = {kind: min(count, longest) for kind, count in (("pp", prompt), ("tg", generate)) if count}
    return [Test(kind, count, depth) for depth in dict.fromkeys(depths) for kind, count in counts.items()]


def _measure(runtime: Runtime, test: Test, ids: list[int], repeats: int, prune, progress) -> Measurement:
    seconds, used = [], Counter()
    before, timed = ids[: test.depth], ids[test.depth : test.depth + test.tokens]
    step = 1 if test.kind == "tg" else runtime.plan.chunk
    for run in range(repeats + 1):
        hold(runtime, before, prune)
        stats, began = runtime.stats, time.perf_counter()
        compute(runtime, timed, step)
        ended = time.perf_counter()
        if run == 0:  # warm-up
            continue
        seconds.append(ended - began)
        used.update({key: value - stats[key] for key, value in runtime.stats.items()})
        if progress:
            progress(test.name, run, repeats)
    bundle, plan = runtime.bundle, runtime.plan
    weights = weight_bytes(bundle, used["experts_used"] / max(used["tokens"], 1))
    tps = test.tokens / np.array(seconds)
    return Measurement(
        model=bundle.path.name.removesuffix(".emoe"),
        architecture=runtime.config.architecture,
        size_bytes=bundle.nbytes,
        params=parameters(bundle),
        bits_per_weight=bundle.bits_per_weight,
        device=runtime.device,
        threads=runtime.threads,
        ram_bytes=plan.ram_bytes,
        slots=plan.slots,
        resident=plan.resident,
        holds_working_set=plan.holds_working_set,
        test=test.name,
        tokens=used["tokens"] // repeats,
        depth=test.depth,
        prune=str(prune),
        experts_used=used["experts_used"] / max(used["moe_tokens"], 1),
        tps_mean=float(tps.mean()),
        tps_sd=float(tps.std(ddof=1)) if repeats > 1 else 0.0,
        repeats=repeats,
        hit_rate=used["expert_hits"] / max(used["expert_hits"] + used["expert_misses"], 1),
        read_bytes_per_token=used["bytes_read"] / (repeats * test.tokens),
        weights_gbps=weights * float(tps.mean()) / 1e9 if test.kind == "tg" else None,
        peak_memory_bytes=runtime.stats["peak_memory_bytes"],
    )


def hold(runtime: Runtime, ids: list[int], prune) -> None:
    """Make the KV cache hold exactly `ids`, reusing what it holds of the previous run."""
    sequence = runtime._session.begin(hold, [*ids, 0], runtime._rule(prune))
    compute(runtime, ids[len(sequence.tokens) :], runtime.plan.chunk)


def compute(runtime: Runtime, ids: list[int], step: int) -> None:
    """Run tokens after those in the KV cache, `step` at a time, with the logits that generating them would need.

    This skips generate()'s search for a cached prefix, which at a large depth would take longer than a token.
    """
    (sequence,) = runtime._session.sequences.all
    for at in range(0, len(ids), step):
        want = LAST if step == 1 or at + step >= len(ids) else NOTHING
        runtime._session.step(sequence, ids[at : at + step], want)


def weight_bytes(bundle: Bundle, experts: float) -> float:
    """Bytes of the weights that a generated token uses: trunk, one row of the embedding, and `experts` experts."""
    shapes = trunk_shapes(bundle.config)
    embedding = next(t for t in bundle.trunk if t.name == "embedding")
    rest = 0 if "head" not in shapes else _tensor_bytes(embedding)
    record = bundle.expert_bytes / len(bundle.experts)
    return bundle.trunk_bytes - rest + experts * record


def _tensor_bytes(tensor) -> int:
    parts = trunk_parts(tensor.name, (tensor.rows, tensor.cols), tensor.encoding)
    return sum(bytes_of(dtype, shape) for _, _, dtype, shape in parts)


def parameters(bundle: Bundle) -> int:
    """The number of weights of the whole model."""
    trunk = sum(tensor.rows * tensor.cols for tensor in bundle.trunk)
    return trunk + len(bundle.experts) * bundle.config.expert_weights
