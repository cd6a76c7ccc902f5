"""Memory that requests may take together: of bodies while they are read and used, and of answers that wait for clients.

The plan reserves as much (Limits.reserve_bytes). What would take more is refused: a body for now, or for good if it
alone takes more; of answers, those of the client with the most that waits.
"""

import re
from collections.abc import Callable

from ..runtime.answer import Generation

ITEM = 150  # bytes of a value in a parsed JSON text, and of what the checks of a request make of it
OWN = 10_000  # of any JSON text
PIECE, ENTRY = 700, 130  # bytes of an answer's piece, and of one log probability in it
WIDE = re.compile(rb"[\xf0-\xff]")  # in UTF-8: characters of 4 bytes, which make their whole string as wide


def parsed_bytes(data: bytes) -> int:
    """Upper bound of the memory for a JSON text, as bytes, as a string and parsed."""
    width = 1 if data.isascii() else 4 if WIDE.search(data) else 2
    escaped = 4 if b"\\u" in data else width
    return OWN + len(data) * (1 + width + escaped) + ITEM * sum(map(data.count, (b"[", b"{", b",", b":")))


class Full(Exception):
    """There is no room now; `ever`: nor will there be."""

    def __init__(self, ever: bool) -> None:
        super().__init__("no room")
        self.ever = ever


class Budget:
    """Counts bytes up to `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    def hold(self) -> "Hold":
        return Hold(self)


class Hold:
    """A part of a budget; a context manager that gives it back."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.taken = budget, 0

    def resize(self, taken: int) -> None:
        """Raises Full if the budget has no room for so many bytes."""
        if taken > self.taken and self.budget.taken + taken - self.taken > self.budget.most:
            raise Full(ever=taken > self.budget.most)
        self.budget.taken += taken - self.taken
        self.taken = taken

    def release(self) -> None:
        self.resize(0)

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Backlogs:
    """What answers have computed and clients have not taken; above `most`, the largest is ended."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self.of: dict[object, int] = {}  # by whoever takes it
        self.ends: dict[object, Callable[[], None]] = {}

    def add(self, owner: object, count: int, end: Callable[[], None]) -> None:
        self.taken += count
        self.of[owner] = self.of.get(owner, 0) + count
        self.ends[owner] = end
        if self.taken > self.most:
            largest = max(self.of, key=self.of.__getitem__)
            self.ends[largest]()

    def remove(self, owner: object, count: int | None = None) -> None:
        """Take so many bytes away, or all of an owner's."""
        if owner in self.of:
            count = self.of[owner] if count is None else min(count, self.of[owner])
            self.taken -= count
            self.of[owner] -= count
            if not self.of[owner]:
                del self.of[owner], self.ends[owner]


def entries_of(piece: object) -> int:
    """The log probabilities of a piece."""
    told = piece.logprobs if isinstance(piece, Generation) else None
    return sum(1 + len(one.top_logprobs) for one in told or ())
