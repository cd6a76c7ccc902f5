"""A cap that several processes share: each has its floor, and an equal part of what is left.

The processes of one machine that name the same share write into one file, under a lock: who they are, the least that
each needs, and its cap. Who joins waits until the others have made room, which they do between two steps, within about
a second; who leaves, or has ended without leaving, leaves its part to the others. The caps together never exceed the
total.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .plan_table import size

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LOOK_S = 0.1  # between two looks of a process that waits to join
JOIN_S = 60.0  # that others have to make room
PATIENCE_S = 5.0  # before less than an equal part will do, as others may be slow to make room for all of it


class Member(NamedTuple):
    began: str  # of the process, as a number may be used again
    floor: int
    cap: int


class RamShare:
    """This process's part of a share.

    name: letters, digits, dots, dashes and underscores. total: bytes of all processes; the last one that joins says.
    Raises ValueError for another name, and OSError if the file cannot be written.
    """

    def __init__(self, name: str, total: int, directory: Path):
        if not NAME.fullmatch(name):
            raise ValueError(f"the share is {name!r}, expected up to 64 letters, digits, dots, dashes and underscores")
        self.name, self.total, self._file = name, total, directory / f"{name}.json"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def join(self, floor: int, wait_s: float = JOIN_S, tell: Callable[[str], None] = lambda line: None) -> int:
        """Take part with at least `floor` bytes, wait until there is room, and return the cap.

        Raises MemoryError if the floors of all together are more than the total, or nobody makes room in time."""
        began, told = time.monotonic(), False
        try:
            while True:
                with self._members(self.total) as members:
                    others = {pid: its for pid, its in members.items() if pid != _own()}
                    floors = floor + sum(its.floor for its in others.values())
                    if floors > self.total:
                        raise MemoryError(
                            f"the share {self.name} of {size(self.total)} has no room for {size(floor)}: "
                            f"{len(others)} other processes need {size(floors - floor)} at the least"
                        )
                    members[_own()] = Member(_began(os.getpid()), floor, 0)
                    cap, waited = self._part(members), time.monotonic() - began
                    if cap >= (floor if waited > PATIENCE_S else self._fair(members, floor)):
                        members[_own()] = members[_own()]._replace(cap=cap)
                        return cap
                if waited > wait_s:
                    raise MemoryError(
                        f"the other processes of the share {self.name} have not made room in {wait_s:g} s"
                    )
                if not told:
                    tell(f"waiting for the other processes of the share {self.name} to make room")
                    told = True
                time.sleep(LOOK_S)
        except BaseException:
            self.leave()
            raise

    def look(self, floor: int, cap: int) -> int:
        """The cap that this process, which has `cap`, should have now; call changed() when it has it.

        What it is to have more is its own from now on; what it is to have less, only from changed() on the others'."""
        with self._members() as members:
            members[_own()] = Member(_began(os.getpid()), floor, cap)
            wanted = max(self._part(members), floor)
            members[_own()] = members[_own()]._replace(cap=max(cap, wanted))
            return wanted

    def changed(self, cap: int) -> None:
        """Say that this process has this cap now."""
        with self._members() as members:
            if _own() in members:
                members[_own()] = members[_own()]._replace(cap=cap)

    def leave(self) -> None:
        with self._members() as members:
            members.pop(_own(), None)

    def _fair(self, members: dict[str, Member], floor: int) -> int:
        """This process's floor, and an equal part of what all floors leave of the total."""
        return floor + (self.total - sum(its.floor for its in members.values())) // len(members)

    def _part(self, members: dict[str, Member]) -> int:
        """The fair part, or as much of it as the others' caps leave now."""
        own = members[_own()]
        taken = sum(its.cap for pid, its in members.items() if pid != _own())
        return min(self._fair(members, own.floor), self.total - taken)

    @contextmanager
    def _members(self, total: int | None = None) -> Iterator[dict[str, Member]]:
        """The processes that are there, by number, to be changed; total: a new one."""
        import fcntl

        with open(self._file.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                found = json.loads(self._file.read_text())
                members = {pid: Member(*its) for pid, its in found["members"].items()}
                self.total = int(found["total"]) if total is None else total
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                members = {}  # a new file, or one that is damaged: the others write themselves into it again
            members = {pid: its for pid, its in members.items() if _began(int(pid)) == its.began}
            yield members
            whole = json.dumps({"total": self.total, "members": members})
            unfinished = self._file.with_suffix(f".{os.getpid()}")
            unfinished.write_text(whole)
            os.replace(unfinished, self._file)


def _own() -> str:
    return str(os.getpid())


def _began(pid: int) -> str:
    """When a process began, "" if there is none; where the system does not tell, whether there is one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "there"
