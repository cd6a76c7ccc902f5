"""The progress of a run, kept on disk beside its output, so that a killed run can be resumed.

OUT.work/ holds identity.json (what the result depends on), a file for each finished step, and the state that the next
step needs. A step is finished once its file has its final name: before, its state is written under a temporary name and
synced to disk. A step's file has the checksums of large state, which a resumed run compares.
Scratch files are in OUT.work/scratch/ and mean nothing to another run.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np

from ..files import named, write_whole
from . import own

IDENTITY, LOCK = "identity.json", "lock"
CHOICE, FINISHED, TABLES = "choice.json", "finished.json", "tables.json"


class Journal:
    """The work directory of one output; a context manager that holds its lock.

    Resumes an unfinished run of the same identity. Raises FileExistsError if there is one and `resume` is off, or if
    OUT.work was not made by a run; ValueError if the unfinished run has another identity (checkpoint, version or
    options), unless `force` starts anew; BlockingIOError while it is still running.
    """

    def __init__(self, out: Path, identity: dict, resume: bool = True, force: bool = False):
        self.directory = work_of(out)
        self._lock = self._locked(out)
        try:
            self.resumed = (self.directory / IDENTITY).is_file()
            if self.resumed and not resume and not force:
                raise FileExistsError(
                    f"{self.directory}: an unfinished run is there; --resume goes on with it, removing it starts anew"
                )
            if self.resumed and (other := self._differs(identity)):
                if not force:
                    raise ValueError(
                        f"{self.directory}: belongs to another run ({other}); "
                        "give the same options, or remove it to start anew"
                    )
                self.resumed = False
            if not self.resumed:
                own.discard(partial_of(out))  # nothing that it holds is known to be of this run
                self._clear()
                self.write(IDENTITY, identity)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
        except BaseException:
            self._lock.close()
            raise

    @classmethod
    def has_finished(cls, out: Path, identity: dict, checksum: str | None) -> bool:
        """Whether OUT, with this checksum, is of a run of this identity that was killed before it cleaned up."""
        journal = cls.__new__(cls)
        journal.directory = work_of(out)
        if checksum is None or not own.is_own(journal.directory) or not journal.has(FINISHED):
            return False
        return journal.read(FINISHED) == checksum and not journal._differs(identity)

    def _locked(self, out: Path):
        """Open and lock the directory's lock file, which another run may remove between the two as it ends."""
        while True:
            own.make(self.directory)
            with named(self.directory / LOCK):
                handle = os.open(self.directory / LOCK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            lock = open(handle, "w")  # noqa: SIM115 (closed by __exit__)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise BlockingIOError(f"{out}: another process is writing it; wait for it or end it") from None
            try:
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self.directory / LOCK)):
                    return lock
            except FileNotFoundError:
                pass
            lock.close()

    def _clear(self) -> None:
        """Remove the files of a run that was killed before it wrote its identity."""
        for left in self.directory.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name not in (LOCK, own.MARK):
                left.unlink()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self._lock.close()

    @property
    def scratch(self) -> Path:
        return self.directory / "scratch"

    def path(self, name: str) -> Path:
        return self.directory / name

    def has(self, name: str) -> bool:
        return self.path(name).is_file()

    def started(self) -> bool:
        """Whether any step is finished."""
        others = (IDENTITY, LOCK, own.MARK, CHOICE, "scratch")
        return any(file.name not in others for file in self.directory.iterdir())

    def write(self, name: str, value) -> None:
        """Write a step's file atomically."""
        write_whole(self.path(name), lambda file: file.write(json.dumps(value, indent=1).encode()))

    def read(self, name: str):
        """Read what write() wrote. Raises ValueError if it is not JSON."""
        try:
            return json.loads(self.path(name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise ValueError(f"{self.path(name)}: is damaged; remove {self.directory} to start anew") from None

    def arrays(self, name: str, compute) -> dict[str, np.ndarray]:
        """The arrays of a step: those of an earlier run, or else compute()'s, after writing them to disk."""
        file = self.path(name)
        if not file.is_file():
            found = compute()
            write_whole(file, lambda handle: np.savez(handle, **found))
        with np.load(file, allow_pickle=False) as saved:
            return {key: saved[key] for key in saved.files}

    def forget(self, pattern: str) -> None:
        """Remove state that later steps do not need."""
        for file in self.directory.glob(pattern):
            file.unlink()

    def remove(self) -> None:
        own.discard(self.directory)

    def _differs(self, identity: dict) -> str:
        """Describe how an unfinished run's identity differs from this run's; empty if it does not."""
        try:
            before = self.read(IDENTITY)
        except ValueError:
            before = {}
        before = before if isinstance(before, dict) else {}
        identity = json.loads(json.dumps(identity))
        other = sorted(key for key in identity.keys() | before.keys() if identity.get(key) != before.get(key))
        return "; ".join(f"{key} was {before.get(key)!r}, is {identity.get(key)!r}" for key in other[:3])


def work_of(out: Path) -> Path:
    return out.with_name(out.name + ".work")


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")
