"""How matrices are encoded: codec, width and parts. devices/format.h defines the codecs.

The core's CODECS has, by name, a codec's widths, its parts, the safetensors type of each part, and its groups.
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
    """The encoding that a width implies: of the first codec that has it."""
    codec = next(name for name, (widths, *_) in _core.CODECS.items() if width in widths)
    encoding = Encoding(codec, width, group)
    return encoding if encoding.grouped else encoding._replace(group=0)


def trunk_parts(name: str, shape: tuple[int, ...], encoding: Encoding) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """The parts of a trunk tensor in trunk.safetensors: (part, name there, type, shape)."""
    dtypes = _core.CODECS[encoding.codec][2]
    if not encoding.grouped:
        return [("codes", name, dtypes[0], shape)]
    rows, cols = shape
    shapes = ((rows, cols * encoding.width // 32), (rows, cols // encoding.group), (rows, cols // encoding.group))
    its = zip(encoding.parts, dtypes, shapes[: len(dtypes)], strict=True)
    return [(part, f"{name}.{part}", dtype, of) for part, dtype, of in its]


@lru_cache(4096)
def record_layout(
    dim: int, hidden: int, encodings: tuple[Encoding, ...], biased: bool = False, gated: bool = True
) -> _core.RecordLayout:
    """The layout of an expert's record in a new bundle. biased: with output biases; gated: with a gate."""
    return _core.RecordLayout(dim, hidden, encodings, biased, gated)


def padded_bytes(places: _core.RecordLayout, alignment: int) -> int:
    """Bytes of a record with this layout, padding included."""
    return -(-places.bytes // alignment) * alignment


def layout_table(encodings: tuple[Encoding, ...], places: _core.RecordLayout, alignment: int) -> dict:
    """A layout as written in bundle.json."""
    return {
        "matrices": [as_table(encoding) for encoding in encodings],
        "bytes": padded_bytes(places, alignment),
        "parts": {name: list(place) for name, place in places.parts.items()},
    }


def as_table(encoding: Encoding) -> dict:
    """An encoding as written in bundle.json."""
    group = {"group": encoding.group} if encoding.grouped else {}
    return {"codec": encoding.codec, "width": encoding.width, **group}
