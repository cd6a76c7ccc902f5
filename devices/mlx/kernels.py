"""The Metal kernels of experts.metal, for MLX to compile when they are first used.

Three launches compute a layer's experts for some tokens: routing, gate with up and activation, and down with the
weighted sum. Each expert is computed at its own widths, by threads that differ in nothing else, whatever else the layer
has.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np

from .experts import PADDED, Arena, Array, Chosen, ExpertShape, LayerExperts, Router, padded

NAME = "mlx-metal"
SOURCE = Path(__file__).with_name("experts.metal")
MOST_PLACES = 32  # of a token: a simdgroup each in one threadgroup
MOST_EXPERTS = 1024  # of a layer: 32 in the registers of each lane
MOST_GROUPS = 32
ACTIVATIONS = ("silu", "gelu_tanh", "clamped_swiglu", "relu2")
SCORES = ("softmax", "sigmoid", "sparsemixer", "sqrtsoftplus")

ROUTE = """
  const uint token = threadgroup_position_in_grid.z, lane = thread_index_in_simdgroup;
  int chosen[TOP_K];
  float of_chosen[TOP_K];
  route<EXPERTS, TOP_K, SCORE, GROUPS, BIASED, RENORMALISED, SCALED, GIVEN>(
      logits + token * uint(EXPERTS), bias, group_of, expert_scale, numbers, given + token * uint(GIVEN), TOP_GROUPS,
      TWO, lane, chosen, of_chosen);
  for (int k = 0; k < TOP_K; ++k)
    if (int(lane) == k) {
      const int id = chosen[k];
      const uint at = token * uint(TOP_K) + lane;
      ids[at] = id, weights[at] = of_chosen[k];
      pages[at] = id < 0 ? -1 : table[id];
      kinds[at] = id < 0 ? 0 : kind_of[id];
    }
"""
GATE_UP = """
  const int first = int(threadgroup_position_in_grid.y * 8u + simdgroup_index_in_threadgroup * 4u);
  if (first < HIDDEN)
    gate_up<ACTIVATION>(x, arena + BASE, pages, kind_of, kinds, numbers, DIM, HIDDEN, PLACES,
                        threadgroup_position_in_grid.z, first, thread_index_in_simdgroup, inner);
"""
DOWN = """
  threadgroup float parts[PLACES * 4];
  const uint token = threadgroup_position_in_grid.z, own = simdgroup_index_in_threadgroup;
  const int first = int(threadgroup_position_in_grid.y * 4u);
  float sums[4];
  down_rows(inner, arena + BASE, pages, kind_of, kinds, DIM, HIDDEN, token * uint(PLACES) + own, first,
            thread_index_in_simdgroup, sums);
  for (int r = 0; r < 4; ++r)
    if (int(thread_index_in_simdgroup) == r) parts[own * 4u + uint(r)] = sums[r];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint row = thread_index_in_threadgroup;
  if (row < 4u && first + int(row) < DIM) {
    const uint at = token * uint(DIM) + uint(first) + row;
    float sum = residual[at];
    for (uint place = 0; place < uint(PLACES); ++place) {
      const uint of_token = token * uint(PLACES) + place;
      if (pages[of_token] >= 0) sum = fma(weights[of_token], parts[place * 4u + row], sum);
    }
    out[at] = sum;
  }
"""
INPUTS = {
    "route": ("logits", "bias", "group_of", "expert_scale", "numbers", "given", "table", "kind_of"),
    "gate_up": ("x", "arena", "pages", "kind_of", "kinds", "numbers"),
    "down": ("inner", "arena", "pages", "kind_of", "kinds", "weights", "residual"),
}
OUTPUTS = {"route": ("ids", "weights", "pages", "kinds"), "gate_up": ("inner",), "down": ("out",)}
BODIES = {"route": ROUTE, "gate_up": GATE_UP, "down": DOWN}


class Kernels:
    """The three kernels; like the functions of plain.py, they compute when their results are evaluated.

    verbose: print each kernel's source when it is first used.
    """

    def __init__(self, verbose: bool = False):
        header = SOURCE.read_text(encoding="utf-8")
        self._verbose = verbose
        self._made = {
            name: mx.fast.metal_kernel(
                name=f"edge_moe_{name}",
                input_names=INPUTS[name],
                output_names=OUTPUTS[name],
                source=BODIES[name],
                header=header,
            )
            for name in BODIES
        }

    def route(
        self, router: Router, logits: Array, layer: LayerExperts, table: Array, given: Array | None = None
    ) -> Chosen:
        """The chosen experts of each token, from logits (tokens, experts), and where their records are.

        table: int32 (experts, padded): the page of each expert's record, -1 without one. given: see plain.choose().
        """
        tokens = len(logits)
        places = max(tokens * router.top_k, PADDED)
        numbers = np.zeros(PADDED, np.float32)
        numbers[:4] = router.logits_scale, router.sum_eps, router.scale, router.threshold
        none, no_group = mx.zeros((PADDED,)), mx.zeros((PADDED,), mx.int32)
        return Chosen(
            *self._made["route"](
                inputs=[
                    padded(mx, logits.reshape(-1)),
                    none if router.bias is None else padded(mx, router.bias),
                    no_group if router.group_of is None else padded(mx, router.group_of),
                    none if router.expert_scale is None else padded(mx, router.expert_scale),
                    mx.array(numbers),
                    no_group if given is None else padded(mx, given.reshape(-1)),
                    table,
                    layer.kind_of,
                ],
                template=[
                    ("EXPERTS", router.experts),
                    ("TOP_K", router.top_k),
                    ("SCORE", SCORES.index(router.score)),
                    ("GROUPS", router.groups),
                    ("TOP_GROUPS", router.top_groups),
                    ("TWO", router.top2sum),
                    ("BIASED", router.bias is not None),
                    ("RENORMALISED", router.renormalise),
                    ("SCALED", router.expert_scale is not None),
                    ("GIVEN", 0 if given is None else given.shape[1]),
                ],
                grid=(32, 1, tokens),
                threadgroup=(32, 1, 1),
                output_shapes=[(places,)] * 4,
                output_dtypes=[mx.int32, mx.float32, mx.int32, mx.int32],
                verbose=self._verbose,
            )
        )

    def experts(
        self, shape: ExpertShape, layer: LayerExperts, arena: Arena, x: Array, chosen: Chosen, residual: Array
    ) -> Array:
        """residual (tokens, dim) plus the weighted sum of the chosen experts' outputs for x (tokens, dim)."""
        tokens, dim = x.shape
        numbers = np.zeros(PADDED, np.float32)
        numbers[:3] = shape.alpha, shape.limit, shape.shift
        # MLX ends a command buffer by the size of its inputs; a kernel gets the whole buffer whatever the slice's size.
        words = arena.words[0, :PADDED]
        sizes = [("DIM", dim), ("HIDDEN", shape.hidden), ("PLACES", layer.top_k), ("BASE", arena.base)]
        (inner,) = self._made["gate_up"](
            inputs=[x, words, chosen.pages, chosen.kinds, layer.numbers, mx.array(numbers)],
            template=[*sizes, ("ACTIVATION", ACTIVATIONS.index(shape.activation))],
            grid=(64, -(-shape.hidden // 8), tokens * layer.top_k),
            threadgroup=(64, 1, 1),
            output_shapes=[(max(tokens * layer.top_k * shape.hidden, PADDED),)],
            output_dtypes=[mx.float32],
            verbose=self._verbose,
        )
        (out,) = self._made["down"](
            inputs=[inner, words, chosen.pages, chosen.kinds, layer.numbers, chosen.weights, residual],
            template=sizes,
            grid=(32 * layer.top_k, -(-dim // 4), tokens),
            threadgroup=(32 * layer.top_k, 1, 1),
            output_shapes=[(tokens, dim)],
            output_dtypes=[mx.float32],
            verbose=self._verbose,
        )
        return out
