"""The text that the compressor learns from, and other text, held out, that the result is certified on.

Text comes from files, from token ids (.npy), or by default from the running interpreter's own standard library, so
nothing is downloaded. Without held-out files the last eighth of each calibration text is held out.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_moe.runtime.config import ModelConfig

LEAST_TOKENS = 256  # of calibration text
SEQUENCE_TOKENS = 256  # of one calibration sequence, or the model's context if shorter
STDLIB_BYTES = 4_000_000  # of the standard library that are read for calibration
STDLIB = "Python standard library"
MOST_DOMAINS = 8  # kinds of text that calibration tells apart
DOMAIN_SEQUENCES = 8  # calibration sequences for each kind, at the least, on average
HELD_OUT_TOKENS = 8192
HELD_OUT_PART = 8  # of a text, from its end, is held out: one in so many
SAMPLE_TOKENS = 64  # of a held-out sequence that calibration must not contain


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token ids (sequences, tokens), where they came from, and the kind of text of each sequence."""

    ids: np.ndarray
    source: str
    domains: np.ndarray  # (sequences,) from 0
    held_out: np.ndarray  # (sequences, tokens), none of them in ids
    held_out_source: str

    @property
    def provenance(self) -> dict:
        """What bundle.json says of it."""
        return {"source": self.source, **_described(self.ids), "domains": int(self.domains.max()) + 1}

    @property
    def held_out_provenance(self) -> dict:
        return {"source": self.held_out_source, **_described(self.held_out)}


def _described(ids: np.ndarray) -> dict:
    digest = hashlib.sha256(np.ascontiguousarray(ids, np.int64).tobytes()).hexdigest()
    return {"sequences": len(ids), "tokens": ids.size, "sha256": digest}


def domains_of(ids: np.ndarray, seed: int) -> np.ndarray:
    """Sort sequences (sequences, tokens) into kinds of text by which tokens they use: (sequences,) from 0.

    k-means on square roots of token frequencies. Rare kinds would otherwise hardly count: minimising the error of
    the average token starves the experts of code in a corpus of prose.
    """
    from scipy.cluster.vq import kmeans2
    from scipy.sparse import csr_array

    sequences, tokens = ids.shape
    kinds = min(MOST_DOMAINS, sequences // DOMAIN_SEQUENCES)
    if kinds < 2:
        return np.zeros(sequences, np.int64)
    rows = np.repeat(np.arange(sequences), tokens)
    counts = csr_array((np.ones(ids.size), (rows, ids.reshape(-1))))
    counts.sum_duplicates()
    counts.data = np.sqrt(counts.data / tokens)
    gram = (counts @ counts.T).toarray()  # (sequences, sequences)
    gram -= gram.mean(0) + gram.mean(1)[:, None] - gram.mean()
    values, vectors = np.linalg.eigh(gram)
    points = vectors[:, -2 * kinds :] * np.sqrt(np.maximum(values[-2 * kinds :], 0))
    kinds = min(kinds, len(np.unique(points.round(6), axis=0)))  # of text that repeats itself
    if kinds < 2:
        return np.zeros(sequences, np.int64)
    _, labels = kmeans2(points, kinds, seed=seed, minit="++", missing="warn")
    return np.unique(labels, return_inverse=True)[1]


def paths_of(files: str | Path | Iterable) -> tuple[Path, ...]:
    """One file's name or several, as options take them."""
    return tuple(map(Path, (files,) if isinstance(files, str | Path) else files))


def check_tokens(tokens: int) -> None:
    if tokens < LEAST_TOKENS:
        raise ValueError(f"tokens is {tokens}, expected at least {LEAST_TOKENS}")


def load_calibration(
    tokenizer, config: ModelConfig, files: Sequence[Path], tokens: int, seed: int, held_out: Sequence[Path] = ()
) -> Calibration:
    """Sequences of calibration tokens and of held-out ones, the same for the same arguments.

    Every file gives the same share of `tokens`, in windows spread evenly over it. Raises ValueError when there is
    no tokenizer for text, a file has too little of it, ids are outside the vocabulary, or held-out text is in the
    calibration text.
    """
    length = min(SEQUENCE_TOKENS, config.context)
    name = ", ".join(Path(file).name for file in files) if files else STDLIB
    if files:
        _refuse_same_files(files, held_out)
        texts = {str(file): _file_ids(tokenizer, Path(file), config) for file in files}
    else:
        texts = {STDLIB: _stdlib_ids(tokenizer, seed)}
    for source, ids in texts.items():
        _check_ids(source, ids, config, length if held_out else 2 * length)
    cut = {} if held_out else {source: max(len(ids) // HELD_OUT_PART, length) for source, ids in texts.items()}
    sequences = _sequences([ids[: len(ids) - cut.get(source, 0)] for source, ids in texts.items()], length, tokens)
    if held_out:
        apart = {str(file): _file_ids(tokenizer, Path(file), config) for file in held_out}
        for source, ids in apart.items():
            _check_ids(source, ids, config, length)
        kept_back = _sequences(list(apart.values()), length, HELD_OUT_TOKENS)
        _refuse_overlap(sequences, kept_back, ", ".join(apart))
        held_out_name = ", ".join(Path(file).name for file in held_out)
    else:
        kept_back = _sequences([ids[-cut[source] :] for source, ids in texts.items()], length, HELD_OUT_TOKENS)
        held_out_name = f"the last part of {name}"
    return Calibration(sequences, name, domains_of(sequences, seed), kept_back, held_out_name)


def _sequences(texts: list[np.ndarray], length: int, tokens: int) -> np.ndarray:
    """(sequences, length) windows spread evenly, the same share of `tokens` from each text."""
    wanted, sequences = max(1, tokens // length), []
    for index, ids in enumerate(texts):
        share = wanted * (index + 1) // len(texts) - wanted * index // len(texts)
        starts = np.linspace(0, len(ids) - length, min(share, len(ids) // length), dtype=np.int64)
        sequences += [ids[start : start + length] for start in starts]
    return np.stack(sequences)


def _check_ids(source: str, ids: np.ndarray, config: ModelConfig, least: int) -> None:
    if len(ids) < least:
        raise ValueError(f"{source}: has {len(ids):,} tokens, at least {least:,} are needed; use a longer text")
    if not (ids.min() >= 0 and ids.max() < config.vocab):
        raise ValueError(f"{source}: has token ids outside the vocabulary of {config.vocab:,}")


def _refuse_same_files(files: list[Path], held_out: list[Path]) -> None:
    contents = {Path(file).read_bytes(): file for file in files if Path(file).is_file()}
    for file in held_out:
        if Path(file).is_file() and (same := contents.get(Path(file).read_bytes())):
            raise ValueError(f"{file}: is the same text as {same}, which is calibrated on; hold out another one")


def _refuse_overlap(sequences: np.ndarray, kept_back: np.ndarray, source: str) -> None:
    calibrated = np.ascontiguousarray(sequences, np.int64).tobytes()
    middle = max((kept_back.shape[1] - SAMPLE_TOKENS) // 2, 0)
    for sequence in np.ascontiguousarray(kept_back, np.int64):
        if sequence[middle : middle + SAMPLE_TOKENS].tobytes() in calibrated:
            raise ValueError(f"{source}: parts of it are in the calibration text; hold out another one")


def stdlib_files(seed: int) -> list[Path]:
    """Modules of the running interpreter's standard library, in an order drawn from `seed`."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [files[i] for i in np.random.default_rng(seed).permutation(len(files))]


def _stdlib_ids(tokenizer, seed: int) -> np.ndarray:
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json; pass --calibration IDS.npy, or use --method rtn")
    text, size = [], 0
    for file in stdlib_files(seed):
        text.append(file.read_text(encoding="utf-8", errors="ignore"))
        size += len(text[-1])
        if size >= STDLIB_BYTES:
            break
    return np.array(tokenizer.encode("\n".join(text)), np.int64)


def _file_ids(tokenizer, file: Path, config: ModelConfig) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of calibration or held-out text")
    if file.suffix == ".npy":
        try:
            ids = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file}: not a NumPy file of token ids ({error})") from None
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{file}: holds {ids.dtype}, expected whole numbers (token ids)")
        return ids.reshape(-1).astype(np.int64)
    if tokenizer is None:
        raise ValueError(f"{file}: the checkpoint has no tokenizer.json; pass token ids as .npy")
    return np.array(tokenizer.encode(file.read_text(encoding="utf-8", errors="replace")), np.int64)
