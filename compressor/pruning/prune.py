"""Calibrating a bundle for pruning: calibrate_pruning() finds the settings of each rule and certifies their cost.

Losses are measured on calibration text (prune_losses.py), mask routers are trained on them (mask_routers.py), and
settings are found for a set of cuts (prune_curves.py). Then the engine scores the bundle on held-out text at each cut
against the unpruned bundle. The bundle stays valid at every moment: while mask routers change, it has no calibration.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ... import _core
from ...devices.probe import default_threads
from ...runtime import reference
from ...runtime.bundle import Bundle
from ...runtime.bundle_table import TABLE_FILE
from ...runtime.hub import hub_id
from ...runtime.plan import resolve_ram
from ...runtime.pruning import LEARNED, MASK_FILE, RULES
from ...runtime.runtime import Runtime
from ...runtime.score import LOGITS_ROWS, Score
from ...runtime.tensorfile import make_header
from ...runtime.tokenizer import tokenizer_of
from ..files import write_whole
from ..passes.calibrate import check_tokens, load_calibration, paths_of
from ..passes.streams import Stream
from ..rounding.bundle_weights import BundleWeights
from ..writing.writer import table_bytes
from . import prune_curves
from .mask_routers import fit_losses, train_otp
from .prune_losses import SAMPLES, collect

DEFAULT_TOKENS = 32_768
DEFAULT_CUT = 0.2
DEFAULT_RULES = ("loss", "otp", "share", "odp")
APART, APART_TOKENS = 5, 64  # every fifth run of 64 tokens is for finding prices


def calibrate_pruning(
    bundle: str | Path,
    *,
    default: float | None = None,
    force: bool = False,
    rules: tuple[str, ...] = DEFAULT_RULES,
    calibration: str | Path | Sequence[str | Path] = (),
    held_out: str | Path | Sequence[str | Path] = (),
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    ram: int | str = "auto",
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Bundle:
    """Calibrate a bundle for pruning and open it.

    default: share of expert uses that a run leaves out unless told otherwise, or the nearest that the first rule
    reaches; None: nothing. force: replace an existing calibration. rules: some of loss, otp, share and odp; a plain
    share means the first, which the certificate is of. calibration, held_out: text files, or .npy of token ids; by
    default as for compress(). tokens: number of calibration tokens. ram: maximum memory for hidden states and for the
    engine; hidden states beyond half of it are in files beside the bundle. progress(step, done, of) reports progress.

    Raises ValueError for bad options, for a bundle whose tokens have one expert each and for a default that the
    calibrated cuts do not reach, FileExistsError for a bundle that is calibrated already, OSError for the disk.
    """
    opened, tell = _open_own(bundle), progress or (lambda step, done, of: None)
    config, path = opened.config, opened.path
    if opened.pruning and not force:
        raise FileExistsError(
            f"{path}: is calibrated for pruning already; --force calibrates it again, --default alone changes what a "
            "run without --prune leaves out"
        )
    if not rules or not set(rules) <= set(RULES):
        raise ValueError(f"rules are {', '.join(rules) or 'none'}, expected some of {', '.join(RULES)}")
    check_tokens(tokens)
    wanted = prune_curves.reachable(config)
    if not wanted:
        raise ValueError(f"{path}: tokens have {config.top_k} expert each, none can be left out")
    if default is not None and not wanted[0] <= default <= wanted[-1]:
        raise ValueError(f"default is {default:g}, expected {wanted[0]:g} to {wanted[-1]:g} of expert uses")
    text = load_calibration(tokenizer_of(path), config, paths_of(calibration), tokens, seed, paths_of(held_out))
    threads = threads or default_threads()
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(1))
        new_stream = _streams(stack, path, resolve_ram(ram), text.ids.size, config)
        weights = BundleWeights(opened)
        found = collect(config, weights, text.ids, new_stream, threads, seed, lambda done, of: tell("losses", done, of))
        apart = np.arange(text.ids.size) // APART_TOKENS % APART == 0
        table, routers = _settings(config, weights, found, rules, wanted, apart, seed, tell)
    reached = table["rules"][rules[0]]["cuts"]
    cut = min(max(DEFAULT_CUT if default is None else default, reached[0]), reached[-1])
    table |= {
        "default": rules[0],
        "cut": cut,
        "default_cut": None if default is None else cut,
        "calibration": {**text.provenance, "seed": seed, "samples": SAMPLES},
        "certificate": None,
    }
    _store(opened, table, routers)
    table["certificate"] = certify(path, rules[0], text, ram, threads, tell)
    _store(opened, table, None)
    return Bundle.open(path)


def set_default(bundle: str | Path, default: float | None) -> Bundle:
    """Change the share of expert uses that a calibrated bundle leaves out by default; None: nothing.

    Raises ValueError for a bundle that is not calibrated and for a share that its rule does not reach.
    """
    opened = _open_own(bundle)
    if not opened.pruning:
        raise ValueError(f"{opened.path}: is not calibrated for pruning; run `edge-moe prune {opened.path}`")
    table = json.loads((opened.path / TABLE_FILE).read_text(encoding="utf-8"))
    if default is not None:
        opened.pruning.rule(default)  # raises for a share that is not calibrated
        table["pruning"]["cut"] = default
    table["pruning"]["default_cut"] = default
    _write_table(opened.path / TABLE_FILE, table)
    return Bundle.open(opened.path)


def _open_own(bundle: str | Path) -> Bundle:
    """A bundle that may be changed. Raises ValueError for one on the hub."""
    if hub_id(bundle):
        raise ValueError(f"{bundle}: is on the hub, and this changes the bundle; download it with `hf download` first")
    return Bundle.open(bundle)


def _streams(stack: ExitStack, path: Path, ram: int, rows: int, config):
    """Return new_stream(name, rows), whose streams are in memory if all fit in half of `ram`."""
    alive = (config.layer_count + 3 + 2 * SAMPLES) * rows * config.width * 4
    directory, count = None, iter(range(1_000_000))
    if alive > ram / 2:
        beside = tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.prune-")
        directory = Path(stack.enter_context(beside))

    def new_stream(name: str, its: int, dim: int = 0) -> Stream:
        stream = Stream(its, dim or config.width, directory and directory / f"{next(count)}-{name}")
        stack.callback(stream.close)
        return stream

    return new_stream


def _settings(config, weights, found: dict, rules, wanted, apart: np.ndarray, seed: int, tell) -> tuple[dict, dict]:
    """The `rules` for bundle.json, and the mask routers by tensor name.

    apart: (rows,) whether a token is for finding prices. Mask routers are trained on the others: on their training
    tokens they are overconfident, and a price would cut more.
    """
    learned = [rule for rule in LEARNED if rule in rules]
    its, values, routers, total = {}, {rule: [] for rule in LEARNED}, {}, (1 + ("otp" in rules)) * len(found)
    for done, (layer, of_layer) in enumerate(found.items() if learned else (), start=1):
        inputs = of_layer.inputs(config, weights, layer)
        routers[layer, "loss"] = fit_losses(inputs[~apart], of_layer.losses[~apart])
        expected = np.exp(np.minimum(inputs[apart] @ routers[layer, "loss"].T, 80))
        expected[:, -1] = 0
        values["loss"].append(expected)
        tell("mask routers", done, total)
    if "otp" in rules:
        least, *_, most = prune_curves.prices(values["loss"], wanted)
        for done, (layer, of_layer) in enumerate(found.items(), start=1):
            inputs = of_layer.inputs(config, weights, layer)
            routers[layer, "otp"] = train_otp(inputs[~apart], of_layer.losses[~apart], (least, most), seed)
            values["otp"].append(-inputs[apart] @ routers[layer, "otp"].T)
            tell("mask routers", len(found) + done, total)
    for rule in rules:
        if rule in LEARNED:
            its[rule] = {"cuts": wanted, "prices": prune_curves.prices(values[rule], wanted)}
            continue
        if rule == "odp" and all(config.top_k_of(layer) == 2 for layer in found):
            cuts, thresholds = prune_curves.median_ratios(found)
        else:
            kept_by = reference.kept_by_ratio if rule == "odp" else reference.kept_by_share
            cuts, thresholds = prune_curves.thresholds(found, kept_by, wanted)
        its[rule] = {"cuts": cuts, "thresholds": thresholds}
        if rule == "odp" and config.tells_received:
            its[rule]["protect"] = prune_curves.PROTECTED
    names = {f"layers.{layer}.{rule}": router for (layer, rule), router in routers.items() if rule in rules}
    return {"rules": its}, names


def certify(path: Path, rule: str, text, ram, threads: int, tell) -> list[dict]:
    """Compare the bundle at each calibrated cut with the unpruned bundle on held-out text; for bundle.json."""
    found, context = [], text.held_out.shape[1]
    with Runtime(path, ram, context, threads=threads, prune="off", logits_rows=LOGITS_ROWS) as runtime:
        curve = runtime.bundle.pruning.curves[rule]
        base, scores, used = Score(), [Score() for _ in curve.cuts], np.zeros(len(curve.cuts), np.int64)
        for done, window in enumerate(text.held_out, start=1):
            whole = runtime.logits(window)[:-1]
            base.add(whole, window[1:])
            for at, cut in enumerate(curve.cuts):
                before = runtime.stats["experts_used"]
                scores[at].add(runtime.logits(window, prune=f"{rule}:{cut}")[:-1], window[1:], whole)
                used[at] += runtime.stats["experts_used"] - before
            tell("certificate", done, len(text.held_out))
        uses = text.held_out.size * sum(runtime.config.top_k_of(layer) for layer in runtime.config.moe_layers)
        for cut, score, its in zip(curve.cuts, scores, used, strict=True):
            result = score.result()
            ratio = result.pop("perplexity") / base.result()["perplexity"]
            row = {"cut": cut, "reached": 1 - int(its) / uses, "perplexity_ratio": ratio, **result}
            found.append({key: float(f"{value:.6g}") for key, value in row.items()} | {"tokens": result["tokens"]})
    return found


def _store(bundle: Bundle, pruning: dict, routers: dict | None) -> None:
    """Store the calibration in the bundle. routers: None keeps those that the bundle has."""
    file = bundle.path / TABLE_FILE
    table = json.loads(file.read_text(encoding="utf-8"))
    if routers is not None:
        if table["pruning"] is not None:
            _write_table(file, table | {"pruning": None})
        (bundle.path / MASK_FILE).unlink(missing_ok=True)
        pruning.pop("mask_routers", None)
    if routers:
        header = make_header([(name, "F32", its.shape, its.nbytes) for name, its in routers.items()], 64)
        data = b"".join([header, *(np.ascontiguousarray(its, "<f4").tobytes() for its in routers.values())])
        write_whole(bundle.path / MASK_FILE, lambda handle: handle.write(data))
        pruning["mask_routers"] = {"bytes": len(data), "crc32c": f"{_core.crc32c(data, 0):08x}"}
    _write_table(file, table | {"pruning": pruning})


def _write_table(file: Path, table: dict) -> None:
    write_whole(file, lambda handle: handle.write(table_bytes(table)))
