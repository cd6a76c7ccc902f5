"""Assigning calls to the engine's sequences, by what each sequence has in its KV cache already."""

import threading
from dataclasses import dataclass, field

from .pruning import OFF, PruneRule


@dataclass
class Sequence:
    number: int  # in the engine
    tokens: list[int] = field(default_factory=list)  # the tokens in its KV cache
    rule: PruneRule = OFF  # by which they were computed
    call: object | None = None  # the call that continues them
    used: int = 0  # logical time when a call last took it
    stops: list[int] = field(default_factory=list)  # lengths at which a snapshot of its state is kept, in order
    saved: list[int] = field(default_factory=list)  # the tokens that were last written to a file, or read from one

    def until_stop(self, tokens: list[int]) -> list[int]:
        """The first tokens, up to the next stop."""
        while self.stops and self.stops[0] <= len(self.tokens):
            del self.stops[0]
        return tokens[: self.stops[0] - len(self.tokens)] if self.stops else tokens

    def shares(self, ids: list[int], rule: PruneRule) -> int:
        """The length of the prefix of ids that is in the KV cache, computed by the same rule.

        It is 0 for a rule that protects tokens, as the choice of these depends on the whole prompt.
        """
        if rule != self.rule or rule.protect:
            return 0
        shared = 0
        while shared < min(len(self.tokens), len(ids)) and self.tokens[shared] == ids[shared]:
            shared += 1
        return shared


class Sequences:
    """All sequences of an engine. A call has at most one, and keeps it until it leaves or another call needs it."""

    def __init__(self, count: int) -> None:
        self.all = [Sequence(number) for number in range(count)]
        self._lock = threading.Lock()  # leave() may be called from any thread
        self._taken = 0

    def of(self, call: object) -> Sequence | None:
        return next((one for one in self.all if one.call is call), None)

    def take(self, call: object, shared: list[int]) -> Sequence:
        """Return the sequence that the call has, or assign one to it.

        shared: for each sequence, the length of the prefix of the call's tokens that it holds. Takes the sequence
        without a call that holds most, or the least recently used of these; if every sequence has a call, the least
        recently used one, whose call must then start over.
        """
        with self._lock:
            found = self.of(call)
            if found is None and (free := [one for one in self.all if one.call is None]):
                found = max(free, key=lambda one: (shared[one.number], -one.used))
            elif found is None:
                found = min(self.all, key=lambda one: one.used)
            self._taken += 1
            found.call, found.used = call, self._taken
            return found

    def leave(self, call: object) -> None:
        """End a call; its sequence keeps its tokens for the next call."""
        with self._lock:
            if (found := self.of(call)) is not None:
                found.call = None
