"""Writing a bundle: whole or not there, whatever stops it."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import make_engine, run_engine

from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.rounding.quantise import quantise, trunk_packing
from edge_moe.compressor.writing import own, writer
from edge_moe.compressor.writing.writer import BundleWriter, Packing, Quantised
from edge_moe.runtime.bundle import TRUNK_FILE, Bundle, verify
from edge_moe.runtime.bundle_records import record_bytes
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.config_file import load_config


@pytest.fixture
def make_writer(golden, tmp_path):
    def make(out: Path = tmp_path / "new.emoe", **changes) -> BundleWriter:
        source = golden["olmoe"][0]
        config = replace(load_config(source), **changes)
        experts = {(layer, e): Packing((2, 3, 4), 32) for layer in range(2) for e in range(config.experts_of(layer))}
        return BundleWriter(out, source, config, trunk_packing(trunk_shapes(config), 8, 64), experts)

    return make


def fill(w: BundleWriter, until: int | None = None) -> None:
    """Write random tensors; with `until` only so many experts."""
    rng = np.random.default_rng(0)
    for name, shape in trunk_shapes(w.config).items():
        packing = w.trunk[name]
        w.write_trunk(name, quantise(rng.standard_normal(shape, np.float32), packing.widths[0], packing.group))
    shapes = ((32, 64), (32, 64), (64, 32))
    for layer, index in list(w.experts)[:until]:
        matrices = zip(shapes, (2, 3, 4), strict=True)
        w.write_expert(layer, index, [quantise(rng.standard_normal(s, np.float32), b, 32) for s, b in matrices])


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes) is a new file system of that size, empty."""
    mounted = []

    def make(nbytes: int) -> Path:
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(directory)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(directory)
        return directory

    yield make
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_written_bundle_opens_and_its_checksums_hold(make_writer):
    with make_writer() as w:
        fill(w)
        assert not w.out.exists()
        w.finish()
    bundle = Bundle.open(w.out)
    assert len(list(verify(bundle))) == 18
    assert {expert.widths for expert in bundle.experts.values()} == {(2, 3, 4)}
    assert [file.name for file in w.out.parent.iterdir()] == ["new.emoe"]


def test_threads_that_write_at_once_write_where_they_should(make_writer):
    interval = sys.getswitchinterval()
    with make_writer() as w:
        fill(w)
        norms = [name for name, packing in w.trunk.items() if packing.widths[0] == 32]
        tensors = {n: Quantised(np.full(trunk_shapes(w.config)[n], i, np.float32)) for i, n in enumerate(norms)}
        for name in norms:
            w.write_trunk(name, tensors[name])
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:  # what lies between theirs is not written again
                for written in [pool.submit(w.write_trunk, name, tensors[name]) for name in norms[::2] * 300]:
                    written.result()
        finally:
            sys.setswitchinterval(interval)
        w.finish()
    bundle = Bundle.open(w.out)
    assert len(norms) > 8
    for tensor in bundle.trunk:
        if tensor.name in tensors:
            found = np.fromfile(
                bundle.path / TRUNK_FILE, np.float32, tensor.rows * tensor.cols, offset=tensor.offsets[0]
            )
            np.testing.assert_array_equal(found, tensors[tensor.name].codes.reshape(-1), tensor.name)


def test_experts_of_each_layer_are_those_of_the_config(make_writer):
    kept = ((0, 1, 2, 3, 4, 5, 6, 7), (1, 2, 6))
    with make_writer(kept=kept, layer_top_k=(1, 3)) as w:
        w.frequency = {(1, 2): 0.5, (0, 7): 0.25}
        fill(w)
        w.finish()
    bundle = Bundle.open(w.out)
    assert (bundle.table["dropped"], bundle.table["top_k"]) == ([[], [0, 3, 4, 5, 7]], [1, 3])
    assert bundle.config == w.config
    assert len(list(verify(bundle))) == 13
    assert bundle.record_table()[2].tolist() == [0, 0, 0, 0, 0, 0, 0, 0.25, 0, 0, 0.5]


def test_where_nothing_is_dropped_the_bundle_is_the_same_as_without_a_list(make_writer, tmp_path):
    everything = tuple(range(8))
    written = []
    for changes in ({}, {"kept": (everything,) * 2, "layer_top_k": (3, 3)}):
        with make_writer(tmp_path / f"{len(written)}.emoe", **changes) as w:
            fill(w)
            w.finish()
        written.append({file.name: file.read_bytes() for file in w.out.iterdir()})
    assert written[0] == written[1]
    table = json.loads(written[0]["bundle.json"])
    assert table["dropped"] == []
    assert "top_k" not in table


def test_experts_other_than_those_of_the_config_are_refused(make_writer, tmp_path):
    for change in (lambda w: w.experts.pop((1, 2)), lambda w: w.experts.update({(1, 3): w.experts[1, 2]})):
        w = make_writer(kept=((0, 1, 2), (5, 6, 7)))
        change(w)
        with pytest.raises(AssertionError, match="config has 6"), w:
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_after_any_error_nothing_is_left(make_writer, tmp_path, error):
    with pytest.raises(error), make_writer() as w:
        fill(w, until=5)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_is_not_finished_is_not_there(make_writer, tmp_path):
    with make_writer() as w:
        fill(w, until=5)
        with pytest.raises(AssertionError, match="11 experts were not written"):
            w.finish()
    assert not w.out.exists()


def test_what_is_there_already_is_not_touched(make_writer, tmp_path):
    for kind in (Path.mkdir, Path.touch):
        out = tmp_path / f"{kind.__name__}.emoe"
        kind(out)
        with pytest.raises(FileExistsError) as caught, make_writer(out):
            pass
        assert str(caught.value) == f"{out}: exists already; choose another name or remove it"
        assert out.exists()


def test_what_a_killed_run_left_is_replaced(make_writer, tmp_path):
    left = tmp_path / "new.emoe.partial"
    own.make(left)
    (left / "old").write_text("x")
    with make_writer() as w:
        fill(w)
        w.finish()
    assert not left.exists()
    assert not (w.out / "old").exists()


def test_folders_on_the_way_are_made(make_writer, tmp_path):
    with make_writer(tmp_path / "a" / "b" / "new.emoe") as w:
        fill(w)
        w.finish()
    Bundle.open(w.out)


def test_many_expert_files_say_the_same_as_one(golden, bundle_of, tmp_path, monkeypatch):
    one = bundle_of("qwen3_moe", width=6)
    config = Bundle.open(one).config
    monkeypatch.setattr(writer, "SHARD_BYTES", 2 * record_bytes(config, (6, 6, 6), 32, 4096))
    many = compress(golden["qwen3_moe"][0], tmp_path / "many.emoe", width=6, method="rtn")
    assert [file.name for file in many.files] == [f"experts-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert len(list(verify(many))) == 14
    ids = golden["qwen3_moe"][1]
    want = run_engine(make_engine(one), ids)
    for slots in (None, 4):
        np.testing.assert_array_equal(run_engine(make_engine(many.path, slots=slots), ids), want)


# ---- full disks


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(make_writer, small_disk):
    disk = small_disk(64 * 1024)
    with pytest.raises(OSError) as caught, make_writer(disk / "new.emoe"):
        pass
    assert str(caught.value) == (
        f"{disk}/new.emoe: needs 1 MB, the disk has 0 MB free; make room or choose another disk"
    )
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("when", ["trunk", "experts", "finish"])
def test_a_disk_that_fills_up_on_the_way_gives_one_error_and_nothing_is_left(make_writer, small_disk, when):
    disk = small_disk(1024 * 1024)

    def fill_up() -> None:  # another program takes all that is left
        handle = os.open(disk / "other", os.O_CREAT | os.O_WRONLY)
        try:
            while os.write(handle, bytes(4096)):
                pass
        except OSError:
            os.close(handle)

    with pytest.raises(OSError) as caught, make_writer(disk / "new.emoe") as w:
        if when == "trunk":
            fill_up()
        fill(w, until=3)
        if when == "experts":
            fill_up()
        fill(w)
        if when == "finish":
            for handle in w._handles.values():
                handle.flush()
            fill_up()
        w.finish()
    assert str(caught.value) == (f"{disk}/new.emoe: the disk filled up while writing; make room or choose another disk")
    assert [file.name for file in disk.iterdir()] == ["other"]
