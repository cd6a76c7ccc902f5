"""Files that are there whole or not at all, whatever stops the writer, and errors that say which file it was."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give errors of the system that name no file this one: a write does not know what it writes to."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OSError(f"{path}: the disk filled up while writing; make room or choose another disk") from None
        if error.errno is not None and error.filename is None:
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise


def write_whole(path: Path, write: Callable) -> None:
    """Give `path` what write(handle) writes: under another name first, brought to disk, then renamed.

    Raises OSError, naming `path`, when the disk is full; nothing is left then.
    """
    partial = path.with_name(path.name + ".new")
    try:
        with named(path):
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
            with open(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
