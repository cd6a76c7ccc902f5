"""Choosing the width of each kind of trunk tensor: attention, shared experts, dense layers, embedding, head.

While experts are measured, each kind is rounded alone, at one width, in a form of the model of its own. The divergence
of its predictions, and the law by which the error falls with the width, give the cost of every width. The trunk and the
experts get their widths at the same marginal rate of nats a byte.
"""

from dataclasses import dataclass

import numpy as np

from ...runtime.config import ModelConfig, trunk_shapes
from ..rounding.quantise import dequantise, quantise, trunk_packing
from ..writing.writer import Packing
from .sizes import kind_of
from .targets import packed_bytes

WIDTHS = (4, 5, 6, 8)  # that a kind may get
PROBED = 4  # the width that is measured, rounded to nearest
FITTED = 0.55  # share of that divergence with GPTQ, which rounds all but the embedding; for attention 0.65 on the
#                reference model, 0.43 on SmolLM2
GROUP = 64

Curve = list[tuple[np.ndarray, np.ndarray]]  # for each item, nats and bytes of its options, (options,) each


@dataclass(frozen=True, slots=True)
class ProbedTrunk:
    """A checkpoint with one kind of trunk tensor rounded to PROBED bits."""

    weights: object  # trunk(name)
    config: ModelConfig
    kind: str

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self.weights.rows(name, rows)

    def trunk(self, name: str) -> np.ndarray:
        tensor = self.weights.trunk(name)
        if kind_of(name, tensor.shape) != self.kind:
            return tensor
        width, group = _packing(name, tensor.shape, PROBED).widths[0], _packing(name, tensor.shape, PROBED).group
        return dequantise(quantise(tensor, width, group), width, tensor.shape[-1]).reshape(tensor.shape)


def kinds(config: ModelConfig) -> tuple[str, ...]:
    """The kinds of trunk tensors that a model has, without norms, biases and routers."""
    found = dict.fromkeys(kind_of(name, shape) for name, shape in trunk_shapes(config).items())
    return tuple(kind for kind in found if kind != "float32")


def packing_of(config: ModelConfig, widths: dict[str, int]) -> dict[str, Packing]:
    """The packing of each trunk tensor, by the width of its kind."""
    return {
        name: _packing(name, shape, widths.get(kind_of(name, shape), PROBED))
        for name, shape in trunk_shapes(config).items()
    }


def choose_widths(
    config: ModelConfig, divergence: dict[str, float], experts: Curve, budget: float, whole: bool
) -> dict[str, int]:
    """The width of each kind at which the last byte gains as much in the trunk as in the experts.

    divergence: nats of each kind at PROBED bits. experts: their curves. budget: bytes for the experts; with `whole`,
    the trunk shares the budget, to which the bytes of the narrowest trunk are added.
    """
    shapes, curves = trunk_shapes(config), {}
    for kind, nats in divergence.items():
        its = {name: shape for name, shape in shapes.items() if kind_of(name, shape) == kind}
        sizes = [sum(packed_bytes(shape, _packing(name, shape, w)) for name, shape in its.items()) for w in WIDTHS]
        left = nats if kind == "embedding" else FITTED * nats
        curves[kind] = np.array([left * expected(width) for width in WIDTHS]), np.array(sizes, np.float64)
    if whole:
        experts = [*experts, *curves.values()]
        budget += sum(sizes[0] for _, sizes in curves.values())
    rate = rate_at(experts, budget) * (1 + 1e-9)  # excludes the step that did not fit
    return {kind: WIDTHS[int(np.argmin(nats + rate * sizes))] for kind, (nats, sizes) in curves.items()}


def expected(width: int) -> float:
    """The divergence at a width relative to that at PROBED bits: a power of the step between codes.

    The power is below 2 because tokens whose experts change add a term that is linear in the step. On the reference
    model, 5, 6 and 8 bits have 0.28, 0.084 and 0.013 of the divergence at 4 bits for the embedding and 0.32, 0.105 and
    0.019 for attention; this gives 0.31, 0.10 and 0.011.
    """
    return ((2**PROBED - 1) / (2**width - 1)) ** 1.6


def rate_at(curves: Curve, budget: float) -> float:
    """The nats that the last byte of a budget gains, where each item takes one of its options.

    This is the linear relaxation of the integer program: items move along their convex hulls, the steepest step first.
    Returns the steepest slope if no step fits, 0 if all do.
    """
    steps, used = [], 0.0
    for nats, sizes in curves:
        at = int(np.lexsort((nats, sizes))[0])
        used += sizes[at]
        while len(better := np.flatnonzero((nats < nats[at]) & (sizes > sizes[at]))):
            slopes = (nats[at] - nats[better]) / (sizes[better] - sizes[at])
            to = int(better[np.argmax(slopes)])
            steps.append((float(slopes.max()), float(sizes[to] - sizes[at])))
            at = to
    for rate, nbytes in sorted(steps, reverse=True):
        used += nbytes
        if used > budget:
            return rate
    return 0.0


def _packing(name: str, shape: tuple[int, ...], width: int) -> Packing:
    return trunk_packing({name: shape}, width, GROUP)[name]
