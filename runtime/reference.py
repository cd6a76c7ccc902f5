"""The reference forward pass of a model, in plain float32 array code, with numpy or mlx.core as `xp`.

The engines are tested against it, and calibration runs it layer by layer. It is written to be read beside the C++
engine, with the same sections in the same order, and not for speed.

`weights` is any object with trunk(name) and expert(layer, expert) -> (gate, up, down), numpy float32 arrays by
canonical name, such as a compressor Checkpoint. If it has a method product(name, x), that computes the trunk's
products, so it sees their inputs; grouped_product(name, x) likewise. `x` is (sequences, tokens, dim); `h` is normalised
and flat, (rows, dim), one row per token; `ids` are the token ids of the rows, (rows,), which only layers need that look
experts up by them. Routing is decided on the host, in numpy.
"""

import math

import numpy as np

from .config import ModelConfig
from .layers import sparsemixer
from .layers.arrays import (
    ACTIVATIONS,
    array,
    clamped_swiglu,
    grouped_product,
    layer_norm,
    product,
    rms_norm,
    sigmoid,
    softmax,
    softplus,
)
from .layers.indexer import Choice
from .layers.past import NO_PAST, Past

NO_BIAS = (None, None, None)  # of gate, up and down


def forward(config: ModelConfig, weights, token_ids, xp=np, prune=None):
    """Logits (tokens, vocab) of one sequence (tokens,), or (sequences, tokens, vocab) of a batch of sequences.

    prune: (layer, h, chosen, routing weights) -> the last two (rows, top_k) with -1 and 0 for pruned experts, for
    example by keep_first(). Raises ValueError for a token id outside the vocabulary.
    """
    token_ids = np.asarray(token_ids)
    sequences = np.atleast_2d(token_ids)
    x, choice = embed(config, weights, sequences, xp), Choice()
    for index in range(config.layer_count):
        x = with_ngrams(config, weights, index, x, sequences, xp)
        x = layer(config, weights, index, x, xp, prune, choice, sequences.reshape(-1))
    logits = head(config, weights, x, xp)
    return logits if token_ids.ndim == 2 else logits[0]


def embed(config: ModelConfig, weights, token_ids, xp=np):
    """The input of the first layer, (sequences, tokens, dim), for token_ids (sequences, tokens)."""
    outside = token_ids[(token_ids < 0) | (token_ids >= config.vocab)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} is outside the vocabulary of {config.vocab:,} tokens")
    x = array(weights.trunk("embedding")[token_ids], xp)
    x = x if config.embedding_scale == 1 else x * config.embedding_scale
    return xp.concatenate([x] * config.streams.count, axis=-1) if config.streams else x


def with_ngrams(config: ModelConfig, weights, layer: int, x, token_ids, xp=np, past: Past = NO_PAST):
    """The input x (sequences, tokens, width) of a layer, with embeddings of n-grams where the layer has them.

    token_ids: (sequences, positions), with those before the tokens of x. past: see attention_block().
    """
    its = config.layers[layer].ngrams
    if its is None:
        return x
    trunk, times = _of_layer(weights, layer, xp)
    found = its.rows_of(token_ids)[:, -x.shape[1] :]
    rows = array(weights.rows(f"layers.{layer}.ngrams.table", found.reshape(-1)).reshape(*found.shape[:2], -1), xp)
    return x + its.added(trunk, times, x, rows, config.dim, config.norm_eps, xp, past)


def layer(
    config: ModelConfig,
    weights,
    layer: int,
    x,
    xp=np,
    prune=None,
    choice: Choice | None = None,
    ids=None,
    past: Past = NO_PAST,
):
    """One layer: x (sequences, tokens, width) in and out. choice, past: see attention_block()."""
    if config.layers[layer].attention:
        y = attention_block(config, weights, layer, x, xp, choice, past)
        x = with_attention(config, weights, layer, x, y, xp)
    if config.layers[layer].mlp is None:
        return scaled(config, weights, layer, x, xp)
    if not config.has_experts(layer):
        y = dense_block(config, weights, layer, mlp_input(config, weights, layer, x, xp), xp)
    else:
        y = moe_block(config, weights, layer, x, xp, prune, ids)
    return with_mlp(config, weights, layer, x, y, xp)


def with_attention(config: ModelConfig, weights, layer: int, x, y, xp=np):
    """The residual stream x (..., width) with the output of attention, y (..., dim)."""
    return _added(config, weights, f"layers.{layer}.attention", x, y, xp)


def with_mlp(config: ModelConfig, weights, layer: int, x, y, xp=np):
    """The residual stream x (..., width) with what the MLP adds, y (rows, dim), after the layer."""
    y = y.reshape(*x.shape[:-1], config.dim)
    return scaled(config, weights, layer, _added(config, weights, f"layers.{layer}.mlp", x, y, xp), xp)


def _added(config: ModelConfig, weights, name: str, x, y, xp):
    return x + y if config.streams is None else config.streams.added(weights, name, x, y, config.norm_eps, xp)


def head(config: ModelConfig, weights, x, xp=np):
    """Logits (sequences, tokens, vocab) for the last layer's output x (sequences, tokens, dim)."""
    h = block_input(config, weights, "output", x, xp)
    logits = product(weights, "embedding" if config.tied_head else "head", h, xp)
    if config.head_bias:
        logits = logits + array(weights.trunk("head_bias"), xp)
    logits = logits if config.logits_scale == 1 else logits * config.logits_scale
    return config.logits_cap * xp.tanh(logits / config.logits_cap) if config.logits_cap else logits


def block_input(config: ModelConfig, weights, name: str, x, xp=np):
    """The input of attention, MLP or head, (..., dim), from x (..., width). name: layers.3.attention, output."""
    if config.streams:
        return config.streams.mixed(weights, name, x, config.norm_eps, xp)
    return norm(config, weights, f"{name}_norm", x, xp)


def norm(config: ModelConfig, weights, name: str, x, xp=np):
    """One of the residual stream's norms, by canonical name, of x (..., dim)."""
    if config.norm == "rms":
        return rms_norm(x, weights.trunk(name), config.norm_eps, xp)
    return layer_norm(x, weights.trunk(name), weights.trunk(f"{name}_bias"), config.norm_eps, xp)


def attention_block(
    config: ModelConfig, weights, layer: int, x, xp=np, choice: Choice | None = None, past: Past = NO_PAST
):
    """The output of attention for x (sequences, tokens, dim): norm, attention, output projection.

    choice: the positions that layers with an indexer choose, which the layers after them may use. past: what the layer
    knows of the tokens before.
    """
    its = config.layers[layer].attention
    trunk, times = _of_layer(weights, layer, xp)

    # attention norm
    h = block_input(config, weights, f"layers.{layer}.attention", x, xp)

    # attention, or what the layer has in its place
    y = its.attended(trunk, times, h, config.norm_eps, xp, choice, past)

    # output projection
    y = times(its.output, y) + trunk("o_bias") if its.output_bias else times(its.output, y)
    return _to_residual(config, post_norm(config, weights, f"layers.{layer}.attention_post_norm", y, xp))


def _of_layer(weights, layer: int, xp):
    """Two functions: a tensor of the layer, and the product of a matrix of the layer with x, by groups or not."""

    def trunk(name):
        return array(weights.trunk(f"layers.{layer}.{name}"), xp)

    def times(name, x, grouped=False):
        return (grouped_product if grouped else product)(weights, f"layers.{layer}.{name}", x, xp)

    return trunk, times


def scaled(config: ModelConfig, weights, layer: int, x, xp=np):
    """The residual stream x (..., dim) after a layer, times the layer's factor if it has one."""
    return x * array(weights.trunk(f"layers.{layer}.layer_scale"), xp) if config.layer_scale else x


def mlp_input(config: ModelConfig, weights, layer: int, x, xp=np):
    """The normalised input of a layer's experts or dense MLP, (rows, dim), from x (..., dim)."""
    return block_input(config, weights, f"layers.{layer}.mlp", x, xp).reshape(-1, config.dim)


def router_input(config: ModelConfig, weights, layer: int, x, xp=np):
    """The normalised input of a layer's router, (rows, dim), from x (..., dim)."""
    return _own_input(config, weights, layer, "router_norm", x, xp)


def shared_input(config: ModelConfig, weights, layer: int, x, xp=np):
    """The normalised input of a layer's shared expert, (rows, dim), from x (..., dim)."""
    return _own_input(config, weights, layer, "shared_norm", x, xp)


def _own_input(config: ModelConfig, weights, layer: int, name: str, x, xp):
    if not config.own_norms:
        return mlp_input(config, weights, layer, x, xp)
    return rms_norm(x, weights.trunk(f"layers.{layer}.{name}"), config.norm_eps, xp).reshape(-1, x.shape[-1])


def moe_block(config: ModelConfig, weights, layer: int, x, xp=np, prune=None, ids=None):
    """The output of a layer's MoE block, (rows, dim), for x (..., dim): route, prune, experts, shared expert."""
    h = mlp_input(config, weights, layer, x, xp)
    chosen, routing_weights = route(config, weights, layer, router_input(config, weights, layer, x, xp), xp, ids)
    if prune:
        chosen, routing_weights = prune(layer, h, chosen, routing_weights)
    y = experts(config, weights, layer, h, chosen, routing_weights, xp)
    y = with_shared(config, weights, layer, x, y, xp)
    return post_norm(config, weights, f"layers.{layer}.mlp_post_norm", y, xp)


def with_shared(config: ModelConfig, weights, layer: int, x, y, xp=np):
    """The output of the shared expert for x (..., dim), added to y (rows, dim), the weighted sum of the experts."""
    if config.own_norms:
        y = rms_norm(y, weights.trunk(f"layers.{layer}.experts_post_norm"), config.norm_eps, xp)
    if config.shared_hidden:
        y = y + shared_expert(config, weights, layer, shared_input(config, weights, layer, x, xp), xp)
    return y


def route(config: ModelConfig, weights, layer: int, h, xp=np, ids=None):
    """The experts of each row (on the host) and their routing weights, both (rows, top_k), largest weight first.

    Ties go to the lower index. If the chosen groups, or the entry in the layer's table, have fewer experts than top_k,
    which only dropping experts can cause, the row has fewer: the rest is -1 with weight 0.
    """
    if config.router.score == "sparsemixer":
        logits = np.asarray(router_logits(config, weights, layer, h, xp))
        chosen, p = sparsemixer.choose(logits, config.top_k_of(layer), config.router.threshold)
        return chosen, array(sparsemixer.weights_of(chosen, p), xp) * config.routing_scale
    scores = router_scores(config, weights, layer, h, xp)  # (rows, experts)
    chosen = choose_experts(config, weights, layer, np.asarray(scores), ids)
    routing_weights = xp.take_along_axis(scores, array(chosen.clip(0), xp), axis=-1)
    routing_weights = xp.where(array(chosen >= 0, xp), routing_weights, 0.0)
    if config.router.renormalise:
        routing_weights = routing_weights / (xp.sum(routing_weights, axis=-1, keepdims=True) + config.router.sum_eps)
    if config.router.expert_scale:
        scale = weights.trunk(f"layers.{layer}.expert_scale")[chosen.clip(0)]
        routing_weights = routing_weights * array(scale, xp)
        order = np.argsort(-np.asarray(routing_weights), axis=-1, kind="stable")
        chosen = np.take_along_axis(chosen, order, axis=-1)
        routing_weights = xp.take_along_axis(routing_weights, array(order, xp), axis=-1)
    return chosen, routing_weights * config.routing_scale


def keep_first(config: ModelConfig, chosen, routing_weights, kept):
    """Prune all but the first `kept` (rows,) experts of each row; see keep()."""
    return keep(config, chosen, routing_weights, np.arange(chosen.shape[1]) < np.asarray(kept)[:, None])


def keep(config: ModelConfig, chosen, routing_weights, stays):
    """Prune the experts where stays (rows, top_k) is False; returns (chosen, weights) like route().

    If the model renormalises, the remaining weights are scaled to the former sum.
    """
    weights = np.where(stays, routing_weights, 0).astype(np.float32)
    if config.router.renormalise:
        weights *= routing_weights.sum(-1, keepdims=True) / np.maximum(weights.sum(-1, keepdims=True), 1e-20)
    return np.where(stays, chosen, -1), weights


def kept_by_ratio(routing_weights, threshold: float):
    """The number of experts of each row, (rows,), with at least `threshold` times the largest weight."""
    return (routing_weights >= threshold * routing_weights[:, :1]).sum(-1)


def kept_by_share(routing_weights, threshold: float):
    """The minimum number of experts of each row, (rows,), whose weights reach `threshold` times the sum of all."""
    before = np.cumsum(routing_weights, -1) - routing_weights
    return np.maximum((before < threshold * routing_weights.sum(-1, keepdims=True)).sum(-1), 1)


def mask_inputs(h, routing_weights):
    """The inputs of a mask router, (rows, dim + 2 top_k + 1): h, log shares of the weights, shares, 1."""
    share = np.maximum(routing_weights / routing_weights.sum(-1, keepdims=True), 1e-6)
    return np.concatenate([h, np.log(share), share, np.ones((len(h), 1))], -1).astype(np.float32)


def kept_by_router(mask_router, h, routing_weights, price: float, losses: bool):
    """The number of experts of each row, (rows,), that a mask router (top_k, dim + 2 top_k + 1) keeps.

    It maximises the score minus the price of the experts or, with `losses`, minimises the loss, whose logarithm the
    router predicts, plus their price. h: (rows, dim)."""
    top_k = routing_weights.shape[1]
    values = mask_inputs(h, routing_weights) @ mask_router.T
    if losses:
        values = -np.exp(np.minimum(values, 80))
        values[:, -1] = 0  # keeping all experts has no loss
    values = values - price * np.arange(1, top_k + 1)
    return top_k - np.argmax(values[:, ::-1], -1)  # ties go to the larger number


def router_scores(config: ModelConfig, weights, layer: int, h, xp=np):
    """The score of each expert of a layer for each row, (rows, experts).

    For sparsemixer this is a softmax, which tells how close an expert is to being chosen, not its routing weight.
    """
    logits = router_logits(config, weights, layer, h, xp)
    if config.router.score == "sqrtsoftplus":
        return xp.sqrt(softplus(logits, xp))
    return (sigmoid if config.router.score == "sigmoid" else softmax)(logits, xp)


def router_logits(config: ModelConfig, weights, layer: int, h, xp=np):
    logits = h @ array(weights.trunk(f"layers.{layer}.router"), xp).T
    if config.router.logit_bias:
        logits = logits + array(weights.trunk(f"layers.{layer}.router_logit_bias"), xp)
    return logits if config.router.logits_scale == 1 else logits * config.router.logits_scale


def choose_experts(config: ModelConfig, weights, layer: int, scores: np.ndarray, ids=None) -> np.ndarray:
    """The indices of the best experts in the order of their scores, (rows, top_k); -1 if there are too few.

    Selection bias and groups affect which experts are chosen, but not their order. Raises ValueError if the layer looks
    experts up and there are no ids.
    """
    rule, top_k = config.router, config.top_k_of(layer)
    if config.is_hashed(layer):
        if ids is None:
            raise ValueError(f"layer {layer} looks experts up by token ids, which are not given")
        listed = weights.trunk(f"layers.{layer}.router_table")[ids].astype(np.int64)
        listed = np.sort(listed, axis=-1)  # so that ties go to the lower index
        worth = np.where(listed < 0, -math.inf, np.take_along_axis(scores, listed.clip(0), axis=-1))
        order = np.argsort(-worth, axis=-1, kind="stable")[:, :top_k]
        return np.take_along_axis(listed, order, axis=-1)
    worth = scores + weights.trunk(f"layers.{layer}.router_bias") if rule.selection_bias else scores
    if rule.groups > 1:
        worth = np.where(in_best_groups(config, layer, worth), worth, -math.inf)
    best = np.argsort(-worth, axis=-1, kind="stable")[:, :top_k]
    taken = np.zeros(scores.shape, bool)
    np.put_along_axis(taken, best, np.take_along_axis(worth, best, axis=-1) > -math.inf, axis=-1)
    ordered = np.argsort(-np.where(taken, scores, -math.inf), axis=-1, kind="stable")[:, :top_k]
    return np.where(np.take_along_axis(taken, ordered, axis=-1), ordered, -1)


def in_best_groups(config: ModelConfig, layer: int, worth: np.ndarray) -> np.ndarray:
    """Whether each expert is in one of the top_groups groups with the best scores, (rows, experts).

    A group's score is that of its best expert or the sum of its two best; that of a group without experts is -inf.
    """
    rule, group_of = config.router, np.array(config.groups_of(layer))
    group_worth = np.full((len(worth), rule.groups), -math.inf, worth.dtype)
    for group in np.unique(group_of):
        best = -np.sort(-worth[:, group_of == group], axis=-1)
        group_worth[:, group] = best[:, : 2 if rule.group_score == "top2sum" else 1].sum(axis=-1)
    best_groups = np.argsort(-group_worth, axis=-1, kind="stable")[:, : rule.top_groups]
    return (group_of[:, None] == best_groups[:, None, :]).any(axis=-1)


def experts(config: ModelConfig, weights, layer: int, h, chosen, routing_weights, xp=np):
    """The sum over chosen experts (rows, top_k) of routing weight x expert(h); each expert computes only its own rows.

    An entry of `chosen` outside 0..experts-1 is a pruned expert and adds nothing.
    """
    y = xp.zeros_like(h)
    for index in range(config.experts_of(layer)):
        rows, place = np.nonzero(chosen == index)
        if not rows.size:
            continue
        bias = expert_bias(config, weights, layer, index, xp)
        rows, place = array(rows, xp), array(place, xp)
        out = expert(config, h[rows], *weights.expert(layer, index), xp, bias)
        y[rows] = y[rows] + out * routing_weights[rows, place][:, None]
    return y


def shared_expert(config: ModelConfig, weights, layer: int, h, xp=np):
    """The output of the shared expert, (rows, dim), scaled by its sigmoid gate and normalised if it has these."""
    y = _trunk_mlp(config, weights, f"layers.{layer}.shared", h, xp)
    if config.own_norms:
        y = rms_norm(y, weights.trunk(f"layers.{layer}.shared_post_norm"), config.norm_eps, xp)
    y = _to_residual(config, y)
    if not config.shared_gate:
        return y
    return y * sigmoid(h @ array(weights.trunk(f"layers.{layer}.shared_router"), xp).T, xp)  # (rows, 1)


def dense_block(config: ModelConfig, weights, layer: int, h, xp=np):
    """The output of the MLP of a dense layer, (rows, dim)."""
    y = _trunk_mlp(config, weights, f"layers.{layer}.dense", h, xp)
    return _to_residual(config, post_norm(config, weights, f"layers.{layer}.mlp_post_norm", y, xp))


def expert_bias(config: ModelConfig, weights, layer: int, index: int, xp=np):
    """What is added to the products of an expert's gate, up and down; NO_BIAS if the model has none."""
    if not config.expert_bias:
        return NO_BIAS
    return tuple(array(one, xp) for one in weights.expert_bias(layer, index))


def expert(config: ModelConfig, h, w_gate, w_up, w_down, xp=np, bias=NO_BIAS):
    """One MLP, (rows, dim), for h (rows, dim), w_gate and w_up (inner, dim), w_down (dim, inner); a gate that is not
    there has no rows.

    bias: what is added to the products of gate, up (inner,) and down (dim,).
    """
    return plus(expert_inner(config, h, w_gate, w_up, xp, bias) @ array(w_down, xp).T, bias[2])


def expert_inner(config: ModelConfig, h, w_gate, w_up, xp=np, bias=NO_BIAS):
    """The input of an expert's down projection, (rows, inner)."""
    gate = plus(h @ array(w_gate, xp).T, bias[0]) if config.gated else None
    return gated(config, gate, plus(h @ array(w_up, xp).T, bias[1]), xp)


def gated(config: ModelConfig, gate, up, xp=np):
    """The input of an MLP's down projection, from the products of its gate, if it has one, and up."""
    if config.activation == "relu2":
        return xp.square(xp.maximum(up, 0))
    if config.activation == "clamped_swiglu":
        return clamped_swiglu(gate, up, config.swiglu_alpha, config.swiglu_limit, config.swiglu_shift, xp)
    inner = ACTIVATIONS[config.activation](gate, xp)
    inner *= up
    return inner


def plus(y, bias):
    """y plus a bias, or y itself without one."""
    return y if bias is None else y + bias


def post_norm(config: ModelConfig, weights, name: str, y, xp=np):
    """What the residual stream gets of y (..., dim): normalised, if the model has such norms."""
    return rms_norm(y, weights.trunk(name), config.norm_eps, xp) if config.post_norms else y


def _to_residual(config: ModelConfig, y):
    return y if config.residual_scale == 1 else y * config.residual_scale


def _trunk_mlp(config: ModelConfig, weights, prefix: str, h, xp):
    gate = product(weights, f"{prefix}.gate", h, xp) if config.gated else None
    up = product(weights, f"{prefix}.up", h, xp)
    return product(weights, f"{prefix}.down", gated(config, gate, up, xp), xp)
