"""What compressing may overwrite and remove beside OUT: what it made itself, never through a link.

OUT.work and OUT.partial have names that a user may have given to something else. A directory is ours once it holds
MARK, which is its first file; one that is empty is taken, any other is refused. A bundle is replaced only where it is a
bundle and nothing else.
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
    """Make a directory of ours, or find it. Raises FileExistsError where something else has its name."""
    check(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark(directory)


def mark(directory: Path) -> None:
    with named(directory / MARK):
        handle = os.open(directory / MARK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(handle, "wb") as file:
            file.write(CONTENT)


def check(directory: Path) -> None:
    """Raise FileExistsError where a directory is there that is not ours."""
    if (directory.exists() or directory.is_symlink()) and not is_own(directory):
        raise FileExistsError(
            f"{directory}: is there, and edge-moe did not make it; move it away or choose another name for the bundle"
        )


def is_own(directory: Path) -> bool:
    """Whether a directory is there that is ours, or empty."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    names = os.listdir(directory)
    file = directory / MARK
    if MARK not in names or not stat.S_ISREG(file.lstat().st_mode):
        return not names
    content = file.read_bytes()[: len(CONTENT) + 1]
    return content == CONTENT or (CONTENT.startswith(content) and names == [MARK])  # killed while it was made


def discard(directory: Path) -> None:
    """Remove a directory of ours, where it is there. Raises FileExistsError where it is not ours."""
    check(directory)
    if directory.is_dir():
        shutil.rmtree(directory, ignore_errors=True)


def unmark(directory: Path) -> None:
    with suppress(FileNotFoundError):
        (directory / MARK).unlink()


def check_bundle(out: Path) -> None:
    """Raise FileExistsError where `out` is not a bundle, or has other files: what is not ours is not replaced."""
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
    """Raise ValueError where `out` names no new directory."""
    if out.name in ("", "..") or str(out).endswith(os.sep):
        raise ValueError(f"{out}: is a directory that is there; name the bundle to write, as {out / 'NAME.emoe'}")
