"""Reading untrusted files: only regular files inside a directory, of bounded size, with the file's name in every error.

A bundle may come from anyone. A link in it could point at any file of this machine, a sparse file could be larger than
memory, and a few megabytes of JSON can become gigabytes of Python objects.
"""

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

PIECE_BYTES = 1 << 20
MOST_JSON_BYTES = 64_000_000  # of a JSON file; bundle.json of 23,040 experts has 9 MB
MOST_JSON_VALUES = 2_000_000  # in a JSON file; Python takes up to 200 bytes for each
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that is valid only in pairs


def real_path(directory: Path, name: str, missing: str = "") -> Path:
    """The path of the regular file DIRECTORY/name, with links resolved.

    Links are followed inside the directory and into the blobs of a Hugging Face cache, which consists of links. Raises
    FileNotFoundError, ending in `missing`, if there is no regular file, and ValueError for a link that leads elsewhere.
    """
    file = directory / name
    try:
        real = file.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: a cycle of links
        regular = False
    if not regular:
        raise FileNotFoundError(f"{file}: no such file{missing}")
    blobs = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if directory.resolve() not in real.parents and not blobs:
        raise ValueError(
            f"{file}: is a link to {real}, outside of {directory}; links are followed only inside it and into a "
            "Hugging Face cache: put the file itself there"
        )
    return real


def pieces(path: Path, offset: int = 0, nbytes: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file from `offset` on, `nbytes` or all, in pieces; fewer if the file ends early."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            left = nbytes
            while left != 0 and (piece := file.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left))):
                left = None if left is None else left - len(piece)
                yield piece
    except OSError as error:
        raise _named(error, path) from None


def read_bounded(path: Path, most_bytes: int, remedy: str) -> bytes:
    """Read a whole file. Raises ValueError, ending in `remedy`, if it is larger than `most_bytes`."""
    data = b"".join(pieces(path, nbytes=most_bytes + 1))
    if len(data) > most_bytes:
        raise ValueError(f"{path}: has more than {most_bytes:,} bytes, which no such file needs; {remedy}")
    return data


def parse_json(path: Path, text: bytes, remedy: str) -> dict:
    """Parse a file's bytes as a JSON object. Raises ValueError, ending in `remedy`, for anything else."""
    check_values(path, text, remedy)
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}; {remedy}")
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}: has a string with half a surrogate pair, which no text has; {remedy}") from None
    return value


def check_values(path: Path, text: bytes, remedy: str) -> None:
    """Raise ValueError, ending in `remedy`, for JSON with too many values, which would take much memory."""
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MOST_JSON_VALUES:
        raise ValueError(f"{path}: has more than {MOST_JSON_VALUES:,} values, which no such file needs; {remedy}")


def _named(error: OSError, path: Path) -> OSError:
    """The error with the file's name, which errors of read() lack."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(path))
