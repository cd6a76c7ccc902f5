"""Reading calls of tools from an answer's text, as it comes.

A call is given when it is complete; what only looks like one is text, to the last character. White space around calls
is left out. The result does not depend on how the text is cut: every decision is made on a beginning of the text that
does not change any more. call_formats.py has the forms that models write.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from .reader import Event
from .thoughts import begins

Types = dict[str, dict]  # by name of a tool: the JSON schemas of its parameters


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  # a JSON object
    identity: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}", compare=False)


class Unfinished(Exception):
    """A body that goes on after what looked like its end."""


Body = Callable[[str, Types], list[Call]]  # raises ValueError for a malformed one
Take = Callable[[str, Types], tuple[int, list[Call]] | None]  # of text from a call's beginning: length, calls


@dataclass(frozen=True, slots=True)
class Forced:
    """How a call is written that must be one: before its name, behind it, and at the end. Between the last two are the
    arguments as JSON or, with `parameter`, each on its own: before its key, between key and value for a text and for
    JSON, and behind."""

    before: str
    named: str
    after: str
    parameter: tuple[str, str, str, str] | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """How a model writes calls. template: words in the chat templates of such models. begin: of a call. take: reads
    one. section: around all calls. ends_thought: whether a thought may go over into calls without a tag between. marks:
    what may be special tokens, which are then kept in the text. forced: None where an answer cannot be forced to be a
    call."""

    name: str
    template: tuple[str, ...]
    begin: str
    take: Take
    section: tuple[str, str] | None = None
    ends_thought: bool = False
    marks: tuple[str, ...] = ()
    forced: Forced | None = None


class CallReader:
    """Gives ("text", text) and ("call", Call). tools: as the chat template gets them."""

    def __init__(self, form: Format, tools: list[dict]) -> None:
        self.form = form
        self.types: Types = {
            tool["function"]["name"]: (tool["function"].get("parameters") or {}).get("properties") or {}
            for tool in tools
        }
        self.held = ""
        self.pending: str | None = None  # what was read of a section, to be shown if no call follows; None outside
        self.called = False  # whether this section has a call
        self.skips_space = False  # after a call

    def add(self, text: str) -> list[Event]:
        self.held += text
        return self._events(last=False)

    def finish(self) -> list[Event]:
        return self._events(last=True)

    def _events(self, last: bool) -> list[Event]:
        events: list[Event] = []
        while True:
            more = self._outside(events, last) if self.pending is None else self._inside(events, last)
            if not more:
                return events

    def _outside(self, events: list[Event], last: bool) -> bool:
        """Show text up to the next call; returns whether there is one."""
        section, held = self.form.section, self.held
        opener = section[0] if section else self.form.begin
        at = held.find(opener)
        end = at if at >= 0 else len(held) - begins(held, opener)
        shown = held if last and at < 0 else held[:end].rstrip()
        self._show(events, shown)
        self.held = held[len(shown) :]
        if at < 0:
            return False
        begun = at + (len(opener) if section else 0)
        self.pending, self.held, self.called = held[len(shown) : begun], held[begun:], False
        return True

    def _inside(self, events: list[Event], last: bool) -> bool:
        """Read a call, or the end of the section; returns whether to go on."""
        form, rest = self.form, self.held.lstrip()
        before = (self.pending or "") + self.held[: len(self.held) - len(rest)]
        if form.section and rest.startswith(form.section[1]):
            self._leave(events, "" if self.called else before + form.section[1], rest[len(form.section[1]) :])
            return True
        if rest.startswith(form.begin):
            taken = form.take(rest, self.types)
            if taken is not None:
                length, calls = taken
                again = rest.find(form.begin, len(form.begin), length)
                length = again if again > 0 and not calls else length
                self.called = self.called or bool(calls)
                events += [("call", call) for call in calls]
                self.skips_space = self.skips_space or bool(calls)
                self._leave(
                    events, "" if calls else before + rest[:length], rest[length:], stay=form.section is not None
                )
                return True
            if last:
                self._leave(events, before + rest, "")
            return False
        marks = (form.begin, *(form.section or ())[1:])
        if not last and any(mark.startswith(rest) for mark in marks):
            return False
        self._leave(events, "" if self.called and not rest else before, rest)
        return bool(rest) or last

    def _leave(self, events: list[Event], shown: str, rest: str, stay: bool = False) -> None:
        """Show text, and go on with the rest; stay: in the section."""
        self._show(events, shown)
        self.held, self.pending = rest, "" if stay else None

    def _show(self, events: list[Event], text: str) -> None:
        if self.skips_space:
            text = text.lstrip()
            self.skips_space = not text
        if text:
            events.append(("text", text))
