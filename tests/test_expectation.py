"""The speed that a plan expects: what is read is what runs read, and recorded runs are within the bounds it names."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from bundles import REFERENCE

from edge_moe.bench.expectation import LEAST, MOST, expected_speed
from edge_moe.bench.machine import WIDTHS, Machine, machine_of, mount_of
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.compressor.choosing.estimate import estimate
from edge_moe.compressor.pipeline import compress
from edge_moe.machine_file import NAME, disk_of, known_machine, remember_machine
from edge_moe.runtime.runtime import Runtime

CONFIGS = REFERENCE.parent / "configs"
QWEN = CONFIGS / "qwen3-30b-a3b.json"

# bench/reports/cpu.md of an Intel Xeon with AVX-512 VNNI, two threads: kernels alone, then random models of QWEN's
# shapes with 4,096 tokens of vocabulary, every expert in memory, and width 4 with trunk 8 under caps.
XEON = Machine("", 2, 18.5, {1: 9.2, 2: 14.5, 3: 13.2, 4: 17.0, 6: 15.9, 8: 18.3}, "2026-11-20")
RESIDENT = [  # layers, width, trunk, tok/s
    *((4, 2, 4, 165.7), (4, 2, 8, 119.9), (4, 3, 8, 95.4), (4, 4, 8, 130.3), (4, 8, 8, 86.9)),
    *((12, 2, 4, 56.9), (12, 2, 8, 43.7), (12, 4, 4, 38.2), (12, 4, 8, 31.3), (12, 4, 8, 34.1)),
]
PAGED = [  # hits, the disk's GB/s, tok/s
    *((0.22, 1.13, 10.9), (0.33, 1.12, 16.6), (0.59, 1.02, 24.1), (0.81, 1.31, 36.1)),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    def make(layers: int):
        raw = json.loads(QWEN.read_text()) | {"num_hidden_layers": layers, "vocab_size": 4096}
        file = tmp_path_factory.mktemp("shapes") / f"{layers}.json"
        file.write_text(json.dumps(raw))
        return file

    return make


def above_floor(config, more_bytes: int):
    """At width 4, under a cap above the floor; what this process has by now counts."""
    options = {"context": 64, "width": 4, "trunk_width": 8}
    return estimate(config, estimate(config, "100GB", **options).plan.floor_bytes + more_bytes, **options)


def test_speeds_that_were_recorded_are_within_the_bounds(shapes):
    for layers, width, trunk, tps in RESIDENT:
        made = estimate(shapes(layers), "100GB", context=128, width=width, trunk_width=trunk)
        speed = expected_speed(made, XEON, None)
        assert speed.low <= tps <= speed.high, (layers, width, trunk, tps / speed.tokens_per_second)
    for hits, disk_gbps, tps in PAGED:
        made = above_floor(shapes(4), 200_000_000)
        speed = expected_speed(replace(made, hit_rate=hits, calibrated=True), XEON, disk_gbps)
        assert speed.low <= tps <= speed.high, (hits, disk_gbps, tps / speed.tokens_per_second)


def test_a_token_takes_its_weights_at_the_kernels_speed_and_its_misses_at_the_disks(shapes):
    made = above_floor(shapes(4), 400_000_000)
    plan = made.plan
    assert plan.working_set_bytes == 4 * 8 * 3 * 2048 * 768 * 4.5 / 8
    attention = 4 * (2 * 2048 * 4096 + 2 * 2048 * 512)
    routers = 4 * 4 * 128 * 2048
    trunk = (attention + 2048 * 4096 + 2048) * 8.5 / 8 + routers  # the head, and one row of the embedding
    assert made.trunk_read_bytes == pytest.approx(trunk, rel=0.01)
    share = plan.experts_bytes / plan.all_experts_bytes
    assert not plan.resident and made.hit_rate == pytest.approx(share) and not made.calibrated
    speed = expected_speed(made, XEON, 2.0)
    seconds = plan.working_set_bytes / 17.0e9 + made.trunk_read_bytes / 18.3e9 + 4 * 40e-6
    assert 1 / speed.resident_tokens_per_second == pytest.approx(seconds, rel=0.01)
    assert speed.read_bytes_per_token == pytest.approx((1 - share) * plan.working_set_bytes)
    assert 1 / speed.tokens_per_second == pytest.approx(seconds + speed.read_bytes_per_token / 2e9, rel=0.01)
    assert speed.low == LEAST * speed.tokens_per_second < MOST * speed.tokens_per_second < speed.high
    calibrated = expected_speed(replace(made, calibrated=True), XEON, 2.0)
    assert calibrated.high == MOST * calibrated.tokens_per_second
    assert expected_speed(made, XEON, None) is None
    assert expected_speed(estimate(shapes(4), "20MB"), XEON, 2.0) is None


def test_what_is_expected_to_be_read_is_read(shapes, tmp_path):
    path = make_synthetic(shapes(2), tmp_path / "random.emoe", vocab=512).path
    whole = estimate(path, "10GB", context=48).plan
    cap = (whole.floor_bytes + whole.resident_bytes) // 2
    with Runtime(path, cap, 48) as runtime:
        runtime._engine.set_prefetch(False)  # what is read ahead in vain depends on how busy the machine is
        ids = np.random.default_rng(0).integers(0, 512, (2, 48)).tolist()
        runtime.logits(ids[0])
        runtime.reset()
        before = runtime.stats["bytes_read"]
        for token in ids[1]:  # one at a time, as in an answer
            runtime._session.step(runtime._session.sequences.all[0], [token], 1)
        read = (runtime.stats["bytes_read"] - before) / 48
    expected = expected_speed(estimate(path, cap, context=48), XEON, 1.0).read_bytes_per_token
    assert 0.5 * expected < read < 1.1 * expected


def test_hits_are_those_of_the_experts_that_calibration_used_most(stdlib_calibration, stdlib_ids, tmp_path):
    options = {"calibration": stdlib_calibration[0], "tokens": 2048, "certificate": False, "threads": 1}
    bundle = compress(REFERENCE, tmp_path / "calibrated.emoe", bits=2.5, trunk_width=8, **options)
    whole = estimate(bundle.path, "1GB", context=512).plan
    cap = whole.resident_bytes - whole.all_experts_bytes // 2
    made = estimate(bundle.path, cap, context=512)
    experts = list(bundle.experts.values())
    held, room, uses = 0.0, made.plan.experts_bytes, sum(expert.frequency for expert in experts)
    for expert in sorted(experts, key=lambda expert: -expert.frequency / expert.nbytes):
        room -= expert.nbytes
        held += expert.frequency if room >= 0 else 0
    assert made.calibrated and made.hit_rate == pytest.approx(held / uses)
    assert made.hit_rate > made.plan.experts_bytes / made.plan.all_experts_bytes
    with Runtime(bundle.path, cap, 512) as runtime:
        runtime.logits(stdlib_ids[:256])
        before = runtime.stats
        for token in stdlib_ids[256:512]:
            runtime._session.step(runtime._session.sequences.all[0], [token], 1)
        now = runtime.stats
    hits, misses = (now[key] - before[key] for key in ("expert_hits", "expert_misses"))
    assert hits / (hits + misses) == pytest.approx(made.hit_rate, abs=0.1)


# ---- what is kept of a machine


@pytest.fixture
def here(monkeypatch, tmp_path) -> Machine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from edge_moe.bench.conditions import processor
    from edge_moe.devices.probe import default_threads

    speeds = dict.fromkeys(WIDTHS, 10.0)
    return Machine(processor(), default_threads(), 20.0, speeds, date.today().isoformat(), {"/": 1.5, "/proc": None})


def test_a_machine_is_kept_and_found_again(here, tmp_path):
    assert known_machine() is None
    remember_machine(here)
    assert known_machine() == here
    assert (tmp_path / "edge-moe").stat().st_mode & 0o777 == 0o700


def test_a_disk_that_was_not_measured_has_the_speed_of_the_last(here, tmp_path):
    assert disk_of(here, Path("/proc/self")) == (None, "/proc")
    assert disk_of(replace(here, disks={"/elsewhere": 3.0, "/last": 2.0}), tmp_path) == (2.0, "/last")
    assert mount_of(Path("/proc/self/not/there")) == "/proc" and mount_of(Path("/")) == "/"


@pytest.mark.parametrize(
    "damage",
    [
        lambda its: its | {"threads": its["threads"] + 1},
        lambda its: its | {"processor": "another"},
        lambda its: its | {"kernel_gbps": {"2": 10.0}},
        lambda its: its | {"kernel_gbps": its["kernel_gbps"] | {"2": 0.0}},
        lambda its: its | {"memory_gbps": float("nan")},
        lambda its: its | {"disks": []},
        lambda its: [its],
        lambda its: None,
    ],
)
def test_what_is_of_another_machine_or_damaged_is_not_taken(here, damage):
    assert machine_of(here.as_dict()) == here
    assert machine_of(damage(here.as_dict())) is None


def test_a_file_that_is_no_json_is_as_none(here, tmp_path):
    remember_machine(here)
    (tmp_path / "edge-moe" / NAME).write_bytes(b"\xff{")
    assert known_machine() is None
