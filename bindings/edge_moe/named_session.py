"""A chat with a name, which survives the process: its turns, and what was computed of them."""

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from .conversation import Conversation, Turn
from .report import size
from .runtime.files import parse_json, read_bounded
from .runtime.runtime import Runtime
from .user_files import state_directory

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_BYTES = 64_000_000  # of the turns
COMPUTED_BYTES = 10_000_000_000  # of what was computed, at the most
TURNS = "chat.json"


class NamedSession:
    """The files of one chat.

    name: letters, digits, dots, dashes and underscores. Raises ValueError for another name, and for a file that is not
    one of a chat; OSError if the directory cannot be made.
    """

    def __init__(self, name: str, directory: Path | None = None):
        if not NAME.fullmatch(name):
            raise ValueError(
                f"--session is {name!r}, expected a name of up to 64 letters, digits, dots, dashes and underscores"
            )
        self.directory = (directory or state_directory() / "sessions") / name
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def resume(self, runtime: Runtime, conversation: Conversation) -> str:
        """Put the turns of before into the conversation, and return what to say of that. The system prompt of before
        holds if there is none now."""
        with suppress(ValueError):  # of a device that cannot: the prompt is computed again
            runtime.keep_sessions(self.directory, COMPUTED_BYTES)
        file = self.directory / TURNS
        if not file.exists():
            return f"a new session, kept in {self.directory}"
        found = parse_json(file, read_bounded(file, MOST_BYTES, _remedy(file)), _remedy(file))
        try:
            turns = [Turn(str(t["message"]), str(t["answer"]), list(map(int, t["tokens"])), bool(t["complete"]))
                     for t in found["turns"]]  # fmt: skip
            system = found["system"]
            if not isinstance(system, str | None):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{file}: is not a chat; {_remedy(file)}") from None
        conversation.turns = turns
        if conversation.system is None and conversation.templated:
            conversation.system = system
        computed = sum(path.stat().st_size for path in self.directory.glob("*.emoe-session"))
        return f"goes on from {len(turns):,} message{'s' * (len(turns) != 1)} of before" + (
            f", {size(computed)} of them computed" if computed else ""
        )

    def keep(self, conversation: Conversation) -> None:
        """Write the turns, as a whole or not at all. Raises OSError."""
        found = {"system": conversation.system, "turns": [asdict(turn) for turn in conversation.turns]}
        unfinished = self.directory / f".{TURNS}.{os.getpid()}"
        try:
            with open(unfinished, "w", encoding="utf-8", errors="replace") as file:
                json.dump(found, file, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.directory / TURNS)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def _remedy(file: Path) -> str:
    return f"choose another name, or remove {file.parent}"
