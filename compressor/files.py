"""Files that are there whole or not at all, whatever stops the writer."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable) -> None:
    """Give `path` what write(handle) writes: under another name first, brought to disk, then renamed."""
    partial = path.with_name(path.name + ".new")
    with open(partial, "wb") as handle:
        write(handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
