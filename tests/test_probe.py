"""What a cgroup leaves to the process: both versions' files, the cgroups above, and a real one where allowed."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cgroup
import pytest

from edge_moe import _core
from edge_moe.devices import probe
from edge_moe.devices.probe import cgroup_limit_bytes, default_threads, memory_limit_bytes, usable_processors

FREE = 10_000
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")
UNLIMITED = {V1: 2**63 - 4096, V2: "max"}


def group(directory, names, limit, usage, stat: str = "") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(stat)


@pytest.fixture
def room(tmp_path):
    """room(lines of /proc/self/cgroup) with the mounts in tmp_path/sys."""

    def measure(*lines: str) -> int:
        (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in lines))
        return memory_limit_bytes(FREE, str(tmp_path / "cgroup"), str(tmp_path / "sys"))

    return measure


@pytest.mark.parametrize(
    ("names", "mount", "line"),
    [
        (V1, "memory", "4:memory:/a/b"),
        (V1, "memory", "4:cpu,memory:/a/b"),
        (V2, "", "0::/a/b"),
        (V2, "unified", "0::/a/b"),
    ],
)
def test_the_tightest_cgroup_on_the_way_up_decides(tmp_path, room, names, mount, line):
    top = tmp_path / "sys" / mount
    group(top / "a/b", names, UNLIMITED[names], 500)
    group(top / "a", names, 3000, 1000)
    group(top, names, 9000, 1500)
    assert room(line) == 2000
    group(top / "a/b", names, 1700, 500)
    assert room(line) == 1200
    assert cgroup_limit_bytes(str(tmp_path / "cgroup"), str(tmp_path / "sys")) == 1700


@pytest.mark.parametrize(("names", "line", "mount"), [(V1, "4:memory:/a", "memory"), (V2, "0::/a", "")])
def test_without_a_limit_there_is_what_is_free(tmp_path, room, names, line, mount):
    group(tmp_path / "sys" / mount / "a", names, UNLIMITED[names], 500)
    assert room(line) == FREE
    assert room("1:name=systemd:/a", "not a line", "") == FREE
    assert room() == FREE
    assert memory_limit_bytes(FREE, str(tmp_path / "nowhere"), str(tmp_path)) == FREE
    assert cgroup_limit_bytes(str(tmp_path / "nowhere"), str(tmp_path)) is None


def test_a_container_that_sees_its_own_cgroup_as_the_mount_finds_its_limit(tmp_path, room):
    group(tmp_path / "sys/memory", V1, 4000, 1000)
    assert room("4:memory:/docker/0123abcd") == 3000


def test_usage_above_the_limit_leaves_nothing(tmp_path, room):
    group(tmp_path / "sys/a", V2, 4000, 5000)
    assert room("0::/a") == 0


@pytest.mark.parametrize(
    ("names", "line", "mount", "prefix"), [(V1, "4:memory:/", "memory", "total_"), (V2, "0::/", "", "")]
)
def test_cached_files_count_as_room(tmp_path, room, names, line, mount, prefix):
    stat = f"anon 300\nfile 3000\n{prefix}inactive_file 2000\n{prefix}active_file 700\n"
    group(tmp_path / "sys" / mount, names, 4000, 3500, stat)
    assert room(line) == 4000 - (3500 - 2700)


@pytest.mark.parametrize("content", ["", "x", "1 2", "-"])
def test_files_that_cannot_be_understood_are_passed_over(tmp_path, room, content):
    group(tmp_path / "sys/a", V2, content, content, content)
    assert room("0::/a") == FREE


def test_a_real_cgroup_limits_the_automatic_cap():
    group = cgroup.make(400_000_000)
    code = """
import json
from edge_moe import _core
from edge_moe.devices.probe import memory_limit_bytes
from edge_moe.runtime.plan import resolve_ram
print(json.dumps([memory_limit_bytes(_core.free_bytes()), resolve_ram("auto")]))
"""
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=group.join,
        )
    finally:
        group.remove()
    left, cap = json.loads(child.stdout)
    assert 200_000_000 < left < 400_000_000
    assert 0.8 * left < cap < 400_000_000  # the process's own memory is counted in


# ---- processors


def test_there_is_at_least_one_thread_and_no_more_than_cores():
    assert 1 <= default_threads() <= usable_processors() <= os.cpu_count()


def test_slow_cores_beside_fast_ones_are_left_out(monkeypatch):
    monkeypatch.setattr(_core, "performance_cores", lambda: 1)
    assert default_threads() == 1
    monkeypatch.setattr(_core, "performance_cores", lambda: 1000)
    assert default_threads() == usable_processors()


@pytest.fixture
def processors(tmp_path, monkeypatch):
    """processors(lines of /proc/self/cgroup) on a machine of 64."""
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)

    def count(*lines: str) -> int:
        (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in lines))
        return usable_processors(str(tmp_path / "cgroup"), str(tmp_path / "sys"))

    return count


def quota(directory, text: str) -> None:
    """text: as cpu.max has it; in files of version 1 where it begins with 1:"""
    directory.mkdir(parents=True, exist_ok=True)
    if text.startswith("1:"):
        wanted, period = text[2:].split()
        (directory / "cpu.cfs_quota_us").write_text(f"{wanted}\n")
        (directory / "cpu.cfs_period_us").write_text(f"{period}\n")
    else:
        (directory / "cpu.max").write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("mount", "line", "version"),
    [
        ("", "0::/a/b", ""),
        ("unified", "0::/a/b", ""),
        ("cpu", "3:cpu:/a/b", "1:"),
        ("cpu,cpuacct", "3:cpu,cpuacct:/a/b", "1:"),
        ("cpu", "3:cpuacct,cpu:/a/b", "1:"),
    ],
)
def test_the_lowest_quota_on_the_way_up_decides(tmp_path, processors, mount, line, version):
    top, none = tmp_path / "sys" / mount, "-1 100000" if version else "max 100000"
    quota(top / "a/b", version + none)
    assert processors(line) == 64
    quota(top / "a", f"{version}200000 100000")
    assert processors(line) == 2
    quota(top, f"{version}150000 100000")
    assert processors(line) == 2  # one and a half
    quota(top / "a/b", f"{version}5000 100000")
    assert processors(line) == 1
    quota(top / "a/b", f"{version}64000000 100000")
    assert processors(line) == 2


@pytest.mark.parametrize("content", ["", "x", "100000", "0 100000", "100000 0", "max", "- -"])
def test_a_quota_that_cannot_be_understood_is_passed_over(tmp_path, processors, content):
    quota(tmp_path / "sys/a", content)
    assert processors("0::/a") in (64, 1)  # "100000" alone is read as one processor
    assert processors("not a line", "7:memory:/a") == 64


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_real_quota_is_the_number_of_default_threads():
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for _, controllers, path in lines if "cpu" in controllers.split(",")), None)
    mount = next((m for m in ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct") if os.path.isdir(m)), None)
    if own is None or mount is None:
        pytest.skip("no cpu controller of version 1")
    try:
        directory = tempfile.mkdtemp(prefix="edge-moe-", dir=mount + own)
    except OSError as error:
        pytest.skip(str(error))
    try:
        with open(f"{directory}/cpu.cfs_quota_us", "w") as file:
            file.write("80000")  # of a period of 100 ms

        def join() -> None:
            with open(f"{directory}/cgroup.procs", "w") as file:
                file.write(str(os.getpid()))

        code = "from edge_moe.devices.probe import default_threads; print(default_threads())"
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=join
        )
    finally:
        os.rmdir(directory)
    assert child.stdout == "1\n"
