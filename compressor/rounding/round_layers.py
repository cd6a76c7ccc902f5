"""Rounding the experts layer by layer, each matched to its full-precision output with the error of earlier layers.

Each compressed form of the model (a track: the bundle, and a uniform width to compare with) runs beside the source
model on the same text. An expert is rounded for the inputs that it will get at run time, those of the track, whose
earlier layers are already rounded. Its target is its full-precision output on the source's inputs plus its share of the
track's deficit: source minus track in the residual stream. With second moments H of the inputs x and C = the mean of
(target - W x) x^T, the matrix W + C H^-1 is closest to the target; GPTQ rounds it, with a cross-validated share of the
step (inputs.py). On the reference model at 2 bits, group 64, the KLD is 0.0417 with the source's inputs, 0.0345 with
the track's, and 0.0316 with the deficit. An expert is rounded to nearest if its output is then closer to the target.

A few tokens can be a thousand times larger than the others (massive activations); a small change of their routing
weight, or other experts, then makes a deficit a thousand times as large. So the error of each token is taken relative
to the norm of the residual stream after the layer, which later norms divide by, and a token whose deficit exceeds that
norm counts accordingly less.

Where norms follow the sum of the experts, their target is the source's sum: the deficit is that of the sum, and the
error is taken relative to it, times the share of the residual stream that depends on it.
"""

from dataclasses import dataclass, field, fields

import numpy as np

from ...runtime import reference
from ...runtime.config import ModelConfig
from ..passes import forward
from ..passes.expert_rows import fitting_rows, with_nearest
from ..passes.streams import Stream
from ..writing.writer import KEPT, BundleWriter, Packing, Quantised, record_bytes_of, table_packing
from .gptq import SWEEPS, gptq
from .inputs import Inputs
from .quantise import dequantise, quantise
from .round_trunk import TrunkFit, fitted_rows


@dataclass(slots=True)
class Track:
    """One compressed form of the model: its packing, its hidden states so far, and its writer."""

    name: str
    config: ModelConfig  # without the dropped experts
    trunk: "PackedTrunk"
    experts: dict[tuple[int, int], Packing]  # by layer and number among the experts kept
    writer: BundleWriter | None = None
    x: Stream | None = None
    # while a layer is rounded
    a: Stream | None = None
    y: Stream | None = None
    lacking: Stream | None = None
    token_weights: np.ndarray | None = (
        None  # (rows,) 1 / (squared norm of the source's stream after the layer + that of the deficit)
    )
    routing: forward.Routing | None = None
    norms: forward.Held | None = None
    changed: list[float] = field(default_factory=list)  # by layer: share of expert choices that differ from the source

    @property
    def bits_per_weight(self) -> float:
        """Mean true bits of an expert weight, scales, biases and padding included."""
        sizes = [8 * record_bytes_of(self.config, packing) for packing in self.experts.values()]
        return sum(sizes) / (len(sizes) * self.config.expert_weights)


@dataclass(slots=True)
class PackedTrunk:
    """A checkpoint's trunk in a track: rounded, with routers reduced to the experts kept. Each tensor read is written.

    Tensors without a put() are rounded to nearest.
    """

    checkpoint: object
    config: ModelConfig
    packing: dict[str, Packing]
    writer: BundleWriter | None
    threads: int
    rounded: dict[str, Quantised] = field(default_factory=dict)  # of the current layer

    def put(self, name: str, packed: Quantised) -> None:
        self.rounded[name] = packed
        if self.writer is not None:
            self.writer.write_trunk(name, packed)

    def whole(self, name: str) -> np.ndarray:
        """The tensor before rounding."""
        return cut_router(self.config, name, self.checkpoint.trunk(name))

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of a table as the bundle has them."""
        tensor = self.checkpoint.rows(name, rows)
        packing = table_packing(self.packing["embedding"], tensor.shape[1])
        packed = quantise(tensor, packing.widths[0], packing.group, search=False, threads=self.threads)
        return dequantise(packed, packing.widths[0], tensor.shape[1])

    def trunk(self, name: str) -> np.ndarray:
        width, group = self.packing[name].widths[0], self.packing[name].group
        if name in self.rounded:
            packed = self.rounded[name]
            return dequantise(packed, width, packed.scales.shape[-1] * group)
        tensor = self.whole(name)
        packed = quantise(tensor, width, group, threads=self.threads)
        if self.writer is not None:
            self.writer.write_trunk(name, packed)
        return dequantise(packed, width, tensor.shape[-1]).reshape(tensor.shape)


@dataclass(slots=True)
class Rounding:
    """The pass over the layers. Rows of calibration text come first, then held-out rows, which nothing is fitted to."""

    config: ModelConfig
    checkpoint: object
    ids: np.ndarray  # (sequences, tokens)
    calibration_rows: int
    tracks: list[Track]
    new_stream: object  # (name, rows, columns if not the residual stream's) -> Stream
    workers: int  # experts at a time
    threads: int  # for each expert
    act_order: bool = False
    keep: object = None  # (name, compute) -> arrays, loaded if an earlier run saved them
    sweeps: int = SWEEPS  # rounds of refinement after GPTQ
    x: Stream | None = None
    _norms: forward.Held | None = None  # of the current layer; read once, not for each expert

    def start(self) -> None:
        self.x = self.new_stream("source", self.ids.size)
        forward.embed(self.config, self.checkpoint, self.ids, self.x)
        for track in self.tracks:
            track.x = self.new_stream(track.name, self.ids.size)
            forward.embed(track.config, track.trunk, self.ids, track.x)

    @property
    def names(self) -> list[str]:
        return ["source", *(track.name for track in self.tracks)]

    @property
    def streams(self) -> list[Stream]:
        """The state between two layers, in the order of `names`."""
        return [self.x, *(track.x for track in self.tracks)]

    def go_on(self, streams: list[Stream]) -> None:
        """Restore the state that an earlier run saved."""
        for owner, stream in zip((self, *self.tracks), streams, strict=True):
            owner.x = stream

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    def layer(self, layer: int, tell) -> None:
        """Round one layer and compute it in all tracks. tell(experts done) reports progress."""
        self._norms = forward.Held(self.checkpoint)
        for track in self.tracks:
            track.norms = forward.Held(track.trunk)
        forward.add_ngrams(self.config, self.checkpoint, layer, self.x, self.ids)
        for track in self.tracks:
            self._trunk_fit(track, layer).ngrams(self.ids)
            forward.add_ngrams(track.config, track.trunk, layer, track.x, self.ids)
        a = self._attention(self.config, self.checkpoint, layer, self.x, "source")
        y = self._common_mlp(self.config, self.checkpoint, layer, a, "source")
        for track in self.tracks:
            fit = self._trunk_fit(track, layer)
            fit.attention(track.x, self.x, a)
            track.a = self._attention(track.config, track.trunk, layer, track.x, track.name)
            fit.mlp(track.a, a, y)
            track.y = self._common_mlp(track.config, track.trunk, layer, track.a, track.name)
        if self.config.has_experts(layer):
            self._source_experts(layer, a, y)
            self._rounded_experts(layer, a, tell)
            y = self._finish(layer, a, y)
        for owner, after in ((self, y), *((track, track.y) for track in self.tracks)):
            owner.x.close()
            owner.x = after
        a.close()
        for track in self.tracks:
            track.a.close()
            track.trunk.rounded.clear()

    def head(self) -> None:
        """Round the head, after the last layer."""
        self._norms = forward.Held(self.checkpoint)
        for track in self.tracks:
            self._trunk_fit(track, None).head(track.x, self.x)

    def _trunk_fit(self, track: Track, layer: int | None) -> TrunkFit:
        tokens, threads = self.ids.shape[1], self.workers * self.threads
        rows = fitted_rows(self.config, self.calibration_rows, tokens)
        options = self.sweeps, threads, self.act_order
        return TrunkFit(track.config, self._norms, track.trunk, layer, tokens, rows, *options)

    def _attention(self, config, weights, layer, x: Stream, name: str) -> Stream:
        a = self.new_stream(f"{name}-attended", x.rows)
        forward.attention(config, weights, layer, x, self.ids.shape[1], a)
        return a

    def _common_mlp(self, config, weights, layer, a: Stream, name: str) -> Stream:
        y = self.new_stream(f"{name}-next", a.rows, forward.sums_dim(config, layer))
        forward.common_mlp(config, weights, layer, a, y)
        return y

    def _finish(self, layer: int, a: Stream, y: Stream) -> Stream:
        """Finish the layer in all tracks, and return the source's output."""
        for track in self.tracks:
            its = track.config, track.norms, layer, track.a, track.y
            track.y = forward.finish_mlp(*its, self.new_stream)
        return forward.finish_mlp(self.config, self._norms, layer, a, y, self.new_stream)

    def _source_experts(self, layer: int, a: Stream, y: Stream) -> None:
        """Add the source's experts to y, and compute each track's deficit per unit of routing weight.

        Held-out rows tell how many choices of experts have changed in each track.
        """
        routing = forward.route(self.config, self.checkpoint, layer, a, self.ids)
        for track in self.tracks:
            track.routing = forward.route(track.config, track.trunk, layer, track.a, self.ids)
            if self.calibration_rows < a.rows:
                track.changed.append(self._changed(track, layer, routing))
            track.lacking = self.new_stream(f"{track.name}-lacking", a.rows, y.dim)

        def one(expert: int):
            matrices = self.checkpoint.expert(layer, expert)
            bias = reference.expert_bias(self.config, self.checkpoint, layer, expert)
            wanted = [(y, routing.rows_of(expert))]
            for track in self.tracks:
                if (number := track.config.number_of(layer, expert)) is not None:
                    wanted.append((track.lacking, track.routing.rows_of(number)))
            return [
                (into, self._parts(self.config, self._norms, layer, a, matrices, bias, *its)) for into, its in wanted
            ]

        for outputs in forward.in_order(self.workers, one, range(self.config.experts)):
            for into, parts in outputs:
                forward.add_all(into, parts)
        for track in self.tracks:
            weight = track.routing.weights.sum(axis=1, keepdims=True)
            track.token_weights = np.empty(y.rows, np.float32)
            for start, stop in y.blocks():
                whole = y.read(start, stop)
                lacks = whole - track.y.read(start, stop) - track.lacking.read(start, stop)
                size = np.square(whole).sum(-1) + np.square(lacks).sum(-1)
                share = self._share(layer, a.read(start, stop), whole)
                track.token_weights[start:stop] = share / np.maximum(size, 1e-12)
                track.lacking.write(start, lacks / np.maximum(weight[start:stop], 1e-6))

    def _share(self, layer: int, a: np.ndarray, y: np.ndarray):
        """The squared share of the residual stream after the layer that depends on y, what the experts are added to.

        a: the stream before the MLP, (rows, dim). 1 if y is the stream itself.
        """
        if not forward.sums_experts(self.config, layer):
            return 1
        after = forward.finished(self.config, self._norms, layer, a, y)
        before = reference.scaled(self.config, self._norms, layer, a)
        return np.square(after - before).sum(-1) / np.maximum(np.square(after).sum(-1), 1e-12)

    def _changed(self, track: Track, layer: int, routing: forward.Routing) -> float:
        """The share of the source's expert uses, on held-out tokens and for experts kept, that the track lacks."""
        kept = list(track.config.kept[layer]) if track.config.kept else slice(None)
        held_out = slice(self.calibration_rows, None)
        uses = [np.zeros(its.scores[held_out].shape, bool) for its in (routing, track.routing)]
        for its, its_uses in zip((routing, track.routing), uses, strict=True):
            rows, place = np.nonzero(its.chosen[held_out] >= 0)
            its_uses[rows, its.chosen[held_out][rows, place]] = True
        wanted = uses[0][:, kept]
        return float((wanted & ~uses[1]).sum() / max(wanted.sum(), 1))

    def _rounded_experts(self, layer: int, a: Stream, tell) -> None:
        def one(expert: int):
            numbers = [(track, track.config.number_of(layer, expert)) for track in self.tracks]
            if all(number is None for _, number in numbers):
                return []
            matrices, results = self.checkpoint.expert(layer, expert), []
            bias = reference.expert_bias(self.config, self.checkpoint, layer, expert)
            for track, number in numbers:
                if number is not None:
                    packed = self._packed(track, layer, number, matrices, bias, a)
                    widths = track.experts[layer, number].widths
                    rounded = [
                        dequantise(one, width, matrix.shape[1])
                        for one, width, matrix in zip(packed, widths, matrices, strict=True)
                    ]
                    its = track.routing.rows_of(number)
                    parts = self._parts(track.config, track.norms, layer, track.a, rounded, bias, *its)
                    results.append((track, number, packed, bias, parts))
            return results

        for done, results in enumerate(forward.in_order(self.workers, one, range(self.config.experts)), start=1):
            for track, number, packed, bias, parts in results:
                forward.add_all(track.y, parts)
                if track.writer is not None:
                    track.writer.write_expert(layer, number, packed, bias)
            tell(done)
        for track in self.tracks:
            track.lacking.close()

    def _parts(self, config, norms, layer, a, matrices, bias, rows, weight):
        parts = forward.expert_parts(config, norms, layer, a, matrices, bias, rows, weight)
        return forward.held(parts, len(rows), config.dim)

    def _packed(self, track: Track, layer: int, number: int, matrices, bias, a: Stream) -> list[Quantised]:
        """gate, up and down of one expert, rounded; with `keep`, saved on disk for a resumed run."""
        if self.keep is None:
            return self._round(track, layer, number, matrices, bias, a)

        def compute() -> dict:
            parts = enumerate(self._round(track, layer, number, matrices, bias, a))
            return {
                f"{i}.{f.name}": v for i, one in parts for f in fields(one) if (v := getattr(one, f.name)) is not None
            }

        saved = self.keep(f"packed-{layer:04}-{number:04}.{track.name}", compute)
        return [Quantised(*(saved.get(f"{i}.{f.name}") for f in fields(Quantised))) for i in range(3)]

    def _round(self, track: Track, layer: int, number: int, matrices, bias, a: Stream) -> list[Quantised]:
        packing, config = track.experts[layer, number], self.config
        if packing == KEPT:
            its_kept = track.config.kept
            return kept(self.checkpoint, layer, its_kept[layer][number] if its_kept else number)
        if packing.widths[0] >= 16:
            return [quantise(matrix, 16, packing.group) for matrix in matrices]
        rows, weight = fitting_rows(*track.routing.rows_of(number, self.calibration_rows), config.dim)
        rows, weight = with_nearest(track.routing, number, rows, weight, self.calibration_rows)
        counts = weight**2 * track.token_weights[rows]
        h = forward.expert_input(track.config, track.norms, layer, track.a, rows)
        clean = forward.expert_input(config, self._norms, layer, a, rows)
        packed, rounded = [], []

        def pack(matrix: np.ndarray, step: np.ndarray, inputs: Inputs, width: int) -> None:
            one = gptq(matrix + step, inputs.curvature, width, packing.group, sweeps=self.sweeps, threads=self.threads)
            packed.append(one)
            rounded.append(dequantise(one, width, matrix.shape[1]))

        inputs, inner_inputs = (Inputs(packing.group if self.act_order else 0) for _ in range(2))
        inputs.add(h, counts, clean - h)
        steps = np.split(inputs.step(np.concatenate(matrices[:2])), [len(matrices[0])])
        for matrix, step, width in zip(matrices[:2], steps, packing.widths[:2], strict=True):
            pack(matrix, step, inputs, width)
        inner = reference.expert_inner(config, h, *rounded, bias=bias)
        target = reference.expert(config, clean, *matrices, bias=bias) + track.lacking.take(rows)
        inner_inputs.add(inner, counts, target - reference.plus(inner @ matrices[2].T, bias[2]))
        pack(matrices[2], inner_inputs.step(), inner_inputs, packing.widths[2])
        del inputs, inner_inputs, inner

        def error(its: list[np.ndarray]) -> float:
            return float(counts @ np.square(reference.expert(config, h, *its, bias=bias) - target).sum(-1))

        # Each matrix alone is no worse than rounded to nearest, row by row; all three together may be.
        to_nearest = [
            quantise(matrix, width, packing.group, threads=self.threads)
            for matrix, width in zip(matrices, packing.widths, strict=True)
        ]
        its = zip(to_nearest, packing.widths, matrices, strict=True)
        if error([dequantise(one, width, matrix.shape[1]) for one, width, matrix in its]) < error(rounded):
            return to_nearest
        return packed


def kept(checkpoint, layer: int, expert: int) -> list[Quantised]:
    """gate, up and down of an expert with the codes that the checkpoint has."""
    return [Quantised(*parts) for parts in checkpoint.codes(layer, expert)]


def cut_router(config: ModelConfig, name: str, tensor: np.ndarray) -> np.ndarray:
    """The rows of a router (or its values for each expert) for the experts that are kept; other tensors unchanged.

    A table of experts gets their new numbers, and -1 for those that are gone.
    """
    per_expert = (".router", ".router_bias", ".router_logit_bias", ".expert_scale")
    if not config.kept or not name.endswith((*per_expert, ".router_table")):
        return tensor
    kept = list(config.kept[int(name.split(".")[1])])
    if name.endswith(per_expert):
        return np.ascontiguousarray(tensor[kept])
    numbers = np.full(config.experts, -1, np.float32)
    numbers[kept] = np.arange(len(kept))
    return numbers[tensor.astype(np.int64)]
