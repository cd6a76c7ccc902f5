"""One answer: what it is asked with, and while it is computed its tokens and a piece of text for each."""

import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypedDict

import numpy as np

from .answer import Account, Generation
from .answer_text import AnswerText
from .pruning import PruneRule
from .sampling import Sampler
from .turns import Wanted

AHEAD = 4  # threads that ask for a piece each find it there, and little is lost where nobody does


class Sampling(TypedDict, total=False):
    """Sampler's options."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None


class Templating(TypedDict, total=False):
    """The chat template's options."""

    tools: Sequence[dict] | None
    documents: Sequence[dict] | None
    continue_final_message: bool | str
    chat_template_kwargs: Mapping[str, object] | None


class Options(Sampling, Templating, total=False):
    """What an answer is asked with beside its prompt and max_tokens; Runtime.generate() says what each means."""

    stop: str | Sequence[str] | None
    prune: float | str | None
    timeout: float | None
    stop_event: threading.Event | None
    progress: Callable[[str, int, int], None] | None


def options_of(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of one kind."""
    return {name: options[name] for name in kind.__annotations__ if name in options}


def check_options(options: Mapping[str, object]) -> None:
    """Raise TypeError for an option that there is none of."""
    for name in options:
        if name not in Options.__annotations__:
            near = get_close_matches(name, Options.__annotations__, 1)
            hint = f"did you mean {near[0]!r}?" if near else "help(Runtime.generate) names them"
            raise TypeError(f"there is no option {name!r}; {hint}")


def stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if not all(isinstance(one, str) for one in stops):
        raise TypeError(f"stop is {stop!r:.60}, expected a text or a list of texts")
    return stops


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
