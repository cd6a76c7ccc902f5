"""What routing and experts are computed from on the mlx device, by the kernels of kernels.py or the operations of
plain.py, which give the same numbers.

A token has `places` for the experts that it chooses, in order of rank. Arrays over the places of all tokens are flat,
and padded to at least 8 values: a kernel's smaller inputs are in another address space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

PAGE_BYTES = 4096
PAGE_WORDS = PAGE_BYTES // 4
PADDED = 8
FORMS = {"bfloat16": 16, "mxfp4": 20}  # of a matrix in a record; those of affine codes are their widths
PROJECTIONS = ("gate", "up", "down")
NUMBERS = 24  # of a kind of record; see experts.metal
Array = Any  # of mlx.core, which is imported only where this device is used


@dataclass(frozen=True, slots=True)
class RecordKind:
    """Records with the same encodings, in parts at the same places."""

    encodings: tuple[tuple[str, int, int], ...]  # codec, width and group of gate, up and down
    parts: dict[str, tuple[int, int]]  # (offset, bytes) by name, like "gate.codes"
    nbytes: int

    @property
    def pages(self) -> int:
        return -(-self.nbytes // PAGE_BYTES)

    def numbers(self) -> np.ndarray:
        """What kernels know of it, int32 (24,)."""
        numbers = np.zeros((len(PROJECTIONS), 8), np.int32)
        for row, name, (codec, width, group) in zip(numbers, PROJECTIONS, self.encodings, strict=True):
            if f"{name}.codes" not in self.parts:
                continue
            places = [self.parts.get(f"{name}.{part}", (0, 0))[0] for part in ("codes", "scales", "biases")]
            codes, scales, biases = places
            scale_bytes = 1 if codec == "mxfp4" else 2
            bias = self.parts.get(f"{name}.output_bias", (0, 0))[0]
            row[:6] = FORMS.get(codec, width), codes // 4, scales // scale_bytes, biases // 2, bias // 4, group
        return numbers.reshape(-1)


@dataclass(frozen=True, slots=True)
class Arena:
    """The memory of all slots. The first page begins `base` words after the array does, on a page of the system."""

    words: Array  # uint32 (pages + 1, PAGE_WORDS)
    base: int


@dataclass(frozen=True, slots=True)
class Router:
    """How a layer's router logits become routing weights; see runtime/src/router.h."""

    experts: int
    top_k: int
    score: str = "softmax"  # softmax | sigmoid | sqrtsoftplus | sparsemixer
    renormalise: bool = False
    logits_scale: float = 1.0
    sum_eps: float = 1e-20
    scale: float = 1.0
    threshold: float = 0.0
    groups: int = 1
    top_groups: int = 1
    top2sum: bool = False
    bias: Array | None = None  # float32 (experts,)
    group_of: Array | None = None  # int32 (experts,)
    expert_scale: Array | None = None  # float32 (experts,)


class Chosen(NamedTuple):
    """The experts that some tokens have chosen, by place."""

    ids: Array  # int32 (places of all tokens, padded); -1 without one
    weights: Array  # float32; a token's are in descending order
    pages: Array  # int32: the page of the arena that the record begins at, -1 without one
    kinds: Array  # int32: which kind of record it is


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What all experts of a model have in common."""

    dim: int
    hidden: int
    activation: str = "silu"  # silu | gelu_tanh | clamped_swiglu | relu2, which has no gate
    alpha: float = 0.0  # of clamped_swiglu
    limit: float = 0.0
    shift: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """One layer's experts, and their records."""

    top_k: int  # places of a token
    kinds: Sequence[RecordKind]  # of the model
    numbers: Array  # int32 (kinds, 24)
    kind_of: Array  # int32 (experts, padded): the kind of each expert's record
    present: tuple[int, ...]  # the kinds that the layer has


def padded(mx, values: Array, fill: float = 0) -> Array:
    """The values (n,) with as many of `fill` after them as make PADDED."""
    return values if values.size >= PADDED else mx.pad(values, (0, PADDED - values.size), constant_values=fill)
