"""How tokens are chosen: the options of a call, checked, for the core's sampler; what a model's makers advise.

The order is transformers': logit_bias, repetition_penalty, presence and frequency, then temperature, top_k, top_p and
min_p, each of the last three among the tokens that the one before it left.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np

from .. import _core
from .config_file import read_json

LEAST, MOST = 1e-37, 1e37  # a temperature within float32: beyond either, draws are the limit's
ADVICE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # read from generation_config.json


class Sampler:
    """Draws tokens one after the other; with a seed the same draws every time.

    temperature: what logits are divided by; 0 takes the most likely token, ties going to the lower id. top_p keeps the
    smallest set of tokens whose probabilities reach it. top_k keeps so many of the likeliest, 0 keeps all. min_p keeps
    those that have at least that share of the likeliest token's probability. repetition_penalty divides the positive
    logits of tokens in the prompt or the answer so far, and multiplies the negative ones (Keskar et al. 2019, as
    transformers does). presence_penalty is subtracted from the logit of each token of the answer so far, and
    frequency_penalty as often as it is there (as in OpenAI's interface: the prompt does not count). logit_bias: token
    id -> what is added to its logit, -inf to forbid it. prompt: its token ids, for the repetition penalty. vocab: the
    number of logits, where it is known beforehand.

    Raises ValueError for values out of range and TypeError for those that are no numbers.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        prompt: Iterable[int] = (),
        vocab: int | None = None,
    ):
        infinite = float("inf")
        _check("temperature", temperature, 0 <= _real("temperature", temperature) < infinite, "0 or more")
        _check("top_p", top_p, 0 < _real("top_p", top_p) <= 1, "above 0 and at most 1")
        _check("top_k", top_k, whole_number("top_k", top_k) >= 0, "0 or more")
        _check("min_p", min_p, 0 <= _real("min_p", min_p) <= 1, "0 to 1")
        repetition = _real("repetition_penalty", repetition_penalty)
        _check("repetition_penalty", repetition_penalty, 0 < repetition < infinite, "above 0")
        for name, value in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
            _check(name, value, abs(_real(name, value)) < infinite, "a finite number")
        if seed is not None:
            _check("seed", seed, whole_number("seed", seed) >= 0, "0 or more")
        self._core = _core.Sampler(
            temperature=min(max(temperature, LEAST), MOST) if temperature > 0 else 0.0,
            top_p=top_p,
            top_k=min(top_k, 2**31 - 1),
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=_bias(logit_bias, vocab),
            seed=int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]),
            prompt=np.fromiter(prompt if repetition_penalty != 1 else (), np.int32),
        )

    def __call__(self, logits: np.ndarray) -> int:
        """logits: (vocab,) float32 -> a token id, which counts as part of the answer from then on."""
        return self._core(np.ascontiguousarray(logits, np.float32))

    def with_logprobs(self, logits: np.ndarray, count: int) -> tuple[int, "TokenLogprobs"]:
        """The same, and how likely the token and the `count` likeliest tokens were."""
        token, logprob, likeliest = self._core.with_logprobs(np.ascontiguousarray(logits, np.float32), count)
        return token, TokenLogprobs(token, logprob, tuple(likeliest))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token of an answer was: natural logarithms of probabilities, after logits processors, logit_bias and
    penalties, before temperature and what leaves tokens out."""

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]  # of the likeliest tokens, likeliest first: id and logprob


LogitsProcessor = Callable[[Sequence[int], np.ndarray], np.ndarray]


def processed(processors: Sequence[LogitsProcessor], tokens: list[int], logits: np.ndarray) -> np.ndarray:
    """Logits (vocab,) float32 after each of the processors, which gets the tokens so far, the prompt's among them.

    Raises ValueError where one returns something else than as many numbers, or leaves no token possible.
    """
    for processor in processors:
        name = getattr(processor, "__name__", type(processor).__name__)
        found = np.asarray(processor(tokens, logits))
        if found.shape != logits.shape or found.dtype.kind != "f":
            raise ValueError(
                f"logits processor {name} returned {found.dtype} {found.shape}, expected floats {logits.shape}"
            )
        if np.isnan(found).any() or not np.isfinite(found.max()):
            raise ValueError(f"logits processor {name} returned NaN, +inf, or no token that is possible")
        logits = np.ascontiguousarray(found, np.float32)
    return logits


def sampling_defaults(directory: str | Path) -> dict:
    """What the model's makers advise in generation_config.json: Sampler's keywords, the temperature always.

    Greedy where they do not sample; a repetition penalty holds then too, as in transformers. Raises ValueError, naming
    the file, for values out of range.
    """
    file = Path(directory) / "generation_config.json"
    advice = read_json(file) if file.is_file() else {}
    found = {key: advice[key] for key in ADVICE if advice.get(key) is not None}
    if advice.get("do_sample") is not True:
        found = {key: value for key, value in found.items() if key == "repetition_penalty"}
    found = {"temperature": 1.0 if advice.get("do_sample") is True else 0.0, **found}
    try:
        Sampler(**found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    return found


def _bias(logit_bias: Mapping[int, float] | None, vocab: int | None) -> list[tuple[int, float]]:
    if not isinstance(logit_bias, Mapping | None):
        raise TypeError(f"logit_bias is {type(logit_bias).__name__}, expected a mapping of token ids to numbers")
    found = []
    for token, bias in (logit_bias or {}).items():
        token = whole_number("a token id of logit_bias", token)
        within = token >= 0 if vocab is None else 0 <= token < vocab
        _check("a token id of logit_bias", token, within, "0 or more" if vocab is None else f"0 to {vocab - 1:,}")
        name = f"logit_bias of token {token}"
        _check(name, bias, _real(name, bias) < float("inf"), "a finite number, or -inf")
        found.append((token, float(bias)))
    return found


def _real(name: str, value) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {str(value)[:20]}..., which no float can hold") from None


def whole_number(name: str, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected a whole number") from None


def _check(name: str, value, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}, expected {wanted}")
