"""The calibration text, and the held-out text on which the result is certified.

Text comes from files, from token ids (.npy), or by default from the source of Python's standard library, so nothing is
downloaded. Without held-out files, the last eighth of each calibration text is held out. texts.py reads and encodes a
text.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...runtime.config import ModelConfig
from .texts import STDLIB, Ids, LargeText, check_file, content_hash, open_text, stdlib_text

LEAST_TOKENS = 256  # minimum of calibration text
SEQUENCE_TOKENS = 256  # maximum length of a calibration sequence
MOST_DOMAINS = 8  # maximum of kinds of text that calibration tells apart
DOMAIN_SEQUENCES = 8  # minimum of calibration sequences for each kind, on average
HELD_OUT_TOKENS = 8192
HELD_OUT_PART = 8  # the last 1 / 8 of a text is held out
SAMPLE_TOKENS = 64  # from the middle of a held-out sequence, which the calibration text must not contain


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
        """The description of the calibration text for bundle.json."""
        return {"source": self.source, **_described(self.ids), "domains": int(self.domains.max()) + 1}

    @property
    def held_out_provenance(self) -> dict:
        return {"source": self.held_out_source, **_described(self.held_out)}


def _described(ids: np.ndarray) -> dict:
    digest = hashlib.sha256(np.ascontiguousarray(ids, np.int64).tobytes()).hexdigest()
    return {"sequences": len(ids), "tokens": ids.size, "sha256": digest}


def domains_of(ids: np.ndarray, seed: int) -> np.ndarray:
    """Cluster sequences (sequences, tokens) into kinds of text by the tokens they use: (sequences,) labels from 0.

    k-means on square roots of token frequencies. Without kinds, rare ones would hardly count: minimising the mean error
    over tokens gives too few bits to the experts for code in a corpus of prose.
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
    kinds = min(kinds, len(np.unique(points.round(6), axis=0)))  # fewer if the text repeats itself
    if kinds < 2:
        return np.zeros(sequences, np.int64)
    _, labels = kmeans2(points, kinds, seed=seed, minit="++", missing="warn")
    return np.unique(labels, return_inverse=True)[1]


def paths_of(files: str | Path | Iterable) -> tuple[Path, ...]:
    """The paths of an option that takes one file or several."""
    return tuple(map(Path, (files,) if isinstance(files, str | Path) else files))


def sequence_tokens(config: ModelConfig) -> int:
    """The length of a calibration sequence: layers are computed one at a time, from their input alone."""
    return min(SEQUENCE_TOKENS, config.context, config.independent_tokens or config.context)


def check_tokens(tokens: int) -> None:
    if tokens < LEAST_TOKENS:
        raise ValueError(f"tokens is {tokens}, expected at least {LEAST_TOKENS}")


def load_calibration(
    tokenizer,
    config: ModelConfig,
    files: Sequence[Path],
    tokens: int,
    seed: int,
    held_out: Sequence[Path] = (),
) -> Calibration:
    """Load calibration and held-out sequences, deterministically for the same arguments.

    Each file contributes the same share of `tokens`, in windows spread evenly over it. Raises ValueError if text has no
    tokenizer, a file is too short, ids are outside the vocabulary, or held-out text is in the calibration text.
    """
    length = sequence_tokens(config)
    name = ", ".join(Path(file).name for file in files) if files else STDLIB
    if files:
        _refuse_same_files(files, held_out)
    for file in (*files, *held_out):  # a missing file is reported before any is read
        check_file(Path(file))
    texts = [open_text(Path(file), tokenizer, tokens) for file in files] or [stdlib_text(tokenizer, seed)]
    apart = [open_text(Path(file), tokenizer, tokens) for file in held_out]
    for text in texts:
        text.check_length(length if held_out else 2 * length)
    for text in apart:
        text.check_length(length)
    if not held_out:
        texts, apart = zip(*(text.parts(HELD_OUT_PART, length) for text in texts), strict=True)
    sequences = _sequences(texts, length, tokens, config)
    kept_back = _sequences(apart, length, HELD_OUT_TOKENS, config)
    held_out_name = f"the last part of {name}"
    if held_out:
        _refuse_overlap(sequences, kept_back, ", ".join(text.source for text in apart))
        held_out_name = ", ".join(Path(file).name for file in held_out)
    return Calibration(sequences, name, domains_of(sequences, seed), kept_back, held_out_name)


def _sequences(texts: Sequence[Ids | LargeText], length: int, tokens: int, config: ModelConfig) -> np.ndarray:
    """Windows spread evenly over each text, (sequences, length), with the same share of `tokens` from each."""
    wanted, sequences = max(1, tokens // length), []
    for index, text in enumerate(texts):
        share = wanted * (index + 1) // len(texts) - wanted * index // len(texts)
        found = text.windows(share, length)
        if share and not found:
            raise ValueError(f"{text.source}: has too few tokens for its size to calibrate on; use another text")
        for ids in found:
            if not (ids.min() >= 0 and ids.max() < config.vocab):
                raise ValueError(f"{text.source}: has token ids outside the vocabulary of {config.vocab:,}")
        sequences += found
    return np.stack(sequences)


def _refuse_same_files(files: Sequence[Path], held_out: Sequence[Path]) -> None:
    if not held_out:
        return
    contents = {content_hash(Path(file)): file for file in files}
    for file in held_out:
        if (found := content_hash(Path(file))) and (same := contents.get(found)):
            raise ValueError(f"{file}: is the same text as {same}, which is calibrated on; hold out another one")


def _refuse_overlap(sequences: np.ndarray, kept_back: np.ndarray, source: str) -> None:
    calibrated = np.ascontiguousarray(sequences, np.int64).tobytes()
    middle = max((kept_back.shape[1] - SAMPLE_TOKENS) // 2, 0)
    for sequence in np.ascontiguousarray(kept_back, np.int64):
        if sequence[middle : middle + SAMPLE_TOKENS].tobytes() in calibrated:
            raise ValueError(f"{source}: parts of it are in the calibration text; hold out another one")
