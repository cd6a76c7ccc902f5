"""The MLP of a layer: experts behind a router, with a shared expert or without, or a dense one."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How a layer turns router logits into chosen experts and their routing weights."""

    score: str = "softmax"  # softmax | sigmoid, over all experts, before the cut to top_k | sparsemixer
    renormalise: bool = False  # chosen weights are scaled to sum to one
    selection_bias: bool = False  # one number an expert, added to its score for the choice, not for the weight
    groups: int = 1  # experts are chosen within top_groups of so many groups of neighbours
    top_groups: int = 1
    group_score: str = "max"  # max | top2sum, of a group's scores
    scale: float = 1.0  # of the weights, at last
    threshold: float = 0.0  # of sparsemixer: how far below the largest a logit may be to count, as a share


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts, each a gated MLP, and an expert that every token passes through beside them."""

    experts: int
    top_k: int
    hidden: int  # inner size of one
    router: RouterConfig = field(default_factory=RouterConfig)
    shared_hidden: int = 0  # inner size of the shared expert; 0 is none
    shared_gate: bool = True  # its output is weighted by a sigmoid gate
    output_bias: bool = False  # a vector is added to each of a routed expert's three products

    def shapes(self, dim: int, experts: int | None = None) -> dict[str, tuple[int, ...]]:
        """The trunk's tensors by canonical name, in the order of use. experts: how many are left; by default all."""
        count = self.experts if experts is None else experts
        parts: dict[str, tuple[int, ...]] = {"router": (count, dim)}
        if self.router.selection_bias:
            parts |= {"router_bias": (count,)}
        if self.shared_hidden:
            parts |= {"shared_router": (1, dim)} if self.shared_gate else {}
            parts |= _gated("shared", dim, self.shared_hidden)
        return parts


@dataclass(frozen=True, slots=True)
class Dense:
    """One gated MLP for every token."""

    hidden: int

    def shapes(self, dim: int, _experts: int | None = None) -> dict[str, tuple[int, ...]]:
        """The trunk's tensors by canonical name, in the order of use."""
        return _gated("dense", dim, self.hidden)


def _gated(prefix: str, dim: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.gate": (inner, dim), f"{prefix}.up": (inner, dim), f"{prefix}.down": (dim, inner)}
