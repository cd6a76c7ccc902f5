"""The turns of a chat, and the prompt that they make with the next message."""

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from .runtime.channels import MISTRAL, brackets_of, has_channels, split_thought
from .runtime.tokenizer import Tokenizer


class Thoughts(Enum):
    """How a chat template gets the thoughts of former answers. Most templates leave them out of the prompt."""

    IN_TEXT = "between tags in the text, as the model wrote them"
    APART = "in a field of their own"
    AS_PARTS = "as parts of the content, which is then a list"
    LEFT_OUT = "not at all"


def thoughts_in_prompts(tokenizer: Tokenizer) -> Thoughts:
    """As parts where Mistral's template takes them, or in a field where the template reads it; otherwise in the text,
    unless the model writes them in another form."""
    keys = tokenizer.template_keys()
    if brackets_of(tokenizer) is MISTRAL and "thinking" in keys and "reasoning_content" not in keys:
        return Thoughts.AS_PARTS
    if tokenizer.reads_reasoning():
        return Thoughts.APART
    return Thoughts.LEFT_OUT if has_channels(tokenizer) else Thoughts.IN_TEXT


@dataclass(slots=True)
class Turn:
    """A message and its answer."""

    message: str
    answer: str
    tokens: list[int]  # of the answer
    complete: bool  # the model ended it

    def messages(self, thoughts: Thoughts = Thoughts.IN_TEXT) -> list[dict]:
        answer = {"role": "assistant", "content": self.answer}
        if thoughts is not Thoughts.IN_TEXT:
            thought, answer["content"] = split_thought(self.answer)
            if thought and thoughts is Thoughts.APART:
                answer["reasoning_content"] = thought
            elif thought and thoughts is Thoughts.AS_PARTS:
                rest = [{"type": "text", "text": answer["content"]}] if answer["content"] else []
                answer["content"] = [{"type": "thinking", "thinking": thought}, *rest]
        return [{"role": "user", "content": self.message}, answer]


@dataclass(slots=True)
class Conversation:
    """Turns in order: messages if the model has a chat template, else one continuous text."""

    templated: bool
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    thoughts: Thoughts = Thoughts.IN_TEXT

    def prompt(self, message: str, dropped: int = 0) -> list[dict] | str:
        """The prompt for `message`, without the oldest `dropped` turns."""
        turns = self.turns[dropped:]
        if not self.templated:
            return "\n".join([*(turn.message + turn.answer for turn in turns), message])
        begin = [] if self.system is None else [{"role": "system", "content": self.system}]
        said = [one for turn in turns for one in turn.messages(self.thoughts)]
        return [*begin, *said, {"role": "user", "content": message}]

    def save(self, path: Path) -> None:
        """Write the conversation as JSON messages if the file's name ends in .json, else as text.

        Raises FileExistsError for a file that exists, and other OSErrors.
        """
        messages = [one for turn in self.turns for one in turn.messages()]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        if path.suffix == ".json":
            text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n\n".join(f"{one['role']}: {one['content'].strip()}" for one in messages) + "\n"
        with path.open("x", encoding="utf-8", errors="replace") as file:
            file.write(text)
