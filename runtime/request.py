"""The request for one answer: its options, and its tokens and pieces of text while it is computed."""

import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, TypedDict

import numpy as np

from .answer import Account, Generation
from .answer_text import AnswerText
from .prompt_scores import PromptScores
from .pruning import PruneRule
from .sampling import LogitsProcessor, Sampler, TokenLogprobs, processed, whole_number
from .turns import Wanted

MOST_LOGPROBS = 1000  # maximum of top_logprobs
AHEAD = 4  # pieces computed ahead: threads that ask find one ready, and little is lost if nobody asks


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
    """The options of the chat template."""

    tools: Sequence[dict] | None
    documents: Sequence[dict] | None
    continue_final_message: bool | str
    chat_template_kwargs: Mapping[str, object] | None


class Choosing(TypedDict, total=False):
    """The options of choosing a token that are not the sampler's."""

    logits_processors: Sequence[LogitsProcessor] | None
    logprobs: bool
    top_logprobs: int


class Options(Sampling, Choosing, Templating, total=False):
    """The options of an answer in addition to its prompt and max_tokens; Runtime.generate() documents them."""

    stop: str | Sequence[str] | None
    prune: float | str | None
    timeout: float | None
    stop_event: threading.Event | None
    progress: Callable[[str, int, int], None] | None


def options_of(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of one kind."""
    return {name: options[name] for name in kind.__annotations__ if name in options}


def check_options(options: Mapping[str, object]) -> None:
    """Raise TypeError for an unknown option."""
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


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses a token: applies the logits processors, then the sampler.

    top_logprobs: the number of likeliest tokens whose log probabilities are returned beside the chosen token's; None
    returns none at all.
    """

    sampler: Sampler
    processors: tuple[LogitsProcessor, ...] = ()
    top_logprobs: int | None = None

    @classmethod
    def of(cls, sampler: Sampler, options: Mapping[str, Any]) -> "Chooser":
        """Make it from options. Raises TypeError and ValueError, naming the option, for invalid values."""
        processors = options.get("logits_processors") or ()
        if not isinstance(processors, Sequence) or not all(callable(one) for one in processors):
            raise TypeError(f"logits_processors is {processors!r:.60}, expected a list of functions (tokens, logits)")
        logprobs, count = options.get("logprobs", False), whole_number("top_logprobs", options.get("top_logprobs", 0))
        if not isinstance(logprobs, bool):
            raise TypeError(f"logprobs is {logprobs!r}, expected True or False; top_logprobs sets the number of tokens")
        if not 0 <= count <= MOST_LOGPROBS:
            raise ValueError(f"top_logprobs is {count}, expected 0 to {MOST_LOGPROBS}")
        return cls(sampler, tuple(processors), count if logprobs or count else None)

    def __call__(self, tokens: list[int], logits: np.ndarray) -> tuple[int, TokenLogprobs | None]:
        """The next token after `tokens` by its logits (vocab,)."""
        logits = processed(self.processors, tokens, logits) if self.processors else logits
        if self.top_logprobs is None:
            return self.sampler(logits), None
        return self.sampler.with_logprobs(logits, self.top_logprobs)


@dataclass(eq=False)
class Request:
    ids: list[int]  # the prompt
    max_tokens: int  # 0: only the prompt is computed, for its scores
    context: int
    choose: Chooser
    text: AnswerText
    end_tokens: Collection[int | None]
    rule: PruneRule
    wanted: Wanted  # also identifies the call in turns and sequences
    account: Account
    progress: Callable[[str, int, int], None] | None = None
    ahead: int = AHEAD  # pieces that may be computed before they are asked for, in steps for other requests
    tokens: list[int] = field(default_factory=list)  # of the answer
    pieces: deque[Generation | BaseException] = field(default_factory=deque)  # computed but not asked for yet
    scores: PromptScores | None = None  # of the prompt's tokens, where they are wanted
    asked: float = 0.0  # when a piece was last asked for, by time.monotonic()

    @property
    def whole(self) -> list[int]:
        return self.ids + self.tokens

    def take(self, logits: np.ndarray) -> Generation:
        """Choose the next token from the logits (vocab,) after the last one; returns a piece, which has a finish_reason
        if it is the last."""
        token, logprobs = self.choose(self.whole, logits)
        self.tokens.append(token)
        self.account.count = len(self.tokens)
        piece = self._piece_of(token)
        return piece if logprobs is None else replace(piece, logprobs=[logprobs])

    def _piece_of(self, token: int) -> Generation:
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
