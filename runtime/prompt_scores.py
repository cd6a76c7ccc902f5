"""The log probabilities of a prompt's own tokens, collected while it is computed."""

import numpy as np

from .sampling import TokenLogprobs
from .score import log_softmax


class PromptScores:
    """found: of each token of the prompt, None for the first, which nothing predicts.

    top_logprobs: the number of likeliest tokens beside each.
    """

    def __init__(self, top_logprobs: int = 0) -> None:
        self.top_logprobs = top_logprobs
        self.found: list[TokenLogprobs | None] = [None]

    def add(self, ids: list[int], rows: np.ndarray) -> None:
        """Add the logits (rows, vocab) of the last tokens before the end of `ids`, which end with one token more; at
        the end of the prompt there is no such token, and the last row is left out."""
        for row in rows[: len(ids) - len(self.found)]:
            token, logprobs = ids[len(self.found)], log_softmax(row)
            likeliest: tuple[tuple[int, float], ...] = ()
            if self.top_logprobs:
                top = np.argpartition(-logprobs, min(self.top_logprobs, len(row) - 1))[: self.top_logprobs]
                likeliest = tuple(
                    (int(one), float(logprobs[one])) for one in sorted(top, key=lambda one: (-row[one], one))
                )
            self.found.append(TokenLogprobs(token, float(logprobs[token]), likeliest))
