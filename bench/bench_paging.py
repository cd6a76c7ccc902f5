"""Benchmarks of decoding with experts paged in, at caps from the floor to every expert in memory.

Each cap has its own process, as peak memory is per process; it loads once and decodes on request, so that loading is
not timed. The tokens must be those without a cap, and the peak at most the cap.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from edge_moe.bench.synthetic import make_synthetic

SHARES = (0.0, 0.1, 0.3, 0.6, 1.0)  # position of the cap between the floor and every expert in memory
CONFIG, LAYERS, VOCAB = "configs/qwen3-30b-a3b.json", 2, 4096
MARGIN = 1_000_000  # upper bound of the variation of the interpreter's memory between starts
PROMPT, CONTEXT = 8, 256

CHILD = """
import json, sys
from edge_moe import Runtime, _core
from edge_moe.runtime.plan import BelowFloor
path, ram, context, prompt, count = json.loads(sys.argv[1])
try:
    runtime = Runtime(path, ram, context)
except BelowFloor as refused:
    print(json.dumps([refused.plan.floor_bytes, refused.plan.resident_bytes]), flush=True)
    sys.exit()
print(json.dumps(_core.kernel_names()[0]), flush=True)
for line in sys.stdin:
    runtime.reset()
    before = runtime.stats
    tokens = runtime.generate(prompt, count).tokens
    stats = runtime.stats
    used = {key: stats[key] - before[key] for key in ("bytes_read", "expert_hits", "expert_misses")}
    memory = {key: stats[key] for key in ("peak_memory_bytes", "ram_bytes")}
    print(json.dumps({"tokens": tokens, "slots": runtime.plan.slots, **used, **memory}), flush=True)
"""


class Capped:
    """A process with a Runtime under a cap; `first` is the message that it sends after loading."""

    def __init__(self, path, ram: int, count: int):
        prompt = np.random.default_rng(0).integers(2, VOCAB, PROMPT).tolist()
        arguments = json.dumps([str(path), ram, CONTEXT, prompt, count])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", CHILD, arguments], **pipes)
        self.first = json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()

    def decode(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def count(small) -> int:
    """The number of tokens to decode."""
    return 8 if small else 16


@pytest.fixture(scope="module")
def bundle(request, small, tmp_path_factory):
    """The embedded model, or 0.7 GB of random experts with Qwen3-30B-A3B's shapes."""
    if small:
        return request.getfixturevalue("reference_bundle")
    out = tmp_path_factory.mktemp("paging") / "random.emoe"
    return make_synthetic(request.path.parent / CONFIG, out, layers=LAYERS, vocab=VOCAB).path


@pytest.fixture(scope="module")
def limits(bundle, count) -> tuple[int, int]:
    """The floor, and the cap from which every expert is in memory."""
    with Capped(bundle, 1_000_000, count) as refused:
        floor, resident = refused.first
    return floor + MARGIN, resident + MARGIN


@pytest.fixture(scope="module")
def uncapped(bundle, count) -> list[int]:
    with Capped(bundle, 8_000_000_000, count) as capped:
        return capped.decode()["tokens"]


@pytest.mark.benchmark(group="decode under a cap")
@pytest.mark.parametrize("share", SHARES)
def test_decode_under_a_cap(benchmark, bundle, limits, uncapped, count, share):
    cap = limits[0] + round(share * (limits[1] - limits[0]))
    with Capped(bundle, cap, count) as capped:
        result = benchmark.pedantic(capped.decode, rounds=3, warmup_rounds=1)
        kernels = capped.first
    tokens, hits, misses = (result.pop(key) for key in ("tokens", "expert_hits", "expert_misses"))
    assert tokens == uncapped
    assert result["peak_memory_bytes"] <= result["ram_bytes"] == cap
    if share == 1:
        assert result["slots"] == misses == result["bytes_read"] == 0
    else:
        assert result["slots"] > 0 and (misses > 0) == (result["bytes_read"] > 0)
    benchmark.extra_info |= {"kernels": kernels, "hit_rate": hits / (hits + misses), **result}
    if benchmark.stats:
        benchmark.extra_info["tps"] = count / benchmark.stats.stats.median
