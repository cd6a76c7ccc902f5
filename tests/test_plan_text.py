"""The last line of a plan: a verdict, by the speed that is expected."""

from dataclasses import replace
from pathlib import Path

import pytest
from bundles import REFERENCE

from edge_moe.bench.expectation import Speed
from edge_moe.compressor.choosing.estimate import estimate
from edge_moe.plan_text import UNKNOWN, estimate_text

QWEN = REFERENCE.parent / "configs" / "qwen3-30b-a3b.json"
PAGED = Speed(2.0, 1.4, 4.0, 8.0, 1_900_000_000, 300_000_000, 0.6, 1.5, "2026-11-27")


@pytest.fixture(scope="module")
def paged():
    return estimate(QWEN, "8GB")


def verdict(made, speed: Speed | None) -> str:
    """The last line, unwrapped."""
    text = estimate_text(made, lambda _: speed, Path("."))
    assert max(map(len, text.splitlines())) <= 80 + len(str(Path(".").resolve()))  # a path is never broken
    return " ".join(text.split()).rpartition("verdict: " if speed else "speed: ")[2]


@pytest.mark.parametrize(
    "tps, words",
    [
        (12.3, "faster than one reads, about 12 tok/s (1.4 to 4): "),
        (8.0, "faster than one reads, about 8 tok/s (1.4 to 4): "),
        (3.0, "about as fast as one reads, about 3 tok/s (1.4 to 4): "),
        (2.0, "slow, about 2 tok/s (1.4 to 4): "),
        (0.068, "too slow to wait for, about 0.068 tok/s (1.4 to 4, 15 s a token): "),
    ],
)
def test_a_verdict_is_by_tokens_a_second(paged, tps, words):
    assert verdict(paged, replace(PAGED, tokens_per_second=tps)).startswith(words)


def test_what_is_read_and_where_that_is_known_from_is_said(paged):
    rest = (
        "a token computes with 1.90 GB of weights and reads 300.0 MB of them from storage at 1.5 GB/s (%s); with every "
        "expert in memory about 8 tok/s; by what doctor measured on 2026-11-27"
    )
    assert verdict(paged, PAGED).endswith(rest % "taking experts to be used evenly: text reads less")
    assert verdict(replace(paged, calibrated=True), PAGED).endswith(rest % "by calibration's frequencies")
    resident = replace(PAGED, read_bytes_per_token=0)
    assert verdict(paged, resident).endswith("every expert is in memory; by what doctor measured on 2026-11-27")
    assert "speed: " + verdict(paged, None) == UNKNOWN
    below = " ".join(estimate_text(estimate(QWEN, "1GB"), lambda _: None, Path(".")).split())
    assert below.endswith("verdict: does not run under 1.00 GB")


def test_a_disk_that_is_too_small_is_said(paged):
    whole = "disk: a bundle of 10.73 GB; "
    assert whole in estimate_text(paged, lambda _: None, Path("."))
    text = " ".join(estimate_text(replace(paged, disk_bytes=10**18), lambda _: None, Path(".")).split())
    assert ", which is not enough" in text
