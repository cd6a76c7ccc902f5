"""What a run has done so far, on disk beside its output, so that a killed one can go on where it was.

OUT.work/ holds identity.json (what the result depends on), a file for each finished step, and the state that the next
step needs. A step counts once its file has its name: state is written first, under a temporary name, and brought to
disk. Scratch files are in OUT.work/scratch/ and mean nothing to another run.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np

from edge_moe.compressor.files import write_whole

IDENTITY, LOCK = "identity.json", "lock"


class Journal:
    """The work directory of one output; a context manager that holds its lock.

    Raises FileExistsError when an unfinished run is there and `resume` is off, ValueError when it was another one (of
    another checkpoint, version or option), BlockingIOError while it still runs.
    """

    def __init__(self, out: Path, identity: dict, resume: bool):
        self.directory = out.with_name(out.name + ".work")
        self._lock = self._locked(out)
        try:
            self.resumed = (self.directory / IDENTITY).is_file()
            if not self.resumed:
                self._clear()
                self.write(IDENTITY, identity)
            elif resume:
                self._compare(identity)
            else:
                raise FileExistsError(
                    f"{self.directory}: an unfinished run is there; --resume goes on with it, removing it starts anew"
                )
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
        except BaseException:
            self._lock.close()
            raise

    def _locked(self, out: Path):
        """The directory's lock file, held. Another run's end may remove it between opening and locking it."""
        while True:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = open(self.directory / LOCK, "w")  # noqa: SIM115 (closed by __exit__)
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
        """Remove what a run left that did not come as far as its identity."""
        for left in self.directory.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != LOCK:
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
        """Whether any step is done."""
        return any(file.name not in (IDENTITY, LOCK, "scratch") for file in self.directory.iterdir())

    def write(self, name: str, value) -> None:
        """Write a step's file: whole or not at all."""
        write_whole(self.path(name), lambda file: file.write(json.dumps(value, indent=1).encode()))

    def read(self, name: str):
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def arrays(self, name: str, compute) -> dict[str, np.ndarray]:
        """The arrays of a step: compute()'s, once they are on disk, or those that a run before this one left."""
        file = self.path(name)
        if not file.is_file():
            found = compute()
            write_whole(file, lambda handle: np.savez(handle, **found))
        with np.load(file, allow_pickle=False) as saved:
            return {key: saved[key] for key in saved.files}

    def forget(self, pattern: str) -> None:
        """Remove state that no later step needs."""
        for file in self.directory.glob(pattern):
            file.unlink()

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _compare(self, identity: dict) -> None:
        try:
            before = self.read(IDENTITY)
        except ValueError:
            before = {}
        before = before if isinstance(before, dict) else {}
        identity = json.loads(json.dumps(identity))
        other = sorted(key for key in identity.keys() | before.keys() if identity.get(key) != before.get(key))
        if other:
            shown = "; ".join(f"{key} was {before.get(key)!r}, is {identity.get(key)!r}" for key in other[:3])
            raise ValueError(
                f"{self.directory}: belongs to another run ({shown}); give the same options, or remove it to start anew"
            )
