"""A cap that follows the machine: lowered while others need memory, raised slowly, never below the floor."""

import json
import subprocess
import sys

import cgroup
import pytest

from edge_moe.runtime import elastic
from edge_moe.runtime.elastic import ElasticCap, Memory
from edge_moe.runtime.plan import BelowFloor
from edge_moe.runtime.runtime import Runtime

CAP = 8_000_000_000  # above what other tests leave in this process
CALM = Memory(8 * CAP, 0.0, 1)


@pytest.fixture
def cap(bundle_of):
    with Runtime(bundle_of("reference", bits=16), "8GB", 256, "cpu", threads=1) as runtime:
        yield ElasticCap(runtime)


def ram(cap: ElasticCap) -> int:
    return cap._runtime().plan.ram_bytes


def test_what_is_missing_is_given_back_and_taken_again_in_steps(cap):
    now = cap._changed
    assert cap.look(now + 1, CALM) is None and ram(cap) == CAP
    said = cap.look(now + 2, CALM._replace(available=cap.reserve - CAP // 4))
    assert ram(cap) == CAP - CAP // 4
    assert said == "cap lowered from 8.00 GB to 6.00 GB: 0 B of memory are free, of 500.0 MB to be left"
    at = now + 2
    assert cap.look(at + elastic.QUIET_S - 1, CALM) is None
    assert cap.look(at + elastic.QUIET_S, CALM) == "cap raised from 6.00 GB to 6.50 GB: 64.00 GB of memory are free"
    for _ in range(5):
        at += elastic.QUIET_S
        cap.look(at + elastic.QUIET_S, CALM)
    assert ram(cap) == CAP


def test_mlx_is_given_larger_steps(bundle_of):
    """There each change of the cap costs all that is in memory."""
    pytest.importorskip("mlx.core")
    with Runtime(bundle_of("reference", bits=16), "8GB", 256, "mlx") as runtime:
        cap = ElasticCap(runtime)
        cap.look(cap._changed, CALM._replace(available=cap.reserve - 1))
        assert ram(cap) == CAP - CAP // 16
        cap.look(cap._changed, CALM._replace(available=cap.reserve - CAP // 2))
        cap.look(cap._changed + elastic.QUIET_S, CALM)
        assert ram(cap) == CAP - CAP // 16 - CAP // 2 + CAP // 4


def test_no_more_is_taken_than_is_free(cap):
    now = cap._changed
    cap.look(now, CALM._replace(available=cap.reserve - CAP // 4))
    assert cap.look(now + 99, CALM._replace(available=cap.reserve + CAP // 80)) is None
    cap.look(now + 99, CALM._replace(available=cap.reserve + CAP // 40))
    assert ram(cap) == CAP - CAP // 4 + CAP // 40


@pytest.mark.parametrize("memory", [CALM._replace(stalled=30.0), CALM._replace(level=2)])
def test_stalls_lower_the_cap_again_and_again(cap, memory):
    now = cap._changed + elastic.AGAIN_S
    assert cap.look(now, memory) is not None and ram(cap) == CAP - CAP // 8
    assert cap.look(now + 1, memory) is None
    assert cap.look(now + elastic.AGAIN_S, memory) is not None and ram(cap) == CAP - CAP // 4


def test_the_floor_is_the_end(cap):
    runtime = cap._runtime()
    with pytest.raises(BelowFloor) as refused:
        runtime.set_ram(1_000_000)
    for at in range(3):
        cap.look(cap._changed + at, Memory(-3 * CAP, 0.0, 1))
    assert refused.value.plan.floor_bytes <= ram(cap) < refused.value.plan.floor_bytes + 8_000_000
    assert cap.look(cap._changed + 9, Memory(-3 * CAP, 0.0, 1)) is None
    assert runtime.generate("import os", 3).generation_tokens == 3


def test_a_closed_runtime_ends_it(cap):
    cap._runtime().close()
    with pytest.raises(ValueError, match="closed"):
        cap.look(0, CALM)


RUN = """
import json, sys
from edge_moe import Runtime
from edge_moe.runtime import elastic

elastic.LOOK_S = elastic.QUIET_S = 0.2
with Runtime(sys.argv[1], int(sys.argv[2]), 256, "cpu", threads=1) as runtime:
    want = runtime.generate("import os", 20).tokens
    changes = []
    runtime.follow_memory(changes.append)
    print(elastic.memory_now().available, flush=True)
    for line in sys.stdin:
        for _ in range(2000):
            if changes and changes[-1].startswith(line.strip()):
                break
            assert runtime.generate("import os", 20).tokens == want
        print(json.dumps({"ram": runtime.plan.ram_bytes, "said": changes[-1]}), flush=True)
"""
TAKE = """
import sys
taken = bytearray(int(sys.argv[1]))
taken[::4096] = bytes(len(taken[::4096])).replace(b"\\0", b"x")
print("taken", flush=True)
sys.stdin.read()
"""


def test_in_a_container_another_program_gets_memory_and_gives_it_back(bundle_of):
    path = bundle_of("reference", bits=16)
    group = cgroup.make(500_000_000)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "preexec_fn": group.join}
    try:
        with subprocess.Popen([sys.executable, "-c", RUN, str(path), "300000000"], **pipes) as runtime:
            free = int(runtime.stdout.readline())
            with subprocess.Popen([sys.executable, "-c", TAKE, str(free - 50_000_000)], **pipes) as other:
                assert other.stdout.readline() == "taken\n"
                print("cap lowered", file=runtime.stdin, flush=True)
                lowered = json.loads(runtime.stdout.readline())
                assert lowered["ram"] < 300_000_000 and "of memory are free" in lowered["said"]
                other.stdin.close()
            print("cap raised", file=runtime.stdin, flush=True)
            assert json.loads(runtime.stdout.readline())["ram"] > lowered["ram"]
            runtime.stdin.close()
        assert runtime.returncode == 0
    finally:
        group.remove()
