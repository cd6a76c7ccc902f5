"""The settings of each pruning rule for each cut: the price of an expert, or a threshold for each layer."""

from collections.abc import Callable

import numpy as np

from ...runtime.config import ModelConfig
from .prune_losses import LayerLosses

CUTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
THRESHOLDS = np.linspace(0, 1, 101)  # candidates
PROTECTED = 0.02  # share of a prompt's tokens that the Mixture Compressor's rule does not prune
PRICES = 1e-12, 1e6  # range, in nats an expert
STEPS = 60  # of bisection


def reachable(config: ModelConfig) -> list[float]:
    """The cuts that a model's top_k allows, given that each token keeps an expert."""
    most = 1 - len(config.moe_layers) / sum(config.top_k_of(layer) for layer in config.moe_layers)
    return [cut for cut in CUTS if cut < 0.95 * most]


def kept_at(values: np.ndarray, price: float) -> np.ndarray:
    """The number of experts that each row keeps, (rows,): it minimises expected loss (rows, top_k) + price * number;
    ties go to the larger number."""
    top_k = values.shape[1]
    return top_k - np.argmin((values + price * np.arange(1, top_k + 1))[:, ::-1], axis=-1)


def cut_of(kept: list[np.ndarray], values: list[np.ndarray]) -> float:
    """The share of expert uses left out, given for each layer kept (rows,) and values (rows, top_k)."""
    return 1 - sum(its.sum() for its in kept) / sum(its.size for its in values)


def prices(expected: list[np.ndarray], cuts: list[float]) -> list[float]:
    """The price of an expert that reaches each cut, given expected losses (rows, top_k) for each layer."""

    def reached(price: float) -> float:
        return cut_of([kept_at(its, price) for its in expected], expected)

    return [float(np.sqrt(np.prod(around(reached, cut)))) for cut in cuts]


def around(reached: Callable[[float], float], cut: float) -> tuple[float, float]:
    """Two adjacent prices between which reached(price), which rises with the price, crosses a cut."""
    low, high = PRICES
    for _ in range(STEPS):
        price = float(np.sqrt(low * high))
        low, high = (low, price) if reached(price) > cut else (price, high)
    return low, high


def thresholds(layers: dict[int, LayerLosses], kept_by, cuts: list[float]) -> tuple[list[float], list[list[float]]]:
    """The thresholds with the smallest loss near given cuts, for a rule kept_by(weights, threshold).

    Returns (cuts reached, thresholds by cut and layer)."""
    kept, losses = [], []  # (layers, THRESHOLDS) means
    for layer in layers.values():
        counts = [kept_by(layer.weights, threshold) for threshold in THRESHOLDS]
        rows = np.arange(len(layer.weights))
        kept.append([its.mean() for its in counts])
        losses.append([layer.losses[rows, its - 1].mean() for its in counts])
    kept, losses = np.array(kept), np.array(losses)
    every, most = np.arange(len(kept)), kept.max(axis=1).sum()

    def best(price: float) -> np.ndarray:
        return np.argmin(losses + price * kept, axis=1)

    def reached(price: float) -> float:
        return float(1 - kept[every, best(price)].sum() / most)

    found = {}
    for cut in cuts:
        if its := [price for price in around(reached, cut) if 0 < reached(price) < 1]:
            price = min(its, key=lambda price: abs(reached(price) - cut))
            found[reached(price)] = THRESHOLDS[best(price)].tolist()
    return sorted(found), [found[its] for its in sorted(found)]


def median_ratios(layers: dict[int, LayerLosses]) -> tuple[list[float], list[list[float]]]:
    """The Mixture Compressor's rule for a top_k of 2: (cuts, thresholds by cut and layer).

    A layer's threshold is the median ratio of the second weight to the first, which drops half of the second experts.
    Each cut prunes one more layer, in the order of increasing loss.
    """
    losses = []
    for layer in layers.values():
        ratio = layer.share[:, 1] / layer.share[:, 0]
        threshold = float(np.median(ratio))
        drops = ratio < threshold
        losses.append((float((layer.losses[:, 0] * drops).mean()), float(drops.mean()) / 2, threshold))
    order = sorted(range(len(losses)), key=lambda i: losses[i][0])
    cuts, thresholds = [], []
    for count in range(1, len(order) + 1):
        pruned = order[:count]
        cuts.append(sum(losses[i][1] for i in pruned) / len(losses))
        thresholds.append([losses[i][2] if i in pruned else 0.0 for i in range(len(losses))])
    return cuts, thresholds
