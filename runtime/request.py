"""One answer while it is computed: its prompt, what has been generated, and a piece of text for each token."""

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from .answer import Account, Generation
from .answer_text import AnswerText
from .pruning import PruneRule
from .sampling import Sampler
from .turns import Wanted

AHEAD = 4  # threads that ask for a piece each find it there, and little is lost where nobody does


@dataclass(eq=False)
class Request:
    ids: list[int]  # the prompt
    max_tokens: int
    context: int
    sampler: Sampler
    text: AnswerText
    end_tokens: Collection[int | None]
    rule: PruneRule
    wanted: Wanted  # which also stands for the call, in turns and sequences
    account: Account
    progress: Callable[[str, int, int], None] | None = None
    ahead: int = AHEAD  # pieces that may be computed before they are asked for, in a step that others need
    tokens: list[int] = field(default_factory=list)  # of the answer
    pieces: deque[Generation | BaseException] = field(default_factory=deque)  # computed and not asked for yet
    asked: float = 0.0  # when a piece was asked for last, of time.monotonic()

    @property
    def whole(self) -> list[int]:
        return self.ids + self.tokens

    def take(self, logits: np.ndarray) -> Generation:
        """Choose the next token by the logits (vocab,) after the last one: a piece, the last where it has a
        finish_reason."""
        token = self.sampler(logits)
        self.tokens.append(token)
        self.account.count = len(self.tokens)
        if token in self.end_tokens or token in self.text.stop_tokens:
            return self.account.piece(self.text.finish(), [token], "stop")
        piece = self.text.add(token)
        full = len(self.ids) + len(self.tokens) > self.context
        if self.text.stopped or full or len(self.tokens) == self.max_tokens:
            reason = "stop" if self.text.stopped else "length"
            return self.account.piece(piece + self.text.finish(), [token], reason)
        return self.account.piece(piece, [token], None)

    def cancelled(self) -> Generation:
        return self.account.piece(self.text.finish(), [], "cancelled")
