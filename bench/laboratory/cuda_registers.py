"""Compiles the CUDA kernels for each board and reports registers and spills (bench/reports/cuda-registers.md); no GPU.

python -m bench.laboratory.cuda_registers DEVICES > bench/reports/cuda-registers.md      DEVICES: the sources' directory
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edge_moe.devices.nvidia import nvcc_version

from .markdown import table

ARCHITECTURES = {"sm_87": "Orin", "sm_90": "H100, H200", "sm_110": "Thor"}
OPTIONS = ("-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "--Werror", "all-warnings")


@dataclass
class Kernel:
    name: str
    registers: int  # per thread
    spilled_bytes: int  # stored and loaded, per thread
    stack_bytes: int


def kernels(nvcc: str, source: Path, architecture: str) -> list[Kernel]:
    """The kernels of a source. Raises RuntimeError with nvcc's output if it fails or warns."""
    with tempfile.TemporaryDirectory() as directory:
        command = [nvcc, *OPTIONS, f"-arch={architecture}", "-c", source, "-o", Path(directory) / "kernels.o"]
        built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if built.returncode or "warning" in built.stdout:
        raise RuntimeError(built.stdout)
    found = []
    for part in built.stdout.split("Compiling entry function")[1:]:
        # The name is mangled; templates have a number, the queries that they take, or a type.
        name, number, kind = re.search(r"\d([a-z_]+_kernel)(?:ILi(\d+)E|INS_\d+(\w+?)E)?", part).groups()
        stack, *spilled = (int(count) for count in re.findall(r"(\d+) bytes (?:stack|spill)", part))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found.append(Kernel(name + (f"<{number or kind}>" if number or kind else ""), registers, sum(spilled), stack))
    return found


def main() -> None:
    sources = sorted(path for path in (Path(sys.argv[1]) / "cuda").glob("*.cu") if path.stem != "device")
    rows = []
    for source in sources:
        of_source: dict[str, list[Kernel]] = {}
        for architecture in ARCHITECTURES:
            for kernel in kernels("nvcc", source, architecture):
                of_source.setdefault(kernel.name, []).append(kernel)
        for name, found in sorted(of_source.items()):
            spilled = sum(kernel.spilled_bytes for kernel in found)
            rows.append([source.name, name, *(str(kernel.registers) for kernel in found), str(spilled)])
    boards = [f"{architecture} ({board})" for architecture, board in ARCHITECTURES.items()]
    print(
        f"# Registers of the CUDA kernels\n\nOf a thread, by nvcc {nvcc_version()}, and the bytes spilled on all three "
        "together.\n\n" + table(["source", "kernel", *boards, "spilled"], rows)
    )


if __name__ == "__main__":
    main()
