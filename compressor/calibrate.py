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
STDLIB = "Python standard library"
MOST_DOMAINS = 8  # kinds of text that calibration tells apart
DOMAIN_SEQUENCES = 8  # calibration sequences for each kind, at the least, on average


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token ids (sequences, tokens), where they came from, and the kind of text of each sequence."""

    ids: np.ndarray
    source: str
    domains: np.ndarray  # (sequences,) from 0

    @property
    def provenance(self) -> dict:
        sequences, tokens = self.ids.shape
        digest = hashlib.sha256(np.ascontiguousarray(self.ids, np.int64).tobytes()).hexdigest()
        return {
            "source": self.source,
            "sequences": sequences,
            "tokens": sequences * tokens,
            "domains": int(self.domains.max()) + 1,
            "sha256": digest,
        }


@dataclass(slots=True)
class LayerMeasure:
    """One layer's calibration. An option is one choice of widths for an expert."""

    frequency: np.ndarray  # (experts,) assignments / tokens
    routing_weight: np.ndarray  # (experts,) mean over all tokens of the weight before renormalisation
    errors: np.ndarray  # (experts, options) Frobenius norm of the change of the block's output (MC)
    # (experts, options, domains + 1) mean over a domain's tokens of the squared change of the residual stream, relative
    # to its squared norm. The last column stands for text unlike all of it, which uses every expert alike: it keeps
    # experts that calibration seldom or never saw from being starved. One without a token counts as its layer's mean.
    domain_errors: np.ndarray


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
        name = files[index] if files else STDLIB
        if len(ids) < length:
            raise ValueError(
                f"{name}: has {len(ids):,} tokens, calibration needs at least {length:,}; use a longer text"
            )
        if not (ids.min() >= 0 and ids.max() < config.vocab):
            raise ValueError(f"{name}: has token ids outside the vocabulary of {config.vocab:,}")
        starts = np.linspace(0, len(ids) - length, min(share, len(ids) // length), dtype=np.int64)
        sequences += [ids[start : start + length] for start in starts]
    source = ", ".join(Path(file).name for file in files) if files else STDLIB
    ids = np.stack(sequences)
    return Calibration(ids, source, domains_of(ids, seed))


def stdlib_files(seed: int) -> list[Path]:
    """Modules of the running interpreter's standard library, in an order drawn from `seed`."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [files[i] for i in np.random.default_rng(seed).permutation(len(files))]


def measure_layer(config: ModelConfig, weights, layer: int, x: np.ndarray, domains: np.ndarray, change) -> tuple:
    """Run one layer over x (sequences, tokens, dim); returns (its output, LayerMeasure or None for a dense layer).

    domains: (sequences,). change(layer, expert, h) -> (options, rows) squared norm of the change of one expert's
    output for each of its rows h (rows, dim), for each option.
    """
    x = x + reference.attention_block(config, weights, layer, x)
    h = reference.mlp_input(config, weights, layer, x)
    if layer in config.dense_layers:
        return x + reference.dense_block(config, weights, layer, h).reshape(x.shape), None
    chosen, routed = reference.route(config, weights, layer, h)
    y = reference.experts(config, weights, layer, h, chosen, routed)
    if config.shared_hidden:
        y = y + reference.shared_expert(config, weights, layer, h)
    x = x + y.reshape(x.shape)

    scores = reference.softmax(h @ weights.trunk(f"layers.{layer}.router").T)
    picked = np.zeros(scores.shape, bool)
    np.put_along_axis(picked, chosen, True, axis=-1)
    domain = np.repeat(domains, x.shape[1])  # (rows,)
    domain_tokens = np.bincount(domain)
    relative = 1 / np.maximum(np.square(x.reshape(h.shape)).sum(-1), 1e-12)
    errors, domain_errors, a_token = [], [], []
    for expert in range(config.experts):
        rows, place = np.nonzero(chosen == expert)
        kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).astype(np.int64))
        rows_kept, place = rows[kept], place[kept]
        squared = change(layer, expert, h[rows_kept]) * routed[rows_kept, place] ** 2 * (len(rows) / max(len(kept), 1))
        errors.append(np.sqrt(squared.sum(-1)))
        by_domain = [
            np.bincount(domain[rows_kept], option * relative[rows_kept], len(domain_tokens)) for option in squared
        ]
        domain_errors.append(np.array(by_domain) / domain_tokens)
        a_token.append((squared @ relative[rows_kept]) / len(rows) if len(rows) else np.full(len(squared), np.nan))
    unseen = np.array(a_token)  # (experts, options)
    unseen = np.where(np.isnan(unseen), np.nanmean(unseen, axis=0), unseen) * config.top_k / config.experts
    measure = LayerMeasure(
        picked.mean(0),
        np.where(picked, scores, 0).mean(0),
        np.array(errors),
        np.concatenate([np.array(domain_errors), unseen[:, :, None]], axis=2),
    )
    return x, measure


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
