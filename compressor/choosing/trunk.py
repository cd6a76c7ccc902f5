"""How wide each kind of the trunk is: attention, shared experts, dense layers, embedding, head.

Each kind is rounded alone, at one width, in a form of the model that goes beside the source while experts are measured;
the divergence of its predictions, and the law by which error falls with width, price every width. A byte goes where it
buys most: the trunk is as wide as the experts' own rate of nats a byte warrants.
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
FITTED = 0.55  # of that is left by GPTQ, which rounds all but the embedding; attention: 0.65 on the reference model,
#                0.43 on SmolLM2
GROUP = 64

Curve = list[tuple[np.ndarray, np.ndarray]]  # of each item: nats and bytes of its options, (options,) each


@dataclass(frozen=True, slots=True)
class ProbedTrunk:
    """A checkpoint with one kind of its trunk rounded to PROBED bits."""

    weights: object  # trunk(name)
    config: ModelConfig
    kind: str

    def trunk(self, name: str) -> np.ndarray:
        tensor = self.weights.trunk(name)
        if kind_of(name, tensor.shape) != self.kind:
            return tensor
        width, group = _packing(name, tensor.shape, PROBED).widths[0], _packing(name, tensor.shape, PROBED).group
        return dequantise(quantise(tensor, width, group), width, tensor.shape[-1]).reshape(tensor.shape)


def kinds(config: ModelConfig) -> tuple[str, ...]:
    """Those that a model has, but for norms, biases and routers."""
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
    """The width of each kind where the last byte buys as much in the trunk as in the experts.

    divergence: nats of each kind at PROBED bits. budget: bytes of the experts, to which, with `whole`, those of the
    narrowest trunk are added: both are bought out of one.
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
    rate = rate_at(experts, budget) * (1 + 1e-9)  # so that the step which did not fit is not taken
    return {kind: WIDTHS[int(np.argmin(nats + rate * sizes))] for kind, (nats, sizes) in curves.items()}


def expected(width: int) -> float:
    """Divergence at a width, of that at PROBED: a power of the step between codes.

    Under 2, as tokens that change their experts add a term that falls with the step alone. On the reference model 5, 6
    and 8 bits are 0.28, 0.084 and 0.013 of 4 bits' for the embedding, 0.32, 0.105 and 0.019 for attention; this gives
    0.31, 0.10 and 0.011.
    """
    return ((2**PROBED - 1) / (2**width - 1)) ** 1.6


def rate_at(curves: Curve, budget: float) -> float:
    """Nats that the last byte of a budget buys, where each item has one of its options.

    The program's relaxation: every item goes down its convex hull, the steepest step first. The steepest of all where
    nothing fits, 0 where everything does.
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
