"""Benchmarks of the embedded model, all of it in memory: loading, prefill and decode.

The results of the timed code are compared with the answer of the scalar kernels.
"""

import numpy as np
import pytest

from edge_moe import _core
from edge_moe.bench.bench import generate_run
from edge_moe.runtime.runtime import Runtime

pytestmark = pytest.mark.benchmark(group="the embedded model, in memory")
RAM, CONTEXT = "4GB", 1024
ANSWER = 8  # tokens that are compared


@pytest.fixture(scope="module")
def ids(small) -> list[int]:
    return np.random.default_rng(0).integers(2, 4096, 64 if small else 512).tolist()


@pytest.fixture(scope="module")
def answer(reference_bundle, ids) -> list[int]:
    """The tokens that the scalar kernels generate after `ids`."""
    with Runtime(reference_bundle, RAM, CONTEXT, kernels="scalar") as runtime:
        return runtime.generate(ids, ANSWER).tokens


@pytest.fixture(scope="module")
def runtime(reference_bundle):
    with Runtime(reference_bundle, RAM, CONTEXT) as runtime:
        yield runtime


def test_load(benchmark, reference_bundle, ids, answer):
    def load() -> Runtime:
        return Runtime(reference_bundle, RAM, CONTEXT)

    with benchmark(load) as loaded:
        assert loaded.generate(ids, ANSWER).tokens == answer
        _describe(benchmark, loaded)


def test_prefill(benchmark, runtime, ids, answer):
    def prefill() -> list[int]:
        runtime.reset()
        return runtime.generate(ids, 1).tokens

    assert benchmark(prefill) == answer[:1]
    _describe(benchmark, runtime, tokens=len(ids))


def test_decode(benchmark, runtime, ids, answer):
    benchmark(generate_run, runtime, ids, "off")
    before = runtime.stats["tokens"]
    assert runtime.generate(ids, ANSWER).tokens == answer
    assert runtime.stats["tokens"] - before == ANSWER  # the timed tokens are in the KV cache, and correct
    _describe(benchmark, runtime, tokens=len(ids))


def _describe(benchmark, runtime: Runtime, tokens: int = 0) -> None:
    bundle, stats = runtime.bundle, runtime.stats
    assert runtime.plan.resident and stats["bytes_read"] == 0
    assert stats["peak_memory_bytes"] <= stats["ram_bytes"]
    memory = {"ram_bytes": stats["ram_bytes"], "peak_memory_bytes": stats["peak_memory_bytes"]}
    kernels = _core.kernel_names()[0]
    benchmark.extra_info |= {"bytes": bundle.nbytes, "kernels": kernels, "threads": runtime.threads, **memory}
    if tokens and benchmark.stats:
        benchmark.extra_info |= {"tokens": tokens, "tps": tokens / benchmark.stats.stats.median}
