"""Sensitivity: what each width of each expert matrix costs the model, measured with the quantiser that rounds it.

One pass over the layers with full-precision inputs. Each matrix of each expert is rounded alone (GPTQ without
refinement) at each choice of width and group, and the change of the layer's output on calibration tokens is measured.
A layer's gain is measured too: its experts are rounded together at one choice, the error is carried through the rest of
the model, and the gain is the KL divergence of the predictions per unit of error. In the same pass, forms of the model
with one kind of trunk tensor rounded (trunk.py) give the divergence of that kind.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from ...runtime import reference
from ...runtime.config import ModelConfig
from ...runtime.score import log_softmax
from ..files import write_whole
from ..passes import forward
from ..passes.calibrate import Calibration
from ..passes.expert_rows import fitting_rows, with_nearest
from ..passes.streams import Stream
from ..rounding.gptq import gptq
from ..rounding.inputs import curvature_of
from ..rounding.quantise import dequantise

MOST_ROWS = 1024  # tokens of an expert on which its error is measured; more are sampled evenly
GAIN_ROWS = 40_000  # maximum of rows with carried errors over all layers, but at least GAIN_SEQUENCES a layer
GAIN_SEQUENCES = 16

Choice = tuple[int, int]  # width and group of one matrix


@dataclass(slots=True)
class LayerMeasure:
    """The measures of one layer, one row per expert; a choice is a (width, group) of one matrix."""

    frequency: np.ndarray  # (experts,) assignments / tokens
    routing_weight: np.ndarray  # (experts,) mean over all tokens of the score where chosen, before renormalisation
    rows: np.ndarray  # (experts,) tokens routed to each
    norm_errors: np.ndarray  # (experts, 3, choices) Frobenius norm of the change of the block's output (MC)
    # (experts, 3, choices, domains + 1) mean over a domain's tokens of the squared change of the residual stream,
    # relative to its squared norm. The last column stands for text unlike the calibration's that uses all experts
    # evenly: it keeps bits for experts that calibration seldom used.
    errors: np.ndarray
    drop_errors: np.ndarray  # (experts, domains + 1) the same for dropping the expert
    carried: np.ndarray  # (domains,) the same for all of the layer's experts rounded at the carried choice


@dataclass(slots=True)
class Measures:
    """The measures of a model: by layer (None for one without experts), with the choices and each layer's gain."""

    layers: list[LayerMeasure | None]
    choices: list[Choice]
    gain: np.ndarray  # (layers, domains + 1) nats of KL divergence a unit of relative squared error
    trunk: dict[str, float] = field(default_factory=dict)  # nats by kind of trunk tensor, at trunk.PROBED bits
    has_codes: bool = False  # whether the checkpoint's own codes are one more option for each expert

    def cost(self) -> np.ndarray:
        """Expected KL divergence in nats a token, (experts of all layers, 3, choices, domains + 1)."""
        present = [(m, gain) for m, gain in zip(self.layers, self.gain, strict=True) if m is not None]
        return np.concatenate([m.errors * gain for m, gain in present])

    def of(self, config: ModelConfig) -> "Measures":
        """The measures of only the experts that `config` keeps."""
        layers = []
        for layer, measure in enumerate(self.layers):
            if measure is None:
                layers.append(None)
                continue
            kept = list(config.kept[layer])
            cut = {f.name: getattr(measure, f.name)[kept] for f in fields(LayerMeasure) if f.name != "carried"}
            layers.append(LayerMeasure(**cut, carried=measure.carried))
        return Measures(layers, self.choices, self.gain, self.trunk, self.has_codes)

    def frequencies(self) -> dict[tuple[int, int], float]:
        """Uses of each expert a token, by layer and number."""
        present = [(layer, m) for layer, m in enumerate(self.layers) if m is not None]
        return {(layer, i): float(f) for layer, m in present for i, f in enumerate(m.frequency)}

    def spread(self, choice: int) -> float:
        """How much the experts differ: 90th over 10th percentile of an expert's cost with all matrices at `choice`."""
        cost = self.cost()[:, :, choice, :-1].mean(axis=-1).sum(axis=1)
        low, high = np.quantile(cost, (0.1, 0.9))
        return float(high / max(low, 1e-30))


@dataclass(slots=True)
class Layer:
    """The data that measuring the experts of one layer shares."""

    index: int
    a: Stream  # after attention
    routing: forward.Routing
    norms: forward.Held
    # (rows,) 1 / squared norm of the residual stream after the layer, which later norms divide by, times the square of
    # output_scales()' factor of the row
    relative: np.ndarray
    of_dims: np.ndarray  # (dim,) its other factor
    place: np.ndarray  # (rows,) index in the sample that carries errors, -1 outside of it


@dataclass(slots=True)
class Form:
    """The hidden states of one form of the model: the source, or a form with an error that is carried along."""

    weights: object  # trunk(name)
    x: Stream | None = None  # None before there is an error to carry
    # within a layer
    a: Stream | None = None
    y: Stream | None = None
    routing: forward.Routing | None = None

    def enter(self, config: ModelConfig, layer: int, ids: np.ndarray, new_stream) -> None:
        """Compute a layer without its experts, whose outputs are added to y later. ids: (sequences, tokens) of x."""
        self.a = new_stream("attended", self.x.rows)
        self.y = new_stream("next", self.x.rows, forward.sums_dim(config, layer))
        forward.add_ngrams(config, self.weights, layer, self.x, ids)
        forward.attention(config, self.weights, layer, self.x, ids.shape[1], self.a)
        forward.common_mlp(config, self.weights, layer, self.a, self.y)
        self.routing = None
        if config.has_experts(layer):
            self.routing = forward.route(config, self.weights, layer, self.a, ids)

    def leave(self, config: ModelConfig, layer: int, new_stream) -> None:
        """Finish the layer, whose experts' outputs y has now."""
        self.y = forward.finish_mlp(config, self.weights, layer, self.a, self.y, new_stream)
        self.x.close()
        self.a.close()
        self.x = self.y


@dataclass(slots=True)
class Sensitivity:
    """The measuring pass, layer by layer; its state can be saved after each layer."""

    config: ModelConfig
    weights: object  # trunk(name), expert(layer, expert)
    calibration: Calibration
    choices: list[Choice]
    carried_choice: int
    workers: int  # experts at a time
    threads: int  # for each expert
    new_stream: Callable[..., Stream]  # (name, rows, columns if not the residual stream's) -> an empty stream
    keep: object = None  # (name, compute) -> arrays, loaded if an earlier run saved them
    trunks: dict[str, object] = field(default_factory=dict)  # by kind, the weights with that kind of tensor rounded
    forms: dict[str, Form] = field(default_factory=dict)  # source, carried, and one for each kind of trunk tensor
    sample: np.ndarray = None  # indices of the sequences whose rows carry errors

    def __post_init__(self):
        sequences, tokens = self.calibration.ids.shape
        count = sampled_sequences(self.config, sequences, tokens)
        self.sample = np.linspace(0, sequences - 1, count).astype(np.int64)
        # carried: for each layer so far, the stream with that layer's error, (layers so far * rows, dim)
        self.forms = {"source": Form(self.weights), "carried": Form(self.weights)}
        self.forms |= {kind: Form(weights) for kind, weights in self.trunks.items()}

    def start(self) -> None:
        """Fill the streams of all forms with the inputs of the first layer."""
        for name, form in self.forms.items():
            if name != "carried":
                ids = self._ids_of(name)
                form.x = self.new_stream(name, ids.size)
                forward.embed(self.config, form.weights, ids, form.x)

    def _ids_of(self, form: str) -> np.ndarray:
        """The token ids of a form's sequences, (sequences, tokens)."""
        return self.calibration.ids[slice(None) if form == "source" else self.sample]

    @property
    def sample_rows(self) -> np.ndarray:
        tokens = self.calibration.ids.shape[1]
        return (self.sample[:, None] * tokens + np.arange(tokens)).reshape(-1)

    @property
    def streams(self) -> dict[str, Stream]:
        """The state between two layers, by name of the form."""
        return {name: form.x for name, form in self.forms.items() if form.x is not None}

    def go_on(self, streams: dict[str, Stream]) -> None:
        """Restore the state that an earlier run saved."""
        for name, stream in streams.items():
            self.forms[name].x = stream

    def layer(self, layer: int, tell: Callable[[int], None]) -> LayerMeasure | None:
        """Measure one layer and compute it in all forms. tell(experts done) reports progress."""
        config, measure = self.config, None
        present = {name: form for name, form in self.forms.items() if form.x is not None}
        for name, form in present.items():
            form.enter(config, layer, self._ids_of(name), self.new_stream)
        change = None
        if config.has_experts(layer):
            change = np.zeros((len(self.sample_rows), config.dim), np.float32)
            measure = self._experts(layer, list(present.values()), change, tell)
            source, rows = self.forms["source"], self.sample_rows
            moved = source.y.take(rows) + change
            moved = forward.finished(config, forward.Held(self.weights), layer, source.a.take(rows), moved)
        for form in present.values():
            form.leave(config, layer, self.new_stream)
        if change is not None:
            self._carry(moved)
        return measure

    def _experts(self, layer: int, forms: list[Form], change: np.ndarray, tell) -> LayerMeasure:
        """Measure the layer's experts, add their outputs to every form, and the carried choice's error to `change`."""
        config, norms, source = self.config, forward.Held(self.weights), self.forms["source"]
        a, routing = source.a, source.routing

        def outputs_of(expert: int):
            """For each form, its stream and the blocks of output that the expert adds to it."""
            matrices, outputs = self.weights.expert(layer, expert), []
            bias = reference.expert_bias(config, self.weights, layer, expert)
            for form in forms:
                rows, routed = form.routing.rows_of(expert)
                parts = forward.expert_parts(config, norms, layer, form.a, matrices, bias, rows, routed)
                outputs.append((form.y, forward.held(parts, len(rows), config.dim)))
            return outputs

        for outputs in forward.in_order(self.workers, outputs_of, range(config.experts)):
            for into, parts in outputs:
                forward.add_all(into, parts)

        place = np.full(a.rows, -1)
        place[self.sample_rows] = np.arange(len(self.sample_rows))
        relative = np.empty(a.rows, np.float32)
        for start, stop in source.y.blocks():
            streams = a.read(start, stop), source.y.read(start, stop)
            of_rows, of_dims = forward.output_scales(config, norms, layer, *streams)
            size = np.square(forward.finished(config, norms, layer, *streams)).sum(-1)
            relative[start:stop] = np.square(of_rows) / np.maximum(size, 1e-12)
        at = Layer(layer, a, routing, norms, relative, of_dims, place)

        def measured(expert: int):
            def compute() -> dict[str, np.ndarray]:
                bias = reference.expert_bias(config, self.weights, layer, expert)
                return self._expert(at, expert, self.weights.expert(layer, expert), bias)

            return self.keep(f"measured-{layer:04}-{expert:04}", compute) if self.keep else compute()

        found = []
        for result in forward.in_order(self.workers, measured, range(config.experts)):
            change[result["moved_at"]] += result["moved"]
            found.append(result)
            tell(len(found))
        count, norm_errors, errors = (
            np.array([its[key] for its in found]) for key in ("count", "norm_errors", "errors")
        )
        scores = np.zeros_like(routing.scores)
        np.put_along_axis(scores, routing.chosen, np.take_along_axis(routing.scores, routing.chosen, -1), -1)
        return LayerMeasure(
            count / a.rows,
            scores.mean(0),
            count,
            norm_errors,
            errors[:, :-1].reshape(config.experts, 3, len(self.choices), -1),
            errors[:, -1],
            self._of_sample(np.square(change * of_dims, dtype=np.float64).sum(-1) * relative[self.sample_rows]),
        )

    def _expert(self, at: "Layer", expert: int, matrices, bias) -> dict[str, np.ndarray]:
        """One expert's part of a LayerMeasure, and the change of its output on the sampled rows with all three matrices
        at the carried choice."""
        config, routing = self.config, at.routing
        domain = np.repeat(self.calibration.domains, self.calibration.ids.shape[1])  # (rows,)
        domain_tokens = np.bincount(domain)
        rows, routed = routing.rows_of(expert)
        given, share = with_nearest(routing, expert, *fitting_rows(rows, routed, config.dim), at.a.rows)
        kept = sampled(len(given))
        relative = at.relative[given]
        h = forward.expert_input(config, at.norms, at.index, at.a, given)
        squared, gone, rounded = self._changes(matrices, bias, h, share**2 * relative, kept, at.of_dims)
        # the last row is the whole output, the change when the expert is dropped
        squared = np.concatenate([squared.reshape(-1, len(kept)), gone[None]]) * share[kept] ** 2
        scale = len(rows) / max(len(kept), 1)
        norm_errors = np.sqrt(squared[:-1].sum(-1) * scale).reshape(3, -1)
        squared *= relative[kept]
        in_domain = [np.bincount(domain[given[kept]], one, len(domain_tokens)) for one in squared]
        unseen = squared.mean(-1) * config.top_k / config.experts

        sample = at.place[rows] >= 0
        h = forward.expert_input(config, at.norms, at.index, at.a, rows[sample])
        moved = reference.expert(config, h, *rounded, bias=bias) - reference.expert(config, h, *matrices, bias=bias)
        return {
            "count": np.array(len(rows)),
            "norm_errors": norm_errors,
            "errors": np.column_stack([np.array(in_domain) * scale / domain_tokens, unseen]),
            "moved_at": at.place[rows[sample]],
            "moved": moved * routed[sample, None],
        }

    def _changes(self, matrices, bias, h, token_weights, kept, of_dims):
        """Squared norm of the change of one expert's output, (3, choices, kept rows), with each matrix rounded alone.

        of_dims: factors of the output's dimensions, (dim,).

        Also return the squared norm of the output, (kept rows,), and the three matrices at the carried choice. The
        rounding is fitted to every second row and the error taken on the others: otherwise the error of an expert with
        few rows would be underestimated.
        """
        config = self.config
        inner = reference.expert_inner(config, h, *matrices[:2], bias=bias)
        curvature = curvature_of(h[::2], token_weights[::2])
        curvature_down = curvature_of(inner[::2], token_weights[::2])
        h_kept, inner_kept = h[kept], inner[kept]
        gate, up, y = (
            reference.plus(x @ matrix.T, its)
            for x, matrix, its in zip((h_kept, h_kept, inner_kept), matrices, bias, strict=True)
        )
        squared = np.empty((3, len(self.choices), len(kept)), np.float64)
        carried = None
        for i, (width, group) in enumerate(self.choices):
            rounded = []
            for matrix, its in zip(matrices, (curvature, curvature, curvature_down), strict=True):
                packed = gptq(matrix, its, width, group, sweeps=0, threads=self.threads)
                rounded.append(dequantise(packed, width, matrix.shape[1]))
            gates, ups = reference.plus(h_kept @ rounded[0].T, bias[0]), reference.plus(h_kept @ rounded[1].T, bias[1])
            inners = (reference.gated(config, gates, up), reference.gated(config, gate, ups), inner_kept)
            for part, inner in enumerate(inners):
                down = rounded[2] if part == 2 else matrices[2]
                squared[part, i] = np.square((reference.plus(inner @ down.T, bias[2]) - y) * of_dims).sum(-1)
            if i == self.carried_choice:
                carried = rounded
        return squared, np.square(y * of_dims, dtype=np.float64).sum(-1), carried

    def _of_sample(self, values: np.ndarray) -> np.ndarray:
        """Mean over each domain, (domains,), of one value per sampled row."""
        domain = np.repeat(self.calibration.domains[self.sample], self.calibration.ids.shape[1])
        domains = int(self.calibration.domains.max()) + 1
        return np.bincount(domain, values, domains) / np.maximum(np.bincount(domain, minlength=domains), 1)

    def _carry(self, moved: np.ndarray) -> None:
        """Append a stream with this layer's error, (sampled rows, dim), to those of the layers before."""
        form = self.forms["carried"]
        before = form.x.rows if form.x else 0
        out = self.new_stream("carried", before + len(moved))
        if form.x:
            for start, stop in form.x.blocks():
                out.write(start, form.x.read(start, stop))
            form.x.close()
        out.write(before, moved)
        form.x = out

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()

    def finish(self, layers: list[LayerMeasure | None], logits_rows: int) -> Measures:
        """Return the measures, with costs in nats, after the last layer.

        A layer's gain is the KL divergence per unit of relative squared error. Each domain's gain is shrunk towards the
        mean over domains, as it is measured on few tokens.
        """
        config, rows = self.config, self.sample_rows
        domain = np.repeat(self.calibration.domains[self.sample], self.calibration.ids.shape[1])
        domains = int(self.calibration.domains.max()) + 1
        tokens = np.bincount(domain, minlength=domains)
        sums, trunk = np.zeros((len(config.moe_layers), domains)), dict.fromkeys(self.trunks, 0.0)
        held = {name: forward.Held(form.weights) for name, form in self.forms.items()}
        for start in range(0, len(rows), logits_rows):
            at = slice(start, min(start + logits_rows, len(rows)))
            clean = log_softmax(reference.head(config, held["source"], self.forms["source"].x.take(rows[at])))
            p = np.exp(clean)

            def divergence(form: str, first: int, at=at, clean=clean, p=p) -> np.ndarray:
                moved = self.forms[form].x.read(first + at.start, first + at.stop)
                return (p * (clean - log_softmax(reference.head(config, held[form], moved)))).sum(-1)

            for i in range(len(sums)):
                sums[i] += np.bincount(domain[at], divergence("carried", i * len(rows)), domains)
            for kind in trunk:
                trunk[kind] += float(divergence(kind, 0).sum()) / len(rows)
        gain = np.zeros((config.layer_count, domains + 1))
        for i, layer in enumerate(config.moe_layers):
            carried = layers[layer].carried
            mean = sums[i].sum() / max((carried * tokens).sum(), 1e-30)
            own = sums[i] / np.maximum(carried * tokens, 1e-30)
            trust = tokens / (tokens + len(rows) / (2 * domains))
            gain[layer, :-1] = np.where(carried > 0, trust * own + (1 - trust) * mean, mean)
            gain[layer, -1] = mean
        return Measures(layers, self.choices, gain, trunk)


def sampled_sequences(config: ModelConfig, sequences: int, tokens: int) -> int:
    """How many of `sequences` sequences, of `tokens` tokens each, carry errors."""
    return min(sequences, max(GAIN_SEQUENCES, 2 * GAIN_ROWS // (tokens * (len(config.moe_layers) + 1))))


def sampled(rows: int) -> np.ndarray:
    """The rows on which an expert's error is measured: every second one, sampled evenly if there are many."""
    others = np.arange(1, rows, 2)
    return others[np.unique(np.linspace(0, len(others) - 1, min(len(others), MOST_ROWS)).astype(np.int64))]


def save_measure(path: Path, measure: LayerMeasure | None) -> None:
    """Write one layer's measure atomically."""
    arrays = {} if measure is None else {f.name: getattr(measure, f.name) for f in fields(LayerMeasure)}
    write_whole(path, lambda file: np.savez(file, **arrays))


def load_measure(path: Path) -> LayerMeasure | None:
    with np.load(path, allow_pickle=False) as arrays:
        return LayerMeasure(**{name: arrays[name] for name in arrays.files}) if arrays.files else None
