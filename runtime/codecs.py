"""How matrices are encoded: by which codec, at which width, as which parts. devices/format.h defines the codecs.

CODECS of the core has, by name: the widths that a codec has, its parts, the type of its codes in safetensors, and
whether products read their inputs rounded.
"""

from functools import lru_cache
from typing import NamedTuple

from .. import _core

PROJECTIONS = ("gate", "up", "down")


class Encoding(NamedTuple):
    """How one matrix is encoded. group: inputs that share a scale; 0 for a codec without scales."""

    codec: str
    width: int  # bits of a code
    group: int

    @property
    def parts(self) -> tuple[str, ...]:
        return _core.CODECS[self.codec][1]

    @property
    def grouped(self) -> bool:
        return "scales" in self.parts


def encoding_of(width: int, group: int) -> Encoding:
    """The encoding that a width alone stands for: of the first codec that has it."""
    codec = next(name for name, (widths, *_) in _core.CODECS.items() if width in widths)
    encoding = Encoding(codec, width, group)
    return encoding if encoding.grouped else encoding._replace(group=0)


def trunk_parts(name: str, shape: tuple[int, ...], encoding: Encoding) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """The parts of a trunk tensor as trunk.safetensors has them: (part, name there, type, shape)."""
    dtype = _core.CODECS[encoding.codec][2]
    if not encoding.grouped:
        return [("codes", name, dtype, shape)]
    rows, cols = shape
    codes = ("codes", f"{name}.codes", dtype, (rows, cols * encoding.width // 32))
    return [codes, *((part, f"{name}.{part}", "BF16", (rows, cols // encoding.group)) for part in encoding.parts[1:])]


@lru_cache(4096)
def record_layout(dim: int, hidden: int, encodings: tuple[Encoding, ...], biased: bool = False) -> _core.RecordLayout:
    """Where the parts of an expert lie in a new bundle's record. biased: its products have a bias."""
    return _core.RecordLayout(dim, hidden, encodings, biased)


def as_table(encoding: Encoding) -> dict:
    """An encoding as bundle.json has it."""
    group = {"group": encoding.group} if encoding.grouped else {}
    return {"codec": encoding.codec, "width": encoding.width, **group}
