"""The CUDA device without a GPU: its logic, run by a stand-in for one, and what nvcc makes of it for each board."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import run_python

from bench.laboratory.cuda_registers import ARCHITECTURES, kernels
from edge_moe import _core
from edge_moe.devices.nvidia import find_driver
from edge_moe.runtime.runtime import Runtime

TESTS = Path(__file__).parent
DEVICES = TESTS.parent / "devices"
BINDINGS = TESTS.parent / "bindings"
NVCC = shutil.which("nvcc")
KERNELS = sorted(path for path in (DEVICES / "cuda").glob("*.cu") if path.stem != "device")
KERNELS.append(TESTS.parent / "bench" / "laboratory" / "cuda_kernels.cu")


FIND_GPU = """
from edge_moe import _core
print(_core.cuda_build())
try:
    print(_core.cuda_gpu()["name"])
except RuntimeError as error:
    print(error)
"""
BUILDS = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")


def build(source: Path, out: Path, target: str, **options) -> None:
    """Configure and build a target; the test fails with what either said when it does not work, or warns."""
    given = [f"-D{name}={value}" for name, value in options.items()]
    for command in (["-G", "Ninja", "-S", source, "-B", out, *given], ["--build", out, "--target", target]):
        built = subprocess.run(["cmake", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert built.returncode == 0, built.stdout
        assert "warning" not in built.stdout, built.stdout


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """core("SIMULATED") is the path of the core with that EDGE_MOE_CUDA; each replaces the one before."""
    out = tmp_path_factory.mktemp("core")

    def make(cuda: str) -> Path:
        options = {"EDGE_MOE_CUDA": cuda, "CMAKE_BUILD_TYPE": "Release", "Python_EXECUTABLE": sys.executable}
        build(BINDINGS, out, "_core", CMAKE_CUDA_ARCHITECTURES="87", **options)
        (path,) = out.glob("_core.*")
        return path

    return make


@BUILDS
def test_kernels_give_the_bits_of_scalar(tmp_path):
    build(DEVICES, tmp_path, "check_cuda", EDGE_MOE_CUDA="SIMULATED")
    ran = subprocess.run([tmp_path / "check_cuda"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 700


@BUILDS
def test_a_simulated_gpu_passes_the_gates(core):
    environment = {**os.environ, "EDGE_MOE_CORE": str(core("SIMULATED")), "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "other_core", "-p", "no:cacheprovider"]
    ran = subprocess.run([*command, TESTS / "test_cuda_engine.py"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"\b(9\d|1\d\d) passed in", ran.stdout), ran.stdout


@BUILDS
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_a_build_with_cuda_says_that_there_is_no_gpu(core, monkeypatch):
    monkeypatch.setenv("EDGE_MOE_CORE", str(core("ON")))
    found, _, said = run_python(FIND_GPU).stdout.partition("\n")
    assert found == "cuda"
    if not find_driver():
        assert re.fullmatch(r"no NVIDIA GPU can be used: .*; run edge-moe doctor, or use device cpu\n", said)


@pytest.mark.skipif(_core.cuda_build() != "none", reason="this build has CUDA")
def test_a_build_without_cuda_says_how_to_get_one(bundle_of):
    with pytest.raises(ValueError, match="no code for NVIDIA GPUs; install it again, .* or use device cpu"):
        Runtime(bundle_of("reference", width=4), device="cuda")
    with Runtime(bundle_of("reference", width=4)) as runtime:
        assert runtime.device == "cpu"


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_nvcc_keeps_kernels_in_registers(source, architecture):
    found = kernels(NVCC, source, architecture)
    assert found and all(kernel.registers > 0 for kernel in found)
    assert not any(kernel.spilled_bytes or kernel.stack_bytes for kernel in found), found
