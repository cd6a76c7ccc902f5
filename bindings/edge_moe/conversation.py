"""The turns of a chat, and the prompt that they make with the next message."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from .runtime.channels import without_thoughts


@dataclass(slots=True)
class Turn:
    """A message and its answer."""

    message: str
    answer: str
    tokens: list[int]  # of the answer
    complete: bool  # the model ended it

    @property
    def messages(self) -> list[dict]:
        return [{"role": "user", "content": self.message}, {"role": "assistant", "content": self.answer}]


@dataclass(slots=True)
class Conversation:
    """Turns in order: messages if the model has a chat template, else one continuous text."""

    templated: bool
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    channels: bool = False  # the template takes answers without their thoughts; see runtime/channels.py

    def prompt(self, message: str, dropped: int = 0) -> list[dict] | str:
        """The prompt for `message`, without the oldest `dropped` turns."""
        turns = self.turns[dropped:]
        if not self.templated:
            return "\n".join([*(turn.message + turn.answer for turn in turns), message])
        if self.channels:
            turns = [replace(turn, answer=without_thoughts(turn.answer)) for turn in turns]
        begin = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*begin, *(one for turn in turns for one in turn.messages), {"role": "user", "content": message}]

    def save(self, path: Path) -> None:
        """Write the conversation as JSON messages if the file's name ends in .json, else as text.

        Raises FileExistsError for a file that exists, and other OSErrors.
        """
        messages = [one for turn in self.turns for one in turn.messages]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        if path.suffix == ".json":
            text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n\n".join(f"{one['role']}: {one['content'].strip()}" for one in messages) + "\n"
        with path.open("x", encoding="utf-8", errors="replace") as file:
            file.write(text)
