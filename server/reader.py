"""Reading an answer: its pieces of text become events, which are the same however the text is cut.

An event is ("thought", text), ("text", text) or ("call", Call). For a continued text all is text.
"""

from dataclasses import dataclass, field
from typing import Any

from ..runtime.answer import Generation
from .thoughts import ThoughtSplit

Event = tuple[str, Any]


class PlainReader:
    """A text that is continued."""

    reasoning_tokens = 0
    called = False

    def add(self, piece: Generation) -> list[Event]:
        return [("text", piece.text)] if piece.text else []


class MessageReader:
    """The answer to messages: a thought, a text and calls of tools.

    opened: the tag of a thought that the prompt opens. calls: reads calls from the text, where tools were given.
    """

    def __init__(self, opened: str = "", calls=None) -> None:
        self.split = ThoughtSplit(opened, calls.form.section[0] if calls and calls.form.ends_thought else "")
        self.calls = calls
        self.reasoning_tokens, self.called = 0, False

    def add(self, piece: Generation) -> list[Event]:
        thinking, last = self.split.thinking, piece.finish_reason is not None
        found = self.split.add(piece.text) + (self.split.finish() if last else [])
        self.reasoning_tokens += len(piece.tokens) if thinking else 0
        events: list[Event] = []
        for kind, text in found:
            events += [(kind, text)] if kind == "thought" or self.calls is None else self.calls.add(text)
        if last and self.calls is not None:
            events += self.calls.finish()
        self.called = self.called or any(kind == "call" for kind, _ in events)
        return events


@dataclass
class Told:
    """A whole answer, put together from its events."""

    blocks: list[list] = field(default_factory=list)  # [kind, value] of its events, in order, texts joined
    stop: str | None = None  # the stop text that ended it
    begun: bool = False  # whether it has a token
    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    last: Generation | None = None
    called: bool = False
    reasoning_tokens: int = 0

    def add(self, piece: Generation, events: list[Event], reader: PlainReader | MessageReader, keeps: bool) -> None:
        """keeps: also the tokens and their log probabilities."""
        for kind, value in events:
            if kind != "call" and self.blocks and self.blocks[-1][0] == kind:
                self.blocks[-1][1] += value
            else:
                self.blocks.append([kind, value])
        self.begun = self.begun or bool(piece.tokens)
        if keeps:
            self.tokens += piece.tokens
            self.logprobs += piece.logprobs or []
        self.last, self.called, self.reasoning_tokens = piece, reader.called, reader.reasoning_tokens

    def joined(self, kind: str) -> str:
        return "".join(value for its, value in self.blocks if its == kind)

    @property
    def text(self) -> str:
        return self.joined("text")

    @property
    def thought(self) -> str:
        return self.joined("thought")

    @property
    def calls(self) -> list:
        return [value for kind, value in self.blocks if kind == "call"]

    def last_finish(self) -> str | None:
        """Why the answer ended, if it did."""
        return None if self.last is None else self.last.finish_reason
