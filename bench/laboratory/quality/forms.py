"""The compressed forms of a model to compare: methods, other ways to spend the same bytes, and ablations.

Each is a run of compress(), in some forms with one step replaced.
"""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from edge_moe.compressor.choosing import allocate, targets
from edge_moe.compressor.choosing.sensitivity import Measures
from edge_moe.compressor.passes import forward
from edge_moe.compressor.passes.streams import Stream
from edge_moe.compressor.pipeline import Compression
from edge_moe.compressor.rounding.quantise import trunk_packing
from edge_moe.compressor.rounding.round_layers import Rounding, Track
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import Packing
from edge_moe.runtime.bundle_records import record_alignment, record_bytes
from edge_moe.runtime.config import ModelConfig, trunk_shapes

from .study import Study

DROPPED = 0.25  # share of the experts in rows that drop some
SEEDS = 3  # number of random allocations
REPEAT_TOKENS = 256  # each repeat uses so many tokens fewer, which shifts its windows of calibration text


def compressed(study: Study, form: "Form", out: Path) -> None:
    """Write the bundle of a form with compress()."""
    with Checkpoint(study.model) as checkpoint:
        o = targets.check(targets.Options(**{**study.options, **form.options}), checkpoint.config)
        kept = form.measures_file(study) if form.measures else None
        Variant(checkpoint, out, o, lambda step, done, of: None, form=form, kept=kept).run()


@dataclass(frozen=True)
class Form:
    """One row."""

    name: str
    bits: float  # budget of true bits a weight, with the weights of dropped experts counted
    options: dict  # of compress(), in addition to the study's
    mixed: Callable | None = None  # (compression, measures, budget, unit) -> packings, instead of allocate.mixed()
    rounding: type = Rounding
    make: Callable[[Study, "Form", Path], None] = field(default=compressed)
    true_bits: float | None = None  # given if the bundle stores the form's weights at a larger width

    @property
    def key(self) -> str:
        """The name of the form's files."""
        name = "".join(letter if letter.isalnum() else "-" for letter in self.name)
        return f"{name}-{self.bits:g}{self._sample}"

    @property
    def measures(self) -> str | None:
        """The name of the form's measures, equal for forms with the same measures; None if it measures nothing."""
        method = self.options.get("method")
        if self.make is not compressed or method not in ("pmq", "mc", "mc-release"):
            return None
        # mc and mc-release choose from the same widths, by measures that do not depend on the bits
        name = "mc"
        if method == "pmq":
            name = f"pmq-{self.options['bits']:g}" if "bits" in self.options else f"pmq-whole-{self.bits:g}"
            name += f"-group-{self.options['group']}" if "group" in self.options else ""
        return name + self._sample

    @property
    def _sample(self) -> str:
        """The name of the sample of calibration text, if it is not the study's."""
        sample = f"-of-{self.options['tokens']}-tokens" if "tokens" in self.options else ""
        return sample + ("-of-Python" if "calibration" in self.options else "")

    def measures_file(self, study: Study) -> Path:
        return study.work / f"measures-{self.measures}.pickle"


@dataclass(slots=True)
class Variant(Compression):
    """A run of compress() with replaced steps, which reuses the measures of other forms."""

    form: Form = None
    kept: Path | None = None

    @property
    def rounding(self) -> type:
        return self.form.rounding

    def measure(self) -> Measures:
        if not self.kept.exists():
            partial_file = self.out.with_suffix(".new")
            partial_file.write_bytes(pickle.dumps(Compression.measure(self)))
            os.replace(partial_file, self.kept)
        return pickle.loads(self.kept.read_bytes())

    def mixed(self, config: ModelConfig, measures: Measures, budget: float, unit: Packing, paging) -> list[Packing]:
        if self.form.mixed is None:
            return allocate.mixed(config, measures, budget, unit, paging)
        return self.form.mixed(self, measures, budget, unit)


# ---- methods


def bases(study: Study) -> list[Form]:
    """The reference itself, and a form with only the trunk quantised."""
    return [
        Form("bfloat16", 16, {"method": "rtn", "bits": 16}),
        Form("trunk alone", 16, {"method": "rtn", "width": 16}),
    ]


def methods(study: Study, bits: float) -> list[Form]:
    """The rows of one size, without other tools'. rtn takes the width and group of `uniform`."""
    config = study.config
    one = targets.uniform_packing(config, bits, targets.groups(targets.Options(method="uniform"), config))
    pmq, certified = {"method": "pmq", "bits": bits}, {"certificate": True}
    fewer = {"method": "pmq", "bits": bits / (1 - DROPPED), "drop_experts": DROPPED, "drop_counts": "equal"}
    forms = [
        Form("rtn", bits, {"method": "rtn", "width": one.widths[0], "group": one.group}),
        Form("uniform", bits, {"method": "uniform", "bits": bits} | certified),
    ]
    low, high = published_bits(config)
    if low <= bits <= high:
        forms += [Form(name, bits, {"method": name, "bits": bits}) for name in ("mc", "mc-release")]
    return [
        *forms,
        Form("pmq", bits, pmq | certified),
        Form("pmq, trunk too", bits, {"method": "pmq", "trunk_width": None, "size": bundle_bytes(study, bits)}),
        Form("pmq, experts dropped", bits, fewer),
        Form("pmq, experts dropped by sensitivity", bits, {**fewer, "drop_counts": "sensitivity"}),
        *(Form(f"random {seed}", bits, pmq, partial(at_random, seed=seed)) for seed in range(SEEDS)),
        Form("frequency only", bits, pmq, by_frequency),
        Form("error only", bits, pmq, by_error),
    ]


def bundle_bytes(study: Study, bits: float) -> int:
    """Upper bound of the bytes of a bundle with these bits and the study's trunk."""
    config = study.config
    trunk = trunk_packing(trunk_shapes(config), study.trunk_width, targets.DEFAULT_GROUP)
    with Checkpoint(study.model) as checkpoint:
        fixed = targets.fixed_bytes(checkpoint, config, trunk)
    return fixed + int(bits * config.expert_weights * config.expert_count / 8)


def published_bits(config: ModelConfig) -> tuple[float, float]:
    """The minimum and maximum true bits of mc: at least one expert has each wider width, at most all the widest."""
    group = targets.groups(targets.Options(method="mc"), config)[0]
    narrow, middle, wide = (targets.true_bits(config, (width,) * 3, group) for width in targets.MC_WIDTHS)
    return narrow + (wide + middle - 2 * narrow) / config.experts, wide


def at_random(run: Compression, measures: Measures, budget: float, unit: Packing, seed: int) -> list[Packing]:
    """A random packing for each expert, then shrunk at random until all fit, and grown at random while they do."""
    options, sizes = by_size(run.config, allocate.packings(measures.choices))
    random = np.random.default_rng(seed)
    chosen = random.integers(len(options), size=run.config.expert_count)
    while sizes[chosen].sum() > budget:
        chosen[random.choice(np.flatnonzero(chosen))] -= 1
    grown = True
    while grown:
        grown = False
        for expert in random.permutation(len(chosen)):
            larger = np.flatnonzero(sizes > sizes[chosen[expert]])
            if len(larger) and sizes[chosen].sum() - sizes[chosen[expert]] + sizes[larger[0]] <= budget:
                chosen[expert], grown = larger[0], True
    return [options[i] for i in chosen]


def by_size(config: ModelConfig, options: list[Packing]) -> tuple[list[Packing], np.ndarray]:
    """The packings by increasing bytes, and these bytes."""
    sizes = [record_bytes(config, option.widths, option.group, record_alignment(config)) for option in options]
    order = np.argsort(sizes, kind="stable")
    return [options[i] for i in order], np.array(sizes)[order]


def by_frequency(run: Compression, measures: Measures, budget: float, unit: Packing) -> list[Packing]:
    """pmq's program, with the same costs of the choices for every expert, times the expert's frequency."""
    layers = [measure for measure in measures.layers if measure is not None]
    curve = np.mean([measure.errors.mean(axis=(0, -1)) for measure in layers], axis=0)  # (3, choices)
    costs = with_errors(measures, lambda measure: measure.frequency[:, None, None, None] * curve[..., None], 1)
    return allocate.mixed(run.config, costs, budget, unit)


def by_error(run: Compression, measures: Measures, budget: float, unit: Packing) -> list[Packing]:
    """pmq's program with only the measured error per use of the expert: no gain, frequency or kinds of text."""

    def of_a_use(measure) -> np.ndarray:
        return (measure.norm_errors**2 / np.maximum(measure.rows, 1)[:, None, None])[..., None]

    return allocate.mixed(run.config, with_errors(measures, of_a_use, 1), budget, unit)


def with_errors(measures: Measures, errors: Callable, columns: int) -> Measures:
    """Replace the errors of measures, (experts, 3, choices, columns), and set the gain to 1."""
    layers = [None if m is None else replace(m, errors=errors(m)) for m in measures.layers]
    return Measures(layers, measures.choices, np.ones((len(layers), columns)))


# ---- ablations


def ablations(study: Study, bits: float, repeat: int) -> list[Form]:
    """pmq, then pmq with one part removed each; with half of the study's calibration tokens, to save time."""
    tokens = study.calibration_tokens // 2 - repeat * REPEAT_TOKENS
    pmq = {"method": "pmq", "bits": bits, "tokens": tokens}
    rounding = {
        "GPTQ alone, without refinement": Unrefined,
        "without its share of what is lacking": NothingLacking,
        "clean inputs, not the track's": CleanInputs,
    }
    spending = {
        "without gain": without_gain,
        "without domains": without_domains,
        "without the unseen column": without_unseen,
        "without widths by projection": without_projections,
    }
    forms = [
        Form("pmq", bits, pmq),
        *(Form(name, bits, pmq, rounding=how) for name, how in rounding.items()),
        *(Form(name, bits, pmq, how) for name, how in spending.items()),
        Form("groups of 64", bits, pmq | {"group": 64}),
        Form("uniform", bits, pmq | {"method": "uniform"}),
        Form("with activation order", bits, pmq | {"act_order": True}),
    ]
    if study.calibration:
        code = pmq | {"calibration": ()}
        forms.append(Form("calibrated on Python alone", bits, code))
        forms.append(Form("calibrated on Python alone, without the unseen column", bits, code, without_unseen))
    return forms


def without_gain(run: Compression, measures: Measures, budget: float, unit: Packing) -> list[Packing]:
    return allocate.mixed(run.config, replace(measures, gain=np.ones_like(measures.gain)), budget, unit)


def without_domains(run: Compression, measures: Measures, budget: float, unit: Packing) -> list[Packing]:
    """All kinds of text merged into one; the unseen column stays."""
    share = np.bincount(run.calibration.domains) / len(run.calibration.domains)

    def columns(values: np.ndarray) -> np.ndarray:
        return np.stack([values[..., :-1] @ share, values[..., -1]], axis=-1)

    merged = with_errors(measures, lambda measure: columns(measure.errors), 2)
    return allocate.mixed(run.config, replace(merged, gain=measures.gain[:, [-1, -1]]), budget, unit)


def without_unseen(run: Compression, measures: Measures, budget: float, unit: Packing) -> list[Packing]:
    seen = with_errors(measures, lambda measure: measure.errors[..., :-1], 1)
    return allocate.mixed(run.config, replace(seen, gain=measures.gain[:, :-1]), budget, unit)


def without_projections(run: Compression, measures: Measures, budget: float, unit: Packing) -> list[Packing]:
    options = [option for option in allocate.packings(measures.choices) if len(set(option.widths)) == 1]
    return allocate.mixed(run.config, measures, budget, unit, options=options)


@dataclass(slots=True)
class Unrefined(Rounding):
    sweeps: int = 0


class NothingLacking(Rounding):
    """The target of down is the expert's full-precision output, without a share of the deficit."""

    def _round(self, track: Track, layer: int, number: int, matrices, bias, a: Stream):
        return Rounding._round(self, replace(track, lacking=Zeros(a.dim)), layer, number, matrices, bias, a)


@dataclass(slots=True)
class CleanInputs(Rounding):
    """Every layer is rounded for its full-precision inputs, as in GPTQ without the errors of earlier layers."""

    clean_routing: forward.Routing | None = None  # of the layer
    clean_weights: np.ndarray | None = None  # token weights of the layer without a deficit

    def _source_experts(self, layer: int, a: Stream, y: Stream) -> None:
        Rounding._source_experts(self, layer, a, y)
        norms = [np.square(y.read(start, stop)).sum(-1) for start, stop in y.blocks()]
        self.clean_weights = 1 / np.maximum(np.concatenate(norms), 1e-12)

    def _rounded_experts(self, layer: int, a: Stream, tell) -> None:
        self.clean_routing = forward.route(self.config, self.checkpoint, layer, a, self.ids)
        Rounding._rounded_experts(self, layer, a, tell)

    def _round(self, track: Track, layer: int, number: int, matrices, bias, a: Stream):
        clean = replace(track, a=a, routing=self.clean_routing, lacking=Zeros(a.dim), token_weights=self.clean_weights)
        return Rounding._round(self, clean, layer, number, matrices, bias, a)


@dataclass(frozen=True, slots=True)
class Zeros:
    """A Stream of zeros, with only the method that rounding calls."""

    dim: int

    def take(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros((len(rows), self.dim), np.float32)
