"""The loss of leaving out a token's lighter experts, estimated on calibration text without running the pruned model.

The loss of keeping the first r experts of a token in one layer is the expected KL divergence to second order: the mean
over labels of (g . e)^2 / 2, where e is the change of the layer's output and g the gradient of the log-likelihood of a
label sampled from the model's predictions. As e is a sum over experts, only g . (weighted output) of each expert is
stored for a token; its mean outer product is the experts' Gram matrix in the metric of the predictions.
"""

from dataclasses import dataclass

import numpy as np

from ...runtime import reference
from ...runtime.config import ModelConfig
from ...runtime.layers.hyper import HyperConnections
from ..passes import adjoint, forward, mixes
from ..passes.derivatives import rms_norm_backward
from ..passes.streams import Stream

SAMPLES = 8  # labels for each token
BLOCK = 512  # rows of an expert whose gradients are held at a time


@dataclass(slots=True)
class LayerLosses:
    """The losses of one layer on calibration text, one row per token."""

    attended: Stream  # (rows, width) residual stream before the layer's MLP
    weights: np.ndarray  # (rows, top_k), heaviest first
    losses: np.ndarray  # (rows, top_k) nats when only the first 1, 2, ... experts are kept; the last is 0

    @property
    def share(self) -> np.ndarray:
        """The routing weights relative to their sum, (rows, top_k)."""
        return self.weights / self.weights.sum(axis=-1, keepdims=True)

    def inputs(self, config: ModelConfig, weights, layer: int) -> np.ndarray:
        """The inputs of a mask router, (rows, dim + 2 top_k + 1)."""
        h = forward.expert_input(config, forward.Held(weights), layer, self.attended, np.arange(self.attended.rows))
        return reference.mask_inputs(h, self.weights)


def losses_of(config: ModelConfig, weights: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Loss of keeping the first 1, 2, ..., top_k experts of each row, (rows, top_k), in nats.

    weights: (rows, top_k). q: (samples, rows, top_k), the dot product of each gradient and expert's weighted output.
    """
    kept = np.cumsum(weights, axis=-1)
    found = []
    for count in range(1, weights.shape[1] + 1):
        stays = np.zeros_like(weights)
        scale = kept[:, -1] / np.maximum(kept[:, count - 1], 1e-20) if config.router.renormalise else 1.0
        stays[:, :count] = np.broadcast_to(scale, len(weights))[:, None]
        found.append(np.square((q * (1 - stays)).sum(-1)).mean(0) / 2)
    return np.stack(found, axis=-1)


def collect(config: ModelConfig, weights, ids: np.ndarray, new_stream, workers: int, seed: int, tell) -> dict:
    """LayerLosses by layer with experts, for ids (sequences, tokens). tell(layers done, of) reports progress.

    The caller closes their streams.
    """
    tokens, total = ids.shape[1], 2 * config.layer_count
    x = new_stream("input", ids.size)
    forward.embed(config, weights, ids, x)
    attended, sums, routings, mixings = [], [], [], []
    for layer in range(config.layer_count):
        name = f"sums-{layer}" if forward.sums_experts(config, layer) else "output"
        a, y = new_stream(f"attended-{layer}", x.rows), new_stream(name, x.rows, forward.sums_dim(config, layer))
        forward.add_ngrams(config, weights, layer, x, ids)
        mixings.append(_mixing(config, weights, layer, x, new_stream))
        forward.attention(config, weights, layer, x, tokens, a)
        forward.common_mlp(config, weights, layer, a, y)
        routings.append(None)
        if config.has_experts(layer):
            routings[-1] = forward.route(config, weights, layer, a, ids)
            _add_experts(config, weights, layer, a, y, routings[-1], workers)
        sums.append(None)
        if forward.sums_experts(config, layer):
            sums[-1], y = y, new_stream("output", x.rows)
            forward.finish_rows(config, weights, layer, a, sums[-1], y)
        attended.append(a)
        x.close()
        x = y
        tell(layer + 1, total)
    found, g = {}, new_stream("gradient", SAMPLES * x.rows)
    random = np.random.default_rng(seed)
    for start, stop in x.blocks():
        blocks = adjoint.head_backward(config, forward.Held(weights), x.read(start, stop), SAMPLES, random)
        for sample, block in enumerate(blocks):
            g.write(sample * x.rows + start, block)
    x.close()
    for layer in reversed(range(config.layer_count)):
        back, a, routing = new_stream("gradient", g.rows), attended[layer], routings[layer]
        inner = g if sums[layer] is None else new_stream("inner-gradient", g.rows, config.dim)
        q = _layer_backward(config, weights, layer, a, sums[layer], routing, g, inner, back, workers)
        for stream in {g, inner, sums[layer]} - {None}:
            stream.close()
        g = back
        if mixings[layer] is not None:
            _attention_backward(config, mixings[layer], g)
            mixings[layer].close()
        if q is None:
            a.close()
        else:
            found[layer] = LayerLosses(a, routing.weights, losses_of(config, routing.weights, q))
        tell(2 * config.layer_count - layer, total)
    g.close()
    return dict(sorted(found.items()))


def _mixing(config: ModelConfig, weights, layer: int, x: Stream, new_stream) -> Stream | None:
    """How attention's output finds the streams mixed, (rows, streams * streams), if it does. x: before attention."""
    streams = config.streams
    if not isinstance(streams, HyperConnections) or config.layers[layer].attention is None:
        return None
    held, out = forward.Held(weights), new_stream(f"mixing-{layer}", x.rows, streams.count**2)
    for start, stop in x.blocks():
        its = streams.mixing(held, f"layers.{layer}.attention", x.read(start, stop), config.norm_eps)
        out.write(start, its.reshape(len(its), -1))
    return out


def _attention_backward(config: ModelConfig, mixing: Stream, g: Stream) -> None:
    """Propagate `g` (SAMPLES * rows, width) from the streams after attention to those before it, in place."""
    count = config.streams.count
    for start, stop in g.blocks():
        its = mixing.take(np.arange(start, stop) % mixing.rows).reshape(-1, count, count)
        g.write(start, mixes.pass_backward(config.streams, its, g.read(start, stop)))


def _add_experts(config, weights, layer: int, a: Stream, y: Stream, routing, workers: int) -> None:
    norms = forward.Held(weights)

    def one(expert: int):
        rows, weight = routing.rows_of(expert)
        matrices, bias = weights.expert(layer, expert), reference.expert_bias(config, weights, layer, expert)
        return list(forward.expert_parts(config, norms, layer, a, matrices, bias, rows, weight))

    for parts in forward.in_order(workers, one, range(config.experts_of(layer))):
        forward.add_all(y, parts)


def _layer_backward(config, weights, layer: int, a: Stream, sums, routing, g: Stream, inner: Stream, back, workers):
    """Propagate the gradient `g` at the layer's output to its input, into `back`; both (SAMPLES * rows, dim).

    sums: the experts' sums (rows, dim), if the residual stream gets them changed; the gradient at them goes to `inner`.
    Returns the dot product of the gradient and each expert's weighted output, (SAMPLES, rows, top_k); None for a layer
    without experts.
    """
    rows, held = a.rows, forward.Held(weights)
    for start, stop in g.blocks() if config.streams is None or config.layers[layer].mlp is None else ():
        back.write(start, reference.scaled(config, held, layer, g.read(start, stop)))

    def add(its: np.ndarray, g_h: np.ndarray, norm: str = "mlp_norm") -> None:
        """Add a gradient (SAMPLES, len(its), dim) at the normalised input of some rows."""
        if norm == "mlp_norm":
            add_to_stream(its, adjoint.input_backward(config, held, f"layers.{layer}.mlp", a.take(its), g_h))
        else:
            weight = held.trunk(f"layers.{layer}.{norm}")
            add_to_stream(its, rms_norm_backward(a.take(its), weight, config.norm_eps, g_h))

    def add_to_stream(its: np.ndarray, g: np.ndarray) -> None:
        for sample, values in enumerate(g):
            back.add(sample * rows + its, values)

    def gradient(its: np.ndarray, of: Stream = inner) -> np.ndarray:
        return np.stack([of.take(sample * rows + its) for sample in range(SAMPLES)])

    of_router, of_shared = ("router_norm", "shared_norm") if config.own_norms else ("mlp_norm", "mlp_norm")
    for start in range(0, rows if sums else 0, BLOCK):
        its = np.arange(start, min(start + BLOCK, rows))
        g_y, before, y = reference.scaled(config, held, layer, gradient(its, g)), a.take(its), sums.take(its)
        added = reference.with_shared(config, held, layer, before, y) if config.streams else y
        g_y, g_a = adjoint.output_backward(config, held, f"layers.{layer}.mlp", before, added, g_y)
        if config.streams:
            add_to_stream(its, g_a)
        g_sum, g_shared = adjoint.sum_backward(config, held, layer, before, y, g_y)
        for sample, values in enumerate(g_sum):
            inner.write(sample * rows + start, values)
        if config.shared_hidden:
            h = reference.shared_input(config, held, layer, a.take(its))
            add(its, adjoint.shared_backward(config, held, layer, h, g_shared), of_shared)

    def one(part):
        matrices, bias, its, place = part
        h, g_y = forward.expert_input(config, held, layer, a, its), gradient(its)
        weight = routing.weights[its, place][:, None]
        y, g_h = adjoint.mlp_backward(config, h, matrices, g_y * weight, bias)
        return its, place, (g_y * (y * weight)).sum(-1), g_h

    q = None if routing is None else np.zeros((SAMPLES, rows, routing.chosen.shape[1]), np.float32)
    for its, place, along, g_h in forward.in_order(workers, one, _parts(config, weights, layer, routing)):
        q[:, its, place] = along
        add(its, g_h)
    for start in range(0, rows if config.layers[layer].mlp else 0, BLOCK):
        its = np.arange(start, min(start + BLOCK, rows))
        if routing is None:
            h, g_y = forward.expert_input(config, held, layer, a, its), gradient(its)
            g_y = reference.scaled(config, held, layer, g_y)
            if config.streams:
                y = reference.dense_block(config, held, layer, h)
                g_y, g_a = adjoint.output_backward(config, held, f"layers.{layer}.mlp", a.take(its), y, g_y)
                add_to_stream(its, g_a)
            add(its, adjoint.dense_backward(config, held, layer, h, g_y))
            continue
        h = reference.router_input(config, held, layer, a.take(its))
        g_weights = q[:, its] / np.maximum(routing.weights[its], 1e-20)
        chosen = routing.chosen[its], routing.weights[its]
        router = held.trunk(f"layers.{layer}.router")
        scale = held.trunk(f"layers.{layer}.expert_scale") if config.router.expert_scale else None
        g_h = adjoint.router_backward(config, router, h, routing.scores[its], *chosen, g_weights, scale)
        if config.shared_hidden and not sums:
            g_h += adjoint.shared_backward(config, held, layer, h, gradient(its))
        add(its, g_h, of_router)
    return q


def _parts(config: ModelConfig, weights, layer: int, routing):
    """Yield (matrices, biases, rows, the expert's place in their top-k) for a layer's experts, at most BLOCK rows at a
    time."""
    if routing is None:
        return
    for expert in range(config.experts_of(layer)):
        its, place = np.nonzero(routing.chosen == expert)
        if not len(its):
            continue
        matrices, bias = weights.expert(layer, expert), reference.expert_bias(config, weights, layer, expert)
        for start in range(0, len(its), BLOCK):
            at = slice(start, start + BLOCK)
            yield matrices, bias, its[at], place[at]
