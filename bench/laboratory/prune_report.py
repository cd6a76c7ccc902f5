"""The pruning report: the cost of leaving out experts by each rule, at equal numbers of experts used.

    python -m bench.laboratory.prune_report --text A.txt B.txt --calibration C.txt --out prune.md --plot prune.svg

The rules that bundles offer run in the engine, at full precision and on a compressed bundle; the baselines (a smaller
top_k, top-p, random masks, one threshold of share for all layers) run in runtime/reference.py. Each is scored against
the same bundle unpruned. The default texts are Python's standard library.
"""

import argparse
import importlib.util
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from edge_moe.bench.conditions import processor, stolen, timed
from edge_moe.bench.evaluate import Cached, Remembered, windows
from edge_moe.bench.texts import held_out_modules
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.pruning.prune import calibrate_pruning
from edge_moe.compressor.rounding.bundle_weights import BundleWeights
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.devices.probe import default_threads
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.pruning import read_mask_routers
from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.score import LOGITS_ROWS, Score
from edge_moe.runtime.tokenizer import Tokenizer

from .options import add_texts
from .prune_paged import paged_table

CUTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
SHOWN = (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
CONTEXT = 256
ENTROPY_CUT = 0.35
NAMES = {"loss": "expected loss (ours)", "otp": "OTP", "share": "share, by layer", "odp": "ODP (ratio), protected"}


@dataclass(frozen=True, slots=True)
class Point:
    """One rule at one setting, over all texts: tokens are summed, perplexity and divergence are means over texts."""

    method: str
    used: float  # experts per token and layer
    cut: float  # share of expert uses left out
    perplexity: float  # relative to the unpruned one, minus 1
    kld: float
    asked: float | None = None
    cuts: tuple[float, ...] = ()  # of each text


def main() -> None:
    a = parse()
    if a.plot and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib: pip install matplotlib")  # before an hour of work
    tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    texts = texts_of(a.model, a.text, a.tokens)
    calibration = {"calibration": a.calibration}
    a.work.mkdir(parents=True, exist_ok=True)
    sections, plotted = [heading(a, texts)], None
    for bits in a.bits:
        bundle = a.work / f"bits-{bits:g}.emoe"
        if not bundle.exists():
            tell(f"compressing to {bits:g} bits")
            compress(a.model, bundle, bits=bits, **({} if bits == 16 else calibration))
        points, took = [], {}
        for seed in range(a.seeds if bits == 16 else 1):
            tell(f"{bits:g} bits: calibrating, seed {seed}")
            its, before = {}, stolen()
            given = {**calibration, "seed": seed, "tokens": a.calibration_tokens, "force": True}
            calibrate_pruning(bundle, **given, progress=timed(None, its))
            took[seed] = its, stolen() - before
            for rule in NAMES if seed == 0 else ("loss", "otp"):
                for cut in CUTS:
                    points += by_engine(bundle, rule, cut, texts)
                tell(f"{bits:g} bits: {NAMES[rule]}, seed {seed}")
        if bits == 16:
            points += controls(a.model, texts, tell)
            plotted = points
        sections += [f"## Experts of {bits:g} bits", frontier_table(points), bars(points)]
        sections += [entropy_text(bundle, texts), reached_table(points, list(texts)), cost_text(took[0])]
    sections += ["## Under a cap", paged_table(a.work / f"bits-{a.bits[0]:g}.emoe", texts, tell)]
    report = "\n\n".join(sections) + "\n"
    if a.out:
        a.out.write_text(report, encoding="utf-8")
    else:
        print(report)
    if a.plot and plotted:
        plot(plotted, a.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.laboratory.prune_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_texts(parser, tokens=4096, calibration_tokens=32_768)
    add = parser.add_argument
    add("--bits", type=float, nargs="+", default=[16, 2.5], help="bits of an expert weight; 16: full precision")
    add("--seeds", type=int, default=3, help="number of calibrations at full precision")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "edge-moe-prune", help="where bundles are kept")
    add("--out", type=Path, help="file for the report; by default stdout")
    add("--plot", type=Path, help="file for a plot; needs matplotlib")
    return parser.parse_args()


def texts_of(model: Path, files: list[Path], tokens: int) -> dict[str, np.ndarray]:
    tokenizer = Tokenizer(model)
    if not files:
        return {"held-out modules": np.array(held_out_modules(tokenizer, 0, tokens // CONTEXT, CONTEXT))}
    return {file.stem: np.array(tokenizer.encode(file.read_text(encoding="utf-8"))[:tokens]) for file in files}


def scored(method: str, texts: dict, logits, unpruned, account) -> Point:
    """Score one rule on all texts. account(): (expert uses, uses without pruning, layers times tokens) so far."""
    ratios, klds, sums = [], [], [np.zeros(3)]
    for ids in texts.values():
        score, base = Score(), Score()
        for window in windows(ids, CONTEXT):
            whole = unpruned(window)[:-1]
            base.add(whole, window[1:])
            score.add(logits(window)[:-1], window[1:], whole)
        result = score.result()
        ratios.append(np.log(result["perplexity"] / base.result()["perplexity"]))
        klds.append(result["kld_mean"])
        sums.append(np.array(account()))
    uses, of, rows = sums[-1]
    cuts = tuple(1 - its[0] / its[1] for its in np.diff(sums, axis=0))
    change, kld = float(np.exp(np.mean(ratios)) - 1), float(np.mean(klds))
    return Point(method, float(uses / rows), float(1 - uses / of), change, kld, cuts=cuts)


UNPRUNED = {}  # by bundle


def by_engine(bundle: Path, rule: str, cut: float, texts: dict) -> list[Point]:
    """The point of a rule at a calibrated cut, or no point if its curve does not reach the cut."""
    with Runtime(bundle, context=CONTEXT, prune="off", logits_rows=LOGITS_ROWS) as runtime:
        curve = runtime.bundle.pruning.curves[rule]
        if not curve.cuts[0] <= cut <= curve.cuts[-1]:
            return []
        unpruned = UNPRUNED.setdefault(bundle, Remembered(runtime.logits))
        unpruned.logits = runtime.logits
        for ids in texts.values():
            unpruned.remember(windows(ids, CONTEXT))
        before, config = runtime.stats, runtime.config

        def account():
            used = {key: runtime.stats[key] - before[key] for key in ("experts_used", "moe_tokens")}
            layers = config.moe_layers
            of = used["moe_tokens"] / len(layers) * sum(config.top_k_of(layer) for layer in layers)
            return used["experts_used"], of, used["moe_tokens"]

        # a window is processed in chunks like a prompt, so rules that protect tokens see as many at a time
        logits = partial(runtime.logits, prune=f"{rule}:{cut}")
        return [replace(scored(NAMES[rule], texts, logits, unpruned, account), asked=cut)]


# ---- baselines


def controls(model: Path, texts: dict, tell) -> list[Point]:
    with Checkpoint(model) as checkpoint:
        weights, config = Cached(checkpoint), checkpoint.config
        unpruned = Remembered(partial(reference.forward, config, weights))
        random = np.random.default_rng(0)
        ways = [("smaller top_k", partial(fixed, count)) for count in range(1, config.top_k)]
        ways += [("top-p", partial(top_p, weights, share)) for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
        ways += [("random masks", partial(at_random, random, share)) for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]
        ways += [("share, one threshold", partial(shares, share)) for share in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)]
        found = []
        for name, stays in ways:
            prune = Counting(config, stays)
            logits = partial(reference.forward, config, weights, prune=prune)
            found.append(scored(name, texts, logits, unpruned, prune.account))
            tell(f"{name}: cut {found[-1].cut:.3f}")
        return found


class Counting:
    """A `prune` for reference.forward() that counts uses; stays(config, layer, h, chosen, weights) -> (rows, top_k)."""

    def __init__(self, config, stays):
        self.config, self.stays = config, stays
        self.used = self.pairs = self.rows = 0
        self.counts = {}  # experts kept, by layer

    def __call__(self, layer: int, h, chosen, weights):
        stays = self.stays(self.config, layer, h, chosen, weights)
        self.used += int(stays.sum())
        self.pairs += stays.size
        self.rows += len(stays)
        self.counts.setdefault(layer, []).append(stays.sum(axis=1))
        return reference.keep(self.config, chosen, weights, stays)

    def account(self):
        return self.used, self.pairs, self.rows


def fixed(count, config, layer, h, chosen, weights):
    return np.broadcast_to(np.arange(chosen.shape[1]) < count, chosen.shape)


def top_p(model, share, config, layer, h, chosen, weights):
    """The fewest experts whose router scores reach `share` of the sum over all experts."""
    scores = np.take_along_axis(reference.router_scores(config, model, layer, h), chosen, axis=-1)
    stays = np.cumsum(scores, axis=-1) - scores < share
    stays[:, 0] = True
    return stays


def at_random(random, share, config, layer, h, chosen, weights):
    stays = random.random(chosen.shape) < share
    stays[:, 0] = True
    return stays


def shares(threshold, config, layer, h, chosen, weights):
    return np.arange(chosen.shape[1]) < reference.kept_by_share(weights, threshold)[:, None]


def by_router(rule: str, routers: list, price: float, config, layer, h, chosen, weights):
    router = routers[layer].reshape(chosen.shape[1], -1)
    return np.arange(chosen.shape[1]) < reference.kept_by_router(router, h, weights, price, rule == "loss")[:, None]


def entropy_text(bundle: Path, texts: dict) -> str:
    """The entropy of the number of experts per token at one cut, in the reference forward pass."""
    opened, lines = Bundle.open(bundle), []
    routers, weights = read_mask_routers(bundle, opened.pruning, opened.table), Cached(BundleWeights(opened))
    for rule, its in routers.items():
        rule_at = opened.pruning.rule(f"{rule}:{ENTROPY_CUT}")
        prune = Counting(opened.config, partial(by_router, rule, its, rule_at.price))
        for ids in texts.values():
            reference.forward(opened.config, weights, ids[:CONTEXT], prune=prune)
        shown = []
        for layer in opened.config.moe_layers:
            counts = np.bincount(np.concatenate(prune.counts[layer]))[1:]
            shares = counts[counts > 0] / counts.sum()
            shown.append(
                f"{-(shares * np.log2(shares)).sum():.2f} ({counts @ np.arange(1, len(counts) + 1) / counts.sum():.2f})"
            )
        lines.append(f"- {NAMES[rule]}: {', '.join(shown)}")
    return (
        f"Entropy of the number of experts that a token keeps, bits by layer, and in brackets its mean, at a cut of "
        f"{ENTROPY_CUT:.0%}; a constant number has none:\n\n" + "\n".join(lines)
    )


# ---- the report


def heading(a: argparse.Namespace, texts: dict) -> str:
    names = ", ".join(f"{name} ({len(ids):,} tokens)" for name, ids in texts.items())
    calibration = ", ".join(file.name for file in a.calibration) or "the standard library"
    return (
        "# Pruning experts per token\n\n"
        f"{Path(a.model).name} on {names}; windows of {CONTEXT}. Calibrated on {a.calibration_tokens:,} tokens of "
        f"{calibration}. Each figure is against the same experts unpruned: KLD in nats a token, and in brackets the "
        "change of perplexity; between two measured points of a rule, interpolated. Where there are several seeds "
        "of calibration: their mean, and the largest difference from it."
    )


def curves(points: list[Point]) -> dict[str, list[list[Point]]]:
    """For each method, the points of each seed, by increasing cut."""
    found = {}
    for point in points:
        runs = found.setdefault(point.method, [[]])
        if runs[-1] and point.cut < runs[-1][-1].cut and point.method in NAMES.values():
            runs.append([])  # the next seed starts at the smallest cut again
        runs[-1].append(point)
    return {name: [sorted(run, key=lambda point: point.cut) for run in runs] for name, runs in found.items()}


def at(run: list[Point], cut: float) -> tuple[float, float] | None:
    """(KLD, change of perplexity) at a cut, interpolated between points, KLD in the logarithm."""
    cuts = [point.cut for point in run]
    if not cuts[0] - 0.02 <= cut <= cuts[-1] + 0.02:
        return None
    kld = np.exp(np.interp(cut, cuts, np.log([point.kld for point in run])))
    return float(kld), float(np.interp(cut, cuts, [point.perplexity for point in run]))


def frontier_table(points: list[Point]) -> str:
    lines = ["| rule | " + " | ".join(f"{cut:.0%} cut" for cut in SHOWN) + " |", "|---|" + "---|" * len(SHOWN)]
    for name, runs in curves(points).items():
        cells = []
        for cut in SHOWN:
            found = [its for run in runs if (its := at(run, cut))]
            if not found:
                cells.append("")
                continue
            kld, change = np.mean(found, axis=0)
            spread = max(abs(its[0] - kld) for its in found)
            cells.append(f"{kld:.4f}{f' ± {spread:.4f}' if len(found) > 1 else ''} ({change:+.2%})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars(points: list[Point]) -> str:
    """Whether our rule is below every other where both are measured, and whether it meets its two targets."""
    runs, lines = curves(points), []
    for cut, most in ((0.2, 0.003), (0.35, 0.01)):
        worst = max(at(run, cut)[1] for run in runs[NAMES["loss"]])
        met = "met" if worst < most else "MISSED"
        lines.append(f"- {cut:.0%} fewer expert uses at less than {most:.1%} of perplexity: {met} ({worst:+.2%})")
    for name, others in runs.items():
        if name == NAMES["loss"]:
            continue
        ratios = {}
        for cut in SHOWN:
            ours, theirs = ([its[0] for run in some if (its := at(run, cut))] for some in (runs[NAMES["loss"]], others))
            if ours and theirs:
                ratios[cut] = np.mean(ours) / np.mean(theirs)
        if ratios:
            worst = max(ratios, key=ratios.get)
            lines.append(f"- KLD of ours over that of {name}: at most {ratios[worst]:.2f} (at {worst:.0%} cut)")
    return "\n".join(lines)


def reached_table(points: list[Point], texts: list[str]) -> str:
    """The share that our cuts leave out of each text, for the first seed."""
    first = {point.asked: point.cuts for point in reversed(points) if point.method == NAMES["loss"]}
    lines = ["| asked | " + " | ".join(texts) + " |", "|---" * (1 + len(texts)) + "|"]
    for asked, cuts in sorted(first.items()):
        lines.append(f"| {asked:.0%} | " + " | ".join(f"{cut:.1%}" for cut in cuts) + " |")
    return (
        "A cut is a mean over text like that of calibration; of other text ours leaves out more or less:\n\n"
        + "\n".join(lines)
    )


def cost_text(took: tuple[dict[str, float], float]) -> str:
    steps, lost = took
    return (
        f"Calibrating took {sum(steps.values()):.0f} s on {default_threads()} threads ("
        + ", ".join(f"{step} {seconds:.0f} s" for step, seconds in steps.items())
        + f"; {processor()}); other machines on the same host took {lost:.0f} s of these cores meanwhile."
    )


def plot(points: list[Point], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "edge-moe"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, runs in curves(points).items():
        style = {"linewidth": 2.5} if name == NAMES["loss"] else {"linewidth": 1, "alpha": 0.8}
        axes.plot([p.used for p in runs[0]], [p.kld for p in runs[0]], marker="o", markersize=3, label=name, **style)
    axes.set(yscale="log", xlabel="experts used a token and layer", ylabel="KLD from the model unpruned, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
