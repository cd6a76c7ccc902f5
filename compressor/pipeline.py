"""compress(): a checkpoint to a bundle in five steps: calibrate, measure, allocate, quantise, write.

Calibration and measuring go through the model once, quantising once more; either way one layer's weights are in
memory at a time. Methods: `uniform` one width everywhere (`rtn`: the same without the search for scales), `mc` the
published program a layer, `pmq` one program over the whole model in true bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edge_moe import _core
from edge_moe.compressor import calibrate
from edge_moe.compressor.allocate import allocate_layer, allocate_model
from edge_moe.compressor.checkpoint import Checkpoint
from edge_moe.compressor.quantise import dequantise, largest_group, quantise, trunk_packing
from edge_moe.compressor.writer import COPIED, BundleWriter, Packing
from edge_moe.devices.probe import default_threads
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle, record_alignment, record_bytes
from edge_moe.runtime.config import ModelConfig, trunk_shapes
from edge_moe.runtime.plan import parse_bytes
from edge_moe.runtime.tokenizer import Tokenizer

METHODS = ("pmq", "mc", "uniform", "rtn")
MC_WIDTHS = (1, 2, 3)
MC_EXPONENTS = (1.0, 1.0, 2.0)  # alpha, beta, gamma as the paper prints them
DEFAULT_BITS = 2.5
DEFAULT_TOKENS = 32_768
LEAST_ROWS = 32  # tokens of an expert from which the importance of its inputs is taken
TABLE_BYTES = 600  # of bundle.json and headers for each tensor and expert, at the most
Progress = Callable[[str, int, int], None]  # (step, done, of)


@dataclass(frozen=True, slots=True)
class Options:
    """What to make of a checkpoint; compress() documents the fields."""

    bits: float | None = None
    width: int | None = None
    size: int | str | None = None
    method: str = "pmq"
    calibration: tuple[str, ...] = ()
    tokens: int = DEFAULT_TOKENS
    group: int = 64
    trunk_width: int = 8
    seed: int = 0
    threads: int | None = None


def compress(model: str | Path, out: str | Path, *, progress: Progress | None = None, **options) -> Bundle:
    """Compress the checkpoint directory `model` into the bundle directory `out`, and open it.

    bits: mean bits of an expert weight, scales, biases and padding included (default 2.5; 16 leaves everything,
    trunk included, bfloat16). width: instead, one width for all experts (methods uniform, rtn). size: instead, the most
    bytes that the whole bundle may have ("8GB" or a number). method: pmq, mc, uniform or rtn. calibration: text files,
    or .npy of token ids; none: the standard library's source. tokens: calibration tokens. group: inputs that share a
    scale, 32, 64 or 128. trunk_width: bits of the trunk's matrices. progress(step, done, of) is called as work goes on.

    pmq and mc always calibrate, uniform when texts are given; then an input of a matrix counts by its mean square.

    Raises ValueError for bad options or a bad checkpoint, FileExistsError when `out` is there, OSError for the disk.
    After an error or an interrupt nothing is left of `out`.
    """
    known = tuple(Options.__slots__)
    for name in options.keys() - set(known):
        raise TypeError(f"compress() has no option {name!r}; options are {', '.join(known)}")
    o = Options(**options)
    tell = progress or (lambda step, done, of: None)
    with Checkpoint(model) as checkpoint:
        config = checkpoint.config
        o = _check(o, config)
        if Path(out).exists():
            raise FileExistsError(f"{out}: exists already; choose another name or remove it")
        shapes = trunk_shapes(config)
        trunk = trunk_packing(shapes, 16 if o.bits == 16 else o.trunk_width, 64)
        budget = _budget(o, checkpoint, trunk)
        candidates = _candidates(o, config, budget)
        measures, importance, provenance = [], {}, None
        if len(candidates) > 1 or (o.calibration and o.method == "uniform" and candidates != [(16, 16, 16)]):
            calibration = _load_calibration(checkpoint, o)
            provenance = {**calibration.provenance, "seed": o.seed}
            measures, importance = _measure(checkpoint, calibration, candidates, o, tell)
        experts = _allocate(config, candidates, measures, budget, o)
        frequency = _frequencies(config, measures)
        extra = {"calibration": provenance, "method": {"name": o.method, "group": o.group}, "certificate": None}
        with BundleWriter(Path(out), checkpoint.directory, config, trunk, experts, frequency, extra) as writer:
            _write(checkpoint, writer, importance, o, tell)
            writer.finish()
    return Bundle.open(out)


def uniform_width(config: ModelConfig, bits: float, group: int) -> int:
    """The largest width whose experts, all alike, take at most `bits` a weight; _check() has seen that one does."""
    return max(width for width in _core.WIDTHS if true_bits(config, (width,) * 3, group) <= bits + 1e-9)


def true_bits(config: ModelConfig, widths: tuple[int, int, int], group: int) -> float:
    """Bits a weight of one expert on disk, scales, biases and padding included."""
    return 8 * record_bytes(config, widths, group, record_alignment(config)) / config.expert_weights


def _check(o: Options, config: ModelConfig) -> Options:
    """Refuse what cannot be; returns the options with the one target that holds filled in."""
    if o.method not in METHODS:
        raise ValueError(f"method is {o.method!r}, expected one of {', '.join(METHODS)}")
    if o.group not in _core.GROUPS:
        raise ValueError(f"group is {o.group}, expected one of {', '.join(map(str, _core.GROUPS))}")
    if o.trunk_width not in _core.WIDTHS:
        raise ValueError(f"trunk_width is {o.trunk_width}, expected one of {', '.join(map(str, _core.WIDTHS))}")
    if sum(value is not None for value in (o.bits, o.width, o.size)) > 1:
        raise ValueError("bits, width and size exclude each other; give one of them")
    if o.width is not None and o.method not in ("uniform", "rtn"):
        raise ValueError(f"width is one width for all experts; method {o.method} chooses widths, give bits instead")
    if o.width is not None and o.width not in _core.WIDTHS:
        raise ValueError(f"width is {o.width}, expected one of {', '.join(map(str, _core.WIDTHS))}")
    if o.tokens < 256:
        raise ValueError(f"tokens is {o.tokens}, expected at least 256")
    bits = DEFAULT_BITS if o.bits is None and o.width is None and o.size is None else o.bits
    lossless = bits == 16 or o.width == 16
    group = o.group if lossless else largest_group(o.group, config.dim, config.expert_hidden)
    if group is None:
        raise ValueError(
            f"experts are {config.expert_hidden} x {config.dim}, not multiples of 32: they cannot be grouped; "
            "only bits 16 is possible"
        )
    calibration = (o.calibration,) if isinstance(o.calibration, str | Path) else tuple(o.calibration)
    size = None if o.size is None else parse_bytes(o.size)
    least = true_bits(config, (1, 1, 1), group) if not lossless else 1.0
    if bits is not None and not least - 1e-9 <= bits <= 16:
        raise ValueError(f"bits is {bits:g}, expected {least:.3g} to 16 (1 bit in groups of {group} is {least:.3g})")
    return replace(o, bits=bits, size=size, group=group, calibration=calibration)


def _budget(o: Options, checkpoint: Checkpoint, trunk: dict[str, Packing]) -> float:
    """Bytes for the experts."""
    config = checkpoint.config
    experts = config.experts * len(config.moe_layers)
    if o.size is not None:
        shapes = trunk_shapes(config)
        fixed = sum(packed_bytes(shapes[name], packing) for name, packing in trunk.items())
        copies = [checkpoint.directory / name for name in COPIED]
        fixed += sum(file.stat().st_size for file in copies if file.is_file())
        fixed += TABLE_BYTES * (len(trunk) + experts) + 2 * _core.DATA_ALIGNMENT
        least = experts * record_bytes(config, (1, 1, 1), o.group, record_alignment(config))
        if o.size < fixed + least:
            raise ValueError(
                f"size is {o.size:,} bytes, expected at least {fixed + least:,}: {least:,} for experts of width 1 and "
                f"{fixed:,} for the rest; raise it, or lower trunk_width"
            )
        return o.size - fixed
    if o.width is not None:
        return float("inf")
    return o.bits * config.expert_weights * experts / 8


def packed_bytes(shape: tuple[int, ...], packing: Packing) -> int:
    """Bytes of one trunk tensor."""
    width, count = packing.widths[0], int(np.prod(shape))
    return count * width // 8 + (2 * 2 * count // packing.group if width < 16 else 0)


def _candidates(o: Options, config: ModelConfig, budget: float) -> list[tuple[int, int, int]]:
    """Widths of gate, up and down that the method may choose from; one is no choice.

    For pmq, down may be one step wider than the others, and no expert takes over twice the mean: such a one has
    never been worth it, and measuring it costs time.
    """
    if o.width is not None:
        return [(o.width,) * 3]
    if o.bits == 16:
        return [(16, 16, 16)]
    bits = 8 * budget / (config.expert_weights * config.experts * len(config.moe_layers))
    if o.method in ("uniform", "rtn"):
        return [(uniform_width(config, bits, o.group),) * 3]
    if o.method == "mc":
        return [(width,) * 3 for width in MC_WIDTHS]
    widths = [width for width in _core.WIDTHS if width < 16]
    options = [(a, a, down) for i, a in enumerate(widths) for down in widths[i : i + 2]]
    return [option for option in options if true_bits(config, option, o.group) <= 2 * bits]


def _load_calibration(checkpoint: Checkpoint, o: Options) -> calibrate.Calibration:
    has_tokenizer = (checkpoint.directory / "tokenizer.json").is_file()
    tokenizer = Tokenizer(checkpoint.directory) if has_tokenizer else None
    return calibrate.load_calibration(
        tokenizer, checkpoint.config, [Path(file) for file in o.calibration], o.tokens, o.seed
    )


def _measure(checkpoint: Checkpoint, calibration, candidates, o: Options, tell: Progress) -> tuple[list, dict]:
    """One LayerMeasure a layer, None for dense ones; importance of each projection's inputs by (layer, expert)."""
    config, threads = checkpoint.config, o.threads or default_threads()
    importance = {}

    def change(layer, expert, h):
        """Squared norm of the change of an expert's output, (options, rows)."""
        weights = checkpoint.expert(layer, expert)
        inner = reference.expert_inner(config, h, *weights[:2])
        y = inner @ weights[2].T
        outer = input_importance(h)
        counts = importance[layer, expert] = (outer, outer, input_importance(inner))
        unpacked = {}  # (projection, width) -> float32 matrix as it would be read back

        def matrix(projection: int, width: int) -> np.ndarray:
            if (projection, width) not in unpacked:
                packed = quantise(weights[projection], width, o.group, importance=counts[projection], threads=threads)
                unpacked[projection, width] = dequantise(packed, width, weights[projection].shape[1])
            return unpacked[projection, width]

        tell("measure", layer * config.experts + expert + 1, config.layers * config.experts)
        inners, squared = {}, []
        for gate, up, down in candidates:
            if gate not in inners:
                inners[gate] = reference.expert_inner(config, h, matrix(0, gate), matrix(1, up))
            squared.append(np.square(inners[gate] @ matrix(2, down).T - y).sum(-1))
        return np.array(squared, np.float64)

    x = reference.embed(config, checkpoint, calibration.ids)
    measures = []
    for layer in range(config.layers):
        tell("measure", layer * config.experts, config.layers * config.experts)
        x, measure = calibrate.measure_layer(config, checkpoint, layer, x, calibration.domains, change)
        measures.append(measure)
    return measures, importance


def input_importance(x: np.ndarray) -> np.ndarray | None:
    """How much each input of a matrix counts, float32 (cols,): its mean square over x (rows, cols).

    A tenth of the mean is added to each, for text where other inputs are large. None with too few rows to tell.
    """
    if len(x) < LEAST_ROWS:
        return None
    square = np.square(x, dtype=np.float64).mean(0)
    return (square + 0.1 * square.mean() + 1e-30).astype(np.float32)


def _allocate(config: ModelConfig, candidates, measures, budget: float, o: Options) -> dict:
    """Packing of every expert by (layer, index)."""
    keys = [(layer, index) for layer in config.moe_layers for index in range(config.experts)]
    if len(candidates) == 1:
        return {key: Packing(candidates[0], o.group) for key in keys}
    present = [measure for measure in measures if measure is not None]
    sizes = [record_bytes(config, widths, o.group, record_alignment(config)) for widths in candidates]
    if o.method == "mc":
        # scales, biases and, at its worst width, padding
        overhead = max(true_bits(config, (width,) * 3, o.group) - width for width in MC_WIDTHS)
        nominal = 8 * budget / (config.expert_weights * len(keys)) - overhead
        total_bits = int(nominal * config.experts + 1e-6)
        chosen = [
            np.searchsorted(
                MC_WIDTHS, allocate_layer(m.frequency, m.routing_weight, m.errors, total_bits, *MC_EXPONENTS)
            )
            for m in present
        ]
        chosen = np.concatenate(chosen)
    else:
        cost = np.concatenate([measure.domain_errors for measure in present])  # (experts, options, domains)
        alike = [i for i, widths in enumerate(candidates) if len(set(widths)) == 1 and sizes[i] * len(keys) <= budget]
        unit = cost[:, alike[-1] if alike else 0].sum(axis=0)  # a domain's error with one width everywhere
        chosen = allocate_model(cost / np.maximum(unit, 1e-30), np.tile(sizes, (len(keys), 1)), budget)
    return {key: Packing(candidates[option], o.group) for key, option in zip(keys, chosen, strict=True)}


def _frequencies(config: ModelConfig, measures) -> dict[tuple[int, int], float]:
    return {
        (layer, index): float(measure.frequency[index])
        for layer, measure in enumerate(measures)
        if measure is not None
        for index in range(config.experts)
    }


def _write(checkpoint: Checkpoint, writer: BundleWriter, importance: dict, o: Options, tell: Progress) -> None:
    threads = o.threads or default_threads()
    search = o.method != "rtn"
    total = len(writer.trunk) + len(writer.experts)

    def pack(weights, width, group, importance=None):
        return quantise(weights, width, group, importance=importance, search=search, threads=threads)

    for done, (name, packing) in enumerate(writer.trunk.items(), start=1):
        writer.write_trunk(name, pack(checkpoint.trunk(name), packing.widths[0], packing.group))
        tell("quantise", done, total)
    for done, ((layer, index), packing) in enumerate(writer.experts.items(), start=len(writer.trunk) + 1):
        parts = zip(
            checkpoint.expert(layer, index), packing.widths, importance.get((layer, index), (None,) * 3), strict=True
        )
        writer.write_expert(layer, index, [pack(w, width, packing.group, counts) for w, width, counts in parts])
        tell("quantise", done, total)
