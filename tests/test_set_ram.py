"""The cap of a Runtime that lives is lowered and raised: it holds at every moment, and no result changes."""

import json
import threading

import pytest
from bundles import run_python

from edge_moe import _core
from edge_moe.runtime.plan import BelowFloor
from edge_moe.runtime.runtime import Runtime

CHANGES = """
import json, random, sys, threading
from edge_moe import Runtime, _core
from edge_moe.runtime.plan import BelowFloor

random.seed(2)
with Runtime(sys.argv[1], "2GB", 256, "cpu", threads=1) as runtime:
    want = runtime.generate("import os", 200).tokens
    whole = runtime.plan
    try:
        runtime.set_ram(1_000_000)
    except BelowFloor as refused:
        floor = refused.plan.floor_bytes
    else:
        raise SystemExit("a cap below the floor was not refused")
    assert runtime.plan == whole
    runtime.set_ram(floor)
    changes, over, answers, worse = 0, 0, 0, 0
    while changes < int(sys.argv[2]):
        got = []
        def run():
            for piece in runtime.stream("import os", 200):
                got.extend(piece.tokens)
        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():
            over += _core.peak_bytes() > runtime.plan.ram_bytes  # since the cap was lowered last
            cap = random.randrange(floor, whole.resident_bytes)
            plan = runtime.set_ram(cap)
            over += _core.resident_bytes() > cap or plan.total_bytes > cap
            changes += 1
        thread.join()
        answers, worse = answers + 1, worse + (got != want)
    print(json.dumps([changes, over, answers, worse, runtime.stats["expert_misses"]]))
"""


def floor_of(runtime: Runtime) -> int:
    with pytest.raises(BelowFloor) as refused:
        runtime.set_ram(1_000_000)
    return refused.value.plan.floor_bytes


def test_a_cap_that_changes_all_the_time_holds_at_every_moment(bundle_of):
    ran = run_python(CHANGES, bundle_of("reference", bits=16), 200)
    changes, over, answers, worse, misses = json.loads(ran.stdout)
    assert (over, worse) == (0, 0)
    assert changes >= 200 and answers > 1 and misses > 100


def test_lowered_memory_is_the_systems_and_raised_memory_is_used(bundle_of):
    with Runtime(bundle_of("reference", bits=16), "2GB", 256, "cpu", threads=1) as runtime:
        want = runtime.generate("import os", 60)
        assert runtime.plan.resident and want.expert_misses == 0
        floor = floor_of(runtime)
        before = _core.resident_bytes()
        plan = runtime.set_ram(floor)
        assert plan is runtime.plan and not plan.resident and 4 <= plan.slots < 64
        assert plan.total_bytes <= plan.ram_bytes == floor
        assert before - _core.resident_bytes() > 10_000_000
        paged = runtime.generate("import os", 60)
        assert paged.tokens == want.tokens and paged.expert_misses > 500
        assert "below the floor" in str(pytest.raises(BelowFloor, runtime.set_ram, floor - 2_000_000).value)
        assert runtime.plan == plan
        assert runtime.set_ram("2GB").slots == 64
        runtime.generate("import os", 60)
        again = runtime.generate("import os", 60)
        assert again.tokens == want.tokens and again.expert_misses == 0


def test_what_another_runtime_has_counts(bundle_of):
    path = bundle_of("reference", bits=16)
    with Runtime(path, "2GB", 256, "cpu", threads=1) as runtime:
        alone = floor_of(runtime)
        with Runtime(path, "2GB", 256, "cpu", threads=1) as other:
            assert floor_of(runtime) >= alone + other.plan.experts_bytes
            with pytest.warns(UserWarning, match="another Runtime of this process has a cap of 2,000 MB"):
                assert runtime.set_ram("3GB").ram_bytes == 2_000_000_000


def test_it_waits_for_the_step_and_not_for_the_answer(bundle_of):
    with Runtime(bundle_of("reference", bits=16), "2GB", 256, "cpu", threads=1) as runtime:
        want = runtime.generate("import os", 100).tokens
        floor, started, changed, got = floor_of(runtime), threading.Event(), threading.Event(), []

        def run():
            for piece in runtime.stream("import os", 100):
                got.extend(piece.tokens)
                started.set()
                if len(got) == 3:
                    changed.wait()

        thread = threading.Thread(target=run)
        thread.start()
        started.wait()
        runtime.set_ram(floor)
        changed.set()
        thread.join()
        assert got == want


def test_not_from_within_a_step_nor_of_what_is_closed(bundle_of):
    with Runtime(bundle_of("reference", bits=16), "2GB", 256, "cpu", threads=1) as runtime:
        with pytest.raises(RuntimeError, match="would wait for itself"):
            runtime.generate("import os", 3, progress=lambda *_: runtime.set_ram("1GB"))
        assert len(runtime.generate("import os", 3).tokens) == 3
    with pytest.raises(ValueError, match="this Runtime is closed"):
        runtime.set_ram("1GB")
