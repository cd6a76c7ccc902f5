"""Rotary position embedding: the angle of each pair of dimensions at a position, and its scaling by YaRN and LongRoPE.

Values are float32 where transformers has float32: at high positions the rounding of an angle shows in the logits.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from .arrays import array


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): how rotary angles are scaled beyond the original training context."""

    factor: float
    original_context: int  # tokens
    beta_fast: float  # pairs with more turns than this within original_context keep their angles
    beta_slow: float  # angles of pairs with fewer turns are divided by factor
    mscale: float  # strength of the magnitude that the factor adds to keys and queries; 0: not given
    mscale_all_dim: float  # the same for all dimensions, through the softmax scale, in families that use it
    truncate: bool = True  # the first and the last pair whose angles are between the two are whole numbers
    own_scale: float = 0.0  # factor of cos and sin; 0: the one that follows from factor and mscale


@dataclass(frozen=True, slots=True)
class Stretch:
    """The divisors of the angles of each pair, and the factor of cos and sin."""

    factors: tuple[float, ...]  # (dim / 2,)
    scale: float


@dataclass(frozen=True, slots=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): one Stretch up to the original training context, another beyond.

    A run uses one of them for all of its positions, chosen by the context that it is planned for. Switching when a
    sequence grows beyond original_context would require rotating every cached key again, and a token's result would
    depend on the number of tokens after it.
    """

    original_context: int  # tokens
    short: Stretch
    long: Stretch


@dataclass(frozen=True, slots=True)
class Rope:
    """The dimensions of a head's query and key that are rotated, and the angles."""

    dim: int  # how many are rotated: the first ones; with a latent or compressed rows, the last ones
    theta: float
    factor: float = 1.0  # linear scaling: divisor of positions
    yarn: YarnScaling | None = None
    interleaved: bool = False  # the pairs are (2i, 2i + 1), else (i, i + dim / 2)
    softmax_factor: float = 1.0  # factor of the products of queries and keys
    long: LongRope | None = None  # two stretches; planned() chooses one
    stretch: Stretch | None = None
    of: int = 0  # the pairs are the first ones of this many dimensions, with their angles; 0: of `dim`

    def planned(self, context: int) -> "Rope":
        """The same for a run of `context` tokens, with a stretch of LongRoPE chosen."""
        if self.long is None:
            return self
        stretch = self.long.long if context > self.long.original_context else self.long.short
        return replace(self, long=None, stretch=stretch)

    @property
    def span(self) -> int:
        """The dimensions within which the pairs lie: a pair that is not interleaved is (i, i + span / 2)."""
        return self.of or self.dim

    @property
    def scale(self) -> float:
        """The factor of cos and sin."""
        yarn = self.yarn
        if self.stretch:
            return self.stretch.scale
        if yarn is None:
            return 1.0
        if yarn.own_scale:
            return yarn.own_scale
        if yarn.mscale and yarn.mscale_all_dim:
            return magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)
        return magnitude(yarn.factor, 1.0)

    def frequency(self) -> np.ndarray:
        """The angle between two neighbouring positions, radians, float32 (dim / 2,).

        With YaRN (arXiv 2309.00071, section 3.2), pairs with more than beta_fast turns within the original context keep
        their angles, those with fewer than beta_slow turns have them divided by the factor, and those between by less.
        """
        dim, theta = self.dim, self.theta
        exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(self.span)
        # Powers in double, then rounded: NumPy's float32 power differs in the last bit from one processor to another.
        period = np.array([theta ** float(x) for x in exponent], np.float32)
        if self.stretch:
            return 1 / (np.array(self.stretch.factors, np.float32) * period)
        if self.yarn is None:
            return 1 / period / np.float32(self.factor)
        yarn = self.yarn
        plain, stretched = 1 / period, 1 / (np.float32(yarn.factor) * period)

        def pair_turning(times: float) -> float:
            """The pair, as a real number, that makes `times` turns within the original context."""
            return dim * math.log(yarn.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

        first, last = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
        if yarn.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last = last + 0.001 if first == last else last
        slow = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first), 0, 1)
        return stretched * slow + plain * (1 - slow)

    def tables(self, tokens: int, xp=np, first: int = 0):
        """cos and sin of the angles of positions first, first + 1..., both (tokens, span / 2), in a run of as many.

        Pairs that are not rotated have angles of 0.
        """
        its = self.planned(first + tokens)
        frequency = np.pad(its.frequency(), (0, (self.span - self.dim) // 2))
        angle = np.arange(first, first + tokens, dtype=np.float32)[:, None] * frequency
        scale = np.float32(its.scale)
        return array(np.cos(angle) * scale, xp), array(np.sin(angle) * scale, xp)


def rotate(x, cos, sin, xp=np, interleaved: bool = False):
    """Rotate the pairs (i, i + dim / 2) of x (sequences, tokens, heads, dim) by their angles.

    With `interleaved` the pairs are (2i, 2i + 1), returned in the others' order, which changes no product of two such
    x.
    """
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    cos, sin = cos[:, None], sin[:, None]  # (tokens, 1, half)
    return xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotate_first(x, rope: Rope, cos, sin, xp=np):
    """Rotate the first rope.span dimensions of x (sequences, tokens, heads, size)."""
    span = rope.span
    turned = rotate(x[..., :span], cos, sin, xp, rope.interleaved)
    return turned if span == x.shape[-1] else xp.concatenate([turned, x[..., span:]], axis=-1)


def rotate_last(x, rope: Rope, cos, sin, xp=np, back: bool = False):
    """Rotate the last rope.dim dimensions of x (sequences, tokens, heads, size), whose order stays. back: by minus the
    angles."""
    first = x.shape[-1] - rope.dim
    cos, sin = cos[:, None], -sin[:, None] if back else sin[:, None]  # (tokens, 1, rope.dim / 2)
    rest = x[..., first:]
    half = rope.dim // 2
    a, b = (rest[..., 0::2], rest[..., 1::2]) if rope.interleaved else (rest[..., :half], rest[..., half:])
    parts = [a * cos - b * sin, b * cos + a * sin]
    turned = xp.stack(parts, axis=-1).reshape(rest.shape) if rope.interleaved else xp.concatenate(parts, axis=-1)
    return xp.concatenate([x[..., :first], turned], axis=-1)


def magnitude(factor: float, mscale: float) -> float:
    """The factor by which YaRN enlarges vectors whose positions are scaled by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
