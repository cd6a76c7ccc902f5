"""Selecting the device that runs a model: the CPU; an NVIDIA GPU, whose memory counts under the cap as well; or MLX,
which computes on a Mac's GPU, and elsewhere on the CPU."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .. import _core
from ..devices.nvidia import find_driver

if TYPE_CHECKING:
    from .mlx.ranks import Ranks

DEVICES = ("auto", "cpu", "cuda", "mlx")
OTHER_NAMES = ("metal", "mps", "gpu")  # names of a Mac's GPU
LEAST_MLX = (0, 32, 4)  # codes of one bit, streams that any thread may use


def device_name(name: str) -> str:
    """Resolve a name to cpu, cuda or mlx. "auto" is an NVIDIA GPU if this build has code for one, and on a Mac with
    Apple silicon MLX if that is installed. Raises ValueError for others."""
    if name not in DEVICES:
        metal = "; on a Mac's GPU, mlx computes" if name in OTHER_NAMES else ""
        raise ValueError(f"device is {name!r}, expected one of {', '.join(DEVICES)}{metal}")
    if name == "auto":
        if _core.cuda_build() == "cuda" and find_driver():
            return "cuda"
        return "mlx" if is_apple_silicon() and is_new_enough(mlx_version()) else "cpu"
    return name


def is_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def mlx_version() -> str:
    """The version of MLX that is installed, "" if none is. Does not import it."""
    try:
        return version("mlx")
    except PackageNotFoundError:
        return ""


def is_new_enough(mlx: str) -> bool:
    return tuple(int(part) for part in mlx.split(".")[:3] if part.isdigit()) >= LEAST_MLX


def begin_device(name: str) -> str:
    """device_name(), with a GPU or MLX initialised, so that it has taken its memory. Raises ValueError without one."""
    name = device_name(name)
    if name == "cuda":
        try:
            _core.cuda_gpu()
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    elif name == "mlx":
        _begin_mlx()
    return name


def _begin_mlx() -> None:
    """Import MLX and use each kernel once, so that what Metal takes for them is taken before a plan is made."""
    _import_mlx()
    from .mlx import check

    check.examine()


def _import_mlx() -> None:
    found = mlx_version()
    if not is_new_enough(found):
        wanted, has = ".".join(map(str, LEAST_MLX)), f"this is {found}" if found else "which is not installed"
        raise ValueError(f"device mlx needs MLX {wanted} or newer, {has}: pip install 'edge-moe[mlx]'")
    try:
        from .mlx import engine  # noqa: F401
    except ImportError as error:
        raise ValueError(f"device mlx: MLX {found} cannot be imported: {error}; install it again") from None


def begin_ranks(name: str) -> "Ranks | None":
    """The processes that run a model with this one, where mlx.launch has started several and the device is mlx.

    Raises ValueError if they do not reach one another.
    """
    if device_name(name) != "mlx":
        return None
    _import_mlx()
    from .mlx.ranks import find_ranks

    return find_ranks()
