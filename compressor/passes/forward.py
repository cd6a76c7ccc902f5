"""The forward pass of one layer over streams: the steps of runtime/reference.py, in blocks that fit in memory."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ...runtime import reference
from ...runtime.config import ModelConfig
from .streams import BLOCK_ROWS, Stream

PART_BYTES = 64_000_000  # maximum of one expert's output that a worker holds


@dataclass(slots=True)
class Routing:
    """The routing of a layer: chosen and weights (rows, top_k), and scores (rows, experts) before the choice."""

    chosen: np.ndarray
    weights: np.ndarray
    scores: np.ndarray

    def rows_of(self, expert: int, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The rows among the first `rows` that chose the expert, and their routing weights."""
        found, place = np.nonzero(self.chosen[:rows] == expert)
        return found, self.weights[found, place]

    def nearest_rows(self, expert: int, count: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` other rows among the first `rows`, those closest to choosing the expert, and the routing weights they
        would have given it."""
        ranked = np.argsort(-self.scores[:rows, expert], kind="stable")
        others = ranked[~(self.chosen[ranked] == expert).any(axis=1)][:count]
        others = np.sort(others)
        of_chosen = np.take_along_axis(self.scores[others], self.chosen[others].clip(0), axis=1)
        of_chosen = (of_chosen * (self.chosen[others] >= 0)).sum(axis=1)
        share = self.scores[others, expert] / np.maximum(of_chosen, 1e-30)
        return others, share * self.weights[others].sum(axis=1)


def embed(config: ModelConfig, weights, ids: np.ndarray, out: Stream) -> None:
    """Fill `out` with the input of the first layer for ids (sequences, tokens)."""
    trunk, flat = Held(weights), ids.reshape(-1)
    for start, stop in out.blocks():
        out.write(start, reference.embed(config, trunk, flat[start:stop]))


def add_ngrams(config: ModelConfig, weights, layer: int, x: Stream, ids: np.ndarray) -> None:
    """Add the layer's embeddings of n-grams, if it has any, to its input x. ids (sequences, tokens): of x's sequences,
    which may be these several times."""
    if config.layers[layer].ngrams is None:
        return
    trunk, tokens = Held(weights), ids.shape[1]
    for start, stop in x.blocks(of=tokens):
        block = x.read(start, stop).reshape(-1, tokens, x.dim)
        its = ids[np.arange(start // tokens, stop // tokens) % len(ids)]
        x.write(start, reference.with_ngrams(config, trunk, layer, block, its).reshape(-1, x.dim))


def attention(config: ModelConfig, weights, layer: int, x: Stream, tokens: int, out: Stream) -> None:
    """Write out = x + attention(x), for sequences of `tokens` rows, or x if the layer has no attention."""
    trunk = Held(weights)
    for start, stop in x.blocks(of=tokens):
        block = x.read(start, stop).reshape(-1, tokens, x.dim)
        if config.layers[layer].attention:
            y = reference.attention_block(config, trunk, layer, block)
            block = reference.with_attention(config, trunk, layer, block, y)
        out.write(start, block.reshape(-1, x.dim))


def route(config: ModelConfig, weights, layer: int, a: Stream, ids: np.ndarray) -> Routing:
    """Route the rows of `a`, the residual stream after the layer's attention. ids: (sequences, tokens) of its
    sequences, as in add_ngrams()."""
    trunk, parts, flat = Held(weights), [], ids.reshape(-1)
    for start, stop in a.blocks():
        h = reference.router_input(config, trunk, layer, a.read(start, stop))
        scores = reference.router_scores(config, trunk, layer, h)
        its = flat[np.arange(start, stop) % len(flat)]
        parts.append((*reference.route(config, trunk, layer, h, ids=its), scores))
    return Routing(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def common_mlp(config: ModelConfig, weights, layer: int, a: Stream, out: Stream) -> None:
    """Write to `out` what experts' outputs are added to, or the layer's whole output if it has none.

    out = a + the output of the dense MLP or the shared expert, if the layer has one; or zeros, if the experts' sum is
    changed before the residual stream gets it. Without any MLP it is a.
    """
    trunk = Held(weights)
    for start, stop in a.blocks():
        block = a.read(start, stop)
        if config.layers[layer].mlp is None:
            block = reference.scaled(config, trunk, layer, block)
        elif not config.has_experts(layer):
            y = reference.dense_block(config, trunk, layer, reference.mlp_input(config, trunk, layer, block))
            block = reference.with_mlp(config, trunk, layer, block, y)
        elif config.sums_experts:
            block = np.zeros((len(block), out.dim), np.float32)
        elif config.shared_hidden:
            block += reference.shared_expert(config, trunk, layer, reference.mlp_input(config, trunk, layer, block))
        out.write(start, block)


def sums_dim(config: ModelConfig, layer: int) -> int:
    """The columns of the stream that common_mlp() writes."""
    return config.dim if sums_experts(config, layer) else config.width


def finish_mlp(config: ModelConfig, weights, layer: int, a: Stream, y: Stream, new_stream) -> Stream:
    """The layer's output, given what common_mlp() wrote plus the experts' outputs: y itself with that, or, if it has
    other columns, a new stream; y is then closed."""
    if not sums_experts(config, layer):
        return y
    out = y if y.dim == a.dim else new_stream("next", y.rows)
    finish_rows(config, weights, layer, a, y, out)
    if out is not y:
        y.close()
    return out


def finish_rows(config: ModelConfig, weights, layer: int, a: Stream, y: Stream, out: Stream) -> None:
    """Write the layer's output to `out`, which may be y if it has its columns."""
    trunk = Held(weights)
    for start, stop in y.blocks():
        out.write(start, finished(config, trunk, layer, a.read(start, stop), y.read(start, stop)))


def finished(config: ModelConfig, weights, layer: int, a: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The same for some rows, (rows, dim)."""
    if not sums_experts(config, layer):
        return y
    added = reference.with_shared(config, weights, layer, a, y)
    added = reference.post_norm(config, weights, f"layers.{layer}.mlp_post_norm", added)
    return reference.with_mlp(config, weights, layer, a, added)


def sums_experts(config: ModelConfig, layer: int) -> bool:
    """Whether what experts' outputs are added to is not the residual stream."""
    return config.sums_experts and config.has_experts(layer)


def output_scales(config: ModelConfig, weights, layer: int, a: np.ndarray, y: np.ndarray):
    """How much a change of the experts' sum y (rows, dim) changes the layer's output: factors (rows,) and (dim,).

    Norms also take away the part of a change that is parallel to what they normalise; this is neglected.
    """
    of_rows, of_dims = np.ones(len(a), np.float32), np.ones(config.dim, np.float32)
    if not sums_experts(config, layer):
        return of_rows, of_dims

    def through(x: np.ndarray, name: str) -> None:
        nonlocal of_rows, of_dims
        of_rows = of_rows / np.sqrt(np.square(x).mean(-1) + config.norm_eps)
        of_dims = of_dims * weights.trunk(f"layers.{layer}.{name}")

    if config.own_norms:
        through(y, "experts_post_norm")
    if config.post_norms:
        through(reference.with_shared(config, weights, layer, a, y), "mlp_post_norm")
    if config.streams:
        name = f"layers.{layer}.mlp"
        of_rows = np.sqrt(np.square(config.streams.shares(weights, name, a, config.norm_eps)).sum(-1))
    return of_rows, reference.scaled(config, weights, layer, of_dims)


def expert_input(config: ModelConfig, weights, layer: int, a: Stream, rows: np.ndarray) -> np.ndarray:
    """The normed input of the layer's experts for some rows, (len(rows), dim)."""
    return reference.mlp_input(config, weights, layer, a.take(rows))


def expert_parts(
    config: ModelConfig, norms, layer: int, a: Stream, matrices, bias, rows: np.ndarray, weight: np.ndarray
):
    """Yield one expert's weighted output in blocks, as (rows, values (rows, dim)).

    matrices: gate, up and down; bias: what is added to the product of each, as reference.expert_bias() gives it.
    """
    for start in range(0, len(rows), BLOCK_ROWS):
        at = slice(start, start + BLOCK_ROWS)
        h = expert_input(config, norms, layer, a, rows[at])
        yield rows[at], reference.expert(config, h, *matrices, bias=bias) * weight[at, None]


def held(parts, rows: int, dim: int):
    """The blocks as a list if they fit in PART_BYTES, else the iterator, which computes them on demand."""
    return list(parts) if 4 * rows * dim <= PART_BYTES else parts


def add_all(stream: Stream, parts) -> None:
    for rows, values in parts:
        stream.add(rows, values)


def in_order(workers: int, function, items):
    """Yield function(item) for each item in order, computed by `workers` threads, with few results held at a time.

    One thread consumes the results, so sums are the same for any number of workers.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # an item may take minutes; an interrupted run does not wait for it
        pool.shutdown(wait=not waiting, cancel_futures=True)


def head_blocks(config: ModelConfig, weights, x: Stream, rows: int, first: int = 0):
    """Yield (start, stop, logits) for the stream after the last layer, from row `first`, at most `rows` at a time."""
    trunk = Held(weights)
    for start in range(first, x.rows, rows):
        stop = min(start + rows, x.rows)
        yield start, stop, reference.head(config, trunk, x.read(start, stop))


class Held:
    """Weights whose trunk tensors are read once and kept, for one step of one layer."""

    def __init__(self, weights):
        self._weights, self._trunk = weights, {}

    def trunk(self, name: str) -> np.ndarray:
        if name not in self._trunk:
            self._trunk[name] = self._weights.trunk(name)
        return self._trunk[name]

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of a table, which are not kept."""
        return self._weights.rows(name, rows)
