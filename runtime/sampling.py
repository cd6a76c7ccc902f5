"""From a row of logits to one token: greedy, temperature, top-p."""

import numpy as np


class Sampler:
    """Draws tokens; with a seed the same draws every time.

    temperature 0 takes the most likely token. top_p keeps the smallest set of tokens whose probabilities reach it.
    Raises ValueError for values out of range.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None):
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}, expected 0 or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}, expected above 0 and at most 1")
        if seed is not None and seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more")
        self.temperature, self.top_p = temperature, top_p
        self.random = np.random.default_rng(seed) if temperature > 0 else None

    def __call__(self, logits: np.ndarray) -> int:
        """logits: (vocab,) float32 -> a token id."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64) - logits.max()
        with np.errstate(over="ignore"):  # a temperature next to 0 leaves the most likely tokens alone
            probabilities = np.exp(scaled / self.temperature)
        probabilities /= probabilities.sum()
        if self.top_p < 1:
            order = np.argsort(-probabilities, kind="stable")
            before = np.cumsum(probabilities[order]) - probabilities[order]
            probabilities[order[before >= self.top_p]] = 0
            probabilities /= probabilities.sum()
        return int(self.random.choice(len(probabilities), p=probabilities))
