"""Hit rates of the expert cache by eviction policy, simulated over recorded text.

    python -m bench.laboratory.cache_policies --text A.txt B.txt > policies.md

The router's choices are recorded token by token, as in decoding; each policy then runs over the same trace with the
same number of slots. LFRU is the runtime's own (runtime/src/worths.h), reproduced hit by hit. Belady's optimum knows
the future and is an upper bound. The default texts are Python's standard library.
"""

import argparse
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from edge_moe.bench.evaluate import Cached, windows
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.config import ModelConfig

from .options import add_texts
from .prune_report import texts_of

CONTEXT = 256
HALF_LIFE = 32  # tokens, as in runtime/src/engine.cpp
SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # slots, as a share of all experts

Trace = list[list[int]]  # for each token and layer in order, the experts needed, numbered over all layers


def record(config: ModelConfig, weights, ids: np.ndarray) -> Trace:
    """The trace of tokens, in windows of CONTEXT, one token after another."""
    steps, first = [], np.cumsum([0, *(config.experts_of(layer) for layer in config.moe_layers)])
    offset = dict(zip(config.moe_layers, first, strict=False))
    for window in windows(ids, CONTEXT):
        chosen = {}

        def keep(layer: int, h, its, weights, chosen=chosen):
            chosen[layer] = np.sort(its, axis=1) + offset[layer]
            return its, weights

        reference.forward(config, weights, window, prune=keep)
        steps += [chosen[layer][t].tolist() for t in range(len(window)) for layer in config.moe_layers]
    return steps


# ---- policies: score(expert, now); the expert with the lowest score is evicted


@dataclass
class LFRU:
    """Counts uses, with a half-life of half_life steps, starting from the calibrated frequencies."""

    frequency: np.ndarray
    half_life: float
    used_at: dict = field(default_factory=dict)
    uses: dict = field(default_factory=dict)

    def score(self, expert: int, now: int) -> float:
        fading = 2.0 ** (-(now - self.used_at.get(expert, 0)) / self.half_life)
        return self.uses.get(expert, float(self.frequency[expert])) * fading

    def use(self, expert: int, now: int) -> None:
        self.uses[expert] = self.score(expert, now) + 1
        self.used_at[expert] = now


@dataclass
class LRU:
    used_at: dict = field(default_factory=dict)

    def score(self, expert: int, now: int) -> float:
        return self.used_at[expert]

    def use(self, expert: int, now: int) -> None:
        self.used_at[expert] = now


@dataclass
class LFU:
    uses: dict = field(default_factory=dict)

    def score(self, expert: int, now: int) -> float:
        return self.uses[expert]

    def use(self, expert: int, now: int) -> None:
        self.uses[expert] = self.uses.get(expert, 0) + 1


@dataclass
class Static(LRU):
    """Pins the experts most frequent in calibration; the others share the slots of one step, by LRU."""

    pinned: frozenset = frozenset()

    def score(self, expert: int, now: int) -> float:
        return float("inf") if expert in self.pinned else self.used_at[expert]


@dataclass
class Belady:
    """Evicts the expert that is needed latest, or never again."""

    trace: Trace
    steps: dict = field(default_factory=dict)  # at which each expert is used

    def __post_init__(self) -> None:
        for now, needed in enumerate(self.trace):
            for expert in needed:
                self.steps.setdefault(expert, []).append(now)

    def score(self, expert: int, now: int) -> float:
        after = bisect_right(self.steps[expert], now)
        return -self.steps[expert][after] if after < len(self.steps[expert]) else -float("inf")

    def use(self, expert: int, now: int) -> None:
        pass


def hits(trace: Trace, slots: int, policy) -> int:
    """The number of uses that find their expert in memory. Experts that a step needs are not evicted during it."""
    there, found = [], 0  # there: experts by slot
    for now, needed in enumerate(trace):
        held = [expert for expert in needed if expert in there]
        for expert in held + [expert for expert in needed if expert not in there]:
            if expert in there:
                found += 1
            elif len(there) < slots:
                there.append(expert)
            else:
                at = min(
                    (slot for slot in range(slots) if there[slot] not in needed),
                    key=lambda slot: policy.score(there[slot], now),
                )
                there[at] = expert
            policy.use(expert, now)
    return found


def policies(trace: Trace, slots: int, frequency: np.ndarray, config: ModelConfig) -> dict:
    """The policies by name. frequency: of each expert in calibration."""
    step = max(map(config.top_k_of, config.moe_layers))  # maximum of experts in one step
    pinned = frozenset(np.argsort(-frequency, kind="stable")[: slots - step].tolist())
    return {
        "LRU": LRU(),
        "LFU": LFU(),
        "static pins": Static(pinned=pinned),
        **{f"LFRU, half-life {tokens}": LFRU(frequency, tokens * len(config.moe_layers)) for tokens in (4, 512)},
        "LFRU (the runtime's)": LFRU(frequency, HALF_LIFE * len(config.moe_layers)),
        "Belady's optimum": Belady(trace),
    }


def table(trace: Trace, frequency: np.ndarray, config: ModelConfig) -> str:
    uses, columns = sum(map(len, trace)), [round(share * len(frequency)) for share in SHARES]
    rows = {}
    for slots in columns:
        for name, policy in policies(trace, slots, frequency, config).items():
            rows.setdefault(name, []).append(hits(trace, slots, policy) / uses)
    head = "| policy | " + " | ".join(f"{slots} slots, {slots / len(frequency):.0%}" for slots in columns) + " |"
    lines = [head, "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{rate:.1%}" for rate in rates) + " |" for name, rates in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_texts(parser, tokens=2048)
    a = parser.parse_args()
    texts = texts_of(a.model, a.text, 2 * a.tokens)
    with Checkpoint(a.model) as checkpoint:
        config, weights = checkpoint.config, Cached(checkpoint)
        # the first half of every text is decoded, the second is for calibration
        decoded = record(config, weights, np.concatenate([ids[: a.tokens] for ids in texts.values()]))
        calibrated = record(config, weights, np.concatenate([ids[a.tokens :] for ids in texts.values()]))
    experts = sum(config.experts_of(layer) for layer in config.moe_layers)
    counts = np.bincount(np.concatenate(calibrated), minlength=experts)
    frequency = counts / (len(calibrated) / len(config.moe_layers))
    tokens = len(decoded) // len(config.moe_layers)
    print(
        f"# Hit rates by policy\n\n{a.model.name}: {experts} experts of the same size, {tokens:,} tokens of "
        f"{', '.join(texts)} decoded one after another; frequencies for LFRU and the pins are of as many other tokens "
        f"of the same texts. Half-lives are in tokens; the runtime's is {HALF_LIFE}.\n\n"
        + table(decoded, frequency, config)
    )


if __name__ == "__main__":
    main()
