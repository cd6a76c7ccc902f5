"""The pruning report: its controls leave out what they say, its figures are read off the measured points."""

import numpy as np
import pytest
from bundles import REFERENCE, changed

from bench.laboratory import prune_report
from bench.laboratory.prune_report import Counting, Point, at, bars, curves, frontier_table
from edge_moe.bench.evaluate import Remembered
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.config_file import load_config

CONFIG = load_config(REFERENCE)
OURS = "expected loss (ours)"
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab, 64)


@pytest.fixture(scope="module")
def checkpoint():
    with Checkpoint(REFERENCE) as opened:
        yield opened


def pruned(checkpoint, stays) -> tuple[Counting, np.ndarray]:
    prune = Counting(CONFIG, stays)
    return prune, reference.forward(CONFIG, checkpoint, IDS, prune=prune)


def test_a_smaller_top_k_is_the_models_own(checkpoint):
    """As a config with that top_k computes it, which renormalises over fewer."""
    prune, logits = pruned(checkpoint, lambda *given: prune_report.fixed(3, *given))
    want = reference.forward(changed(CONFIG, top_k=3), checkpoint, IDS)
    np.testing.assert_allclose(logits, want, atol=2e-5)
    assert prune.account() == (3 * 64 * 4, 4 * 64 * 4, 64 * 4)


def test_controls_keep_the_heaviest_and_as_many_as_they_say(checkpoint):
    random = np.random.default_rng(0)
    prune, _ = pruned(checkpoint, lambda *given: prune_report.at_random(random, 0.5, *given))
    assert prune.used / prune.rows == pytest.approx(1 + 3 / 2, abs=0.1)
    few, many = (
        pruned(checkpoint, lambda *given, share=share: prune_report.top_p(checkpoint, share, *given))[0]
        for share in (0.2, 0.8)
    )
    assert 1 <= few.used / few.rows < many.used / many.rows <= 4
    whole, logits = pruned(checkpoint, lambda *given: prune_report.shares(1.0, *given))
    assert whole.used == whole.pairs
    np.testing.assert_array_equal(logits, reference.forward(CONFIG, checkpoint, IDS))


def run(method: str, *klds: float, change=0.001) -> list[Point]:
    """Points at cuts of a tenth, a fifth, ... with these divergences."""
    return [Point(method, 4 - 0.4 * i, 0.1 * i, change, kld) for i, kld in enumerate(klds, start=1)]


def test_between_points_the_logarithm_is_interpolated():
    kld, change = at(run("share", 0.001, 0.01, 0.1), 0.15)
    assert kld == pytest.approx(0.001 * 10**0.5) and change == pytest.approx(0.001)
    assert at(run("share", 0.001, 0.01), 0.5) is None


def test_seeds_are_apart_and_their_spread_is_shown():
    points = run(OURS, 0.001, 0.01, 0.1, 0.2) + run(OURS, 0.003, 0.02, 0.2, 0.3) + run("top-p", 0.1, 0.2, 0.2, 0.3)
    assert {name: len(runs) for name, runs in curves(points).items()} == {OURS: 2, "top-p": 1}
    ours, top_p = frontier_table(points).splitlines()[2:]
    assert ours.startswith(f"| {OURS} | 0.0020 ± 0.0010 (+0.10%) | 0.0150 ± 0.0050 (+0.10%)")
    assert top_p.startswith("| top-p | 0.1000 (+0.10%)")


def test_what_is_reached_is_of_the_first_seed_by_text():
    points = [Point(OURS, 3, 0.2, 0, 0, asked, (asked + off, asked)) for off in (0.01, 0.1) for asked in (0.1, 0.2)]
    points.append(Point("OTP", 3, 0.2, 0, 0, 0.1, (0.5, 0.5)))
    lines = prune_report.reached_table(points, ["a", "b"]).splitlines()[2:]
    assert lines == ["| asked | a | b |", "|---|---|---|", "| 10% | 11.0% | 10.0% |", "| 20% | 21.0% | 20.0% |"]


def test_a_point_counts_each_text_alone(checkpoint):
    texts, kept = {"a": IDS[:16], "b": IDS[16:32]}, iter((4, 2))
    prune = Counting(CONFIG, lambda *given: prune_report.fixed(now, *given))

    def logits(window):
        nonlocal now
        now = next(kept)
        return reference.forward(CONFIG, checkpoint, window, prune=prune)

    now = None
    unpruned = Remembered(lambda window: reference.forward(CONFIG, checkpoint, window))
    point = prune_report.scored("x", texts, logits, unpruned, prune.account)
    assert (point.cuts, point.cut, point.used) == ((0, 0.5), 0.25, 3)
    assert point.kld > 0.001


def test_bars_are_met_or_missed_by_the_worst_seed():
    points = run(OURS, 0.001, 0.01, 0.02, 0.03) + run(OURS, 0.002, 0.02, 0.03, 0.04, change=0.004)
    lines = bars(points + run("top-p", 0.003, 0.02, 0.05, 0.06)).splitlines()
    assert lines[0].endswith("less than 0.3% of perplexity: MISSED (+0.40%)")
    assert lines[1].endswith("less than 1.0% of perplexity: met (+0.40%)")
    assert lines[2] == "- KLD of ours over that of top-p: at most 0.75 (at 20% cut)"
