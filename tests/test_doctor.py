"""`edge-moe doctor`: what it finds is what the system says, and a driver's answers are shown as they are."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_moe import _core
from edge_moe.bench.bandwidth import directory_read_gbps
from edge_moe.devices import nvidia
from edge_moe.devices.probe import default_threads
from edge_moe.doctor import CONFIGS, _model_text, examination_text

# A driver of two GPUs: a board that shares memory, and a card. It has the functions of cuda.h that are called.
DRIVER = """
#include <cstddef>
#include <cstring>
extern "C" {
int cuInit(unsigned) { return FAILS; }
int cuDriverGetVersion(int* version) { return *version = 12060, 0; }
int cuDeviceGetCount(int* count) { return *count = 2, 0; }
int cuDeviceGet(int* device, int number) { return *device = 40 + number, 0; }
int cuDeviceGetName(char* name, int room, int device) {
  return strncpy(name, device == 40 ? "Orin (nvgpu)" : "A card", room), 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) { return *bytes = device == 40 ? 65877884928 : 5000000000, 0; }
int cuDeviceGetAttribute(int* value, int which, int device) {
  return *value = which == 75 ? 8 : which == 76 ? 7 : which == 18 ? device == 40 : which == 16 ? 14 : -1, 0;
}
}
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory) -> Path:
    """What is measured is kept here."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "edge_moe", "doctor", *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A library that answers as a driver does; fails: with an error."""
    if not (compiler := shutil.which("c++")):
        pytest.skip("needs a compiler")
    directory = tmp_path_factory.mktemp("driver")
    source = directory / "driver.cpp"
    source.write_text(DRIVER)

    def build(fails: int) -> str:
        library = directory / f"libcuda-{fails}.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", f"-DFAILS={fails}", source, "-o", library], check=True)
        return str(library)

    return build


def test_a_drivers_gpus_are_found(driver):
    found = nvidia.find_driver(driver(0))
    assert found.version == "12.6"
    assert found.gpus == [
        nvidia.Gpu("Orin (nvgpu)", "8.7", True, 14, 65877884928),
        nvidia.Gpu("A card", "8.7", False, 14, 5000000000),
    ]


def test_no_driver_or_one_that_fails_is_none(driver, tmp_path):
    assert nvidia.find_driver(str(tmp_path / "libcuda.so.1")) is None
    assert nvidia.find_driver(driver(100)) is None


def test_json_is_what_the_system_says(tmp_path):
    ran = run(tmp_path, "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["kernels"] == _core.kernel_names()
    assert found["threads"] == default_threads()
    assert found["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < found["available_bytes"] <= found["memory_bytes"]
    assert found["memory_gbps"] > 0
    assert list(found["kernel_gbps"]) == ["1", "2", "3", "4", "6", "8"] and min(found["kernel_gbps"].values()) > 0
    assert found["disk"]["path"] == str(tmp_path)
    assert found["devices"] == ["cpu"]
    assert list(tmp_path.iterdir()) == []


def test_a_bundles_records_are_what_is_read(bundle_of):
    bundle = bundle_of("olmoe", width=4)
    before = sorted(path.name for path in bundle.iterdir())
    ran = run(bundle, "--json")
    assert json.loads(ran.stdout)["disk"]["path"] == str(bundle)
    assert sorted(path.name for path in bundle.iterdir()) == before


def test_text_names_gpus_and_how_to_get_code_for_them(driver):
    found = json.loads(run("--json").stdout)
    table, so = examination_text(found).split("\n\n")
    assert table.splitlines()[-1].split() == ["runs", "on", "cpu"]
    assert so.startswith(
        "so, at 2.5 bits an expert weight, as `edge-moe compress` makes them:\n  Qwen3-30B-A3B (10.73 GB"
    )
    mac = examination_text(found | {"system": "Darwin 25.1, arm64"}).split("\n\n")[0]
    assert mac.endswith("cpu; for a Mac's GPU: pip install 'edge-moe[mlx]'")
    its = {"version": "0.32.4", "metal": True, "device": "Apple M4", "kernels": "mlx-metal"}
    mac = examination_text(found | {"system": "Darwin 25.1, arm64", "devices": ["mlx", "cpu"], "mlx": its})
    assert "MLX        0.32.4, Metal on Apple M4; kernels mlx-metal\nruns on    mlx or cpu\n" in mac
    for its, said in (({"version": None}, "not installed"), ({"version": "1", "error": "no"}, "does not work: no")):
        assert said in examination_text(found | {"mlx": its})
    gpus = [vars(gpu) for gpu in nvidia.find_driver(driver(0)).gpus]
    text = examination_text(found | {"cuda": {"driver": "12.6", "gpus": gpus, "nvcc": "12.6", "build": False}})
    assert "Orin (nvgpu), compute capability 8.7, 14 multiprocessors, 65.88 GB shared with the processor" in text
    assert "A card, compute capability 8.7, 14 multiprocessors, 5.00 GB of its own" in text
    assert "driver for 12.6; toolkit 12.6" in text
    assert "this build has no code for the GPU: pip install -Ccmake.define.EDGE_MOE_CUDA=ON" in text


def test_each_model_has_a_line_that_says_how_it_would_run():
    its = {"model": "A", "bits": 2.5, "ram_bytes": 8e9, "disk_bytes": 11e9, "floor_bytes": 2e9, "share_in_memory": 0.4}
    text = [
        _model_text(its | changes)
        for changes in (
            {"expected_speed": {"tokens_per_second": 7.12}},
            {"expected_speed": None, "share_in_memory": 1.0},
            {"expected_speed": None, "floor_bytes": 9e9},
        )
    ]
    assert text == [
        "A (11.00 GB) under 8.00 GB: 40% of experts fit, about 7.1 tok/s",
        "A (11.00 GB) under 8.00 GB: every expert fits",
        "A (11.00 GB) under 8.00 GB: does not run; it needs 9.00 GB",
    ]


def test_what_is_measured_is_kept_for_plan(tmp_path, cache):
    config = str(CONFIGS / "qwen3-30b-a3b.json")
    command = [sys.executable, "-m", "edge_moe", "plan", config, "--ram", "20GB", "--json"]
    before = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert before["expected_speed"] is None
    measured = json.loads(run(tmp_path, "--json").stdout)
    assert (cache / "edge-moe" / "machine.json").is_file()
    speed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["expected_speed"]
    assert speed["read_bytes_per_token"] == 0 and speed["hit_rate"] == 1 and speed["disk_gbps"] is None
    assert speed["weight_bytes_per_token"] / speed["tokens_per_second"] > 0
    advised = [its["expected_speed"] for its in measured["models"] if its["share_in_memory"] == 1]
    assert all(one["tokens_per_second"] == pytest.approx(speed["tokens_per_second"]) for one in advised[:1])


@pytest.mark.parametrize("name, what", [("missing", "no such directory"), ("file", "is a file")])
def test_what_is_no_directory_is_one_line(tmp_path, name, what):
    (tmp_path / "file").touch()
    ran = run(tmp_path / name)
    assert (ran.returncode, ran.stdout) == (1, "")
    message = f"{tmp_path / name}: {what}; name a bundle, or the directory that will hold one"
    assert ran.stderr == f"edge-moe: error: {message}\n"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_where_nothing_can_be_written_is_one_line():
    ran = run("/proc")
    assert (ran.returncode, ran.stdout) == (1, "")
    reason = "nothing can be written here (No such file or directory); name another directory"
    assert ran.stderr == f"edge-moe: error: /proc: {reason}\n"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs tmpfs")
def test_a_file_system_in_memory_is_measured_or_refuses():
    gbps = directory_read_gbps("/dev/shm")
    assert gbps is None or gbps > 0
