"""The text of an answer as its tokens come, up to a stop string."""

from array import array
from collections.abc import Sequence

from .tokenizer import Detokenizer, Tokenizer


class AnswerText:
    """Text out of tokens, held back while it could be the beginning of a stop string.

    A stop string that is a special token, which has no text, ends the answer at that token: see `stop_tokens`.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]):
        self.detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self.stop_tokens = {token for stop in stops if (token := tokenizer.special_token(stop)) is not None}
        self.stops = [_Stop(stop) for stop in stops if stop]
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that may be shown once this token is there; sets `stopped` where a stop string is complete."""
        return "" if self.detokenizer is None else self._release(self.detokenizer.add(token))

    def finish(self) -> str:
        """The text that was held back."""
        if self.stopped or self.detokenizer is None:
            return ""
        released = self._release(self.detokenizer.finish())
        return released if self.stopped else released + self.held

    def _release(self, text: str) -> str:
        self.held += text
        begins = [begin for stop in self.stops if (begin := stop.read(text, len(self.held))) is not None]
        if begins:
            self.stopped = True
            return self.held[: min(begins)]
        keep = max((stop.matched for stop in self.stops), default=0)
        released, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return released


class _Stop:
    """How much of a stop string the text ends with (Knuth, Morris and Pratt 1977): a step or two a character.

    The table of borders is made as far as text has matched, so a long stop string costs no more than it is met.
    """

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0
        self.borders = array("q", [0])  # of the first 1, 2, ... characters: the longest end that is also a beginning

    def read(self, text: str, held: int) -> int | None:
        """Go on by a text; where the stop string begins among the `held` characters that end with it, if it does."""
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
