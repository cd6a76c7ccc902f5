"""Rotary position: by what angle a position turns each pair of dimensions, and how YaRN scales attention.

Everything is float32 where transformers has it so: at far positions the rounding of an angle shows in the logits.
"""

import math

import numpy as np

from .config import ModelConfig


def rope_frequency(config: ModelConfig) -> np.ndarray:
    """The angle between two neighbouring positions, radians, float32 (rope_dim / 2,).

    With YaRN (arXiv 2309.00071, section 3.2) pairs that turn more than beta_fast times within the original context
    stay as they are, those that turn less than beta_slow times are slowed down by the factor, the others by less.
    """
    dim, theta = config.rope_dim, config.rope_theta
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    # Powers in double, then rounded: NumPy's float32 power differs in the last bit from one processor to another.
    period = np.array([theta ** float(x) for x in exponent], np.float32)
    if config.yarn is None:
        return 1 / period / np.float32(config.rope_factor)
    yarn = config.yarn
    plain, stretched = 1 / period, 1 / (np.float32(yarn.factor) * period)

    def pair_turning(times: float) -> float:
        """The pair, as a real number, that turns so many times within the original context."""
        return dim * math.log(yarn.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    last = last + 0.001 if first == last else last
    slow = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first), 0, 1)
    return stretched * slow + plain * (1 - slow)


def rope_scale(config: ModelConfig) -> float:
    """What cos and sin are multiplied by."""
    yarn = config.yarn
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _magnitude(yarn.factor, yarn.mscale) / _magnitude(yarn.factor, yarn.mscale_all_dim)
    return _magnitude(yarn.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """What the products of queries and keys are multiplied by."""
    yarn, scale = config.yarn, config.head_dim**-0.5
    factor, mscale = (yarn.factor, yarn.mscale_all_dim) if yarn else (config.rope_factor, config.rope_mscale)
    return scale * _magnitude(factor, mscale) ** 2 if mscale else scale


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
