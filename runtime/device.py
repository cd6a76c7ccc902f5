"""Selecting the device that runs a model: the CPU, or an NVIDIA GPU, whose memory counts under the cap as well."""

from .. import _core
from ..devices.nvidia import find_driver

DEVICES = ("auto", "cpu", "cuda")
OTHER_NAMES = ("metal", "mps", "mlx", "gpu")  # names of a Mac's GPU


def device_name(name: str) -> str:
    """Resolve a name to cpu or cuda; "auto" is a GPU if this build has code for one. Raises ValueError for others."""
    if name not in DEVICES:
        metal = "; there is no Metal yet: on a Mac models run on the CPU's NEON kernels" if name in OTHER_NAMES else ""
        raise ValueError(f"device is {name!r}, expected one of {', '.join(DEVICES)}{metal}")
    if name == "auto":
        return "cuda" if _core.cuda_build() == "cuda" and find_driver() else "cpu"
    return name


def begin_device(name: str) -> str:
    """device_name(), with a GPU initialised, so that its driver has taken its memory. Raises ValueError without one."""
    if (name := device_name(name)) == "cuda":
        try:
            _core.cuda_gpu()
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    return name
