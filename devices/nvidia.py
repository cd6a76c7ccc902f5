"""Finding the NVIDIA GPUs of this machine with the driver's library, without a toolkit or a CUDA build."""

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass

LIBRARY = "libcuda.so.1"
# of CUdevice_attribute, cuda.h
MULTIPROCESSORS, INTEGRATED, MAJOR, MINOR = 16, 18, 75, 76


@dataclass
class Gpu:
    name: str
    compute_capability: str  # "8.7"
    integrated: bool  # shares memory with the processor, as on a Jetson
    multiprocessors: int
    memory_bytes: int  # the GPU's own memory, or the memory that it shares


@dataclass
class Driver:
    version: str  # the newest CUDA that the driver supports: "13.0"
    gpus: list[Gpu]


def find_driver(library: str = LIBRARY) -> Driver | None:
    """The driver and its GPUs; None if there is no driver or it finds no usable GPU."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return None
    return Driver(_version(version.value), [_gpu(cuda, number) for number in range(count.value)])


def nvcc_version() -> str | None:
    """The version of the CUDA toolkit whose nvcc is on the path, or None."""
    if not (nvcc := shutil.which("nvcc")):
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else None


def _gpu(cuda: ctypes.CDLL, number: int) -> Gpu:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), number)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{attribute(MAJOR)}.{attribute(MINOR)}",
        integrated=bool(attribute(INTEGRATED)),
        multiprocessors=attribute(MULTIPROCESSORS),
        memory_bytes=memory.value,
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
