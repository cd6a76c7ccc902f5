"""What the compressor learns from text: how often each expert is used, and what each width would cost.

Calibration tokens go through the model layer by layer (runtime/reference.py), one layer's weights in memory at a
time, every layer seeing full-precision inputs. Text comes from files, from token ids (.npy), or by default from
the running interpreter's own standard library, so nothing is downloaded.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_moe.runtime import reference
from edge_moe.runtime.config import ModelConfig

SEQUENCE_TOKENS = 256  # of one calibration sequence, or the model's context if shorter
MOST_ROWS = 1024  # tokens of an expert on which its error is measured; more are sampled evenly
STDLIB_BYTES = 4_000_000  # of the standard library that are read for calibration


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token ids (sequences, tokens) and where they came from."""

    ids: np.ndarray
    source: str

    @property
    def provenance(self) -> dict:
        sequences, tokens = self.ids.shape
        digest = hashlib.sha256(np.ascontiguousarray(self.ids, np.int64).tobytes()).hexdigest()
        return {"source": self.source, "sequences": sequences, "tokens": sequences * tokens, "sha256": digest}


@dataclass(slots=True)
class LayerMeasure:
    """One layer's calibration. `errors` has a column for each option of widths that was measured."""

    frequency: np.ndarray  # (experts,) assignments / tokens
    routing_weight: np.ndarray  # (experts,) mean over all tokens of the weight before renormalisation
    errors: np.ndarray  # (experts, options) Frobenius norm of the change of the block's output


def load_calibration(tokenizer, config: ModelConfig, files: list[Path], tokens: int, seed: int) -> Calibration:
    """Sequences of calibration tokens, the same for the same arguments.

    Every file gives the same share of `tokens`, in windows spread evenly over it. Raises ValueError when there is
    no tokenizer for text, a file has too little of it, or ids are outside the vocabulary.
    """
    length = min(SEQUENCE_TOKENS, config.context)
    wanted = max(1, tokens // length)
    texts = [_file_ids(tokenizer, Path(file), config) for file in files] if files else [_stdlib_ids(tokenizer, seed)]
    sequences = []
    for index, ids in enumerate(texts):
        share = wanted * (index + 1) // len(texts) - wanted * index // len(texts)
        if len(ids) < length:
            raise ValueError(
                f"{files[index]}: has {len(ids):,} tokens, calibration needs at least {length:,}; use a longer text"
            )
        starts = np.linspace(0, len(ids) - length, min(share, len(ids) // length), dtype=np.int64)
        sequences += [ids[start : start + length] for start in starts]
    source = ", ".join(Path(file).name for file in files) if files else "Python standard library"
    return Calibration(np.stack(sequences), source)


def stdlib_files(seed: int) -> list[Path]:
    """Modules of the running interpreter's standard library, in an order drawn from `seed`."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [files[i] for i in np.random.default_rng(seed).permutation(len(files))]


def measure_layer(config: ModelConfig, weights, layer: int, x: np.ndarray, measure_error) -> tuple:
    """Run one layer over x (sequences, tokens, dim); returns (its output, LayerMeasure or None for a dense layer).

    measure_error(layer, expert, h, routing_weights, scale) -> (options,) errors of one expert over its rows h
    (rows, dim); `scale` is by how many more rows were routed than given.
    """
    x = x + reference.attention_block(config, weights, layer, x)
    h = reference.mlp_input(config, weights, layer, x)
    if layer in config.dense_layers:
        return x + reference.dense_block(config, weights, layer, h).reshape(x.shape), None
    chosen, routed = reference.route(config, weights, layer, h)
    scores = reference.softmax(h @ weights.trunk(f"layers.{layer}.router").T)
    picked = np.zeros(scores.shape, bool)
    np.put_along_axis(picked, chosen, True, axis=-1)
    errors = []
    for expert in range(config.experts):
        rows, place = np.nonzero(chosen == expert)
        kept = rows if len(rows) <= MOST_ROWS else rows[np.linspace(0, len(rows) - 1, MOST_ROWS, dtype=np.int64)]
        at = np.searchsorted(rows, kept)
        errors.append(measure_error(layer, expert, h[kept], routed[kept, place[at]], len(rows) / max(len(kept), 1)))
    measure = LayerMeasure(picked.mean(0), np.where(picked, scores, 0).mean(0), np.array(errors))
    y = reference.experts(config, weights, layer, h, chosen, routed)
    if config.shared_hidden:
        y = y + reference.shared_expert(config, weights, layer, h)
    return x + y.reshape(x.shape), measure


def _stdlib_ids(tokenizer, seed: int) -> np.ndarray:
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json; pass --calibration IDS.npy, or use --method uniform")
    text, size = [], 0
    for file in stdlib_files(seed):
        text.append(file.read_text(encoding="utf-8", errors="ignore"))
        size += len(text[-1])
        if size >= STDLIB_BYTES:
            break
    return np.array(tokenizer.encode("\n".join(text)), np.int64)


def _file_ids(tokenizer, file: Path, config: ModelConfig) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such calibration file")
    if file.suffix == ".npy":
        ids = np.load(file, allow_pickle=False)
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{file}: holds {ids.dtype}, expected whole numbers (token ids)")
        ids = ids.reshape(-1).astype(np.int64)
        if len(ids) and not (0 <= ids.min() and ids.max() < config.vocab):
            raise ValueError(f"{file}: has token ids outside the vocabulary of {config.vocab:,}")
        return ids
    if tokenizer is None:
        raise ValueError(f"{file}: the checkpoint has no tokenizer.json; pass token ids as .npy")
    return np.array(tokenizer.encode(file.read_text(encoding="utf-8", errors="replace")), np.int64)
