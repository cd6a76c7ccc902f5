"""How many experts a token should choose in each layer after experts were dropped (Collaborative Compression).

A token whose experts were dropped is routed to the next best ones, which the model was not trained to use for it:
choosing fewer may be closer to the source. A smaller top_k is tried in one layer at a time, with experts in full
precision, and kept where it lowers the KL divergence.
"""

from dataclasses import dataclass, replace

import numpy as np

from ...runtime import reference
from ...runtime.config import ModelConfig
from ...runtime.score import log_softmax
from ..passes import forward
from ..rounding.round_layers import cut_router
from .sensitivity import Form

SEQUENCES = 32  # of calibration text, spread evenly
LOGITS_BYTES = 64_000_000  # memory for the logits of one form


@dataclass(frozen=True, slots=True)
class CutTrunk:
    """A checkpoint's trunk, with the routers reduced to the experts that are kept."""

    checkpoint: object
    config: ModelConfig

    def trunk(self, name: str) -> np.ndarray:
        return cut_router(self.config, name, self.checkpoint.trunk(name))

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self.checkpoint.rows(name, rows)


def adjust_top_k(config: ModelConfig, checkpoint, ids: np.ndarray, new_stream, workers: int, tell) -> tuple[int, ...]:
    """Return the top_k of each layer (0 in a dense layer) for a config with `kept`.

    Try every value from top_k times the share of experts kept, rounded, up to top_k. ids: (sequences, tokens).
    new_stream: (name, rows, columns if not the residual stream's) -> Stream. tell(layers done) reports progress.
    """
    ids = ids[np.unique(np.linspace(0, len(ids) - 1, min(len(ids), SEQUENCES)).astype(np.int64))]
    full = replace(config, kept=(), layer_top_k=())
    source, base = Form(checkpoint), Form(CutTrunk(checkpoint, config))
    tried = Form(base.weights)  # the rows of all trials so far, concatenated
    for form in (source, base):
        form.x = new_stream("top-k", ids.size)
        forward.embed(config, form.weights, ids, form.x)
    trials = []  # (layer, top_k)
    for layer in range(config.layer_count):
        present = [(full, source), (config, base), *([(config, tried)] if trials else [])]
        for its, form in present:
            form.enter(its, layer, ids, new_stream)
        new = []
        if config.has_experts(layer):
            for top_k in range(fewest(config, layer), config.top_k):
                trials.append((layer, top_k))
                trial = replace(config, layer_top_k=(top_k,) * config.layer_count)
                new.append((trial, _beside(trial, base, layer, ids, new_stream)))
            _add_experts(full, checkpoint, layer, present + new, workers)
        for trial, form in new:
            form.y = forward.finish_mlp(trial, form.weights, layer, form.a, form.y, new_stream)
        for its, form in present:
            form.leave(its, layer, new_stream)
        tried.x = _joined(tried.x, [form.y for _, form in new], new_stream)
        tell(layer + 1)
    found = _divergence(config, source, [base, tried], ids.size)
    for form in (source, base, tried):
        if form.x is not None:
            form.x.close()
    best = dict.fromkeys(config.moe_layers, (found[0], config.top_k))
    for (layer, top_k), nats in zip(trials, found[1:], strict=True):
        best[layer] = min(best[layer], (nats, top_k))
    return tuple(best[layer][1] if layer in best else 0 for layer in range(config.layer_count))


def fewest(config: ModelConfig, layer: int) -> int:
    """The smallest top_k that is tried."""
    return max(round(config.top_k * config.experts_of(layer) / config.experts), 1)


def _beside(config: ModelConfig, base: Form, layer: int, ids: np.ndarray, new_stream) -> Form:
    """A copy of `base` inside a layer, routed by another config."""
    form = Form(base.weights, a=base.a, y=new_stream("top-k-next", base.y.rows, base.y.dim))
    for start, stop in base.y.blocks():
        form.y.write(start, base.y.read(start, stop))
    form.routing = forward.route(config, base.weights, layer, base.a, ids)
    return form


def _add_experts(
    full: ModelConfig, checkpoint, layer: int, forms: list[tuple[ModelConfig, Form]], workers: int
) -> None:
    norms = forward.Held(checkpoint)

    def one(expert: int):
        matrices, outputs = checkpoint.expert(layer, expert), []
        bias = reference.expert_bias(full, checkpoint, layer, expert)
        for config, form in forms:
            number = config.number_of(layer, expert)
            if number is not None:
                rows, weight = form.routing.rows_of(number)
                parts = forward.expert_parts(full, norms, layer, form.a, matrices, bias, rows, weight)
                outputs.append((form.y, forward.held(parts, len(rows), full.dim)))
        return outputs

    for outputs in forward.in_order(workers, one, range(full.experts)):
        for into, parts in outputs:
            forward.add_all(into, parts)


def _joined(before, new: list, new_stream):
    """Concatenate the streams and close them; None if there are none."""
    parts = [stream for stream in (before, *new) if stream is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    out, at = new_stream("top-k-tried", sum(stream.rows for stream in parts)), 0
    for stream in parts:
        for start, stop in stream.blocks():
            out.write(at + start, stream.read(start, stop))
        at += stream.rows
        stream.close()
    return out


def _divergence(config: ModelConfig, source: Form, forms: list[Form], rows: int) -> list[float]:
    """KL divergence from the source of each block of `rows` rows of the forms, in nats a token."""
    step = max(LOGITS_BYTES // (8 * config.vocab), 1)
    held, found = forward.Held(source.weights), []
    for form in forms:
        for first in range(0, form.x.rows if form.x else 0, rows):
            total = 0.0
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                clean = log_softmax(reference.head(config, held, source.x.read(start, stop)))
                moved = log_softmax(reference.head(config, held, form.x.read(first + start, first + stop)))
                total += float((np.exp(clean) * (clean - moved)).sum())
            found.append(total / rows)
    return found
