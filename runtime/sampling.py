"""Sampling tokens: checks the options of a call for the core's sampler, and reads a model's generation_config.json.

The order is transformers': logit_bias, repetition_penalty, presence and frequency penalty, then temperature, top_k,
top_p and min_p, each of the last three applied to the tokens that remain after the one before.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np

from .. import _core
from .config_file import read_json

LEAST, MOST = 1e-37, 1e37  # temperatures are clamped to these float32 values, beyond which samples do not change
ADVICE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # read from generation_config.json


class Sampler:
    """Samples tokens one after another, reproducibly with a seed.

    temperature divides the logits; 0 takes the most likely token, and ties go to the lower id. top_p keeps the smallest
    set of tokens whose probabilities reach it. top_k keeps that many of the likeliest tokens, 0 keeps all. min_p keeps
    tokens with at least that share of the highest probability. repetition_penalty divides the positive logits of tokens
    in the prompt or the answer so far, and multiplies the negative ones (Keskar et al. 2019, as in transformers).
    presence_penalty is subtracted once from the logit of each token in the answer so far, frequency_penalty once per
    occurrence (as in OpenAI's API, the prompt does not count). logit_bias maps token ids to values added to their
    logits, -inf to forbid a token. prompt: its token ids, for the repetition penalty. vocab: the number of logits, if
    known beforehand.

    Raises ValueError for values out of range and TypeError for values that are not numbers.
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
        """Choose a token id from logits (vocab,) float32; it counts as part of the answer from then on."""
        return self._core(np.ascontiguousarray(logits, np.float32))

    def with_logprobs(self, logits: np.ndarray, count: int) -> tuple[int, "TokenLogprobs"]:
        """Choose a token, and return it with the log probabilities of itself and of the `count` likeliest tokens."""
        token, logprob, likeliest = self._core.with_logprobs(np.ascontiguousarray(logits, np.float32), count)
        return token, TokenLogprobs(token, logprob, tuple(likeliest))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log probabilities of a token of an answer, after logits processors, logit_bias and penalties, but before
    temperature, top_k, top_p and min_p."""

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]  # of the likeliest tokens, likeliest first: id and logprob


LogitsProcessor = Callable[[Sequence[int], np.ndarray], np.ndarray]


def processed(processors: Sequence[LogitsProcessor], tokens: list[int], logits: np.ndarray) -> np.ndarray:
    """Logits (vocab,) float32 after all processors, which get the tokens so far, including the prompt.

    Raises ValueError if one returns something other than floats of that shape, or leaves no token possible.
    """
    for processor in processors:
        name = getattr(processor, "__name__", type(processor).__name__)
        found = np.asarray(processor(tokens, logits))
        if found.shape != logits.shape or found.dtype.kind != "f":
            raise ValueError(
                f"logits processor {name} returned {found.dtype} {found.shape}, expected floats {logits.shape}"
            )
        if np.isnan(found).any() or not np.isfinite(found.max()):
            raise ValueError(f"logits processor {name} returned NaN, +inf, or -inf for every token")
        logits = np.ascontiguousarray(found, np.float32)
    return logits


def sampling_defaults(directory: str | Path) -> dict:
    """The defaults from a model's generation_config.json, as keywords of Sampler, always with a temperature.

    Sampling is greedy if do_sample is off; a repetition penalty still applies, as in transformers. Raises ValueError,
    naming the file, for values out of range.
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
