"""Measures the cost of quantising activations beside that of quantising weights, for bench/reports/input-precision.md.

    python -m bench.laboratory.input_precision --text wiki.txt --text code.txt --calibration mixed.txt [MODEL ...]

MODEL is by default the embedded model, which has no massive activations; pretrained checkpoints have them. The forward
pass is the float32 reference, so that nothing else is rounded, such as the KV cache. Inputs of products are rounded by
the kernels' own quantise_activations(): to int8, without or with the second plane of codes that blocks with an outlier
get. Weights are those of calibrated bundles of one width, made by compress().
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from edge_moe import _core
from edge_moe.bench import EMBEDDED
from edge_moe.bench.evaluate import windows
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.rounding.bundle_weights import BundleWeights
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.score import Score
from edge_moe.runtime.tokenizer import Tokenizer

from .markdown import table

WEIGHTS = ((8, 64), (4, 64), (2, 32), (2, 64))  # width and group of experts; unquantised weights are measured too
TRUNK_WIDTH = 8
CALIBRATION_TOKENS = 8192
BLOCK = 64  # inputs that share a scale
CONTEXT = 256
TOKENS = 2048  # of each text
PRODUCTS = ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "kv_b", "gate", "up", "down", "embedding", "head")


def as_they_are(x: np.ndarray) -> np.ndarray:
    return x


def to_int8(x: np.ndarray) -> np.ndarray:
    return rounded(x, lows=False)


def as_kernels_do(x: np.ndarray) -> np.ndarray:
    return rounded(x, lows=True)


INPUTS = {"int8": to_int8, "as it runs": as_kernels_do, "float32": as_they_are}


def rounded(x: np.ndarray, lows: bool) -> np.ndarray:
    """x (..., cols) as the kernels round it; without `lows`, every block has only one plane of codes."""
    cols = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-cols // BLOCK) * BLOCK), np.float32)
    padded[..., :cols] = x
    codes, low_codes, _, scales, *_ = _core.quantise_activations(_core.kernel_names()[0], padded.reshape(-1))
    steps = codes.astype(np.float32)
    if lows:
        steps += low_codes / np.float32(256)
    return (steps.reshape(-1, BLOCK) * scales[:, None]).reshape(padded.shape)[..., :cols]


class Matrix:
    """A weight matrix (rows, cols) for the reference forward pass that rounds its inputs before a product."""

    __array_ufunc__ = None  # so that `x @ matrix` calls __rmatmul__

    def __init__(self, values: np.ndarray, inputs):
        self.values, self._inputs = values, inputs

    @property
    def T(self) -> "Matrix":
        return Matrix(self.values.T, self._inputs)

    def __getitem__(self, rows) -> np.ndarray:  # of an embedding
        return self.values[rows]

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        return self._inputs(x) @ self.values


class Weights:
    """The cached weights of a checkpoint or bundle (config, trunk(name), expert(layer, number)), whose products round
    their inputs by `inputs`."""

    def __init__(self, source):
        self.config, self.inputs = source.config, as_they_are
        self._source, self._kept = source, {}

    def trunk(self, name: str):
        if name not in self._kept:
            self._kept[name] = self._source.trunk(name)
        values = self._kept[name]
        return Matrix(values, self.inputs) if name.split(".")[-1] in PRODUCTS else values

    def expert(self, layer: int, expert: int) -> tuple[Matrix, ...]:
        if (layer, expert) not in self._kept:
            self._kept[layer, expert] = self._source.expert(layer, expert)
        return tuple(Matrix(values, self.inputs) for values in self._kept[layer, expert])

    def expert_bias(self, layer: int, expert: int) -> tuple[np.ndarray, ...]:
        return self._source.expert_bias(layer, expert)


def bundles(
    model: Path, calibration: Sequence[Path], calibration_tokens: int = CALIBRATION_TOKENS
) -> Iterator[tuple[float, BundleWeights]]:
    """Yield the bits a weight and the weights of a bundle for each of WEIGHTS; each is deleted before the next."""
    for width, group in WEIGHTS:
        with tempfile.TemporaryDirectory() as temporary:
            made = compress(
                model,
                Path(temporary) / "uniform.emoe",
                method="uniform",
                width=width,
                group=group,
                trunk_width=TRUNK_WIDTH,
                calibration=calibration,
                tokens=calibration_tokens,
                certificate=False,
            )
            yield made.bits_per_weight, BundleWeights(made)


def precision(model: Path, texts: Sequence[Path], forms: Iterator[tuple[float, object]], tokens: int = TOKENS):
    """Yield (bits, kind of inputs, Score.result()) for the unquantised checkpoint and each form, and each of INPUTS."""
    checkpoint, tokenizer = Checkpoint(model), Tokenizer(model)
    parts = []
    for text in texts:
        parts += windows(tokenizer.encode(text.read_text(encoding="utf-8")[: 16 * tokens]), CONTEXT, tokens)
    wanted = []
    for bits, source in chain([(16, checkpoint)], forms):
        weights = Weights(source)
        wanted = wanted or [reference.forward(weights.config, weights, part)[:-1] for part in parts]
        for kind, inputs in INPUTS.items():
            weights.inputs, score = inputs, Score()
            for part, want in zip(parts, wanted, strict=True):
                score.add(reference.forward(weights.config, weights, part)[:-1], part[1:], want)
            yield bits, kind, score.result()


def share_of_two_planes(model: Path, texts: list[Path]) -> float:
    """The share of blocks with two planes among all inputs of products, over one window of each text."""
    checkpoint, tokenizer = Checkpoint(model), Tokenizer(model)
    weights, counts = Weights(checkpoint), np.zeros(2, int)

    def count(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)]).astype(np.float32)
        flags = _core.quantise_activations(_core.kernel_names()[0], padded.reshape(-1))[2]
        counts[:] += len(flags), int(flags.sum())
        return x

    weights.inputs = count
    for text in texts:
        part = next(iter(windows(tokenizer.encode(text.read_text(encoding="utf-8")[: 16 * CONTEXT]), CONTEXT)))
        reference.forward(weights.config, weights, part)
    return counts[1] / counts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, default=[EMBEDDED], metavar="MODEL")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--calibration", type=Path, action="append", default=[], help="by default the standard library")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each text")
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    options = parser.parse_args()
    calibration = ", ".join(text.name for text in options.calibration) or "the standard library's source"
    print(
        "# What rounding inputs costs\n\nBy `python -m bench.laboratory.input_precision`: KL divergence, nats a token, "
        "from the checkpoint in float32, its 99th percentile, and agreement of the first choice, in windows of "
        f"{CONTEXT} tokens. Weights are those of bundles by `compress` with the method `uniform`, experts at "
        f"{', '.join(f'{width} bits in groups of {group}' for width, group in WEIGHTS)}, the trunk at {TRUNK_WIDTH} "
        f"bits, calibrated on {options.calibration_tokens:,} tokens of {calibration}; with 16 bits they are as they "
        "are. `int8` has one plane of codes for every block of inputs, `as it runs` a second one for blocks with an "
        "outlier; `float32` has inputs as they are."
    )
    for model in options.models:
        share = share_of_two_planes(model, options.text)
        print(
            f"\n## {model.resolve().name}\n\n{options.tokens:,} tokens of each of {len(options.text)} texts "
            f"({', '.join(text.stem for text in options.text)}). Two planes have {share:.0%} of all blocks of inputs.\n"
        )
        rows, forms = [], bundles(model, options.calibration, options.calibration_tokens)
        for bits, kind, result in precision(model, options.text, forms, options.tokens):
            numbers = f"{result['kld_mean']:.5f}", f"{result['kld_p99']:.4f}", f"{result['top1_agreement']:.4f}"
            rows.append([f"{bits:.3g}", kind, *numbers])
        print(table(["bits", "inputs", "KLD", "p99", "same top token"], rows, right=True), flush=True)


if __name__ == "__main__":
    main()
