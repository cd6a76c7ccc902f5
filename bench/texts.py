"""Scoring a bundle on text files, each and together, and optionally comparing it with another model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..compressor.passes.texts import STDLIB_BYTES, stdlib_files
from ..runtime.hub import local_copy
from ..runtime.model_path import find_model
from ..runtime.plan import resolve_ram
from ..runtime.runtime import Runtime
from ..runtime.score import LOGITS_ROWS
from .evaluate import evaluate
from .reference_process import ReferenceProcess, shares

MEANS = ("kld_mean", "kld_p99", "top1_agreement", "experts_used")  # averaged over texts; perplexity geometrically


def evaluate_bundle(
    bundle: str | Path,
    text: str | Path | Sequence[str | Path],
    *,
    against: str | Path | None = None,
    context: int = 256,
    tokens: int | None = None,
    prune: float | str | None = None,
    ram: int | str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a bundle on text files; returns the object that `edge-moe eval --json` prints.

    against: a bundle or checkpoint to compare predictions with. context: tokens of a window; windows do not overlap.
    tokens: score only the first `tokens` of each text. The rest is as for Runtime. Raises what Runtime and
    evaluate_texts() raise.
    """
    files = [text] if isinstance(text, str | Path) else list(text)
    bundle = find_model(bundle)
    against = find_model(local_copy(against), gguf=True) if against else None
    mine, its = shares(bundle, against, ram, context) if against else (ram, "auto")  # both are under one cap
    with (
        Runtime(bundle, mine, context, device, threads, prune, logits_rows=LOGITS_ROWS) as runtime,
        reference_logits(against, runtime, context, its, threads) if against else nullcontext() as logits,
    ):
        return evaluate_texts(runtime, files, context=context, tokens=tokens, against=logits, progress=progress)


def evaluate_texts(
    runtime: Runtime,
    files: list[str | Path],
    *,
    context: int = 256,
    tokens: int | None = None,
    against: Callable | None = None,
    progress=None,
) -> dict:
    """Score a bundle on the first `tokens` of each text file; returns evaluate()'s keys over all, and `texts` by name.

    Over all texts, tokens are summed, perplexity is the geometric mean, and other figures are arithmetic means.
    Raises ValueError for a bundle without a tokenizer, FileNotFoundError, and what evaluate() raises.
    """
    if not files:
        raise ValueError("no text was given; name at least one file")
    if runtime.tokenizer is None:
        raise ValueError(f"{runtime.bundle.path}: this bundle has no tokenizer; text cannot be scored")
    results = {}
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such text file")
        ids = runtime.tokenizer.encode(file.read_text(encoding="utf-8", errors="replace"), most=tokens)
        name = file.name if file.name not in results else str(file)
        results[name] = evaluate(runtime, ids, context=context, tokens=tokens, against=against, progress=progress)
    return {**combine(list(results.values())), "texts": results}


def combine(results: list[dict]) -> dict:
    """Combine the results of several texts."""
    total = dict(results[0])
    total["tokens"] = sum(result["tokens"] for result in results)
    total["perplexity"] = float(np.exp(np.mean([np.log(result["perplexity"]) for result in results])))
    return total | {key: float(np.mean([result[key] for result in results])) for key in MEANS if key in total}


def held_out_modules(tokenizer, seed: int, count: int, context: int) -> list[int]:
    """Token ids of `count` windows, spread evenly over the standard library's modules that calibration does not read.

    seed: of the calibration. There are fewer windows if the text is short.
    """
    files, read = stdlib_files(seed), 0
    modules = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    left = []
    for text in modules:
        if read >= STDLIB_BYTES:
            left.append(text)
        read += len(text)
    ids = np.array(tokenizer.encode("\n".join(left or modules[-1:])))
    starts = np.linspace(0, len(ids) - context, min(count, len(ids) // context), dtype=np.int64)
    return np.concatenate([ids[start : start + context] for start in starts]).tolist()


@contextmanager
def reference_logits(
    model: str | Path, runtime: Runtime, context: int, ram: int | str = "auto", threads: int | None = None
) -> Iterator[Callable]:
    """A function from token ids to the logits of `model`, a bundle or a checkpoint with the same vocabulary.

    It runs in another process, in at most `ram`; shares() divides a cap between both. Raises ValueError if the
    vocabularies differ in size.
    """
    model = find_model(local_copy(model), gguf=True)
    with ReferenceProcess(model, resolve_ram(ram), context, threads) as logits:
        if logits.vocab != runtime.config.vocab:
            raise ValueError(
                f"{model}: has a vocabulary of {logits.vocab:,} tokens, {runtime.bundle.path} of "
                f"{runtime.config.vocab:,}; compare models that share a tokenizer"
            )
        yield logits
