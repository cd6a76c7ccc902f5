"""The MLP of a layer: routed experts, with or without a shared expert, or a dense MLP."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How a layer turns router logits into chosen experts and their routing weights."""

    score: str = "softmax"  # softmax | sigmoid | sqrtsoftplus, of all experts, before the cut to top_k | sparsemixer
    renormalise: bool = False  # the weights of chosen experts are scaled to sum to one
    selection_bias: bool = False  # one value per expert, added to its score for the choice, not for the weight
    groups: int = 1  # number of groups of consecutive experts; experts are chosen from the best top_groups
    top_groups: int = 1
    group_score: str = "max"  # a group's score: max | top2sum of its experts' scores
    scale: float = 1.0  # factor of the final weights
    logit_bias: bool = False  # one value per expert, added to its logit
    threshold: float = 0.0  # of sparsemixer: the maximum relative distance below the largest logit that counts
    logits_scale: float = 1.0
    expert_scale: bool = False  # the final weights are multiplied by a factor of each expert, and ordered by the result
    sum_eps: float = 1e-20  # if the model renormalises: added to the sum that weights are divided by


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts, each an MLP, and optionally a shared expert that every token passes through."""

    experts: int
    top_k: int
    hidden: int  # inner size of an expert
    router: RouterConfig = field(default_factory=RouterConfig)
    shared_hidden: int = 0  # inner size of the shared expert; 0 is none
    shared_gate: bool = True  # the shared expert's output is multiplied by a sigmoid gate
    output_bias: bool = False  # a vector is added to each of a routed expert's three products
    # RMSNorms instead of the layer's one norm: of the input of the router, of routed experts and of the shared expert;
    # and of what routed experts add up to, and of the shared expert's output, before these two are added.
    own_norms: bool = False
    gated: bool = True  # MLPs have a gate, else only up and down
    hashed: bool = False  # a token's experts are looked up by its id in a table, and the router only weights them

    def shapes(self, dim: int, experts: int | None = None, vocab: int = 0) -> dict[str, tuple[int, ...]]:
        """The trunk's tensors by canonical name, in the order of use. experts: number kept; None: all. vocab: the rows
        of the table of experts, whose numbers are -1 where an expert was dropped."""
        count = self.experts if experts is None else experts
        parts: dict[str, tuple[int, ...]] = {"router_norm": (dim,)} if self.own_norms else {}
        parts |= {"router": (count, dim)}
        if self.router.logit_bias:
            parts |= {"router_logit_bias": (count,)}
        if self.router.selection_bias and not self.hashed:
            parts |= {"router_bias": (count,)}
        parts |= {"router_table": (vocab, self.top_k)} if self.hashed else {}
        if self.router.expert_scale:
            parts |= {"expert_scale": (count,)}
        if self.own_norms:
            parts |= {"experts_post_norm": (dim,)}
        if self.shared_hidden:
            parts |= {"shared_norm": (dim,)} if self.own_norms else {}
            parts |= {"shared_router": (1, dim)} if self.shared_gate else {}
            parts |= _mlp("shared", dim, self.shared_hidden, self.gated)
            parts |= {"shared_post_norm": (dim,)} if self.own_norms else {}
        return parts


@dataclass(frozen=True, slots=True)
class Dense:
    """One MLP for every token."""

    hidden: int
    gated: bool = True  # it has a gate, else only up and down

    def shapes(self, dim: int, _experts: int | None = None, _vocab: int = 0) -> dict[str, tuple[int, ...]]:
        """The trunk's tensors by canonical name, in the order of use."""
        return _mlp("dense", dim, self.hidden, self.gated)


def _mlp(prefix: str, dim: int, inner: int, gated: bool) -> dict[str, tuple[int, ...]]:
    gate = {f"{prefix}.gate": (inner, dim)} if gated else {}
    return {**gate, f"{prefix}.up": (inner, dim), f"{prefix}.down": (dim, inner)}
