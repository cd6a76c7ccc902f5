"""How good a bundle is on a text: perplexity, and the distance of its predictions from a reference's.

Convention: consecutive windows of `context` tokens that do not overlap, every position but a window's first is
scored, perplexity is per token. State it beside every figure.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..runtime import reference
from ..runtime.runtime import Runtime
from ..runtime.score import Score


def windows(ids, context: int, tokens: int | None = None) -> Iterable[np.ndarray]:
    """Consecutive windows of the first `tokens` ids; a last one of a single token scores nothing and is left out."""
    ids = np.asarray(ids)[:tokens]
    for at in range(0, len(ids), context):
        if len(window := ids[at : at + context]) > 1:
            yield window


def evaluate(
    runtime: Runtime, ids, *, context: int = 256, tokens: int | None = None, against=None, progress=None, score=None
) -> dict:
    """Score a bundle on token ids; a Runtime made with logits_rows=LOGITS_ROWS is quickest.

    against: what gives reference logits (tokens, vocab) for a window of ids: another Runtime's `logits`, or
    checkpoint_logits(). score: a new Score to add up in; the caller's own keeps the divergence at each position. Raises
    ValueError when context is beyond the runtime's or there is nothing to score.
    """
    if not 2 <= context <= runtime.plan.context:
        raise ValueError(f"context is {context}, expected 2 to {runtime.plan.context}")
    parts = list(windows(ids, context, tokens))
    if not parts:
        raise ValueError("the text has no token to score; use a longer one")
    score, before = score or Score(), runtime.stats
    for done, window in enumerate(parts, start=1):
        whole = against(window) if against else None
        at = 0
        for block in runtime.logits_blocks(window):
            scored = min(len(block), len(window) - 1 - at)  # what follows the last position is not known
            rows = slice(at, at + scored)
            score.add(block[:scored], window[1:][rows], whole[rows] if against else None)
            at += len(block)
        if progress:
            progress("evaluate", done, len(parts))
    used = {key: runtime.stats[key] - before[key] for key in ("experts_used", "moe_tokens")}
    bundle = runtime.bundle
    return {
        **score.result(),
        "experts_used": used["experts_used"] / max(used["moe_tokens"], 1),
        "bits_per_weight": bundle.bits_per_weight,
        "bundle_bytes": bundle.nbytes,
        "expert_bytes": bundle.expert_bytes,
    }


def checkpoint_logits(directory: str | Path, most_bytes: int | None = None):
    """A checkpoint's config and a function from token ids to its full-precision logits, by the reference pass.

    most_bytes: of tensors that are kept in memory; None keeps all of them.
    """
    from ..compressor.source.checkpoint import Checkpoint

    checkpoint = Cached(Checkpoint(directory), most_bytes)
    return checkpoint.config, lambda ids: reference.forward(checkpoint.config, checkpoint, ids)


class Remembered:
    """Logits of windows by `logits`, each window's kept: a reference that much is compared with."""

    def __init__(self, logits):
        self.logits, self._kept = logits, {}

    def __call__(self, window: np.ndarray) -> np.ndarray:
        key = np.asarray(window).tobytes()
        if key not in self._kept:
            self._kept[key] = self.logits(window)
        return self._kept[key]

    def remember(self, windows: Iterable[np.ndarray]) -> None:
        """Ask now, for when `logits` cannot be asked any more."""
        for window in windows:
            self(window)


class Cached:
    """A checkpoint's tensors, each read once and kept; the first ones alone where `most_bytes` does not hold all.

    A pass goes through the layers in order, so of what was used last nothing is used soon.
    """

    def __init__(self, checkpoint, most_bytes: int | None = None):
        self.config = checkpoint.config
        self._checkpoint, self._kept = checkpoint, {}
        self._room = math.inf if most_bytes is None else most_bytes

    def trunk(self, name: str) -> np.ndarray:
        return self._keep(name, lambda: self._checkpoint.trunk(name))

    def expert(self, layer: int, expert: int):
        return self._keep((layer, expert), lambda: self._checkpoint.expert(layer, expert))

    def _keep(self, key, read):
        if key in self._kept:
            return self._kept[key]
        found = read()
        nbytes = found.nbytes if isinstance(found, np.ndarray) else sum(part.nbytes for part in found)
        if nbytes <= self._room:
            self._room -= nbytes
            self._kept[key] = found
        return found
