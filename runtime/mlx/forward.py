"""The layers of a model on MLX, over the trunk in its memory: what is computed between two looks at the host's tables.

Nothing here waits for a value.
"""

import mlx.core as mx
import numpy as np

from ...devices.mlx import plain
from ...devices.mlx.experts import Arena, Array, ExpertShape, LayerExperts, RecordKind, Router, padded
from ...devices.mlx.working import operations
from .. import reference
from ..bundle import Bundle
from ..config import ModelConfig
from ..layers.indexer import Choice
from . import pruning
from .past import LayerPast
from .spans import Span, State
from .weights import TrunkWeights


class Forward:
    """The layers of a bundle, or of a part of one. mask_routers: see MlxEngine.

    entering: in a part without the first layers, what the layers before have made of a step's spans.
    """

    def __init__(self, bundle: Bundle, config: ModelConfig, mask_routers: dict[str, list[np.ndarray]]):
        self.config, c = config, config
        self.layers, self._is_last = bundle.layers, bundle.part is None or bundle.part.is_last
        self.entering: list[State] | None = None
        self.weights = TrunkWeights(bundle)
        self._masks = {rule: [mx.array(its) for its in routers] for rule, routers in mask_routers.items()}
        self._layers = self._layer_experts(bundle)
        self._routers = {layer: self._router(layer) for layer in self.layers}
        self._shape = ExpertShape(c.dim, c.expert_hidden, c.activation, c.swiglu_alpha, c.swiglu_limit, c.swiglu_shift)

    def choose_kernels(self) -> None:
        """Find the kernels that work; memory for the slots is not taken yet."""
        kinds = next(its.kinds for its in self._layers if its)
        self.operations = operations(filter(None, self._routers.values()), self._shape, list(kinds))

    def experts_of(self, layer: int) -> LayerExperts:
        its = self._layers[layer]
        assert its is not None
        return its

    def _layer_experts(self, bundle: Bundle) -> list[LayerExperts | None]:
        c = self.config
        kinds = [
            RecordKind(tuple(tuple(its) for its in one.encodings), one.parts, one.nbytes) for one in bundle.layouts
        ]
        numbers = mx.array(np.array([kind.numbers() for kind in kinds]))
        found: list[LayerExperts | None] = []
        self._kind_of: list[list[int]] = []  # by layer and expert
        for layer in range(c.layer_count):
            count = c.experts_of(layer) if layer in self.layers else 0
            own = [bundle.experts[layer, expert].layout for expert in range(count)]
            self._kind_of.append(own)
            kind_of = padded(mx, mx.array(own, mx.int32)) if own else None
            present = tuple(sorted(set(own)))
            found.append(LayerExperts(c.top_k_of(layer), kinds, numbers, kind_of, present) if own else None)
        return found

    def _router(self, layer: int) -> Router | None:
        c, rule = self.config, self.config.router
        if not c.has_experts(layer):
            return None

        def values(name: str, wanted: bool) -> Array | None:
            return self.weights.trunk(f"layers.{layer}.{name}") if wanted else None

        return Router(
            c.experts_of(layer),
            c.top_k_of(layer),
            rule.score,
            rule.renormalise,
            sum_eps=rule.sum_eps,
            scale=c.routing_scale,
            threshold=rule.threshold,
            groups=rule.groups,
            top_groups=rule.top_groups,
            top2sum=rule.group_score == "top2sum",
            bias=values("router_bias", rule.selection_bias and not c.is_hashed(layer)),
            group_of=mx.array(c.groups_of(layer), mx.int32) if rule.groups > 1 else None,
            expert_scale=values("expert_scale", rule.expert_scale),
        )

    # ---- a layer

    def entered(self, spans: list[Span]) -> list[State]:
        """What the first layer begins with."""
        if self.entering is not None:
            return self.entering
        return [State(reference.embed(self.config, self.weights, span.ids[None], mx)) for span in spans]

    def past(self, layer: int, span: Span) -> LayerPast:
        return span.timeline.pasts[layer - self.layers.start]

    def attended(self, layer: int, span: Span, state: State) -> State:
        """Everything of a layer before its MLP."""
        c, w, x = self.config, self.weights, state.x
        past, choice = self.past(layer, span), Choice(state.visible)
        past.is_received = span.is_protected
        if c.layers[layer].ngrams:
            ids = np.concatenate([np.array(span.timeline.ids, np.int64), span.ids])[None]
            x = reference.with_ngrams(c, w, layer, x, ids, mx, past)
        if c.layers[layer].attention:
            y = reference.attention_block(c, w, layer, x, mx, choice, past)
            x = reference.with_attention(c, w, layer, x, y, mx)
        return State(x, choice.visible)

    def without_experts(self, layer: int, state: State) -> State:
        """The rest of a layer that has no experts."""
        c, w, x = self.config, self.weights, state.x
        if c.layers[layer].mlp:
            y = reference.dense_block(c, w, layer, reference.mlp_input(c, w, layer, x, mx), mx)
            x = reference.with_mlp(c, w, layer, x, y, mx)
        else:
            x = reference.scaled(c, w, layer, x, mx)
        return State(x, state.visible)

    def routed(self, layer: int, span: Span, state: State) -> State:
        """With the experts that the tokens keep."""
        h = reference.mlp_input(self.config, self.weights, layer, state.x, mx)
        ids, weights = self.route(layer, span, state.x)
        rule, dropped = span.timeline.rule, None
        if rule.rule != "off":
            if rule.rule == "ratio":
                kept = pruning.kept_by_ratio(weights, rule.threshold[layer])
            elif rule.rule == "share":
                kept = pruning.kept_by_share(weights, rule.threshold[layer])
            else:
                router = self._masks[rule.rule][layer].reshape(weights.shape[1], -1)
                kept = pruning.kept_by_router(router, h, weights, rule.price, rule.rule == "loss")
            if span.is_protected:
                protected = pruning.protected(h, self.past(layer, span).received, rule.protect)
                kept = mx.where(protected, weights.shape[1], kept)
            ids, weights, dropped = pruning.keep_first(ids, weights, kept, self.config.router.renormalise)
        return State(state.x, state.visible, h, ids, weights, dropped)

    def route(self, layer: int, span: Span, x: Array) -> tuple[Array, Array]:
        """The experts that a layer's router chooses for x (1, tokens, width), and their weights, (tokens, top_k)."""
        c, w, its = self.config, self.weights, self.experts_of(layer)
        logits = reference.router_logits(c, w, layer, reference.router_input(c, w, layer, x, mx), mx)
        given = None  # the experts that a table lists for each token, -1 for none
        if c.is_hashed(layer):
            given = w.rows_of(f"layers.{layer}.router_table", span.ids).astype(mx.int32)
        chosen = self.operations.route(self._routers[layer], logits, its, its.kind_of, given)
        ids, weights = (part[: len(span.ids) * its.top_k].reshape(-1, its.top_k) for part in chosen[:2])
        return ids, weights

    def residual(self, state: State) -> Array:
        """What the experts' outputs are added to, (tokens, dim)."""
        assert state.h is not None
        return mx.zeros_like(state.h) if self.config.sums_experts else state.x.reshape(state.h.shape)

    def experts(self, layer: int, state: State, arena: Arena, pages: Array, to: Array | None = None) -> Array:
        """The residual stream, or `to`, with the sum of the experts of each token. pages: see Records."""
        its = self.experts_of(layer)
        chosen = plain.placed(state.ids, state.weights, its, pages)
        to = self.residual(state) if to is None else to
        return self.operations.experts(self._shape, its, arena, state.h, chosen, to)

    def expert(self, layer: int, expert: int, arena: Arena, page: int, h: Array) -> Array:
        """The output of one expert for h (tokens, dim)."""
        its = self.experts_of(layer)
        kind = its.kinds[self._kind_of[layer][expert]]
        return plain.expert(self._shape, kind, plain.record_at(arena, page, kind), h[None])[0]

    def with_experts(self, layer: int, state: State, y: Array) -> State:
        """The layer's output, from what experts() returns."""
        c, w, x = self.config, self.weights, state.x
        if c.sums_experts:
            y = reference.with_shared(c, w, layer, x, y, mx)
            y = reference.post_norm(c, w, f"layers.{layer}.mlp_post_norm", y, mx)
            x = reference.with_mlp(c, w, layer, x, y, mx)
        else:
            x = reference.with_shared(c, w, layer, x, y, mx).reshape(x.shape)
        return State(x, state.visible)

    def results(self, spans: list[Span], states: list[State]) -> list:
        """The logits of the spans that want some; if other layers follow elsewhere, the arrays of all states."""
        if not self._is_last:
            return [state.arrays for state in states]
        rows = [state.x[:, span.first_row :] for span, state in zip(spans, states, strict=True)]
        return [reference.head(self.config, self.weights, x, mx)[0] for x in rows if x.shape[1]]
