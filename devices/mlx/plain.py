"""Routing and experts in MLX's own operations: for devices without Metal, and where a kernel does not work.

They decide on the device, like the kernels: nothing is read back, and an expert whose record is missing adds nothing.
Each chosen expert's record is copied out of the arena, once for each kind of record that its layer has.
"""

import math

import mlx.core as mx

from .experts import (
    PAGE_WORDS,
    PROJECTIONS,
    Arena,
    Array,
    Chosen,
    ExpertShape,
    LayerExperts,
    RecordKind,
    Router,
    padded,
)


def route(router: Router, logits: Array, layer: LayerExperts, table: Array, given: Array | None = None) -> Chosen:
    """The chosen experts of each token, from logits (tokens, experts), and where their records are.

    table: int32 (experts, padded): the page of each expert's record, -1 without one. given: see choose().
    """
    ids, weights = choose(router, logits, given)
    return placed(ids, weights, layer, table)


def placed(ids: Array, weights: Array, layer: LayerExperts, table: Array) -> Chosen:
    """Chosen experts (tokens, places), and where their records are."""
    ids = padded(mx, ids.reshape(-1), -1)
    at = mx.maximum(ids, 0)
    pages = mx.where(ids >= 0, mx.take(table, at), -1)
    return Chosen(ids, padded(mx, weights.reshape(-1)), pages, mx.take(layer.kind_of, at))


def choose(router: Router, logits: Array, given: Array | None = None) -> tuple[Array, Array]:
    """The chosen experts of each token, -1 without one, and their routing weights, both (tokens, places).

    given: int32 (tokens, n), the experts to choose from, with -1 for none; None: all.
    """
    logits = logits * router.logits_scale if router.logits_scale != 1 else logits
    if router.score == "sparsemixer":
        ids, weights = _sparsemixer(router, logits)
        return ids, weights * router.scale
    if router.score == "sqrtsoftplus":
        scores = mx.sqrt(mx.logaddexp(logits, 0.0))
    else:
        scores = mx.sigmoid(logits) if router.score == "sigmoid" else mx.softmax(logits, axis=-1, precise=True)
    worth = scores if router.bias is None else scores + router.bias
    if given is not None:
        listed = (given[:, :, None] == mx.arange(router.experts)).any(axis=1)
        worth = mx.where(listed, worth, -math.inf)
    if router.groups > 1:
        worth = mx.where(_in_best_groups(router, worth), worth, -math.inf)
    ids = _best(worth, router.top_k)
    weights = mx.where(ids >= 0, mx.take_along_axis(scores, mx.maximum(ids, 0), axis=-1), 0.0)
    if router.bias is not None:
        ids, weights = _sorted(ids, weights, by_number=True)
    if router.renormalise:
        total = weights[:, :1]
        for k in range(1, router.top_k):
            total = total + weights[:, k : k + 1]
        weights = weights / (total + router.sum_eps)
    weights = weights * router.scale
    if router.expert_scale is not None:
        weights = weights * mx.take(router.expert_scale, mx.maximum(ids, 0))
        ids, weights = _sorted(ids, weights, by_number=False)
    return ids, weights


def _best(worth: Array, count: int) -> Array:
    """The indices of the largest values of each row above -inf, int32 (rows, count), -1 if there are too few; ties go
    to the lower index."""
    found = []
    for _ in range(count):
        at = mx.argmax(worth, axis=-1, keepdims=True).astype(mx.int32)
        found.append(mx.where(mx.take_along_axis(worth, at, axis=-1) > -math.inf, at, -1))
        worth = mx.put_along_axis(worth, at, mx.array(-math.inf), axis=-1)
    return mx.concatenate(found, axis=-1)


def _sorted(ids: Array, weights: Array, by_number: bool) -> tuple[Array, Array]:
    """The places of each token by weight, the largest first; ties go to the lower number, or stay in their order."""
    places = mx.arange(ids.shape[1])
    one, other = ids[:, :, None], ids[:, None, :]
    tie = other < one if by_number else (places[None, :] < places[:, None])[None]
    before = (weights[:, None, :] > weights[:, :, None]) | ((weights[:, None, :] == weights[:, :, None]) & tie)
    none = (one < 0) & (places[None, :] < places[:, None])[None]
    before = mx.where(other < 0, none, (one < 0) | before)
    rank = before.astype(mx.int32).sum(-1)
    return mx.put_along_axis(ids, rank, ids, axis=-1), mx.put_along_axis(weights, rank, weights, axis=-1)


def _in_best_groups(router: Router, worth: Array) -> Array:
    """Whether each expert is in one of the best groups, (tokens, experts)."""
    found = []
    for group in range(router.groups):
        own = mx.where(router.group_of == group, worth, -math.inf)
        best = mx.max(own, axis=-1, keepdims=True)
        if router.top2sum:
            at = mx.argmax(own, axis=-1, keepdims=True)
            second = mx.max(mx.put_along_axis(own, at, mx.array(-math.inf), axis=-1), axis=-1, keepdims=True)
            best = mx.where(second > -math.inf, best + second, best)
        found.append(best)
    best = mx.concatenate(found, axis=-1)
    best = mx.where(best > -math.inf, best, -3e38)  # so that a group without experts is chosen last, not never
    chosen = _best(best, router.top_groups)
    return (chosen[:, :, None] == router.group_of[None, None]).any(axis=1)


def _sparsemixer(router: Router, logits: Array) -> tuple[Array, Array]:
    ids, weights, left = [], [], logits
    for _ in range(router.top_k):
        at = mx.argmax(left, axis=-1, keepdims=True).astype(mx.int32)
        top = mx.take_along_axis(left, at, axis=-1)
        near = ~((top - left) / mx.maximum(mx.abs(left), top) > router.threshold) & (left > -math.inf)
        ids.append(at)
        weights.append(1 / mx.where(near, mx.exp(left - top), 0.0).sum(-1, keepdims=True))
        left = mx.put_along_axis(left, at, mx.array(-math.inf), axis=-1)
    return _sorted(mx.concatenate(ids, axis=-1), mx.concatenate(weights, axis=-1), by_number=False)


def experts(shape: ExpertShape, layer: LayerExperts, arena: Arena, x: Array, chosen: Chosen, residual: Array) -> Array:
    """residual (tokens, dim) plus the weighted sum of the chosen experts' outputs for x (tokens, dim)."""
    tokens, dim = x.shape
    count = layer.top_k
    pages, kinds = chosen.pages[: tokens * count], chosen.kinds[: tokens * count]
    inputs = mx.repeat(x, count, axis=0)[:, None]  # (places, 1, dim)
    outputs = mx.zeros((tokens * count, dim))
    for number in layer.present:
        own = (kinds == number) & (pages >= 0)
        kind = layer.kinds[number]
        records = records_at(arena, mx.where(own, pages, 0), kind)
        outputs = mx.where(own[:, None], expert(shape, kind, records, inputs)[:, 0], outputs)
    there = (pages >= 0).reshape(tokens, count, 1)
    outputs, weights = outputs.reshape(tokens, count, dim), chosen.weights[: tokens * count].reshape(tokens, count, 1)
    for place in range(count):
        more = weights[:, place] * outputs[:, place]
        residual = mx.where(there[:, place], residual + more, residual)
    return residual


def records_at(arena: Arena, pages: Array, kind: RecordKind) -> Array:
    """Copies of the records of a kind that begin at `pages` (n,), uint32 (n, words)."""
    count = kind.pages + bool(arena.base)
    rows = pages[:, None] + mx.arange(count)
    words = mx.take(arena.words, rows.reshape(-1), axis=0).reshape(len(pages), -1)
    return words[:, arena.base : arena.base + kind.pages * PAGE_WORDS]


def record_at(arena: Arena, page: int, kind: RecordKind) -> Array:
    """The record of a kind that begins at a page, uint32 (1, words), where it is."""
    words = arena.words[page : page + kind.pages + bool(arena.base)].reshape(1, -1)
    return words[:, arena.base : arena.base + kind.pages * PAGE_WORDS]


def expert(shape: ExpertShape, kind: RecordKind, records: Array, x: Array) -> Array:
    """The outputs (n, rows, dim) of experts for x (n, rows, dim). records: of this kind, uint32 (n, words)."""
    gate = None if shape.activation == "relu2" else product(shape, kind, 0, records, x)
    return product(shape, kind, 2, records, activated(shape, gate, product(shape, kind, 1, records, x)))


def activated(shape: ExpertShape, gate: Array | None, up: Array) -> Array:
    """The input of an expert's down projection."""
    if gate is None:
        return mx.square(mx.maximum(up, 0))
    if shape.activation == "silu":
        return gate * mx.sigmoid(gate) * up
    if shape.activation == "gelu_tanh":
        return gate * mx.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)) * up
    gate = mx.minimum(gate, shape.limit)
    return gate * mx.sigmoid(shape.alpha * gate) * (mx.clip(up, -shape.limit, shape.limit) + shape.shift)


def product(shape: ExpertShape, kind: RecordKind, projection: int, records: Array, x: Array) -> Array:
    """x (n, rows, cols) times the transposed gate, up or down of records (n, words), with its output bias."""
    name, (codec, width, group) = PROJECTIONS[projection], kind.encodings[projection]
    out = shape.dim if name == "down" else shape.hidden

    def part(of: str, dtype) -> Array:
        offset, nbytes = kind.parts[f"{name}.{of}"]
        return records[:, offset // 4 : (offset + nbytes + 3) // 4].view(dtype)[:, : nbytes // dtype.size]

    def matrix(of: str, dtype) -> Array:
        return part(of, dtype).reshape(len(records), out, -1)

    if codec == "bfloat16":
        y = x @ matrix("codes", mx.bfloat16).astype(mx.float32).swapaxes(-1, -2)
    elif codec == "mxfp4":
        codes, scales = matrix("codes", mx.uint32), matrix("scales", mx.uint8)
        y = mx.quantized_matmul(x, codes, scales, transpose=True, group_size=group, bits=width, mode="mxfp4")
    else:
        scales, biases = (matrix(of, mx.bfloat16).astype(mx.float32) for of in ("scales", "biases"))
        codes = matrix("codes", mx.uint32)
        y = mx.quantized_matmul(x, codes, scales, biases, transpose=True, group_size=group, bits=width)
    return y + part("output_bias", mx.float32)[:, None] if f"{name}.output_bias" in kind.parts else y
