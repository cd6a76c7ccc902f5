"""The CUDA kernels without a GPU: their logic, run by a stand-in, and what nvcc makes of them for each board."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

DEVICES = Path(__file__).parent.parent / "devices"
ARCHITECTURES = ("sm_87", "sm_90", "sm_110")  # Orin, a data centre's GPU, Thor
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")
def test_kernels_give_the_bits_of_scalar(tmp_path):
    for command in (["-G", "Ninja", "-S", DEVICES, "-B", tmp_path], ["--build", tmp_path, "--target", "check_cuda"]):
        built = subprocess.run(["cmake", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert built.returncode == 0, built.stdout
        assert "warning" not in built.stdout, built.stdout
    ran = subprocess.run([tmp_path / "check_cuda"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 400


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted((DEVICES / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_nvcc_keeps_kernels_in_registers(source, architecture, tmp_path, record_property):
    options = ["-std=c++17", "-O3", "-fmad=false", f"-arch={architecture}", "-Xptxas", "-v", "--Werror", "all-warnings"]
    command = [NVCC, *options, "-c", source, "-o", tmp_path / "kernels.o"]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout
    assert "warning" not in built.stdout, built.stdout
    kernels = re.findall(r"Compiling entry function '\w*?\d+(\w+_kernel)E", built.stdout)
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill", built.stdout)]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", built.stdout)]
    assert len(kernels) == len(registers) > 0
    assert spilled and not any(spilled), built.stdout
    record_property("registers", dict(zip(kernels, registers, strict=True)))
