"""What a Runtime computed of a prompt, in a file: keys and values and recurrent states, to go on from after a restart.

A file belongs to one bundle, one rule of pruning, one type of cache and one version of this package, and holds a
checksum of everything in it:

    EMOESAVE          8 bytes
    length            of the header, uint32, little-endian like all that follows
    header            JSON: identity, rule, tokens, bytes
    tokens            int32, tokens
    what the engine wrote of them, bytes
    checksum          BLAKE2b of 32 bytes of all before

A file that is damaged, cut short or of another bundle is never used.
"""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from .pruning import PruneRule

if TYPE_CHECKING:
    from .. import _core

MAGIC = b"EMOESAVE"
MOST_HEADER = 1 << 20  # bytes
CHECKSUM = 32  # bytes
SUFFIX = ".emoe-session"


class Unusable(ValueError):
    """Why a file cannot be used here."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A file's header and tokens."""

    path: Path
    identity: str
    rule: dict[str, Any]
    ids: np.ndarray  # int32 (tokens,)
    nbytes: int  # of what the engine wrote

    def shared(self, ids: np.ndarray) -> int:
        """How many of the first tokens agree with `ids`."""
        count = min(len(self.ids), len(ids))
        differ = np.nonzero(self.ids[:count] != ids[:count])[0]
        return int(differ[0]) if len(differ) else count


def write_saved(
    path: Path, engine: "_core.Engine", sequence: int, ids: np.ndarray, identity: str, rule: PruneRule
) -> int:
    """Write what a sequence knows of the tokens `ids`, its first ones, and return the file's bytes.

    The file appears under its name when it is whole and on the disk. Raises OSError if that fails, and leaves what was
    there before.
    """
    header = {"identity": identity, "rule": asdict(rule), "tokens": len(ids), "bytes": engine.saved_bytes(len(ids))}
    text, checksum = json.dumps(header).encode(), hashlib.blake2b(digest_size=CHECKSUM)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".edge-moe-", suffix=SUFFIX)
    try:
        with open(handle, "wb", buffering=0) as file:

            def write(piece) -> None:
                checksum.update(piece)
                left = memoryview(piece).cast("B")
                while left:
                    left = left[file.write(left) :]

            write(MAGIC + struct.pack("<I", len(text)) + text)
            write(np.ascontiguousarray(ids, "<i4").tobytes())
            engine.save_positions(len(ids), write, sequence=sequence)
            file.write(checksum.digest())
            os.fsync(file.fileno())
            nbytes = file.tell()
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return nbytes


def read_saved(path: Path) -> Saved:
    """Read a file's header and tokens. Raises Unusable for a file of another kind, and OSError."""
    with open(path, "rb") as file:
        return _read_head(path, file, lambda piece: None)


def load_saved(saved: Saved, engine: "_core.Engine", sequence: int) -> None:
    """Let a sequence know what a file has of its tokens.

    Raises Unusable for a file that is damaged, or has changed, and OSError; then the sequence is empty.
    """
    checksum = hashlib.blake2b(digest_size=CHECKSUM)
    with open(saved.path, "rb", buffering=0) as file:
        head = _read_head(saved.path, file, checksum.update)
        if (head.identity, head.nbytes) != (saved.identity, engine.saved_bytes(len(saved.ids))) or not np.array_equal(
            head.ids, saved.ids
        ):
            raise Unusable(f"{saved.path}: is of other tokens or of another engine")

        def read(piece: np.ndarray) -> None:
            _fill(saved.path, file, memoryview(piece))
            checksum.update(piece)

        engine.load_positions(saved.ids, read, sequence=sequence)
        if file.read(CHECKSUM + 1) != checksum.digest():
            engine.truncate(0, sequence=sequence)
            raise Unusable(f"{saved.path}: does not match its checksum")


def _read_head(path: Path, file: IO[bytes], seen: Callable[[bytes], None]) -> Saved:
    begin = _read(path, file, len(MAGIC) + 4)
    if begin[: len(MAGIC)] != MAGIC:
        raise Unusable(f"{path}: is no saved session")
    (length,) = struct.unpack("<I", begin[len(MAGIC) :])
    if length > MOST_HEADER:
        raise Unusable(f"{path}: is no saved session")
    text = _read(path, file, length)
    try:
        header = json.loads(text)
        identity, rule = str(header["identity"]), dict(header["rule"])
        tokens, nbytes = int(header["tokens"]), int(header["bytes"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise Unusable(f"{path}: is no saved session") from None
    size = len(begin) + length + 4 * tokens + nbytes + CHECKSUM
    if min(tokens, nbytes) < 0 or os.fstat(file.fileno()).st_size != size:
        raise Unusable(f"{path}: has not the {size:,} bytes that it should have; it was cut short, or is damaged")
    ids = _read(path, file, 4 * tokens)
    for part in (begin, text, ids):
        seen(part)
    return Saved(path, identity, rule, np.frombuffer(ids, "<i4").astype(np.int32), nbytes)


def _read(path: Path, file: IO[bytes], nbytes: int) -> bytes:
    found = bytearray(nbytes)
    _fill(path, file, memoryview(found))
    return bytes(found)


def _fill(path: Path, file: IO[bytes], room: memoryview) -> None:
    room = room.cast("B")
    while room:
        count = file.readinto(room)  # type: ignore[attr-defined]
        if not count:
            raise Unusable(f"{path}: ends early")
        room = room[count:]
