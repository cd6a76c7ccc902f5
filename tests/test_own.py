"""What compressing overwrites and removes is what it made: a stranger's files beside OUT stay as they are."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_resume import hashes, killed_after, killed_at, refused
from test_writer import small_disk  # noqa: F401 (a fixture)

from edge_moe.compressor.choosing import allocate
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.writing import own
from edge_moe.runtime.bundle import Bundle

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs links")
PLAIN = {"method": "rtn", "width": 3}
STRANGER = "is there, and edge-moe did not make it; move it away or choose another name for the bundle"


@pytest.fixture(scope="module")
def model(golden) -> Path:
    return golden["qwen2_moe"][0]


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(file, np.random.default_rng(3).integers(0, 128, 2048))
    return {"calibration": str(file), "tokens": 512, "bits": 6, "threads": 1}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("suffix", ["work", "partial"])
@pytest.mark.parametrize("kind", ["directory", "link", "file", "lock"])
def test_what_a_stranger_has_there_is_not_touched(model, options, tmp_path, suffix, kind, calibrated):
    at, stranger = tmp_path / f"new.emoe.{suffix}", tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("ten years of work")
    if kind == "link":
        at.symlink_to(stranger)
    elif kind == "file":
        at.write_text("ten years of work")
    else:
        shutil.copytree(stranger, at)
        if kind == "lock":
            (at / "lock").touch()
            (at / "identity.json").write_text("{}")
    before = sorted((path, path.is_symlink(), path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    for more in ({}, {"force": True}):
        message = refused(FileExistsError, model, tmp_path / "new.emoe", **(options if calibrated else PLAIN), **more)
        assert message == f"{at}: {STRANGER}"
    assert before == sorted(
        (path, path.is_symlink(), path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")
    )


def test_an_empty_directory_is_taken(model, tmp_path):
    for suffix in ("work", "partial"):
        (tmp_path / f"new.emoe.{suffix}").mkdir()
    compress(model, tmp_path / "new.emoe", **PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["new.emoe"]
    assert not (tmp_path / "new.emoe" / own.MARK).exists()


def test_a_strangers_file_in_the_unfinished_bundle_is_not_shipped(model, options, tmp_path):
    killed_at("round-0001.json", model, tmp_path / "new.emoe", options)
    file = tmp_path / "new.emoe.partial" / "notes.txt"
    file.write_text("private")
    assert refused(ValueError, model, tmp_path / "new.emoe", **options) == (
        f"{file}: edge-moe did not write this; move it away and go on"
    )
    file.rename(tmp_path / "notes.txt")
    compress(model, tmp_path / "new.emoe", **options)


def test_a_link_in_the_unfinished_bundle_is_not_written_through(model, options, tmp_path):
    killed_at("round-0001.json", model, tmp_path / "new.emoe", options)
    file, victim = tmp_path / "new.emoe.partial" / "trunk.safetensors", tmp_path / "victim"
    file.rename(victim)
    before = victim.read_bytes()
    file.symlink_to(victim)
    assert str(file) in refused(OSError, model, tmp_path / "new.emoe", **options)
    assert victim.read_bytes() == before


@pytest.mark.parametrize("out", [".", "..", "/", "x/.."])
def test_a_directory_that_is_there_is_no_name_for_a_bundle(model, tmp_path, monkeypatch, out):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refused(ValueError, model, out, **PLAIN) == (
        f"{Path(out)}: is a directory that is there; name the bundle to write, as {Path(out) / 'NAME.emoe'}"
    )


# ---- force


def test_force_replaces_a_bundle_once_the_new_one_is_whole(model, tmp_path):
    out, seen = tmp_path / "new.emoe", []
    compress(model, out, **PLAIN)
    before = hashes(out)
    compress(model, out, method="rtn", width=4, force=True, progress=lambda *now: seen.append(hashes(out) == before))
    assert all(seen) and {expert.widths for expert in Bundle.open(out).experts.values()} == {(4, 4, 4)}
    assert [path.name for path in tmp_path.iterdir()] == ["new.emoe"] and not (out / own.MARK).exists()


@pytest.mark.parametrize("what", ["empty directory", "file", "bundle with notes", "link", "another table"])
def test_force_replaces_nothing_else(model, tmp_path, what):
    out = tmp_path / "new.emoe"
    if what == "file":
        out.write_text("ten years of work")
    elif what == "empty directory":
        out.mkdir()
    else:
        compress(model, out, **PLAIN)
    if what == "bundle with notes":
        (out / "notes.txt").write_text("mine")
    if what == "link":
        out.rename(tmp_path / "elsewhere")
        out.symlink_to(tmp_path / "elsewhere")
    if what == "another table":
        (out / "bundle.json").write_text(json.dumps({"format": "zip", "copies": {}, "experts": {"files": []}}))
    why = "has notes.txt, which is no part of a bundle" if what == "bundle with notes" else "is no bundle"
    assert refused(FileExistsError, model, out, force=True, **PLAIN) == (
        f"{out}: {why}, so it is not replaced; move it away or choose another name"
    )
    assert out.exists()


def test_force_keeps_what_has_the_name_that_the_old_bundle_would_get(model, tmp_path):
    out, old = tmp_path / "new.emoe", tmp_path / "new.emoe.old"
    compress(model, out, **PLAIN)
    shutil.copytree(out, old)
    assert refused(FileExistsError, model, out, force=True, **PLAIN) == f"{old}: {STRANGER}"
    assert hashes(old) == hashes(out)


def test_force_starts_anew_where_an_unfinished_run_had_other_options(model, options, tmp_path):
    out, other = tmp_path / "new.emoe", tmp_path / "other.emoe"
    killed_at("round-0000.json", model, out, options)
    compress(model, out, **{**options, "bits": 7}, force=True)
    compress(model, other, **{**options, "bits": 7})
    assert hashes(out) == hashes(other)


# ---- going on


def test_an_unfinished_run_is_gone_on_with_unasked(model, options, tmp_path):
    killed_after(12, model, tmp_path / "new.emoe", options)
    seen = []
    compress(model, tmp_path / "new.emoe", progress=lambda *now: seen.append(now), **options)
    assert min(done for step, done, _ in seen if step == "measure") >= 8


def test_the_choice_of_an_unfinished_run_is_kept_whatever_the_solver_would_say_now(
    model, options, tmp_path, monkeypatch
):
    wanted = compress(model, tmp_path / "whole.emoe", **options).path
    out = tmp_path / "new.emoe"
    killed_at("round-0000.json", model, out, options)
    monkeypatch.setattr(allocate, "_solve", lambda cost, *_, **__: np.zeros(len(cost), int))
    assert hashes(compress(model, out, **options).path) == hashes(wanted)


@pytest.mark.parametrize("what", ["trunk", "experts", "stream"])
def test_state_of_the_right_size_that_was_changed_is_refused(model, options, tmp_path, what):
    out = tmp_path / "new.emoe"
    killed_at("round-0000.json", model, out, options)
    if what == "stream":
        (file,) = tmp_path.glob("new.emoe.work/round-*.source")
        offset, message = 100, "does not match its checksum; start again"
    else:
        (file,) = tmp_path.glob(f"new.emoe.partial/{what}*")
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        offset = next(at for at in range(start, len(content)) if content[at])
        message = "is not what the unfinished run wrote; remove its .work to start anew"
    with open(file, "r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ 1]))
    found = refused(ValueError, model, out, **options)
    assert found.startswith(f"{file}: ") and found.endswith(message)


def test_a_disk_that_the_journal_fills_up_is_named(model, options, small_disk):  # noqa: F811
    disk = small_disk(1024 * 1024)

    def fill_up(step: str, done: int, of: int) -> None:
        if done == 1:
            handle = os.open(disk / "other", os.O_CREAT | os.O_WRONLY)
            try:
                while os.write(handle, bytes(512)):
                    pass
            except OSError:
                os.close(handle)

    message = refused(OSError, model, disk / "new.emoe", progress=fill_up, **options)
    assert message == (
        f"{disk}/new.emoe.work/measure-0000.source: the disk filled up while writing; make room or choose another disk"
    )
