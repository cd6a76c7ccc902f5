"""Making a bundle of random weights with the shapes of any config.json, to measure speed and memory without a download.

Codes are uniform random bits. Scales and biases are powers of two that make the weights zero-mean with a deviation near
1/sqrt(inputs), so activations stay finite; the embedding has deviation 1, as attention would otherwise dominate it and
all tokens would be routed alike. Random weights route almost uniformly, so hit rates are lower than a trained model's.
Each record is written as soon as it is generated; no checkpoint is involved.
"""

import json
import math
import tempfile
from pathlib import Path

import numpy as np

from .. import _core
from ..compressor.rounding.quantise import largest_group, to_bfloat16, trunk_packing
from ..compressor.writing.writer import KEPT, BundleWriter, Packing, Quantised
from ..runtime.bundle import Bundle
from ..runtime.child import answer, call
from ..runtime.config import stays_float, trunk_shapes, without_layer
from ..runtime.config_file import family_of, language_keys, parse_config, read_json, with_language_key

GROUP = 64
TABLE_ROWS = 1 << 16  # of a table of n-gram embeddings that are made at a time
MXFP4_DEVIATION = math.sqrt(sum(x * x for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8)  # of random codes


def make_synthetic(
    config: str | Path,
    out: str | Path,
    layers: int | None = None,
    width: int = 4,
    vocab: int | None = None,
    seed: int = 0,
    trunk_width: int = 8,
    mxfp4: bool = False,
) -> Bundle:
    """Write a random bundle with the shapes of `config` (a config.json or its directory), and open it.

    layers, vocab: override the config's. width: bits of every expert weight; trunk_width: bits of attention, embedding
    and head; mxfp4: experts have MXFP4 codes instead. The same arguments give the same bytes. Raises ValueError for a
    config that is not supported, FileExistsError if `out` exists.
    """
    for name, bits in (("width", width), ("trunk_width", trunk_width)):
        if bits not in _core.WIDTHS:
            raise ValueError(f"{name} is {bits}, expected one of {', '.join(map(str, _core.WIDTHS))}")
    raw = raw_config(Path(config), layers, vocab)
    model = parse_config(raw, where=str(config))
    group = largest_group(GROUP, model.dim, model.expert_hidden)
    if group is None and width < 16:
        raise ValueError(
            f"{config}: experts are {model.expert_hidden} x {model.dim}, not multiples of 32; use width 16"
        )
    trunk = trunk_packing(trunk_shapes(model), trunk_width, GROUP)
    packing = KEPT if mxfp4 else Packing((width,) * 3, group or GROUP)
    experts = {(layer, index): packing for layer in model.moe_layers for index in range(model.experts)}
    extra = {"calibration": None, "method": {"name": "synthetic", "seed": seed}, "certificate": None}
    with tempfile.TemporaryDirectory() as source:
        (Path(source) / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
        with BundleWriter(Path(out), Path(source), model, trunk, experts, extra=extra) as writer:
            for number, (name, shape) in enumerate(trunk_shapes(model).items()):
                random = np.random.Generator(np.random.SFC64([seed, 0, number]))
                if without_layer(name) == "router_table":
                    values = Quantised(_table_of_experts(random, shape, model.experts))
                else:
                    values = _trunk_tensor(random, name, shape, trunk[name])
                writer.write_trunk(name, values)
            for layer, index in experts:
                random = np.random.Generator(np.random.SFC64([seed, 1, layer, index]))
                biases = [np.zeros(rows, np.float32) for rows, _ in model.expert_shapes] if model.expert_bias else ()
                matrices = [
                    _mxfp4_matrix(random, its) if mxfp4 else _matrix(random, its, width, packing.group)
                    for its in model.expert_shapes
                ]
                writer.write_expert(layer, index, matrices, biases)
            for number, table in enumerate(writer.tables):
                random = np.random.Generator(np.random.SFC64([seed, 2, number]))
                for first in range(0, table.rows, TABLE_ROWS):
                    shape = min(TABLE_ROWS, table.rows - first), table.cols
                    rows = _matrix(random, shape, table.encoding.width, table.encoding.group, deviation=1.0)
                    writer.write_rows(table, first, rows)
                writer.finish_table(table)
            writer.finish()
    return Bundle.open(out)


def make_in_child(
    temporary: str, config: str | Path, out: str | Path, layers: int | None, width: int, vocab: int | None
):
    """Run make_synthetic() in another process, so that its memory does not count under this process's cap.

    If it is killed, its unfinished files are in the directory `temporary`.
    """
    shapes = {"layers": layers, "width": width, "vocab": vocab}
    killed = "writing the random bundle was killed; it may need more memory"
    call("edge_moe.bench.synthetic", {"config": str(config), "out": str(out), **shapes}, killed, TMPDIR=temporary)


def raw_config(path: Path, layers: int | None, vocab: int | None) -> dict:
    """The config with the changes applied, and without end tokens, which random text would contain by chance."""
    raw = read_json(path / "config.json" if path.is_dir() else path)
    language = language_keys(raw, family_of(raw, str(path)), str(path))
    for key, value, low in (("num_hidden_layers", layers, 1), ("vocab_size", vocab, 2)):
        if value is None:
            continue
        if value < low:
            raise ValueError(f"{key} is {value}, expected at least {low}")
        raw = with_language_key(raw, key, value)
    for key in ("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_override_pattern"):
        if layers and language.get(key) is not None:
            raw = with_language_key(raw, key, language[key][:layers])
    ends = ("bos_token_id", "pad_token_id")
    if not language.get("ple_layer_ids"):  # whose n-grams end where a text does
        ends += ("eos_token_id",)
    return raw | dict.fromkeys(ends)


def _trunk_tensor(random: np.random.Generator, name: str, shape: tuple[int, ...], packing: Packing) -> Quantised:
    if stays_float(name, shape):
        return Quantised(trunk_values(random, name, shape))
    deviation = 1.0 if name == "embedding" else None
    return _matrix(random, shape, packing.widths[0], packing.group, deviation)


def trunk_values(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a tensor that stays float32: ones, zeros for a bias, random numbers for a matrix."""
    if len(shape) == 1:
        return np.zeros(shape, np.float32) if name.endswith("_bias") else np.ones(shape, np.float32)
    inputs = shape[0] if name.endswith(("conv", "conv.weights")) else shape[1]
    return random.standard_normal(shape, np.float32) / np.float32(math.sqrt(inputs))


def _table_of_experts(random: np.random.Generator, shape: tuple[int, ...], experts: int) -> np.ndarray:
    """For each token so many consecutive experts from a random one on."""
    first = random.integers(0, experts, (shape[0], 1))
    return ((first + np.arange(shape[1])) % experts).astype(np.float32)


def _matrix(
    random: np.random.Generator, shape: tuple[int, int], width: int, group: int, deviation: float | None = None
) -> Quantised:
    """A packed random matrix (rows, cols); scales and biases are exact in bfloat16, as the scale is a power of two."""
    rows, cols = shape
    deviation = deviation or 1 / math.sqrt(cols)
    if width == 16:  # random sign and mantissa, constant exponent
        exponent = 126 + round(math.log2(deviation))
        bits = random_bytes(random, 2 * rows * cols).view(np.uint16)
        return Quantised((bits & 0x807F) | np.uint16(exponent << 7))
    levels = 2**width
    scale = 2.0 ** round(math.log2(deviation / math.sqrt((levels**2 - 1) / 12)))  # the root is the codes' deviation
    groups = (rows, cols // group)
    scales = np.full(groups, to_bfloat16(np.float32([scale]))[0])
    biases = np.full(groups, to_bfloat16(np.float32([-scale * (levels - 1) / 2]))[0])
    return Quantised(random_bytes(random, rows * cols * width // 8), scales, biases)


def _mxfp4_matrix(random: np.random.Generator, shape: tuple[int, int]) -> Quantised:
    """A random matrix (rows, cols) of MXFP4 codes, whose exponents are the same."""
    rows, cols = shape
    exponent = round(math.log2(1 / math.sqrt(cols) / MXFP4_DEVIATION))
    codes = random_bytes(random, rows * cols // 2).reshape(rows, -1)
    return Quantised(codes, np.full((rows, cols // KEPT.group), 127 + exponent, np.uint8))


def random_bytes(random: np.random.Generator, count: int) -> np.ndarray:
    """Random uint8 (count,); generating whole words is five times as fast as Generator.bytes."""
    return random.integers(0, 2**64, -(-count // 8), np.uint64).view(np.uint8)[:count]


def _make(**arguments) -> None:
    make_synthetic(**arguments)


if __name__ == "__main__":
    answer(_make)
