"""The shared state of the report's rows: texts, the reference's predictions, scoring, and results kept between runs.

A row is a Form of the model (forms.py): it is made, scored by the engine against the bits-16 bundle like `edge-moe
eval`, and deleted; its figures stay in the work directory. The directory is named by a digest of all that they depend
on, so a killed run can be resumed, and a run with other code, texts or options starts over.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_moe import _core, compressor, runtime
from edge_moe.bench import evaluate, texts
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.config import ModelConfig
from edge_moe.runtime.config_file import load_config, read_json
from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.score import LOGITS_ROWS, Score
from edge_moe.runtime.tokenizer import Tokenizer

SHOWS = ("__main__.py", "cost.py", "report.py")  # files on which no row depends
HELD_OUT = "stdlib"  # the name of the default text


@dataclass(frozen=True, slots=True)
class Study:
    """The inputs that all rows share."""

    model: Path
    texts: dict[str, np.ndarray]  # token ids by name
    calibration: tuple[str, ...]  # files; empty for the standard library
    calibration_tokens: int
    trunk_width: int
    context: int
    work: Path

    @property
    def config(self) -> ModelConfig:
        return load_config(self.model)

    @property
    def options(self) -> dict:
        """The options of compress() for every row, with one thread each, as rows are made in parallel."""
        source = {"calibration": self.calibration, "tokens": self.calibration_tokens}
        return {**source, "trunk_width": self.trunk_width, "certificate": False, "threads": 1}

    def result(self, key: str) -> dict | None:
        """The figures stored under a name, or None."""
        file = self.work / f"{key}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def keep(self, key: str, figures: dict) -> None:
        """Write figures atomically."""
        partial = self.work / f"{key}.new"
        partial.write_text(json.dumps(figures))
        os.replace(partial, self.work / f"{key}.json")

    def prepare(self) -> None:
        """Write the reference's predictions, (tokens of all texts, vocab), that every row is compared with."""
        reference = self.work / "reference.npy"
        for stale in self.work.parent.glob(f"*/{reference.name}"):  # of other code or texts: large, but quick to remake
            if stale != reference:
                stale.unlink()
        if reference.is_file():
            return
        source, partial = self.work / "reference.emoe", reference.with_suffix(".new")
        _remove(source)
        compress(self.model, source, bits=16)
        rows = sum(map(len, self.texts.values()))
        logits, at = np.lib.format.open_memmap(partial, "w+", np.float32, (rows, self.config.vocab)), 0
        with Runtime(source, context=self.context, logits_rows=LOGITS_ROWS, prune="off") as engine:
            for ids in self.texts.values():
                for start, window in enumerate(evaluate.windows(ids, self.context)):
                    first = at + start * self.context
                    logits[first : first + len(window)] = engine.logits(window)
                at += len(ids)
        logits.flush()
        os.replace(partial, reference)
        _remove(source)

    def score(self, bundle: Path) -> dict:
        """The figures of evaluate_texts(), the mean divergence of each window, and bits per weight of the source."""
        reference, results, at = np.load(self.work / "reference.npy", mmap_mode="r"), {}, 0
        with Runtime(bundle, context=self.context, logits_rows=LOGITS_ROWS, threads=1) as engine:
            for name, ids in self.texts.items():
                score, against = Score(), replay(reference[at : at + len(ids)], self.context)
                results[name] = evaluate.evaluate(engine, ids, context=self.context, against=against, score=score)
                scored = range(self.context - 1, len(score.kld), self.context - 1)
                results[name]["windows"] = [float(window.mean()) for window in np.split(score.kld, scored)]
                at += len(ids)
        config, total = self.config, texts.combine(list(results.values()))
        weights = config.expert_weights * config.expert_count
        return {**total, "true_bits": 8 * total["expert_bytes"] / weights, "texts": results}


def replay(logits: np.ndarray, context: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that returns the stored logits (tokens, vocab) of one window after another."""
    starts = iter(range(0, len(logits), context))
    return lambda window: logits[(first := next(starts)) : first + len(window)]


def make_and_score(study: Study, form) -> dict:
    """Make and score one row, and store its figures."""
    began, out = time.monotonic(), study.work / f"{form.key}.emoe"
    for left in (out, *(out.with_name(out.name + suffix) for suffix in (".work", ".partial"))):  # of a killed run
        _remove(left)
    form.make(study, form, out)
    result = study.score(out) | {"seconds": time.monotonic() - began, "certificate": certificate_of(out)}
    if form.true_bits is not None:
        result["true_bits"] = form.true_bits
    _remove(out)
    study.keep(form.key, result)
    return result


def certificate_of(bundle: Path) -> dict | None:
    return read_json(bundle / "bundle.json").get("certificate")


def run(study: Study, forms: list, processes: int, tell: Callable[[str], None]) -> None:
    """Make and score the forms that have no figures yet, several at a time, and report progress.

    Of forms that share measures, the first is made before the others, which reuse its measures.
    """
    left = {form.key: form for form in forms if study.result(form.key) is None}
    waiting, count, done = list(left.values()), len(left), 0
    measuring, running = set(), {}  # measures in progress; forms by future
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        try:
            while waiting or running:
                for form in list(waiting):
                    if form.measures is not None and not form.measures_file(study).exists():
                        if form.measures in measuring:
                            continue
                        measuring.add(form.measures)
                    waiting.remove(form)
                    running[pool.submit(make_and_score, study, form)] = form
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    form, result, done = running.pop(future), future.result(), done + 1
                    measuring.discard(form.measures)
                    tell(f"{done}/{count} {form.key}: KLD {result['kld_mean']:.4f}, {result['seconds']:.0f} s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def end_with_parent() -> None:
    """End this worker with its parent: otherwise it would finish its row and wait for ever for the next."""

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@contextmanager
def open_study(model: Path, files: list[Path], calibration: list[Path], work: Path, tokens: int, **options):
    """Open the study of these inputs and lock its work directory. files: texts, by default the standard library.

    tokens: maximum for each text. options: calibration_tokens, trunk_width and context. Raises FileNotFoundError for a
    missing file, ValueError for a text of fewer than two tokens, BlockingIOError if another process has the directory.
    """
    import fcntl

    tokenizer, ids = Tokenizer(model), {}
    for file in (*files, *calibration):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such text file")
    for file in files:
        name = file.stem if file.stem not in ids else str(file)
        ids[name] = np.array(tokenizer.encode(file.read_text(encoding="utf-8", errors="replace"))[:tokens])
        if len(ids[name]) < 2:
            raise ValueError(f"{file}: has no token to score; use a longer text")
    if not files:
        ids[HELD_OUT] = np.array(texts.held_out_modules(tokenizer, 0, tokens // options["context"], options["context"]))
    directory = work / _digest(model, ids, calibration, options)
    directory.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{work}: another report is being made there; give another --work") from None
        yield Study(Path(model), ids, tuple(map(str, calibration)), work=directory, **options)


def _digest(model: Path, ids: dict[str, np.ndarray], calibration: list[Path], options: dict) -> str:
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    folders = [Path(folder) for package in (runtime, compressor) for folder in package.__path__]
    sources = [file for folder in (*folders, Path(__file__).parent) for file in sorted(folder.rglob("*.py"))]
    sources += [Path(module.__file__) for module in (evaluate, texts, _core)]
    for file in (*(source for source in sources if source.name not in SHOWS), *calibration):
        digest.update(file.read_bytes())
    with Checkpoint(model) as checkpoint:
        digest.update(checkpoint.fingerprint().encode())
    for name, its in ids.items():
        digest.update(name.encode() + its.astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
