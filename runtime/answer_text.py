"""Converting the tokens of an answer to text as they come, up to a stop string."""

from array import array
from collections.abc import Sequence

from .channels import detokenizer_of
from .tokenizer import Tokenizer


class AnswerText:
    """Converts tokens to text, and holds text back while it could be the beginning of a stop string.

    A stop string that is a special token, which has no text, ends the answer at that token: see `stop_tokens`.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], marks: Sequence[str] = ()):
        """marks: special tokens of calls of tools that are wanted as text."""
        self.detokenizer = detokenizer_of(tokenizer, marks) if tokenizer else None
        self.stop_tokens = {token for stop in stops if (token := tokenizer.special_token(stop)) is not None}
        self.stops = [_Stop(stop) for stop in stops if stop]
        self.held = ""
        self.stop: str | None = None  # the stop string that ended the answer

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    def add(self, token: int) -> str:
        """Add a token and return the text that can be shown; sets `stop` if a stop string is complete."""
        return "" if self.detokenizer is None else self._release(self.detokenizer.add(token))

    def finish(self) -> str:
        """The text that was held back."""
        if self.stopped or self.detokenizer is None:
            return ""
        released = self._release(self.detokenizer.finish())
        return released if self.stopped else released + self.held

    def _release(self, text: str) -> str:
        self.held += text
        begins = [(begin, stop.stop) for stop in self.stops if (begin := stop.read(text, len(self.held))) is not None]
        if begins:
            begin, self.stop = min(begins)
            return self.held[:begin]
        keep = max((stop.matched for stop in self.stops), default=0)
        released, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return released


class _Stop:
    """Matches a stop string incrementally (Knuth, Morris and Pratt 1977), in one or two steps a character.

    The table of borders is computed only as far as text has matched, so a long stop string costs little.
    """

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0
        self.borders = array("q", [0])  # for prefixes of 1, 2, ... characters: longest proper prefix that is a suffix

    def read(self, text: str, held: int) -> int | None:
        """Match on through `text`; returns where a complete stop string begins in the `held` characters that end with
        the text, or None."""
        for at, sign in enumerate(text, start=1):
            self.matched = self._next(self.matched, sign)
            if self.matched == len(self.stop):
                return held - len(text) + at - self.matched
        return None

    def _next(self, matched: int, sign: str) -> int:
        while matched and self.stop[matched] != sign:
            matched = self._border(matched)
        return matched + 1 if self.stop[matched] == sign else 0

    def _border(self, length: int) -> int:
        while len(self.borders) < length:
            self.borders.append(self._next(self.borders[-1], self.stop[len(self.borders)]))
        return self.borders[length - 1]
