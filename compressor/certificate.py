"""The certificate: how far a bundle's predictions are from its source's, on text that nothing was fitted to.

Scored on the hidden states that the rounding pass carries for the held-out rows: the source, the bundle's weights as
they are read back, and one width everywhere in at most as many bytes, rounded by the same quantiser. `routing_changed`
is the share of uses of kept experts, mean over layers, that the source has and the bundle has not.
"""

import numpy as np

from ..runtime.score import Score
from .passes import forward
from .rounding.round_layers import Rounding

LOGITS_BYTES = 64_000_000  # of one model's logits at a time


def certify(rounding: Rounding, held_out: dict) -> dict:
    """The certificate for bundle.json, after the last layer; held_out: where its text is from."""
    config, tokens = rounding.config, rounding.ids.shape[1]
    targets = np.roll(rounding.ids, -1, axis=1).reshape(-1)
    scored = np.ones(rounding.ids.shape, bool)
    scored[:, -1] = False  # what follows the last position is not known
    scored = scored.reshape(-1)
    rows = max(LOGITS_BYTES // (4 * config.vocab), 1)
    source, scores = Score(), {track.name: Score() for track in rounding.tracks}
    heads = [
        forward.head_blocks(config, weights, x, rows, first=rounding.calibration_rows)
        for weights, x in ((rounding.checkpoint, rounding.x), *((t.trunk, t.x) for t in rounding.tracks))
    ]
    for (start, stop, exact), *others in zip(*heads, strict=True):
        kept = scored[start:stop]
        target = targets[start:stop][kept]
        source.add(exact[kept], target)
        for score, (_, _, logits) in zip(scores.values(), others, strict=True):
            score.add(logits[kept], target, exact[kept])
    base = source.result()["perplexity"]
    return {
        "held_out": held_out,
        "context": tokens,
        "source_perplexity": _round(base),
        **{
            track.name: {
                "bits_per_weight": _round(track.bits_per_weight),
                **{key: _round(value) for key, value in scores[track.name].result().items()},
                "perplexity_ratio": _round(scores[track.name].result()["perplexity"] / base),
                "routing_changed": _round(float(np.mean(track.changed))),
            }
            for track in rounding.tracks
        },
    }


def _round(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
