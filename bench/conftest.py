"""What the benchmarks that pytest runs share: `pytest bench`, or without a clock and small, `--benchmark-disable`."""

from pathlib import Path

import pytest

from edge_moe.compressor.pipeline import compress

REFERENCE = Path(__file__).parent / "reference_moe"


@pytest.fixture(scope="session")
def small(request) -> bool:
    """Whether nothing is timed, so that small sizes do."""
    return request.config.getoption("benchmark_disable")


@pytest.fixture(scope="session")
def reference_bundle(tmp_path_factory) -> Path:
    """The embedded model, rounded to nearest at 4 bits."""
    return compress(REFERENCE, tmp_path_factory.mktemp("bench") / "reference.emoe", width=4, method="rtn").path
