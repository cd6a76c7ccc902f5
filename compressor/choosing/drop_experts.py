"""Which experts to leave out of a model for good (Collaborative Compression, arXiv 2509.25689).

Experts are ranked in each layer by how much calibration text uses them. The least used are dropped: the same number in
every layer or, with counts by sensitivity, those that by measurement cost the model least over all layers. With pmq,
one program chooses them together with the widths. On the reference model at equal bytes, 1.6 true bits and a quarter
dropped, the KLD is 0.1726 by score with equal counts, 0.1150 by score with counts by sensitivity, and 0.1084 in the
program, which also has the lowest KLD on the text that loses most (code: 0.558, 0.318, 0.227).
"""

from dataclasses import replace

import numpy as np

from ...runtime.config import ModelConfig
from . import allocate
from .sensitivity import Measures

SCORES = ("mixture", "weight", "frequency", "mean-weight")


def score(measure, kind: str) -> np.ndarray:
    """The score of each expert of one layer, (experts,); the lowest are dropped first.

    `weight` is the sum of routing weights (the authors' release). `mixture` (their paper) is the mean of `frequency`
    and `mean-weight`, the mean routing weight where the expert is chosen. Both are normalised over the layer, as one
    would otherwise dominate the other.
    """
    frequency = measure.frequency / max(measure.frequency.sum(), 1e-30)
    mean_weight = measure.routing_weight / np.maximum(measure.frequency, 1e-30)
    mean_weight = mean_weight / max(mean_weight.sum(), 1e-30)
    return {
        "mixture": 0.5 * frequency + 0.5 * mean_weight,
        "weight": measure.routing_weight,
        "frequency": frequency,
        "mean-weight": mean_weight,
    }[kind]


def drop_in_program(config: ModelConfig, measures: Measures, share: float, bits: float, budget: float) -> ModelConfig:
    """The config without `share` of all experts (rounded down), chosen together with the widths of the others.

    bits, budget: true bits a weight and total bytes of the experts that stay. Raises ValueError if a layer or one of
    its groups could not keep as many as the router needs.
    """
    layers, router = [layer for layer in config.moe_layers for _ in range(config.experts)], config.router
    layers, size = np.array(layers), config.experts // router.groups
    group = np.tile(np.arange(config.experts) // size, len(config.moe_layers))
    count = int(share * len(layers) + 1e-9)
    if router.groups == 1:
        keep = [(layers == layer, least_experts(config)) for layer in config.moe_layers]
    else:  # whichever groups the router chooses have enough together
        least = -(-config.top_k // router.top_groups)
        keep = [((layers == layer) & (group == g), least) for layer in config.moe_layers for g in range(router.groups)]
    if len(layers) - count < (needed := sum(least for _, least in keep)):
        raise ValueError(f"dropping {share:.0%} of the experts leaves {len(layers) - count}, the router needs {needed}")
    gone = allocate.dropped(config, measures, budget, allocate.unit_of(config, measures, bits), count, keep)
    kept = {layer: np.flatnonzero(~gone[layers == layer]).tolist() for layer in config.moe_layers}
    return replace(config, kept=tuple(tuple(kept.get(layer, ())) for layer in range(config.layer_count)))


def drop(config: ModelConfig, measures: Measures, share: float, kind: str, counts: str) -> ModelConfig:
    """The config without `share` of each layer's experts (rounded down), or as many in all with other counts a layer.

    counts `sensitivity`: a layer loses its lowest scores first, and the next layer to lose one is that where it costs
    least, by the measured change of the output without that expert. Raises ValueError if fewer experts would be left
    than top_k or than the router's groups need.
    """
    keep = config.experts - int(share * config.experts + 1e-9)
    keep_in = dict.fromkeys(config.moe_layers, keep)
    order = {layer: np.argsort(-score(measures.layers[layer], kind), kind="stable") for layer in config.moe_layers}
    if keep < (least := least_experts(config)):
        raise ValueError(f"dropping {share:.0%} of the experts leaves {keep}, the router needs {least}")
    if counts == "sensitivity":
        keep_in = _by_sensitivity(config, measures, order, keep)
    kept = tuple(
        tuple(sorted(order[layer][: keep_in[layer]].tolist())) if layer in order else ()
        for layer in range(config.layer_count)
    )
    _check_groups(config, kept)
    return replace(config, kept=kept)


def least_experts(config: ModelConfig) -> int:
    """The minimum of experts that a layer must keep: top_k."""
    return config.top_k


def _by_sensitivity(config: ModelConfig, measures: Measures, order: dict, keep: int) -> dict[int, int]:
    cost = {
        layer: (measures.layers[layer].drop_errors * measures.gain[layer]).mean(axis=-1)[order[layer]]
        for layer in config.moe_layers
    }
    keep_in = dict.fromkeys(config.moe_layers, config.experts)
    for _ in range((config.experts - keep) * len(keep_in)):
        free = [layer for layer in keep_in if keep_in[layer] > least_experts(config)]
        cheapest = min(free, key=lambda layer: cost[layer][keep_in[layer] - 1])
        keep_in[cheapest] -= 1
    return keep_in


def _check_groups(config: ModelConfig, kept: tuple[tuple[int, ...], ...]) -> None:
    """Raises ValueError if a token's groups may hold fewer than top_k experts; kept experts stay in their group."""
    router = config.router
    if router.groups == 1:
        return
    size = config.experts // router.groups
    for layer in config.moe_layers:
        in_group = np.bincount(np.array(kept[layer]) // size, minlength=router.groups)
        if np.sort(in_group)[: router.top_groups].sum() < config.top_k:
            raise ValueError(
                f"layer {layer}: its smallest {router.top_groups} groups of experts would have "
                f"{np.sort(in_group)[: router.top_groups].sum()} left, a token needs {config.top_k}; drop fewer"
            )
