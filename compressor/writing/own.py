"""Which directories beside OUT a run may overwrite and remove: those that a run has made, never through a link.

A user may have something else under the names OUT.work and OUT.partial. A directory belongs to compressing if it
contains MARK, which is written first; an empty directory is taken over, any other is refused. A bundle is replaced only
if the directory contains nothing but a bundle.
"""

import json
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from ...runtime.bundle_records import TRUNK_FILE
from ...runtime.pruning import MASK_FILE
from ..files import named

MARK = ".edge-moe"
CONTENT = b"made by edge-moe compress, which goes on from here or removes this directory\n"


def make(directory: Path) -> None:
    """Make and mark a directory, if it is not there. Raises FileExistsError if something else has its name."""
    check(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark(directory)


def mark(directory: Path) -> None:
    with named(directory / MARK):
        handle = os.open(directory / MARK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(handle, "wb") as file:
            file.write(CONTENT)


def check(directory: Path) -> None:
    """Raise FileExistsError if the directory exists and was not made by compressing."""
    if (directory.exists() or directory.is_symlink()) and not is_own(directory):
        raise FileExistsError(
            f"{directory}: is there, and edge-moe did not make it; move it away or choose another name for the bundle"
        )


def is_own(directory: Path) -> bool:
    """Whether the directory exists and is marked, or empty."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    names = os.listdir(directory)
    file = directory / MARK
    if MARK not in names or not stat.S_ISREG(file.lstat().st_mode):
        return not names
    content = file.read_bytes()[: len(CONTENT) + 1]
    return content == CONTENT or (CONTENT.startswith(content) and names == [MARK])  # killed while it was made


def discard(directory: Path) -> None:
    """Remove a marked directory, if it exists. Raises FileExistsError if it is not marked."""
    check(directory)
    if directory.is_dir():
        shutil.rmtree(directory, ignore_errors=True)


def unmark(directory: Path) -> None:
    with suppress(FileNotFoundError):
        (directory / MARK).unlink()


def check_bundle(out: Path) -> None:
    """Raise FileExistsError unless `out` is a bundle without any other files."""
    why = None
    try:
        table = json.loads((out / "bundle.json").read_bytes())
        names = {"bundle.json", TRUNK_FILE, MASK_FILE, MARK, *table["copies"]}
        names |= {file["name"] for file in table["experts"]["files"]}
        if table["format"] != "emoe" or out.is_symlink():
            why = "is no bundle"
        elif others := sorted(set(os.listdir(out)) - names):
            why = f"has {others[0]}, which is no part of a bundle"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        why = "is no bundle"
    if why:
        raise FileExistsError(f"{out}: {why}, so it is not replaced; move it away or choose another name")


def check_name(out: Path) -> None:
    """Raise ValueError unless `out` can be the name of a new directory."""
    if out.name in ("", "..") or str(out).endswith(os.sep):
        raise ValueError(f"{out}: is a directory that is there; name the bundle to write, as {out / 'NAME.emoe'}")
