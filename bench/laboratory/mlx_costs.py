"""Measures what decides the speed of decoding on the mlx device: bytes a second of its kernels, and costs of the host.

    python -m bench.laboratory.mlx_costs [--quick]

Kernels: the experts of one token, of Qwen3-30B-A3B's shapes, in launches that together read more than caches hold;
beside MLX's own products of as many bytes, and beside reading alone. Costs: of handing a unit of work to the GPU by
itself, and of waiting for it, over those of the same units in one piece.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from edge_moe.devices.mlx.experts import Arena, Chosen, ExpertShape, LayerExperts, RecordKind, Router
from edge_moe.devices.mlx.memory import allocate
from edge_moe.devices.mlx.working import operations
from edge_moe.runtime.codecs import encoding_of, record_layout

SHAPE = ExpertShape(2048, 768)
TOP_K, GROUP = 8, 64
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
READ_BYTES = 1 << 30  # of records, in launches of TOP_K each
SCALE = 0x3C80  # 1/64 in bfloat16
UNITS = 48  # of work for the costs: a layer each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the bytes, fewer rounds")
    print(json.dumps(measure(parser.parse_args().quick), indent=1))


def measure(quick: bool) -> dict:
    """Measure the kernels that work here, or MLX's operations in their place, and the costs."""
    nbytes, rounds = (READ_BYTES // 4, 3) if quick else (READ_BYTES, 7)
    if not mx.metal.is_available():
        nbytes //= 16  # MLX's CPU backend is a correctness path
    by = operations([Router(128, TOP_K)], SHAPE, [_kind(width) for width in WIDTHS])
    rates = {"read_gbps": read_gbps(nbytes, rounds), "kernels": kernel_rates(by, nbytes, rounds)}
    return {"computed_by": by.name, **rates, "costs": costs(rounds)}


def read_gbps(nbytes: int, rounds: int) -> float:
    """GB/s of the maximum over an array."""
    words = _bits((nbytes // 4096, 1024))
    mx.eval(words)
    return nbytes / _seconds(lambda: [mx.max(words)], rounds) / 1e9


def kernel_rates(by, nbytes: int, rounds: int) -> list[dict]:
    """By width: GB/s of our kernels, and of MLX's own three products for as many experts, None where it has none."""
    return [{"width": width, "gbps": _ours(by, width, nbytes, rounds), "stock_gbps": _stock(width, nbytes, rounds)}
            for width in WIDTHS]  # fmt: skip


def _ours(by, width: int, nbytes: int, rounds: int) -> float:
    kind = _kind(width)
    launches = max(1, nbytes // (TOP_K * kind.nbytes))
    arena = _random_arena(kind, launches * TOP_K)
    numbers = mx.array(np.array([kind.numbers()]))
    layer = LayerExperts(TOP_K, [kind], numbers, mx.zeros((TOP_K,), mx.int32), (0,))
    x, residual = mx.random.normal((1, SHAPE.dim)), mx.zeros((1, SHAPE.dim))
    pages = np.random.default_rng(0).permutation(launches * TOP_K).reshape(launches, TOP_K) * kind.pages
    ids, weights, kinds = mx.arange(TOP_K), mx.full((TOP_K,), 1 / TOP_K), mx.zeros((TOP_K,), mx.int32)
    all_chosen = [Chosen(ids, weights, mx.array(its.astype(np.int32)), kinds) for its in pages]
    mx.eval(x, residual, numbers, all_chosen)
    seconds = _seconds(lambda: [by.experts(SHAPE, layer, arena, x, its, residual) for its in all_chosen], rounds)
    return launches * TOP_K * kind.nbytes / seconds / 1e9


def _kind(width: int) -> RecordKind:
    encodings = (encoding_of(width, GROUP),) * 3
    layout = record_layout(SHAPE.dim, SHAPE.hidden, encodings)
    return RecordKind(tuple(tuple(its) for its in encodings), dict(layout.parts), layout.bytes)


def _random_arena(kind: RecordKind, count: int) -> Arena:
    arena, memory = allocate(count * kind.pages * 4096)
    records = memory.reshape(count, -1)
    records[:] = np.random.default_rng(1).integers(0, 256, records.shape[1], np.uint8)
    for name, (offset, nbytes) in kind.parts.items():
        if name.endswith((".scales", ".biases")):
            records[:, offset : offset + nbytes].view(np.uint16)[:] = SCALE
    return arena


def _stock(width: int, nbytes: int, rounds: int) -> float | None:
    """GB/s of gather_qmm for the gate, up and down of TOP_K of many experts."""
    wide, tall = (SHAPE.hidden, SHAPE.dim), (SHAPE.dim, SHAPE.hidden)
    of_expert = sum(rows * cols * width // 8 + rows * cols // GROUP * 4 for rows, cols in (wide, wide, tall))
    launches = max(1, nbytes // (TOP_K * of_expert))
    matrices = []
    for rows, cols in (wide, wide, tall):
        groups = (launches * TOP_K, rows, cols // GROUP)
        codes = _bits((launches * TOP_K, rows, cols * width // 32))
        matrices.append((codes, mx.full(groups, 1 / 64, mx.bfloat16), mx.full(groups, 1 / 64, mx.bfloat16)))
    x, order = mx.random.normal((1, 1, SHAPE.dim), mx.bfloat16), mx.random.permutation(launches * TOP_K)
    chosen = [order[at * TOP_K : (at + 1) * TOP_K] for at in range(launches)]
    mx.eval(matrices, x, chosen)
    how = {"transpose": True, "group_size": GROUP, "bits": width}

    def product(inputs, matrix, its):
        return mx.gather_qmm(inputs, *matrix, rhs_indices=its, **how)

    def launch(its):
        gate, up = (product(x, matrix, its) for matrix in matrices[:2])
        return product(gate * mx.sigmoid(gate) * up, matrices[2], its).sum(0)

    try:
        seconds = _seconds(lambda: [launch(its) for its in chosen], rounds)
    except (RuntimeError, ValueError):  # MLX has no kernel of this width
        return None
    return launches * TOP_K * of_expert / seconds / 1e9


def costs(rounds: int) -> dict[str, float]:
    """Microseconds a unit: in one piece, how many more if each is submitted by itself, and if each is waited for."""
    weights = mx.random.normal((SHAPE.dim, SHAPE.dim)) / SHAPE.dim**0.5
    x = mx.random.normal((1, SHAPE.dim))
    mx.eval(weights, x)

    def units(after: Callable[[mx.array], object]):
        y = x
        for _ in range(UNITS):
            y = y @ weights
            after(y)
        return [y]

    whole = _seconds(lambda: units(lambda y: None), 3 * rounds)
    submitted = _seconds(lambda: units(mx.async_eval), 3 * rounds)
    waited = _seconds(lambda: units(np.array), 3 * rounds)
    of_unit = 1e6 / UNITS
    return {
        "unit_us": whole * of_unit,
        "submitted_us": (submitted - whole) * of_unit,
        "waited_us": (waited - whole) * of_unit,
    }


def _bits(shape: tuple[int, ...]) -> mx.array:
    return mx.random.randint(-(2**31), 2**31 - 1, shape, mx.int32).view(mx.uint32)


def _seconds(make: Callable[[], list], rounds: int) -> float:
    """The median seconds of making and evaluating some arrays, after a round to warm up."""
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        mx.eval(make())
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


if __name__ == "__main__":
    main()
