"""Several Runtimes of one process, memory it had before, containers: peak <= cap for each, or a word before."""

import json
import re
import subprocess
import sys

import cgroup
import pytest

from edge_moe import _core
from edge_moe.runtime.runtime import Runtime

pytestmark = pytest.mark.skipif(not _core.peak_bytes(), reason="needs /proc")

COMMON = """
import gc, json, sys, warnings
from edge_moe import Runtime, _core
path, caps = sys.argv[1], [int(cap) for cap in sys.argv[2:]]
said = []
warnings.showwarning = lambda message, category, *rest, **more: said.append(str(message))
warnings.simplefilter("always")
def ask(runtime):
    return runtime.generate(list(range(5, 60)), 40)
def within(*runtimes):
    return [runtime.stats["peak_memory_bytes"] <= runtime.plan.ram_bytes for runtime in runtimes]
def tell(**what):
    print(json.dumps({**what, "said": said, "peak": _core.peak_bytes()}))
"""


def child(code: str, *arguments, group=None, **options) -> dict:
    command = [sys.executable, "-c", COMMON + code, *map(str, arguments)]
    options |= {"preexec_fn": group.join} if group else {}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def path(bundle_of):
    return bundle_of("reference", bits=16)


@pytest.fixture(scope="module")
def plan(path):
    code = "with Runtime(path, caps[0], 256, threads=1) as runtime: tell(plan=runtime.plan.as_dict())"
    return child(code, path, 2_000_000_000)["plan"]


@pytest.fixture(scope="module")
def answer(path):
    with Runtime(path, "2GB", 256, threads=1) as runtime:
        return runtime.generate(list(range(5, 60)), 40).tokens


BOTH = """
first = Runtime(path, caps[0], 256, threads=1)
one = ask(first).tokens
second = Runtime(path, caps[1], 256, threads=1)
two, one_more = ask(second).tokens, ask(first).tokens
first.reset()
third = ask(first).tokens
plans = [first.plan, second.plan]
tell(tokens=[one, two, one_more, third], within=within(first, second), rams=[plan.ram_bytes for plan in plans],
     resident=[plan.resident for plan in plans])
"""


def test_a_second_runtime_is_planned_within_what_the_first_left(path, plan, answer):
    cap = plan["resident_bytes"] + 38_000_000  # the second pages: all its experts would not fit too
    found = child(BOTH, path, cap, 2_000_000_000)
    assert found["tokens"] == [answer] * 4
    assert found["within"] == [True, True]
    assert found["peak"] <= cap
    assert found["rams"] == [cap, cap]
    assert found["said"] == [
        f"ram is 2,000 MB, but another Runtime of this process has a cap of {cap / 1e6:,.0f} MB, which counts the "
        "memory of both and holds for both; close that one first, or give it a higher cap"
    ]


def test_with_room_for_both_each_has_its_own_plan_and_nothing_is_said(path, answer):
    found = child(BOTH, path, 500_000_000, 500_000_000)
    assert (found["tokens"], found["within"], found["said"]) == ([answer] * 4, [True, True], [])
    assert found["resident"] == [True, True]


def test_a_first_runtime_that_was_not_used_yet_keeps_what_was_planned_for_it(path, plan, answer):
    """Its KV cache, slots and mapped experts are not in memory yet, and will be."""
    code = """
first = Runtime(path, caps[0], 256, threads=1)
second = Runtime(path, caps[0], 256, threads=1)
two, one = ask(second).tokens, ask(first).tokens
tell(tokens=[one, two], within=within(first, second), resident=[first.plan.resident, second.plan.resident])
"""
    found = child(code, path, plan["resident_bytes"] + 38_000_000)
    assert found["tokens"] == [answer] * 2
    assert found["within"] == [True, True]
    assert found["resident"] == [True, False]


def test_a_second_runtime_for_which_nothing_is_left_is_refused_and_the_first_stays_below_its_cap(path, plan, answer):
    code = """
first = Runtime(path, caps[0], 256, threads=1)
ask(first)
try:
    Runtime(path, caps[1], 256, threads=1)
except MemoryError as error:
    tell(error=str(error), within=within(first), tokens=ask(first).tokens)
"""
    cap = plan["resident_bytes"] + 1_000_000
    found = child(code, path, cap, 2_000_000_000)
    assert re.fullmatch(
        rf"a cap of {cap // 1_000_000} MB is below the floor of \d+ MB \(.*\); raise the cap, or lower .*; "
        r"other Runtimes of this process have \d+ MB of it",
        found["error"],
    )
    assert "another Runtime of this process" in found["said"][0]
    assert (found["within"], found["tokens"]) == ([True], answer)
    assert found["peak"] <= cap


def test_a_runtime_that_was_closed_is_not_counted(path, plan, answer):
    code = """
with Runtime(path, caps[0], 256, threads=1) as first:
    one = ask(first).tokens
with Runtime(path, caps[1], 256, threads=1) as second:
    tell(tokens=[one, ask(second).tokens], within=within(second), ram=second.plan.ram_bytes)
"""
    cap = plan["resident_bytes"] + 1_000_000
    found = child(code, path, cap, 2_000_000_000)
    assert (found["tokens"], found["ram"], found["said"]) == ([answer] * 2, 2_000_000_000, [])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux alone")
def test_what_a_process_had_before_and_gave_back_is_not_under_the_cap(path, plan, answer):
    code = """
import numpy as np
np.ones(50_000_000).sum()  # 400 MB
before = _core.peak_bytes()
with Runtime(path, caps[0], 256, threads=1) as runtime:
    tokens = ask(runtime).tokens
    tell(before=before, tokens=tokens, within=within(runtime), resident=runtime.plan.resident)
"""
    cap = plan["floor_bytes"] + (plan["resident_bytes"] - plan["floor_bytes"]) // 2
    found = child(code, path, cap)
    assert found["before"] > 400_000_000 > cap
    assert (found["tokens"], found["within"], found["resident"]) == (answer, [True], False)
    assert found["peak"] <= cap


def test_a_later_runtime_with_a_lower_cap_stays_below_it(path, plan, answer):
    code = """
with Runtime(path, caps[0], 1024, threads=1, logits_rows=64) as first:
    first.logits(range(1, 1000))
with Runtime(path, caps[1], 256, threads=1) as second:
    tokens = ask(second).tokens
    tell(tokens=tokens, within=within(second))
"""
    cap = plan["floor_bytes"] + 12_000_000
    found = child(code, path, 2_000_000_000, cap)
    assert (found["tokens"], found["within"]) == (answer, [True])


def test_untouched_memory_is_what_the_process_may_still_grow_by(path):
    code = """
before = _core.resident_bytes() + _core.untouched_bytes()
runtime = Runtime(path, caps[0], 256, threads=1)
planned = _core.resident_bytes() + _core.untouched_bytes()
for _ in runtime.logits_blocks(range(1, 256)):
    pass
used = _core.resident_bytes()
tell(planned=planned, used=used, left=_core.untouched_bytes())
runtime.close()
"""
    found = child(code, path, 2_000_000_000)
    assert abs(found["used"] + found["left"] - found["planned"]) < 3_000_000  # of Python's own growth
    assert found["left"] < found["planned"] / 4


# ---- containers


def test_a_cap_above_the_limit_of_a_container_is_lowered_with_a_word(path, plan, answer):
    limit = plan["resident_bytes"] + 8_000_000
    group = cgroup.make(limit)
    code = """
with Runtime(path, caps[0], 256, threads=1) as runtime:
    tell(tokens=ask(runtime).tokens, ram=runtime.plan.ram_bytes, ok=within(runtime))
"""
    try:
        found = child(code, path, 4_000_000_000, group=group)
        counted = group.peak_bytes
    finally:
        group.remove()
    assert (found["tokens"], found["ok"]) == (answer, [True])
    assert found["ram"] <= limit
    assert counted <= limit
    assert found["said"] == [
        "ram is 4,000 MB, but the memory limit of this process's container (cgroup) leaves it "
        f"{found['ram'] / 1e6:,.0f} MB, which is its cap now"
    ]


def test_many_threads_are_in_the_plan_with_what_the_kernel_takes_for_them(path, plan, answer):
    code = """
with Runtime(path, caps[0], 256, threads=caps[1]) as runtime:
    tell(tokens=ask(runtime).tokens, total=runtime.plan.total_bytes, ok=within(runtime))
"""
    counted, planned = [], []
    for threads in (1, 256):
        group = cgroup.make(1_000_000_000)
        try:
            found = child(code, path, 1_000_000_000, threads, group=group)
            counted.append(group.peak_bytes)
        finally:
            group.remove()
        assert (found["tokens"], found["ok"]) == (answer, [True])
        planned.append(found["total"])
    assert 255 * 16_384 < counted[1] - counted[0] <= planned[1] - planned[0]


def test_more_threads_than_processors_are_spoken_of_once(path):
    code = """
warnings.simplefilter("default")
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for _ in range(3):
    Runtime(path, caps[0], 64, threads=3).close()
tell()
"""
    assert child(code, path, 2_000_000_000)["said"] == [
        "threads is 3, but this process may use 1 processor: more threads than that wait for one another and are slower"
    ]


def test_the_command_line_gives_a_warning_one_line(path):
    command = [
        sys.executable,
        "-m",
        "edge_moe",
        "generate",
        str(path),
        "--tokens",
        "5,6",
        "-n",
        "1",
        "--threads",
        "999",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.match(r"edge-moe: warning: threads is 999, but this process may use \d+ processors?: .*\n", done.stderr)
