"""Where a model is computed: on the processor, or on an NVIDIA GPU, whose memory counts under the cap as well."""

from .. import _core
from ..devices.nvidia import find_driver

DEVICES = ("auto", "cpu", "cuda")
OTHER_NAMES = ("metal", "mps", "mlx", "gpu")  # of a Mac's GPU


def device_name(name: str) -> str:
    """cpu or cuda; "auto": a GPU where this build has code for one. Raises ValueError for another name."""
    if name not in DEVICES:
        metal = "; there is no Metal yet: on a Mac models run on the CPU's NEON kernels" if name in OTHER_NAMES else ""
        raise ValueError(f"device is {name!r}, expected one of {', '.join(DEVICES)}{metal}")
    if name == "auto":
        return "cuda" if _core.cuda_build() == "cuda" and find_driver() else "cpu"
    return name


def begin_device(name: str) -> str:
    """device_name(), ready for use: a GPU's driver has taken its memory. Raises ValueError where there is no GPU."""
    if (name := device_name(name)) == "cuda":
        try:
            _core.cuda_gpu()
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    return name
