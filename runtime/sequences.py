"""Which sequence of the engine a call computes in, and what each of them has in its KV cache already."""

import threading
from dataclasses import dataclass, field

from .pruning import OFF, PruneRule


@dataclass
class Sequence:
    number: int  # in the engine
    tokens: list[int] = field(default_factory=list)  # whose keys and values its KV cache holds
    rule: PruneRule = OFF  # how they were computed
    call: object | None = None  # that goes on from there
    used: int = 0  # a number that grows: when a call took it last

    def shares(self, ids: list[int], rule: PruneRule) -> int:
        """How many of the first tokens it holds as this rule computes them.

        None under a rule that protects tokens: which these are depends on the whole prompt.
        """
        if rule != self.rule or rule.protect:
            return 0
        shared = 0
        while shared < min(len(self.tokens), len(ids)) and self.tokens[shared] == ids[shared]:
            shared += 1
        return shared


class Sequences:
    """All of an engine's. A call has at most one, and keeps it until it leaves or another call needs it."""

    def __init__(self, count: int) -> None:
        self.all = [Sequence(number) for number in range(count)]
        self._lock = threading.Lock()  # leave() comes from any thread
        self._taken = 0

    def of(self, call: object) -> Sequence | None:
        return next((one for one in self.all if one.call is call), None)

    def take(self, call: object, shared: list[int]) -> Sequence:
        """The sequence that the call has; else one for it, which is its own from now on.

        shared: how much of the call's tokens each holds already. Of those that no call has, the one that holds most, or
        the one used least recently; where each has a call, the one used least recently. Its call has to begin anew
        then.
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
        """The call has had its last step; what its sequence holds is there for the next."""
        with self._lock:
            if (found := self.of(call)) is not None:
                found.call = None
