"""Which of the kernels work here: those that give what MLX's own operations give for planted experts.

Nothing but their results tells: what Metal refuses to compile, or computes wrongly on some system, is replaced by MLX's
operations, which are exact.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import kernels, plain
from .experts import (
    PADDED,
    PAGE_BYTES,
    PROJECTIONS,
    Array,
    Chosen,
    ExpertShape,
    LayerExperts,
    RecordKind,
    Router,
)
from .memory import allocate

TOKENS = 3  # that are planted
MISS = 1e-4  # maximum difference, as a part of the largest value


class Operations(NamedTuple):
    """What routing and experts are computed by; as the functions of plain.py."""

    name: str
    route: Callable[..., Chosen]
    experts: Callable[..., Array]


PLAIN = Operations("mlx-cpu", plain.route, plain.experts)  # where there is no Metal


def operations(routers: Iterable[Router], shape: ExpertShape, kinds: list[RecordKind], made: Any = None) -> Operations:
    """The kernels that work for layers with these routers, and experts with this shape and records of these kinds.

    made: the kernels, as kernels.Kernels; by default those of Metal, if it is there.
    """
    if made is None:
        if not mx.metal.is_available():
            return PLAIN
        made = kernels.Kernels()
    planted = list({_key(router): _planted(router) for router in routers}.values())
    fit = all(map(_fits, planted))
    works = {
        "route": fit and _agrees(lambda: _routes(planted, made)),
        "experts": fit and _agrees(lambda: _outputs(max(its.top_k for its in planted), shape, kinds, made)),
    }
    route, experts = (getattr(made if does else plain, name) for name, does in works.items())
    failed = [name for name, does in works.items() if not does]
    of_kernels = f"{kernels.NAME} without {failed[0]}" if failed else kernels.NAME
    return Operations("mlx-operations" if len(failed) == 2 else of_kernels, route, experts)


def _key(router: Router) -> tuple:
    """What a router's kernel is compiled for."""
    values = (getattr(router, its.name) for its in fields(router))
    return tuple(value if isinstance(value, str | int | float | None) else True for value in values)


def _planted(router: Router) -> Router:
    """The router with other values in its arrays."""
    random, count = np.random.default_rng(router.experts), router.experts
    groups = np.sort(np.arange(count) % router.groups).astype(np.int32)
    floats = {"bias": random.random(count, np.float32), "expert_scale": 0.5 + random.random(count, np.float32)}
    arrays = {"group_of": groups, **floats}
    return replace(router, **{name: mx.array(its) for name, its in arrays.items() if getattr(router, name) is not None})


def _fits(router: Router) -> bool:
    sizes = (router.top_k, router.experts, router.groups)
    most = (kernels.MOST_PLACES, kernels.MOST_EXPERTS, kernels.MOST_GROUPS)
    return all(size <= limit for size, limit in zip(sizes, most, strict=True))


def _agrees(pairs: Callable[[], Iterable[tuple[Array, Array]]]) -> bool:
    """Whether what kernels computed is what it should be. A kernel that Metal refuses does not work."""
    try:
        for got, want in pairs():
            got, want = np.array(got), np.array(want)
            most = MISS * np.abs(want).max() if want.dtype.kind == "f" else 0
            if not np.isfinite(got).all() or np.abs(got - want).max() > most:
                return False
    except (RuntimeError, ValueError):  # MLX's, when it compiles or runs a kernel
        return False
    return True


def _routes(routers: list[Router], made: Any) -> Iterator[tuple[Array, Array]]:
    random = np.random.default_rng(1)
    for router in routers:
        count = max(router.experts, PADDED)
        logits = mx.array(random.standard_normal((TOKENS, router.experts), np.float32))
        table, kind_of = (mx.array(random.integers(-1, 9, count), mx.int32) for _ in range(2))
        layer = LayerExperts(router.top_k, (), mx.zeros((PADDED,)), kind_of, ())
        got, want = (its.route(router, logits, layer, table) for its in (made, plain))
        places = TOKENS * router.top_k
        yield from ((one[:places], other[:places]) for one, other in zip(got, want, strict=True))


def _outputs(most: int, shape: ExpertShape, kinds: list[RecordKind], made: Any) -> Iterator[tuple[Array, Array]]:
    """One expert of each kind, `most` kinds at a time."""
    random = np.random.default_rng(2)
    numbers = mx.array(np.array([kind.numbers() for kind in kinds]))
    x = mx.array(random.standard_normal((1, shape.dim), np.float32) / np.sqrt(shape.dim))
    for first in range(0, len(kinds), most):
        own = list(range(first, min(first + most, len(kinds))))
        ends = np.cumsum([0, *(kinds[number].pages for number in own)])
        arena, memory = allocate(int(ends[-1]) * PAGE_BYTES)
        for number, page in zip(own, ends, strict=False):
            _plant(shape, kinds[number], memory[int(page) * PAGE_BYTES :], random)
        places = np.full(max(most, PADDED), -1, np.int32)
        places[: len(own)] = own
        pages = np.where(places < 0, -1, np.pad(ends[:-1], (0, len(places) - len(own)))).astype(np.int32)
        weights = np.where(places < 0, 0, 0.5).astype(np.float32)
        chosen = Chosen(*map(mx.array, (places, weights, pages, np.maximum(places, 0))))
        layer = LayerExperts(most, kinds, numbers, mx.array(np.maximum(places, 0)), tuple(own))
        yield tuple(its.experts(shape, layer, arena, x, chosen, mx.zeros_like(x)) for its in (made, plain))


def _plant(shape: ExpertShape, kind: RecordKind, memory: np.ndarray, random: np.random.Generator) -> None:
    """Write a record whose outputs are neither zero nor beyond a float."""
    codecs = dict(zip(PROJECTIONS, (codec for codec, _, _ in kind.encodings), strict=True))
    for name, (offset, nbytes) in kind.parts.items():
        projection, part = name.split(".")
        if part == "output_bias":
            values = random.standard_normal(nbytes // 4, np.float32)
        elif part == "codes" and codecs[projection] != "bfloat16":
            values = random.integers(0, 256, nbytes, np.uint8)
        elif part == "scales" and codecs[projection] == "mxfp4":
            values = random.integers(118, 124, nbytes, np.uint8)  # exponents
        else:
            values = (random.standard_normal(nbytes // 2, np.float32) / 8).view(np.uint32) >> 16  # of bfloat16
            values = values.astype(np.uint16)
        raw = values.view(np.uint8)
        memory[offset : offset + raw.size] = raw
