"""Processes that share a cap: each has its floor and an equal part of the rest, and together never more than all."""

import json
import os
import subprocess
import sys

import pytest

from edge_moe.runtime.ram_share import RamShare

RUN = """
import json, sys
from pathlib import Path
from edge_moe import Runtime
from edge_moe.runtime.plan import BelowFloor
from edge_moe.runtime.ram_share import RamShare

bundle, total, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
try:
    Runtime(bundle, 1_000_000, 256, "cpu", threads=1)
except BelowFloor as refused:
    floor = refused.plan.floor_bytes + 8_000_000
share = RamShare("one", total, directory)
try:
    cap = share.join(floor)
except MemoryError as error:
    sys.exit(str(error))
with Runtime(bundle, cap, 256, "cpu", threads=1) as runtime:
    want = runtime.generate("import os", 20).tokens
    runtime.follow_share(share)
    print(json.dumps({"cap": runtime.plan.ram_bytes, "floor": floor}), flush=True)
    for line in sys.stdin:
        least, most = json.loads(line)
        for _ in range(3000):
            assert runtime.generate("import os", 20).tokens == want
            if least <= runtime.plan.ram_bytes <= most:
                break
        print(json.dumps({"cap": runtime.plan.ram_bytes}), flush=True)
"""


class Process:
    def __init__(self, bundle, total: int, directory):
        command = [sys.executable, "-c", RUN, str(bundle), str(total), str(directory)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, text=True, **pipes)

    def began(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def cap_between(self, least: float, most: float) -> int:
        """Let it answer until its cap is between these, and return the cap."""
        print(json.dumps([least, most]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())["cap"]

    def end(self, kill: bool = False) -> int:
        if kill:
            self.process.kill()
        self.process.communicate()
        return self.process.returncode


def test_who_joins_is_given_room_and_who_leaves_leaves_it(bundle_of, tmp_path):
    path, total = bundle_of("reference", bits=16), 400_000_000
    first = Process(path, total, tmp_path)
    floor = first.began()["floor"]
    assert first.cap_between(0, total) == total
    second = Process(path, total, tmp_path)
    # The second one waits until the first, which answers meanwhile, has made room.
    half = first.cap_between(floor, total * 0.6)
    assert half <= total * 0.6
    caps = [second.began()["cap"], half]
    assert sum(caps) <= total and min(caps) > 0.4 * total
    assert second.end() == 0
    assert first.cap_between(total, total) == total
    third = Process(path, total, tmp_path)
    first.cap_between(floor, total * 0.6)
    third.began()
    third.end(kill=True)  # it cannot leave
    assert first.cap_between(total, total) == total
    assert first.end() == 0


def test_a_share_without_room_says_so(bundle_of, tmp_path):
    path, total = bundle_of("reference", bits=16), 130_000_000
    first = Process(path, total, tmp_path)
    first.began()
    second = Process(path, total, tmp_path)
    said = second.process.stderr.read()
    assert "the share one of 130.0 MB has no room for" in said and second.end() == 1
    assert first.cap_between(total, total) == total
    first.end()


@pytest.mark.parametrize("name", ["../one", "", "a/b", ".one"])
def test_names_stay_in_their_directory(name, tmp_path):
    with pytest.raises(ValueError, match="expected up to 64 letters"):
        RamShare(name, 10**9, tmp_path)


def test_a_file_that_is_damaged_is_written_again(tmp_path):
    share = RamShare("one", 10**9, tmp_path)
    for content in ("", "[]", '{"members": {"1": 5}, "total": 1}', '{"members": {}}'):
        (tmp_path / "one.json").write_text(content)
        assert share.join(10**6) == 10**9
        share.leave()
    assert json.loads((tmp_path / "one.json").read_text()) == {"total": 10**9, "members": {}}


def test_chats_share_a_cap_by_name(bundle_of, tmp_path):
    """The first gives the second room when it joins, and each says what it has."""
    path, environment = bundle_of("reference", bits=16), {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "edge_moe", "chat", str(path), "--ram", "400MB", "--ram-share", "one", "-n", "4"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command, text=True, env=environment, **pipes)
    assert first.stderr.readline()  # it is there
    second = subprocess.run(command, input="/ram\n", text=True, env=environment, capture_output=True, check=True)
    said = second.stderr.replace("\n", " ")
    assert "cap 200." in said or "cap 19" in said or "cap 20" in said, said
    _, told = first.communicate("/ram\nimport os\n/ram\n")
    assert first.returncode == 0 and "its part of the share one" in told
