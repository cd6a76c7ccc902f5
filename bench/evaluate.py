"""Scoring a bundle on a text: perplexity, and the divergence of its predictions from a reference's.

Convention: consecutive windows of `context` tokens without overlap; every position but a window's first is scored;
perplexity is per token. State it beside every figure.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..runtime import reference
from ..runtime.runtime import Runtime
from ..runtime.score import Score


def windows(ids, context: int, tokens: int | None = None) -> Iterable[np.ndarray]:
    """Consecutive windows of the first `tokens` ids, without a last window of a single token, which scores nothing."""
    ids = np.asarray(ids)[:tokens]
    for at in range(0, len(ids), context):
        if len(window := ids[at : at + context]) > 1:
            yield window


def evaluate(
    runtime: Runtime, ids, *, context: int = 256, tokens: int | None = None, against=None, progress=None, score=None
) -> dict:
    """Score a bundle on token ids; a Runtime made with logits_rows=LOGITS_ROWS is fastest.

    against: a function from a window of ids to reference logits (tokens, vocab): another Runtime's `logits`, or
    checkpoint_logits(). score: the Score to add to; passing one gives access to the divergence at each position. Raises
    ValueError if context is beyond the runtime's or there is nothing to score.
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
            scored = min(len(block), len(window) - 1 - at)  # the last position has no next token
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


def checkpoint_logits(directory: str | Path, most_bytes: int | None = None, context: int = 0):
    """A checkpoint's config, and a function from token ids to full-precision logits by the reference forward pass.

    most_bytes: the maximum of tensors kept in memory; None keeps all of them. context: the context that a Runtime would
    be planned for; 0 is the length of each text.
    """
    from ..compressor.source.checkpoint import Checkpoint

    checkpoint = Cached(Checkpoint(directory), most_bytes)
    config = checkpoint.config.planned(context) if context else checkpoint.config
    return config, lambda ids: reference.forward(config, checkpoint, ids)


class Remembered:
    """A cache of the logits of windows, for a reference that several bundles are compared with."""

    def __init__(self, logits):
        self.logits, self._kept = logits, {}

    def __call__(self, window: np.ndarray) -> np.ndarray:
        key = np.asarray(window).tobytes()
        if key not in self._kept:
            self._kept[key] = self.logits(window)
        return self._kept[key]

    def remember(self, windows: Iterable[np.ndarray]) -> None:
        """Compute the logits of windows now, while `logits` can still be called."""
        for window in windows:
            self(window)


class Cached:
    """A cache of a checkpoint's tensors: the first that are read, up to `most_bytes`, are kept and never evicted.

    A pass goes through the layers in order, so the tensors used last are those used again latest.
    """

    def __init__(self, checkpoint, most_bytes: int | None = None):
        self.config = checkpoint.config
        self._checkpoint, self._kept = checkpoint, {}
        self._room = math.inf if most_bytes is None else most_bytes

    def trunk(self, name: str) -> np.ndarray:
        return self._keep(name, lambda: self._checkpoint.trunk(name))

    def expert(self, layer: int, expert: int):
        return self._keep((layer, expert), lambda: self._checkpoint.expert(layer, expert))

    def expert_bias(self, layer: int, expert: int):
        return self._keep((layer, expert, "bias"), lambda: self._checkpoint.expert_bias(layer, expert))

    def _keep(self, key, read):
        if key in self._kept:
            return self._kept[key]
        found = read()
        nbytes = found.nbytes if isinstance(found, np.ndarray) else sum(part.nbytes for part in found)
        if nbytes <= self._room:
            self._room -= nbytes
            self._kept[key] = found
        return found
