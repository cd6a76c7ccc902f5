"""The backward pass through the MLPs of runtime/reference.py, for calibration: how a layer's change moves predictions.

Gradients are of a log-likelihood with respect to the residual stream. They are propagated back through experts,
routers, shared experts, dense layers and norms, and pass attention unchanged, or mixed where it mixes streams: the
influence of a token on later ones is neglected. derivatives.py has elementary functions, mixes.py residual streams of
several streams. Arrays: g (samples, rows, dim), one gradient for each sampled label.
"""

import numpy as np

from ...runtime import reference
from ...runtime.config import ModelConfig
from ...runtime.layers import sparsemixer
from . import mixes
from .derivatives import rms_norm_backward, softmax_backward, swish


def head_backward(config: ModelConfig, weights, x: np.ndarray, samples: int, random) -> np.ndarray:
    """Gradients, (samples, rows, dim), of the log-likelihood of labels drawn from the model's own predictions.

    x: (rows, dim), the residual stream after the last layer. The mean square of the gradients along a direction is the
    curvature of the KL divergence along it (the Fisher information).
    """
    head = weights.trunk("embedding" if config.tied_head else "head")
    logits = reference.head(config, weights, x)
    p = reference.softmax(logits)
    ends, rows = np.cumsum(p, axis=-1), np.arange(len(x))
    g = np.empty((samples, *x.shape), np.float32)
    for sample in range(samples):
        drawn = random.random(len(x), np.float32)[:, None] * ends[:, -1:]
        labels = np.minimum((ends < drawn).sum(axis=-1), config.vocab - 1)
        slope = -p
        slope[rows, labels] += 1
        if config.logits_cap:
            slope *= 1 - np.square(logits / config.logits_cap)
        slope *= config.logits_scale
        g[sample] = input_backward(config, weights, "output", x, slope @ head)
    return g


def input_backward(config: ModelConfig, weights, name: str, x, g):
    """Backward of reference.block_input: x (rows, width), g (..., rows, dim)."""
    if config.streams:
        return mixes.input_backward(config.streams, weights, name, x, config.norm_eps, g)
    return norm_backward(config, x, weights.trunk(f"{name}_norm"), g)


def output_backward(config: ModelConfig, weights, name: str, x, y, g):
    """Backward of what adds y (rows, dim) to the residual stream x (rows, width): the gradients at y (..., rows, dim)
    and at x (..., rows, width), given g (..., rows, width) at their sum."""
    if config.streams:
        return mixes.output_backward(config.streams, weights, name, x, y, config.norm_eps, g)
    return g, g


def norm_backward(config: ModelConfig, x, weight, g):
    """Backward of reference.norm: x (rows, dim), g (..., rows, dim)."""
    if config.norm == "layer":  # whose shift takes a mean away from the gradient, too
        g = g * weight
        x, g = x - np.mean(x, axis=-1, keepdims=True), g - np.mean(g, axis=-1, keepdims=True)
        weight = 1
    return rms_norm_backward(x, weight, config.norm_eps, g)


def mlp_backward(config: ModelConfig, h, matrices, g, bias=reference.NO_BIAS):
    """Backward of reference.expert: the output (rows, dim), and the gradient (samples, rows, dim) at h (rows, dim)."""
    w_gate, w_up, w_down = matrices
    gate = reference.plus(h @ w_gate.T, bias[0]) if config.gated else None
    y, of_gate, of_up = gated(config, gate, reference.plus(h @ w_up.T, bias[1]))
    inner = g @ w_down
    back = (inner * of_up) @ w_up
    return reference.plus(y @ w_down.T, bias[2]), back if of_gate is None else (inner * of_gate) @ w_gate + back


def gated(config: ModelConfig, gate, up):
    """reference.gated(), and its derivatives by gate, None if there is no gate, and by up."""
    if config.activation == "relu2":
        relu = np.maximum(up, 0)
        return np.square(relu), None, 2 * relu
    if config.activation == "clamped_swiglu":
        alpha, limit = config.swiglu_alpha, config.swiglu_limit
        act, slope = swish(np.minimum(gate, limit), alpha)
        linear = np.clip(up, -limit, limit) + config.swiglu_shift
        return act * linear, linear * slope * (gate <= limit), act * (np.abs(up) <= limit)
    act, slope = activation(config, gate)
    return act * up, up * slope, act


def activation(config: ModelConfig, x):
    """The activation and its derivative."""
    if config.activation == "silu":
        return swish(x, 1)
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
    tanh = np.tanh(inner)
    slope = np.float32(np.sqrt(2 / np.pi)) * (1 + np.float32(3 * 0.044715) * np.square(x))
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - np.square(tanh)) * slope


def router_backward(config: ModelConfig, router, h, scores, chosen, weights, g_weights, expert_scale=None):
    """The gradient (samples, rows, dim) at h, given g_weights (samples, rows, top_k) at the routing weights.

    router: (experts, dim); h: (rows, dim); scores: (rows, experts); chosen, weights: (rows, top_k), as
    reference.route() gives them; expert_scale: (experts,), if the router has it.
    """
    if config.router.logits_scale != 1:
        router = router * config.router.logits_scale
    if config.router.score == "sparsemixer":
        picked = sparsemixer.choose(h @ router.T, chosen.shape[1], config.router.threshold)
        return sparsemixer.backward(*picked, g_weights * config.routing_scale) @ router
    rule, there = config.router, chosen >= 0
    its = np.take_along_axis(scores, chosen.clip(0), axis=-1) * there
    scale = config.routing_scale * (1 if expert_scale is None else expert_scale[chosen.clip(0)])
    if rule.renormalise:
        mean = (g_weights * weights).sum(axis=-1, keepdims=True)
        g_its = (g_weights * scale - mean) / (its.sum(axis=-1, keepdims=True) + rule.sum_eps)
    else:
        g_its = g_weights * scale
    g_scores = np.zeros((len(g_weights), *scores.shape), np.float32)
    rows, place = np.nonzero(there)
    g_scores[:, rows, chosen[rows, place]] = g_its[:, rows, place]
    if rule.score == "softmax":
        g_logits = softmax_backward(scores, g_scores)
    elif rule.score == "sqrtsoftplus":
        g_logits = g_scores * -np.expm1(-np.square(scores)) / np.maximum(2 * scores, 1e-20)
    else:
        g_logits = g_scores * scores * (1 - scores)
    return g_logits @ router


def shared_backward(config: ModelConfig, weights, layer: int, h, g):
    """The gradient at h, through the shared expert."""
    prefix = f"layers.{layer}.shared"
    matrices = _matrices(config, weights, prefix)
    g = g * config.residual_scale
    if config.own_norms:
        y = reference.expert(config, h, *matrices)
        g = rms_norm_backward(y, weights.trunk(f"layers.{layer}.shared_post_norm"), config.norm_eps, g)
    if not config.shared_gate:
        return mlp_backward(config, h, matrices, g)[1]
    row = weights.trunk(f"{prefix}_router")  # (1, dim)
    gate = reference.sigmoid(h @ row.T)  # (rows, 1)
    y, back = mlp_backward(config, h, matrices, g * gate)
    return back + (g * y).sum(axis=-1, keepdims=True) * gate * (1 - gate) * row


def dense_backward(config: ModelConfig, weights, layer: int, h, g):
    """The gradient at h, through the MLP of a dense layer."""
    matrices = _matrices(config, weights, f"layers.{layer}.dense")
    g = g * config.residual_scale
    if config.post_norms:
        y = reference.expert(config, h, *matrices)
        g = rms_norm_backward(y, weights.trunk(f"layers.{layer}.mlp_post_norm"), config.norm_eps, g)
    return mlp_backward(config, h, matrices, g)[1]


def _matrices(config: ModelConfig, weights, prefix: str) -> list[np.ndarray | None]:
    """gate, None if there is none, up and down of an MLP of the trunk."""
    gate = weights.trunk(f"{prefix}.gate") if config.gated else None
    return [gate, weights.trunk(f"{prefix}.up"), weights.trunk(f"{prefix}.down")]


def sum_backward(config: ModelConfig, weights, layer: int, a, y, g):
    """Backward from what the MoE block adds to the residual stream, given a (rows, width) before and the experts' sum
    y (rows, dim).

    Returns the gradients at the experts' sum and at the shared expert's output, both like g (samples, rows, dim).
    """
    if config.post_norms:
        x = reference.with_shared(config, weights, layer, a, y)
        g = rms_norm_backward(x, weights.trunk(f"layers.{layer}.mlp_post_norm"), config.norm_eps, g)
    if not config.own_norms:
        return g, g
    return rms_norm_backward(y, weights.trunk(f"layers.{layer}.experts_post_norm"), config.norm_eps, g), g
