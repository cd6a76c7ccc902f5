"""Embeddings of n-grams: what a layer adds to the residual stream before attention, from a token and those before it.

Each of several hashes of the last two, three, ... tokens picks a row of a table, which may have more weights than the
rest of the model. A token needs one row for each hash.
"""

import math
from dataclasses import dataclass

import numpy as np

from .arrays import rms_norm, sigmoid, silu
from .delta_net import convolve
from .past import NO_PAST, Past

MASK = (1 << 64) - 1
GOLDEN, FIRST_FACTOR, SECOND_FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64
SEED_STEP = 10007  # between the seeds of two layers
LEAST_GATE = 1e-6  # minimum of a gate's magnitude, before its square root


@dataclass(frozen=True, slots=True)
class NGrams:
    """The parameters of one layer's embeddings of n-grams."""

    factors: tuple[int, ...]  # of a token's id and of the ids before it, in a hash; as many as the longest n-gram has
    sizes: tuple[tuple[int, ...], ...]  # of n-grams of two tokens, of three, ...: the rows that each hash can pick
    rows: int  # of the table, padding included
    cols: int
    end: int  # the token that ends a text: n-grams do not reach beyond it
    conv_kernel: int  # inputs of an output of the convolution, which are as many tokens apart as the longest n-gram has

    @property
    def longest(self) -> int:
        """Tokens of the longest n-gram."""
        return len(self.factors)

    @property
    def heads(self) -> int:
        """The number of rows that a token needs."""
        return sum(len(sizes) for sizes in self.sizes)

    @property
    def inputs(self) -> int:
        """The values that a token needs of the table."""
        return self.heads * self.cols

    @property
    def past(self) -> int:
        """How many tokens before its own the convolution reaches."""
        return (self.conv_kernel - 1) * self.longest

    def shapes(self, dim: int, width: int) -> dict[str, tuple[int, ...]]:
        """The tensors but the table by canonical name, in the order of use."""
        return {
            "ngrams.key": (width, self.inputs),
            "ngrams.value": (dim, self.inputs),
            "ngrams.key_norm": (width,),
            "ngrams.query_norm": (width,),
            "ngrams.conv_norm": (width,),
            "ngrams.conv": (self.conv_kernel, width),
        }

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """The rows of the table, int64 (sequences, tokens, heads), for token ids (sequences, tokens) from a beginning.

        A hash is the exclusive or of ids times factors, in 64 bits with sign, modulo the hash's number of rows.
        """
        shifted, first, found = self._shifted(np.asarray(ids, np.int64)), 0, []
        with np.errstate(over="ignore"):
            mixed = shifted[0] * np.int64(self.factors[0])
            for tokens, factor, sizes in zip(shifted[1:], self.factors[1:], self.sizes, strict=True):
                mixed = mixed ^ (tokens * np.int64(factor))
                for size in sizes:
                    found.append(mixed % size + first)
                    first += size
        return np.stack(found, axis=-1)

    def _shifted(self, ids: np.ndarray) -> list[np.ndarray]:
        """ids, and the ids one, two, ... tokens before; `end` where they lie beyond a text's beginning."""
        found, reaches = [ids], np.ones(ids.shape, bool)
        for shift in range(1, self.longest):
            before = np.full_like(ids, self.end)
            before[:, shift:] = ids[:, :-shift]
            reaches = reaches & (before != self.end)  # once a text has ended, nothing before it counts
            found.append(np.where(reaches, before, self.end))
        return found

    def added(self, trunk, times, x, rows, dim: int, eps: float, xp=np, past: Past = NO_PAST):
        """What is added to the residual stream x (sequences, tokens, width).

        rows: the table's, (sequences, tokens, heads * cols). trunk(name) is a tensor of the layer, times(name, x) the
        product of x with a matrix of the layer.
        """
        split = (*x.shape[:-1], -1, dim)

        def normed(name: str, x):
            return rms_norm(x.reshape(split), trunk(name).reshape(-1, dim), eps, xp)

        # each stream's gate, by its product with its key
        keys, value = normed("ngrams.key_norm", times("ngrams.key", rows)), times("ngrams.value", rows)
        gate = xp.sum(keys * normed("ngrams.query_norm", x), axis=-1, keepdims=True) * dim**-0.5
        gate = xp.sqrt(xp.maximum(xp.abs(gate), LEAST_GATE)) * xp.sign(gate)
        gated = sigmoid(gate, xp) * value[..., None, :]

        # and its convolution
        normed_gated = normed("ngrams.conv_norm", gated).reshape(x.shape)
        weights, apart = trunk("ngrams.conv"), self.longest
        return gated.reshape(x.shape) + silu(convolve(normed_gated, weights, xp, apart, past, "ngrams"), xp)


def factors_of(vocab: int, longest: int, seed: int, layer: int) -> tuple[int, ...]:
    """The odd factors of a layer's hashes: numbers of SplitMix64, so small that no product with an id overflows.

    layer: counted among the layers that have n-grams.
    """
    half = max(1, ((1 << 63) - 1) // max(vocab, 1) // 2)
    start = seed + SEED_STEP * layer
    return tuple(2 * (_split_mix(start + GOLDEN * (at + 1)) % half) + 1 for at in range(longest))


def _split_mix(value: int) -> int:
    """One number of SplitMix64."""
    value = (value + GOLDEN) & MASK
    value = ((value ^ (value >> 30)) * FIRST_FACTOR) & MASK
    value = ((value ^ (value >> 27)) * SECOND_FACTOR) & MASK
    return (value ^ (value >> 31)) & MASK


def primes_from(least: int, count: int) -> list[int]:
    """The first `count` primes from `least` on."""
    found, at = [], least
    while len(found) < count:
        if at > 1 and all(at % divisor for divisor in range(2, math.isqrt(at) + 1)):
            found.append(at)
        at += 1
    return found
