"""Where a model is computed: on the processor, or on an NVIDIA GPU, whose memory counts under the cap as well."""

from dataclasses import dataclass

from edge_moe import _core
from edge_moe.devices.nvidia import find_driver

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Device:
    name: str = "cpu"  # or "cuda"
    staged: bool = False  # records reach it through a buffer of each reader

    @property
    def maps_records(self) -> bool:
        """Whether records that all fit are used where they are mapped from their files."""
        return self.name == "cpu"


def device_name(name: str) -> str:
    """cpu or cuda; "auto": a GPU where this build has code for one. Raises ValueError for another name."""
    if name not in DEVICES:
        raise ValueError(f"device is {name!r}, expected one of {', '.join(DEVICES)}")
    if name == "auto":
        return "cuda" if _core.cuda_build() == "cuda" and find_driver() else "cpu"
    return name


def find_device(name: str) -> Device:
    """The device of device_name(), begun to be used. Raises ValueError where there is none of this name."""
    if (name := device_name(name)) == "cpu":
        return Device()
    try:
        return Device(name, staged=not _core.cuda_gpu()["integrated"])
    except RuntimeError as error:
        raise ValueError(str(error)) from None
