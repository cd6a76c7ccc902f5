"""From a row of logits to one token: penalties, temperature, top-k, top-p, min-p, and the draw.

The order is transformers': logit_bias, repetition_penalty, presence and frequency, then temperature, top_k, top_p and
min_p, each of the last three among the tokens that the one before it left. All arithmetic is float32 over the whole
vocabulary but for sums: of 152k logits a draw takes 0.2 to 0.5 ms, where sorting them all would take 4.
"""

import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path

import numpy as np

from .config import read_json

EDGES = (1e-2, 1e-4, 0.0)  # of the largest weight, below which top_p need not look where those above have its share
BLOCK = 512  # weights that are summed before the draw looks for the one it fell on
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
        self.temperature, self.top_p, self.top_k, self.min_p = temperature, top_p, top_k, min_p
        self.repetition, self.presence, self.frequency = repetition_penalty, presence_penalty, frequency_penalty
        self.bias_tokens, self.biases = _bias(logit_bias, vocab)
        self.random = np.random.default_rng(seed) if temperature > 0 else None
        self.remembers = (repetition_penalty, presence_penalty, frequency_penalty) != (1, 0, 0)
        self.prompt = np.fromiter(prompt if repetition_penalty != 1 else (), np.int64)
        self.weights: np.ndarray | None = None  # (vocab,) float32: of the last token drawn
        self.seen: np.ndarray | None = None  # (vocab,) bool: in the prompt, where that counts, or in the answer
        self.counts: np.ndarray | None = None  # (vocab,) float32: how often in the answer

    def __call__(self, logits: np.ndarray) -> int:
        """logits: (vocab,) float32 -> a token id, which counts as part of the answer from then on."""
        logits = self._adjust(logits)
        token = int(np.argmax(logits)) if self.temperature == 0 else self._draw(logits)
        if self.remembers:
            self.seen[token] = True
            self.counts[token] += 1
        return token

    def _adjust(self, logits: np.ndarray) -> np.ndarray:
        """The logits after bias and penalties; the caller's array stays as it is."""
        if not (self.remembers or len(self.biases)):
            return logits
        logits = logits.astype(np.float32)
        logits[self.bias_tokens] += self.biases
        if len(self.biases) and not np.isfinite(logits.max()):
            raise ValueError("logit_bias leaves no token possible; forbid fewer")
        if self.remembers:
            if self.seen is None:
                self.seen, self.counts = np.zeros(len(logits), bool), np.zeros(len(logits), np.float32)
                self.seen[self.prompt] = True
            tokens = np.flatnonzero(self.seen)
            part, counts = logits[tokens], self.counts[tokens]
            with np.errstate(over="ignore"):
                part = np.where(part < 0, part * np.float32(self.repetition), part / np.float32(self.repetition))
                part -= np.float32(self.presence) * (counts > 0) + np.float32(self.frequency) * counts
            logits[tokens] = part
        return logits

    def _draw(self, logits: np.ndarray) -> int:
        scale = min(max(1 / self.temperature, 1e-37), 1e37)  # within float32: at either end the draw is the limit's
        if self.weights is None:  # kept: pages of arrays made anew for each token cost more than what is computed
            self.weights = np.empty(len(logits), np.float32)
        weights = self.weights
        with np.errstate(over="ignore"):
            np.subtract(logits, logits.max(), out=weights, casting="same_kind")
            np.multiply(weights, np.float32(scale), out=weights)
        np.exp(weights, out=weights)  # the largest is 1
        tokens = None  # that are left; None for all
        if 0 < self.top_k < len(weights):
            tokens = largest(weights, self.top_k)
            weights = weights[tokens]
        if self.top_p < 1:
            kept = likeliest(weights, self.top_p)
            tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
        if self.min_p > 0:
            kept = np.flatnonzero(weights >= np.float32(self.min_p))
            tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
        drawn = self._pick(weights)
        return drawn if tokens is None else int(tokens[drawn])

    def _pick(self, weights: np.ndarray) -> int:
        """An index, drawn in proportion to its weight: first its block, then where in the block."""
        whole = len(weights) // BLOCK * BLOCK
        sums = np.append(weights[:whole].reshape(-1, BLOCK).sum(axis=1), weights[whole:].sum())
        begin = BLOCK * _fall(sums, self.random.random())
        return begin + _fall(weights[begin : begin + BLOCK], self.random.random())


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """The indices, ascending, of the `count` largest values; ties go to the lower index."""
    among, part = np.arange(len(values)), values
    if (columns := len(values) // 64) > count:  # the count-th largest of the columns' maxima is no more than the edge
        maxima = values[: 64 * columns].reshape(64, columns).max(axis=0)
        among = np.flatnonzero(values >= np.partition(maxima, -count)[-count])
        part = values[among]
    edge = np.partition(part, -count)[-count]
    mask = part > edge
    mask[np.flatnonzero(part == edge)[: count - np.count_nonzero(mask)]] = True
    return among[mask]


def likeliest(weights: np.ndarray, share: float) -> np.ndarray:
    """The indices, ascending, of the fewest weights that reach `share` of their sum; ties go to the lower index.

    weights: float32, none negative. Those above an edge that reaches the share are counted by their upper 16 bits,
    which order them: only those that share theirs with the last one kept are sorted.
    """
    goal, most = share * float(weights.sum(dtype=np.float64)), weights.max()
    for edge in EDGES:
        among = np.flatnonzero(weights >= edge * most)
        part = weights[among]
        if part.sum(dtype=np.float64) >= goal:
            break
    buckets = part.view(np.int32) >> 16
    sums = np.bincount(buckets, part)
    above = np.append(np.cumsum(sums[::-1])[::-1], 0.0)[1:]  # the sum of the buckets above each
    last = int(np.argmax(above < goal))  # the bucket in which the goal is reached
    mask = buckets > last
    tied = np.flatnonzero(buckets == last)
    tied = tied[np.argsort(-part[tied], kind="stable")]
    before = above[last] + np.cumsum(part[tied], dtype=np.float64) - part[tied]
    mask[tied[: max(int(np.count_nonzero(before < goal)), 1)]] = True
    return among[mask]


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


def _fall(weights: np.ndarray, at: float) -> int:
    """The index on which `at`, in [0, 1), falls when weights are laid end to end; never one of weight 0."""
    ends = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(ends, min(at * ends[-1], np.nextafter(ends[-1], 0)), side="right"))


def _bias(logit_bias: Mapping[int, float] | None, vocab: int | None) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(logit_bias, Mapping | None):
        raise TypeError(f"logit_bias is {type(logit_bias).__name__}, expected a mapping of token ids to numbers")
    tokens, biases = [], []
    for token, bias in (logit_bias or {}).items():
        token = whole_number("a token id of logit_bias", token)
        within = token >= 0 if vocab is None else 0 <= token < vocab
        _check("a token id of logit_bias", token, within, "0 or more" if vocab is None else f"0 to {vocab - 1:,}")
        name = f"logit_bias of token {token}"
        _check(name, bias, _real(name, bias) < float("inf"), "a finite number, or -inf")
        tokens.append(token)
        biases.append(float(bias))
    return np.array(tokens, np.int64), np.array(biases, np.float32)


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
