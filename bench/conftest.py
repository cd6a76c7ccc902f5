"""Fixtures of the benchmarks: `pytest bench` times them, `--benchmark-disable` runs them untimed at small sizes."""

from pathlib import Path

import pytest

from edge_moe.compressor.pipeline import compress

REFERENCE = Path(__file__).parent / "reference_moe"


@pytest.fixture(scope="session")
def small(request) -> bool:
    """Whether timing is disabled, so that small sizes are enough."""
    return request.config.getoption("benchmark_disable")


@pytest.fixture(scope="session")
def reference_bundle(tmp_path_factory) -> Path:
    """The embedded model, rounded to nearest at 4 bits."""
    return compress(REFERENCE, tmp_path_factory.mktemp("bench") / "reference.emoe", width=4, method="rtn").path
