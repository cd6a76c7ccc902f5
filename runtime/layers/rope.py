"""Rotary position: the angle by which a position turns each pair of dimensions, and how YaRN and LongRoPE stretch it.

Everything is float32 where transformers has it so: at far positions the rounding of an angle shows in the logits.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from .arrays import array


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): how rotary angles are stretched beyond the context that was trained first."""

    factor: float
    original_context: int  # tokens
    beta_fast: float  # turns within original_context from which on an angle is left as it is
    beta_slow: float  # turns up to which it is divided by factor
    mscale: float  # how much the factor adds to keys and queries; 0 is not given
    mscale_all_dim: float  # likewise, but to all of their dimensions: by the scale of the softmax, where that counts


@dataclass(frozen=True, slots=True)
class Stretch:
    """What each pair's angles are divided by, and what cos and sin are multiplied by."""

    factors: tuple[float, ...]  # (dim / 2,)
    scale: float


@dataclass(frozen=True, slots=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): one stretch up to the context that was trained first, another beyond.

    A run takes one of them for all of its positions, by the context that it is planned for. To change over when a
    sequence grows beyond original_context would turn every key in the cache anew, and what a token gets would depend on
    how many come after it.
    """

    original_context: int  # tokens
    short: Stretch
    long: Stretch


@dataclass(frozen=True, slots=True)
class Rope:
    """Which dimensions of a head's query and key are turned, and by what angles."""

    dim: int  # how many of them: the first, or with a latent the last
    theta: float
    factor: float = 1.0  # linear scaling: positions are divided by it
    yarn: YarnScaling | None = None
    interleaved: bool = False  # the pairs are (2i, 2i + 1), else (i, i + dim / 2)
    softmax_factor: float = 1.0  # of the products of queries and keys
    long: LongRope | None = None  # two stretches, of which planned() takes one
    stretch: Stretch | None = None

    def planned(self, context: int) -> "Rope":
        """The same for a run of `context` tokens, with LongRoPE's choice made."""
        if self.long is None:
            return self
        stretch = self.long.long if context > self.long.original_context else self.long.short
        return replace(self, long=None, stretch=stretch)

    @property
    def scale(self) -> float:
        """What cos and sin are multiplied by."""
        yarn = self.yarn
        if self.stretch:
            return self.stretch.scale
        if yarn is None:
            return 1.0
        if yarn.mscale and yarn.mscale_all_dim:
            return magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)
        return magnitude(yarn.factor, 1.0)

    def frequency(self) -> np.ndarray:
        """The angle between two neighbouring positions, radians, float32 (dim / 2,).

        With YaRN (arXiv 2309.00071, section 3.2) pairs that turn more than beta_fast times within the original context
        stay as they are, those that turn less than beta_slow times are slowed down by the factor, the others by less.
        """
        dim, theta = self.dim, self.theta
        exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        # Powers in double, then rounded: NumPy's float32 power differs in the last bit from one processor to another.
        period = np.array([theta ** float(x) for x in exponent], np.float32)
        if self.stretch:
            return 1 / (np.array(self.stretch.factors, np.float32) * period)
        if self.yarn is None:
            return 1 / period / np.float32(self.factor)
        yarn = self.yarn
        plain, stretched = 1 / period, 1 / (np.float32(yarn.factor) * period)

        def pair_turning(times: float) -> float:
            """The pair, as a real number, that turns so many times within the original context."""
            return dim * math.log(yarn.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair_turning(yarn.beta_fast)), 0)
        last = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
        last = last + 0.001 if first == last else last
        slow = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first), 0, 1)
        return stretched * slow + plain * (1 - slow)

    def tables(self, tokens: int, xp=np):
        """cos and sin of each position's angles, both (tokens, dim / 2), of a run of so many tokens."""
        its = self.planned(tokens)
        angle = np.arange(tokens, dtype=np.float32)[:, None] * its.frequency()
        scale = np.float32(its.scale)
        return array(np.cos(angle) * scale, xp), array(np.sin(angle) * scale, xp)


def rotate(x, cos, sin, xp=np, interleaved: bool = False):
    """Turn the pairs (i, i + dim / 2) of x (sequences, tokens, heads, dim) by their angle.

    With `interleaved` the pairs are (2i, 2i + 1); they come out as the others, which no product of two such x sees.
    """
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    cos, sin = cos[:, None], sin[:, None]  # (tokens, 1, half)
    return xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def magnitude(factor: float, mscale: float) -> float:
    """By how much YaRN enlarges vectors whose positions are stretched by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
