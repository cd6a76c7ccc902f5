"""What was computed of a prompt survives the process: files of sessions, and folders of them."""

import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.saved_session import SUFFIX, Unusable, read_saved

CONTEXT = 160


def ids_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 96, count).tolist()


def runtime_of(path, **options) -> Runtime:
    return Runtime(path, "8GB", CONTEXT, device="cpu", threads=1, **options)


@pytest.fixture(scope="module")
def path(mixed):
    return mixed("qwen3_moe")


@pytest.fixture
def saved(path, tmp_path):
    """A file of 70 tokens and 12 of their answer."""
    with runtime_of(path) as runtime:
        runtime.generate(ids_of(70), 12)
        assert runtime.save_session(tmp_path / "one") == 81  # the last token was not read
    return tmp_path / "one"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "qwen3_5_moe", "deepseek_v4"])
def test_a_session_goes_on_in_another_process(mixed, name, tmp_path):
    path = mixed(name)
    with runtime_of(path) as runtime:
        first = runtime.generate(ids_of(70), 12)
        tokens = runtime.save_session(tmp_path / "one")
        whole = [*ids_of(70), *first.tokens, *ids_of(9, 1)]
        want = runtime.generate(whole, 10)
    with runtime_of(path, sequences=2) as runtime:
        assert runtime.load_session(tmp_path / "one") == tokens
        got = runtime.generate(whole, 10)
        assert got.tokens == want.tokens and got.cached_tokens == tokens
        assert runtime.generate(ids_of(70), 12).tokens == first.tokens


def test_there_must_be_something_to_save(path, tmp_path):
    with runtime_of(path) as runtime:
        with pytest.raises(ValueError, match="nothing to save"):
            runtime.save_session(tmp_path / "one")
        with pytest.raises(FileNotFoundError):
            runtime.load_session(tmp_path / "one")
        with pytest.raises(ValueError, match="keep_sessions"):
            runtime.save_sessions()


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty", "text"])
def test_a_damaged_file_is_never_used(path, saved, damage, caplog):
    content = saved.read_bytes()
    places = np.linspace(0, len(content) - 1, 24).astype(int) if damage in ("flip", "cut") else [0]
    with runtime_of(path) as runtime:
        want = runtime.generate(ids_of(70), 12).tokens
        for at in places:
            runtime.reset()
            if damage == "flip":
                spoilt = bytearray(content)
                spoilt[at] ^= 1 << at % 8
            else:
                spoilt = {"cut": content[:at], "longer": content + b"x", "empty": b"", "text": b"hello" * 99}[damage]
            saved.write_bytes(spoilt)
            caplog.clear()
            assert runtime.load_session(saved) == 0
            assert len(caplog.records) == 1 and str(saved) in caplog.text
            got = runtime.generate(ids_of(70), 12)
            assert got.tokens == want and got.cached_tokens == 0


def test_a_file_of_another_model_cache_or_context_is_not_used(mixed, path, saved, caplog):
    for other, options in ((mixed("olmoe"), {}), (path, {"kv": "float32"})):
        with runtime_of(other, **options) as runtime:
            assert runtime.load_session(saved) == 0
            assert runtime.generate(ids_of(70), 2).cached_tokens == 0
    with Runtime(path, "8GB", 40, device="cpu") as runtime:
        assert runtime.load_session(saved) == 0
    assert caplog.text.count("is of another bundle, context, type of cache or version") == 3


def test_a_file_under_a_rule_of_pruning_is_for_that_rule(path, tmp_path):
    with runtime_of(path, prune="off") as runtime:
        runtime.generate(ids_of(70), 4)
        runtime.save_session(tmp_path / "one")
    file = read_saved(tmp_path / "one")
    assert file.rule == {"rule": "off", "threshold": [], "price": 0.0, "protect": 0.0} and len(file.ids) == 73


def test_a_folder_keeps_what_makes_room_and_gives_it_back(path, tmp_path):
    talks = [ids_of(60, seed) for seed in range(3)]
    with runtime_of(path) as runtime:
        want = [runtime.generate([*talk, 1, 2, 3], 8).tokens for talk in talks]
        runtime.reset()
        runtime.keep_sessions(tmp_path / "kept")
        for talk in talks:
            runtime.generate(talk, 4)
        assert len(list((tmp_path / "kept").iterdir())) == 2
        assert runtime.generate([*talks[0], 1, 2, 3], 8).cached_tokens == 60  # read again
        assert runtime.save_sessions() == 1
        assert runtime.save_sessions() == 0
    with runtime_of(path) as runtime:
        runtime.keep_sessions(tmp_path / "kept")
        for talk, tokens in zip(talks, want, strict=True):
            got = runtime.generate([*talk, 1, 2, 3], 8)
            assert got.tokens == tokens and got.cached_tokens >= 60


def test_states_are_kept_where_the_next_message_goes_on(mixed, tmp_path):
    """The template may leave out thoughts of the answer, so that is before it."""
    path = mixed("qwen3_5_moe")
    with runtime_of(path) as runtime:
        ids = [token for token in ids_of(70) if token not in runtime._turn_ends][:60]
        runtime.keep_sessions(tmp_path)
        runtime.generate(ids, 6)
        runtime.save_sessions()
        want = runtime.generate([*ids[:59], 7, 8, 9], 8).tokens
    with runtime_of(path) as runtime:
        runtime.keep_sessions(tmp_path)
        got = runtime.generate([*ids[:59], 7, 8, 9], 8)
        assert got.tokens == want and got.cached_tokens == 59


def test_the_least_recently_used_files_make_room(path, tmp_path, caplog):
    with runtime_of(path) as runtime:
        runtime.generate(ids_of(60), 4)
        size = runtime._engine.saved_bytes(63) + 5_000
        runtime.keep_sessions(tmp_path, limit=f"{2 * size / 1000:.3f}KB")
        for seed in range(4):
            runtime.generate(ids_of(60, seed), 4)
            for at, file in enumerate(sorted(tmp_path.iterdir(), key=lambda its: its.stat().st_mtime_ns)):
                os.utime(file, (at, at))
        assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 2
        runtime.keep_sessions(tmp_path, limit="2KB")
        assert runtime.save_sessions() == 0 and "the limit is 2000" in caplog.text


def test_a_full_disk_costs_nothing_but_the_file(path, tmp_path, caplog):
    with runtime_of(path) as runtime:
        runtime.keep_sessions(tmp_path)
        runtime.generate(ids_of(60), 4)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            assert runtime.save_sessions() == 0
            with pytest.raises(OSError):
                runtime.save_session(tmp_path / "one")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert "is not saved" in caplog.text and not list(tmp_path.iterdir())
        assert runtime.save_sessions() == 1


SAVING = """
import sys
from edge_moe.runtime.runtime import Runtime
runtime = Runtime(sys.argv[1], "1GB", 160, device="cpu", threads=1)
runtime.generate(list(range(60)), 4)
print("begun", flush=True)
while True:
    runtime.save_session(sys.argv[2])
    print("saved", flush=True)
"""


def test_a_killed_process_leaves_the_last_whole_file(path, tmp_path):
    for count in (1, 2, 5, 9):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(path), str(tmp_path / "one")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(count + 1):
            assert child.stdout.readline()
        child.kill()
        child.wait()
        child.stdout.close()
        with runtime_of(path) as runtime:
            assert runtime.load_session(tmp_path / "one") == 63


def test_headers_that_lie_are_refused(saved):
    content = saved.read_bytes()
    length = int.from_bytes(content[8:12], "little")
    header = content[12 : 12 + length]
    for lie in (
        header.replace(b'"tokens": 81', b'"tokens": -1'),
        header.replace(b'"tokens": 81', b'"tokens": 99'),
        header.replace(b'"rule": {', b'"rule": ['),
        header[:-1],
    ):
        saved.write_bytes(content[:8] + len(lie).to_bytes(4, "little") + lie + content[12 + length :])
        with pytest.raises(Unusable):
            read_saved(saved)
    saved.write_bytes(content[:8] + (1 << 31).to_bytes(4, "little") + content[12:])
    with pytest.raises(Unusable):
        read_saved(saved)
