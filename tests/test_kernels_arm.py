"""The kernels in C++ alone, built for this machine and for 64-bit Arm: the same bits on both."""

import shutil
import subprocess
from pathlib import Path

import pytest

DEVICES = Path(__file__).parent.parent / "devices"
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def check_kernels(directory: Path, options: list[str], run: list[str]) -> tuple[list[str], str]:
    """Names of the tables that were found to give scalar's bits, and the digest of these."""
    configure = ["cmake", "-G", "Ninja", "-S", DEVICES, "-B", directory, *options]
    for command in (configure, ["cmake", "--build", directory]):
        built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert built.returncode == 0, built.stdout
        assert "warning" not in built.stdout, built.stdout
    ran = subprocess.run([*run, directory / "check_kernels"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    *names, digest = ran.stdout.split()
    return names, digest


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="needs g++-aarch64-linux-gnu")
@pytest.mark.skipif(QEMU is None, reason="needs qemu-user")
def test_arm_gives_the_bits_of_this_machine(tmp_path):
    here = check_kernels(tmp_path / "here", [], [])
    arm = check_kernels(
        tmp_path / "arm", [f"-DCMAKE_TOOLCHAIN_FILE={DEVICES / 'aarch64.cmake'}"], [QEMU, "-cpu", "max"]
    )
    assert arm[0] == ["neon_i8mm", "neon", "scalar"]
    assert here[0][-1] == "scalar"
    assert arm[1] == here[1]
