"""Rounding the trunk: attention, shared expert, dense MLP and head, each for the inputs that it gets in the track.

This works as for experts (round_layers.py): the target of a matrix is the source's output on the source's inputs; the
last matrix of attention and of a dense MLP also makes up for the track's deficit in the residual stream. The matrix
takes a cross-validated step to its target, and GPTQ rounds the result. Matrices with the same input are rounded
together, in the order in which the model uses them. Attention at 4 bits, KLD of GPTQ relative to rounding to nearest:
0.65 on the reference model, 0.46 on SmolLM2. Routers are left unchanged: the same steps gained nothing (KLD 1.01, 0.97
and 1.04 times as large at 2.5, 3 and 2 bits). The embedding is rounded to nearest, and so is a head tied to it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from ...runtime import reference
from ...runtime.config import ModelConfig, trunk_shapes
from ...runtime.layers.arrays import grouped
from ...runtime.layers.compressed import CompressedAttention
from ..passes.forward import Held
from ..passes.streams import BLOCK_ROWS, Stream
from ..writing.writer import Quantised
from .gptq import gptq
from .inputs import Inputs

PIECE_WEIGHTS = 8_000_000  # maximum weights of a matrix that are rounded at a time
FITTED_ROWS = 16_384  # calibration rows that a layer's trunk is fitted to, or twice the inputs of its widest matrix

Run = Callable[[object], np.ndarray]  # computes a part of the model from its weights


class _Reached(Exception):
    """Raised at the product whose input is wanted."""


@dataclass(slots=True)
class _Watched:
    """Weights that stop the model at a product and keep its input."""

    weights: object
    name: str
    x: np.ndarray | None = None

    def trunk(self, name: str) -> np.ndarray:
        return self.weights.trunk(name)

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self.weights.rows(name, rows)

    def product(self, name: str, x: np.ndarray) -> np.ndarray:
        self._watch(name, x)
        return x @ self.trunk(name).T

    def grouped_product(self, name: str, x: np.ndarray) -> np.ndarray:
        self._watch(name, x)
        return grouped(x, self.trunk(name))

    def _watch(self, name: str, x: np.ndarray) -> None:
        if name == self.name:
            self.x = x
            raise _Reached


def input_of(name: str, weights, run: Run) -> np.ndarray:
    """The input (rows, inputs) of the matrix `name` when `run` computes a part of the model."""
    watched = _Watched(weights, name)
    try:
        run(watched)
    except _Reached:
        return watched.x.reshape(-1, watched.x.shape[-1])
    raise ValueError(f"{name} is in no product of that part")


@dataclass(frozen=True, slots=True)
class Block:
    """Whole sequences, (rows, dim) each: a part's input in the track and in the source, and the source's output."""

    track: np.ndarray
    source: np.ndarray
    wanted: np.ndarray

    @property
    def token_weights(self) -> np.ndarray:
        """1 / (squared norm of the source's stream + that of the track's deficit), (rows,)."""
        lacks = np.square(self.wanted - self.track).sum(-1)
        return 1 / np.maximum(np.square(self.wanted).sum(-1) + lacks, 1e-12)


@dataclass(slots=True)
class TrunkFit:
    """Rounds the trunk of one layer of a track or its head. A `part` maps (weights, block (rows, dim)) to an output."""

    config: ModelConfig
    source: object  # trunk(name) of the checkpoint
    rounded: object  # PackedTrunk, which gets each matrix as soon as it is rounded
    layer: int | None
    tokens: int  # of a sequence
    rows: np.ndarray  # to fit to, whole sequences
    sweeps: int  # rounds of refinement after GPTQ
    threads: int
    act_order: bool

    def ngrams(self, ids: np.ndarray) -> None:
        """Round what the embeddings of n-grams are multiplied by. ids: (sequences, tokens)."""
        its = self.config.layers[self.layer].ngrams
        names, table = self._named(("ngrams.key", "ngrams.value")), self._name("ngrams.table")
        if its is None or not self._is_rounded(names[0]):
            return
        inputs, step = self._inputs(names[0]), max(BLOCK_ROWS // self.tokens, 1) * self.tokens
        for start in range(0, len(self.rows), step):
            rows = its.rows_of(ids[self.rows[start : start + step : self.tokens] // self.tokens]).reshape(-1)
            x, source = (weights.rows(table, rows).reshape(-1, its.inputs) for weights in (self.rounded, self.source))
            inputs.add(x, np.ones(len(x), np.float32), source - x)
        for name in names:
            self._pack(name, self.rounded.whole(name), inputs, follows=True)

    def attention(self, x: Stream, source_x: Stream, source_a: Stream) -> None:
        """Round attention. x, source_x: the streams before attention; source_a: the source's stream after it."""
        its = self.config.layers[self.layer].attention
        if its is None:
            return

        def part(weights, x: np.ndarray) -> np.ndarray:
            sequences = x.reshape(-1, self.tokens, x.shape[-1])
            return reference.attention_block(self.config, weights, self.layer, sequences)

        streams = (x, source_x, source_a)
        self._mix("attention", part, streams)
        *first, (last,) = its.stages()
        for names in first:
            if isinstance(its, CompressedAttention) and names == (its.grouped,):
                self._follow_groups(self._name(its.grouped), its.groups, part, streams)
            else:
                self._follow(self._named(names), part, streams)
        if self.config.post_norms or self.config.streams:
            self._follow(self._named((last,)), part, streams, relative=True, normed=self.config.post_norms)
        else:
            bias = self.source.trunk(self._name("o_bias")) if its.output_bias else 0
            self._reach(self._name(last), part, streams, bias)

    def mlp(self, a: Stream, source_a: Stream, source_y: Stream) -> None:
        """Round the shared expert or the dense MLP. a, source_a: the streams after attention; source_y: the source's
        stream after the layer, the target of a dense MLP."""
        dense = not self.config.has_experts(self.layer)
        if self.config.layers[self.layer].mlp is None:
            return
        self._mix(
            "mlp", lambda weights, a: reference.mlp_input(self.config, weights, self.layer, a), (a, source_a, source_a)
        )
        if not (dense or self.config.shared_hidden):
            return
        block = reference.dense_block if dense else reference.shared_expert
        h_of = reference.mlp_input if dense else reference.shared_input
        name, streams = "dense" if dense else "shared", (a, source_a, source_y if dense else source_a)

        def part(weights, a: np.ndarray) -> np.ndarray:
            return block(self.config, weights, self.layer, h_of(self.config, weights, self.layer, a))

        gate = (f"{name}.gate",) if self.config.gated else ()
        self._follow(self._named((*gate, f"{name}.up")), part, streams)
        if dense and not self.config.sums_experts:
            self._reach(self._name(f"{name}.down"), part, streams)
        else:  # the experts make up for the deficit, or norms are between this output and the residual stream
            normed = self.config.post_norms if dense else self.config.own_norms
            self._follow(self._named((f"{name}.down",)), part, streams, relative=True, normed=normed)

    def head(self, x: Stream, source_x: Stream) -> None:
        """Round the head. x, source_x: the streams after the last layer."""
        part = lambda weights, x: reference.head(self.config, weights, x)  # noqa: E731
        self._mix("output", part, (x, source_x, source_x))
        if not self.config.tied_head:
            self._follow(("head",), part, (x, source_x, source_x))

    def _mix(self, name: str, part, streams: tuple[Stream, ...]) -> None:
        """Round the gates of a residual stream of several streams. name: attention, mlp or output."""
        for matrix in self.config.streams.stages if self.config.streams else ():
            whole = f"{name}_mix.{matrix}"
            self._follow((whole if self.layer is None else self._name(whole),), part, streams)

    def _follow(
        self, names: tuple[str, ...], part, streams: tuple[Stream, ...], relative: bool = False, normed: bool = False
    ) -> None:
        """Round matrices with one input; the target of each is the source's output. relative: errors are relative to
        the norm of the stream; normed: and to that of the output of the first."""
        if self._is_rounded(names[0]):
            inputs, rounded = self._inputs(names[0]), Held(self.rounded)
            for block in self._blocks(streams):
                x, source_x = self._both_inputs(names[0], part, block, rounded)
                counts = block.token_weights if relative else np.ones(len(x), np.float32)
                if normed:
                    counts = counts / np.maximum(np.square(source_x @ self.source.trunk(names[0]).T).mean(-1), 1e-12)
                inputs.add(x, counts, source_x - x)
            for name in names:
                self._pack(name, self.rounded.whole(name), inputs, follows=True)

    def _follow_groups(self, name: str, groups: int, part, streams: tuple[Stream, ...]) -> None:
        """Round a matrix whose rows are in groups with inputs of their own, likewise.

        The part is computed anew for as many groups as take the memory of the widest matrix.
        """
        if not self._is_rounded(name):
            return
        matrices, packed, rounded = np.split(self.rounded.whole(name), groups), [], Held(self.rounded)
        together = max((widest_input(self.config) // matrices[0].shape[1]) ** 2, 1)
        for first in range(0, groups, together):
            several = [self._inputs(name) for _ in matrices[first : first + together]]
            for block in self._blocks(streams):
                both = self._both_inputs(name, part, block, rounded)
                x, source_x = (one.reshape(-1, groups, one.shape[-1])[:, first:] for one in both)
                for at, inputs in enumerate(several):
                    inputs.add(x[:, at], np.ones(len(x), np.float32), source_x[:, at] - x[:, at])
            for matrix, inputs in zip(matrices[first:], several, strict=False):
                packed += self._pieces(name, matrix, inputs, follows=True)
        self.rounded.put(name, _joined(packed))

    def _both_inputs(self, name: str, part, block: Block, rounded: Held) -> tuple[np.ndarray, np.ndarray]:
        """The inputs of the matrix `name` in the track and in the source, (rows, inputs)."""
        x = input_of(name, rounded, lambda weights: part(weights, block.track))
        return x, input_of(name, self.source, lambda weights: part(weights, block.source))

    def _reach(self, name: str, part, streams: tuple[Stream, ...], bias=0) -> None:
        """Round the last matrix of a part; its target is the source's stream after it minus the track's before it.

        bias: what the part adds to the matrix's output (rows,), which is then multiplied by the residual scale.
        """
        if self._is_rounded(name):
            inputs, matrix, rounded = self._inputs(name), self.rounded.whole(name), Held(self.rounded)
            for block in self._blocks(streams):
                x = input_of(name, rounded, lambda weights, its=block.track: part(weights, its))
                target = (block.wanted - block.track) / self.config.residual_scale - bias
                inputs.add(x, block.token_weights, target - x @ matrix.T)
            self._pack(name, matrix + inputs.step(), inputs)

    def _blocks(self, streams: tuple[Stream, ...]) -> Iterator[Block]:
        step = max(BLOCK_ROWS // self.tokens, 1) * self.tokens
        for start in range(0, len(self.rows), step):
            yield Block(*(stream.take(self.rows[start : start + step]) for stream in streams))

    def _pack(self, name: str, matrix: np.ndarray, inputs: Inputs, follows: bool = False) -> None:
        """Round a matrix for its inputs. follows: after a step to its output on the source's inputs."""
        self.rounded.put(name, _joined(self._pieces(name, matrix, inputs, follows)))

    def _pieces(self, name: str, matrix: np.ndarray, inputs: Inputs, follows: bool) -> list[Quantised]:
        packing, packed = self.rounded.packing[name], []
        step = max(PIECE_WEIGHTS // matrix.shape[1], 1)
        for start in range(0, len(matrix), step):
            piece = matrix[start : start + step]
            piece = piece + inputs.step(piece) if follows else piece
            width, its = packing.widths[0], inputs.curvature
            packed.append(gptq(piece, its, width, packing.group, sweeps=self.sweeps, threads=self.threads))
        return packed

    def _is_rounded(self, name: str) -> bool:
        return self.rounded.packing[name].widths[0] < 16

    def _inputs(self, name: str) -> Inputs:
        return Inputs(self.rounded.packing[name].group if self.act_order else 0)

    def _name(self, name: str) -> str:
        return f"layers.{self.layer}.{name}"

    def _named(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(self._name, names))


def _joined(pieces: list[Quantised]) -> Quantised:
    """The matrix whose rows these are."""
    parts = ([getattr(one, f.name) for one in pieces] for f in fields(Quantised))
    return Quantised(*map(np.concatenate, parts))


def fitted_rows(config: ModelConfig, rows: int, tokens: int) -> np.ndarray:
    """The calibration rows that the trunk is fitted to: sequences of `tokens`, sampled evenly."""
    sequences, most = rows // tokens, max(FITTED_ROWS, 2 * widest_input(config)) // tokens
    chosen = np.unique(np.linspace(0, sequences - 1, min(sequences, max(most, 1))).astype(np.int64))
    return (chosen[:, None] * tokens + np.arange(tokens)).reshape(-1)


def widest_input(config: ModelConfig) -> int:
    """The maximum number of inputs of a trunk matrix."""
    return max(shape[-1] for shape in trunk_shapes(config).values() if len(shape) == 2)
