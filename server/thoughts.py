"""Splitting an answer's text, as it comes, into its thought and the rest: as runtime/channels.py does a whole text."""

from ..runtime.channels import THINKING, THOUGHT


def begins(text: str, mark: str) -> int:
    """The length of the longest end of the text that a mark begins with, but not all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


class ThoughtSplit:
    """Gives ("thought", text) and ("text", text) for the texts that are added; holds back what may be part of a tag.

    opened: the tag that the prompt ends with, as opened_thought() gives it. begins_call: a text that a thought without
    an end is followed by, which then belongs to the rest.
    """

    def __init__(self, opened: str = "", begins_call: str = "") -> None:
        self.held, self.begins_call = "", begins_call
        self.state = "begin"  # then "thought begins", "thought", "rest begins", "rest"
        self.add(opened)

    @property
    def thinking(self) -> bool:
        return self.state.startswith("thought")

    @property
    def answering(self) -> bool:
        return self.state == "rest"

    def add(self, text: str) -> list[tuple[str, str]]:
        self.held += text
        found: list[tuple[str, str]] = []
        while True:
            state = self.state
            released = self._step()
            if released:
                found.append(("thought" if state.startswith("thought") else "text", released))
            if self.state == state:
                return found

    def finish(self) -> list[tuple[str, str]]:
        """What was held back."""
        held, self.held = self.held, ""
        if self.thinking:
            held = held.strip("\n") if self.state == "thought begins" else held.rstrip("\n")
        elif self.state == "rest begins":
            held = ""
        return [("thought" if self.thinking else "text", held)] if held else []

    def _step(self) -> str:
        """Release text that is complete, and go on to the next state where its tag is."""
        if self.state == "begin":
            begun = self.held.lstrip()
            if begun.startswith(THINKING):
                self.held, self.state = begun.removeprefix(THINKING), "thought begins"
            elif not THINKING.startswith(begun):
                self.state = "rest"
            return ""
        if self.state == "thought begins":
            self.held = self.held.lstrip("\n")
            if self.held:
                self.state = "thought"
            return ""
        if self.state == "thought":
            ends = [at for mark in (THOUGHT, self.begins_call) if mark and (at := self.held.find(mark)) >= 0]
            if ends:
                thought, rest = self.held[: min(ends)], self.held[min(ends) :]
                self.held, self.state = rest.removeprefix(THOUGHT), "rest begins"
                return thought.rstrip("\n")
            kept = max(begins(self.held, mark) for mark in (THOUGHT, self.begins_call))
            kept = len(self.held) - len(self.held[: len(self.held) - kept].rstrip("\n"))
            released, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
            return released
        if self.state == "rest begins":
            self.held = self.held.lstrip()
            if self.held:
                self.state = "rest"
            return ""
        released, self.held = self.held, ""
        return released
