"""Scoring predictions: perplexity, and KL divergence from a reference's predictions."""

from dataclasses import dataclass, field

import numpy as np

LOGITS_ROWS = 32  # positions scored at once: limits memory for large vocabularies; the plan counts them


MOST_NATS = 300.0  # maximum per token: a perplexity of 2e130 is enough, and its ratios are finite


@dataclass(slots=True)
class Score:
    """Accumulates figures over scored positions."""

    tokens: int = 0
    nll: float = 0.0  # nats
    kld: list = field(default_factory=list)  # nats, one per position
    agree: int = 0  # positions where both have the same most likely token

    def add(self, logits: np.ndarray, targets: np.ndarray, against: np.ndarray | None = None) -> None:
        """Add positions. logits, against: (positions, vocab); targets: (positions,), the tokens that follow."""
        log_p = log_softmax(logits)
        self.tokens += len(targets)
        self.nll -= float(log_p[np.arange(len(targets)), targets].sum())
        if against is not None:
            log_q = log_softmax(against)
            self.kld += (np.exp(log_q) * (log_q - log_p)).sum(axis=-1).tolist()
            self.agree += int((logits.argmax(-1) == against.argmax(-1)).sum())

    def result(self) -> dict:
        """tokens, perplexity and, when compared, kld_mean, kld_p99 (nats a token) and top1_agreement."""
        nats = min(self.nll / max(self.tokens, 1), MOST_NATS)
        out = {"tokens": self.tokens, "perplexity": float(np.exp(nats))}
        if self.kld:
            out |= {
                "kld_mean": float(np.mean(self.kld)),
                "kld_p99": float(np.quantile(self.kld, 0.99)),
                "top1_agreement": self.agree / self.tokens,
            }
        return out


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The log-softmax of float32 logits, as float64 (rows, vocab)."""
    shifted = logits.astype(np.float64)
    shifted -= logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
