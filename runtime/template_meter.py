"""Limiting the work and memory of a chat template: steps and bytes are checked before each operation.

Sizes are upper bounds if an exact size would cost as much as the operation. Memory is the growth of the process since
rendering began, measured again whenever UNMEASURED bytes were asked for.
"""

import json
import sys
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from types import GeneratorType

from jinja2.utils import Namespace
from markupsafe import Markup

from .. import _core

ROOM = 256_000_000  # default maximum of memory, in bytes
MOST_STEPS = 1_000_000  # a step is an operation, an item of a loop, or 256 characters that an operation reads
MOST_NUMBER = 10_000_000  # maximum by which an operation may repeat, pad or count
MOST_BITS = 4096  # of an integer
UNMEASURED = 200_000  # bytes that may be asked for between measurements of memory
PART = 2048  # characters that are quoted at a time to measure the quoted length
# What str.split() splits at; str.splitlines() splits at some of these and no others.
WHITE = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


class TooMuch(ValueError):
    """Raised when a template exceeds a limit."""


class Meter:
    """The work and memory that one rendering may still take."""

    def __init__(self, room_bytes: int | None):
        self.room = ROOM if room_bytes is None else room_bytes
        self.steps, self.unmeasured, self.asked, self.began = 0, 0, 0, _core.resident_bytes()

    def step(self, count: int = 1) -> None:
        self.steps += count
        self.unmeasured += 100  # bytes of a small value
        if self.steps > MOST_STEPS:
            raise TooMuch(f"it takes more than {MOST_STEPS:,} steps")
        if self.unmeasured > UNMEASURED:
            self.allow(0)

    def allow(self, nbytes: int) -> None:
        """Check the memory that an operation is about to take.

        Other threads may make the process grow too, so growth beyond what was asked for is not the template's.
        """
        self.unmeasured += nbytes
        if self.unmeasured > UNMEASURED:
            self.asked += self.unmeasured
            grown = max(0, _core.resident_bytes() - self.began)
            if min(grown + nbytes, self.asked) > self.room:
                raise TooMuch(f"it takes more than {self.room / 1e6:,.0f} MB of memory, what the cap leaves it")
            self.unmeasured = nbytes
            self.asked -= nbytes

    def number(self, value) -> int:
        """Check an integer to repeat, pad or count by, and return its absolute value; 0 for other types."""
        if not isinstance(value, int):
            return 0
        if abs(value) > MOST_NUMBER:
            raise TooMuch(f"it repeats, pads or counts by more than {MOST_NUMBER:,}")
        return abs(value)

    def bits(self, operator: str, left, right) -> None:
        """Check the size of the result of an operation on two numbers."""
        if not (isinstance(left, int) and isinstance(right, int)):
            return
        sizes = left.bit_length(), right.bit_length()
        if operator == "**":
            bits = sizes[0] * (right if right > 0 and sizes[1] < 32 else MOST_BITS + 1 if right > 0 else 1)
        else:
            bits = sum(sizes)
        if bits > MOST_BITS:
            raise TooMuch(f"it computes with whole numbers of more than {MOST_BITS:,} bits")

    def flat(self, value):
        """Count the steps of an operation that traverses a value, which may contain one part many times."""
        self.step(1 + len(value) // 256 if isinstance(value, str | bytes) else 1)
        for item in _items(value):
            self.flat(item)
        return value

    def shape(self, value) -> tuple[int, int]:
        """The number of values in a value, including itself, and their nesting depth."""
        self.step()
        elements, depth = 1, 1
        for item in _items(value):
            more, deep = self.shape(item)
            elements, depth = elements + more, max(depth, deep + 1)
        return elements, depth

    def text(self, value, quoted: bool = False) -> int:
        """Upper bound of the characters of str(value) or, with `quoted`, of repr(value) and of its JSON."""
        if isinstance(value, str):
            self.step(1 + len(value) // 256)
            factor = 6 if isinstance(value, Markup) else 1  # text joined with Markup is escaped
            if not quoted:
                return factor * len(value)
            parts = (value[at : at + PART] for at in range(0, len(value), PART))
            return factor * (2 + sum(max(len(repr(part)), len(json.dumps(part))) for part in parts))
        self.step()
        if isinstance(value, bytes):
            return 4 * len(value) + 3
        if isinstance(value, int):
            return value.bit_length() // 3 + 2
        return 100 + sum(self.text(item, True) + 4 for item in _items(value))

    def new_text(self, characters: int, *made_of) -> None:
        """Check the memory of a new string of `characters` characters, made of these values."""
        self.step(1 + characters // 256)
        width = max(map(_width, made_of), default=4)
        self.allow(characters * width)

    def count_parts(self, text, separator, name: str) -> int:
        """Upper bound of the number of parts from splitting a text."""
        if separator:
            return text.count(separator)
        white = WHITE if isinstance(text, str) and not text.isascii() else WHITE[:10]
        return sum(text.count(sign if isinstance(text, str) else sign.encode()) for sign in white)


def listed(value, meter: Meter):
    """The items of a generator as a list, counting steps; any other value unchanged."""
    if not isinstance(value, GeneratorType | Iterator):
        return value
    items = []
    for item in value:
        meter.step()
        items.append(item)
    return items


def _items(value):
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if isinstance(value, Mapping):
        return (part for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set | frozenset | KeysView | ItemsView | ValuesView):
        return value
    return ()


def _width(value) -> int:
    """Bytes per character of a string; 4 for other values and for strings too short to tell."""
    if not isinstance(value, str):
        return 4
    if value.isascii():
        return 1
    return min(4, -(-max(sys.getsizeof(value) - 76, 0) // len(value))) if len(value) > 100 else 4
