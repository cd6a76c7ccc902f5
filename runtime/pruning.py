"""Reading the pruning calibration of a bundle, and resolving the `prune` of a request to a rule and its settings.

bundle.json's `pruning` has, for each rule by name, the calibrated cuts (share of expert uses left out) and the settings
for each cut: `thresholds`, one per layer with experts, or a `price` of an expert in the mask routers' scores. Both are
interpolated between cuts. src/prune.h and reference.py implement the rules.

`cut` is the cut of "bundle". `default_cut` is the cut of a run without `prune`, null for none; for a bundle of an
earlier release, which does not have it, it is `cut`.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import _core
from .bundle_table import LISTED, PRUNING_CERTIFICATE, REMEDY, TABLE_FILE, Reader, is_number, shown
from .config import ModelConfig
from .files import read_bounded, real_path
from .tensorfile import read_header

MASK_FILE = "mask-routers.safetensors"
RULES = {"odp": "ratio", "share": "share", "otp": "otp", "loss": "loss"}  # names in bundle.json, and the engine's
LEARNED = ("otp", "loss")  # rules with mask routers
MASK_HEADER_BYTES, MASK_TENSOR_BYTES = 65_536, 256  # upper bounds for the mask routers' header: in all, per tensor


@dataclass(frozen=True, slots=True)
class PruneRule:
    """The pruning of one request, as the engine takes it."""

    rule: str = "off"  # off, ratio, share, otp or loss
    threshold: tuple[float, ...] = ()  # by layer, for ratio and share
    price: float = 0.0  # of an expert, for otp and loss
    protect: float = 0.0  # share of a prompt's tokens, by most received attention, that keep all experts


OFF = PruneRule()


@dataclass(frozen=True, slots=True)
class Curve:
    """The settings of one rule by cut, in ascending order."""

    cuts: tuple[float, ...]
    settings: np.ndarray  # (cuts, layers with experts) thresholds, or (cuts, 1) prices
    protect: float = 0.0


@dataclass(frozen=True, slots=True)
class Pruning:
    """The pruning calibration of a bundle."""

    config: ModelConfig
    path: Path
    curves: dict[str, Curve]
    default: str  # the rule that a plain number means
    cut: float  # what "bundle" means
    default_cut: float | None  # of a run without `prune`; None: it leaves out nothing
    certificate: list

    @property
    def learned(self) -> list[str]:
        """The rules that have mask routers."""
        return [name for name in LEARNED if name in self.curves]

    def about(self) -> dict:
        """The object that `inspect` shows. Raises ValueError for a malformed certificate."""
        read = Reader(self.path / TABLE_FILE)
        for number, row in enumerate(self.certificate):
            read.check(row, PRUNING_CERTIFICATE, f"pruning.certificate[{number}]")
        reach = {name: list(curve.cuts) for name, curve in self.curves.items()}
        cuts = {"cut": self.cut, "default_cut": self.default_cut}
        return {"default": self.default, **cuts, "rules": reach, "certificate": self.certificate}

    def rule(self, prune: float | str) -> PruneRule:
        """Resolve "bundle", a cut, the name of a rule (at the bundle's cut, or the nearest), or NAME:CUT.

        Raises ValueError for other values and for cuts that are not calibrated."""
        name, cut = self._asked_for(prune)
        curve = self.curves[name]
        low, high = curve.cuts[0], curve.cuts[-1]
        if cut is None:
            cut = min(max(self.cut, low), high)
        if not low <= cut <= high:
            reach = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            raise ValueError(f"{self.path}: prune is {cut:g}, but {name} is calibrated for {reach} of expert uses")
        at = bisect_left(curve.cuts, cut)
        settings = curve.settings[at]
        if curve.cuts[at] != cut:
            part = (cut - curve.cuts[at - 1]) / (curve.cuts[at] - curve.cuts[at - 1])
            settings = (1 - part) * curve.settings[at - 1] + part * settings
        if name in LEARNED:
            return PruneRule(name, price=float(settings[0]))
        threshold = dict(zip(self.config.moe_layers, settings.tolist(), strict=True))
        by_layer = tuple(threshold.get(layer, 0.0) for layer in range(self.config.layer_count))
        return PruneRule(RULES[name], by_layer, protect=curve.protect)

    def _asked_for(self, prune: float | str) -> tuple[str, float | None]:
        name, cut = self.default, prune
        if isinstance(prune, str):
            name, _, text = prune.partition(":")
            name = self.default if prune == "bundle" else name
            try:
                cut = float(text) if text else None
            except ValueError:
                cut = math.nan
        if name not in self.curves or (cut is not None and not math.isfinite(cut)):
            raise ValueError(
                f"prune is {prune!r}, expected off, bundle, a share of expert uses such as 0.2, or one of "
                f"{', '.join(self.curves)}, optionally with a share, such as {self.default}:0.2"
            )
        return name, cut


def prune_rule(pruning: Pruning | None, prune: float | str | None, path: Path) -> PruneRule:
    """The rule for a request. prune: None for the bundle's default, which is off unless set."""
    if prune == "off" or (prune is None and (pruning is None or pruning.default_cut is None)):
        return OFF
    if pruning is None:
        raise ValueError(
            f"{path}: prune is {prune!r}, but this bundle is not calibrated for it; "
            f"use off, or run `edge-moe prune {path}`"
        )
    return pruning.rule(pruning.default_cut if prune is None else prune)


def read_pruning(path: Path, config: ModelConfig, table: dict) -> Pruning | None:
    """Read and check bundle.json's `pruning`. Raises ValueError for invalid values."""
    entry = table.get("pruning")
    if entry is None:
        return None
    where = path / TABLE_FILE

    def bad(what: str) -> ValueError:
        return ValueError(f"{where}: pruning {what}; {REMEDY}")

    if not isinstance(entry, dict) or not isinstance(entry.get("rules"), dict) or not entry["rules"]:
        raise bad("has no rules")
    curves = {}
    for name, its in entry["rules"].items():
        if name not in RULES or not isinstance(its, dict):
            raise bad(f"has a rule {name!r}, expected some of {', '.join(RULES)}")
        learned = name in LEARNED
        cuts = its.get("cuts")
        if not _numbers(cuts) or not all(a < b for a, b in zip([0, *cuts], [*cuts, 1], strict=True)):
            raise bad(f"has cuts of {name} that do not rise from 0 to 1")
        values = its.get("prices" if learned else "thresholds")
        rows = [[value] for value in values] if learned and isinstance(values, list) else values
        layers = 1 if learned else len(config.moe_layers)
        if not isinstance(rows, list) or len(rows) != len(cuts):
            raise bad(f"does not have one setting of {name} for each of its {len(cuts)} cuts")
        if not all(_numbers(row) for row in rows):
            raise bad(f"has settings of {name} that are not finite numbers")
        if any(len(row) != layers for row in rows):
            raise bad(f"has thresholds of {name} for other than the {layers} layers with experts")
        if not learned and not all(0 <= value <= 1 for row in rows for value in row):
            raise bad(f"has thresholds of {name} outside 0 to 1")
        protect = its.get("protect", 0.0)
        if not _numbers([protect]) or not 0 <= protect <= 1:
            raise bad(f"protects a share of {shown(protect)}, expected 0 to 1")
        curves[name] = Curve(tuple(cuts), np.array(rows, np.float64), protect)
    default, cut, certificate = entry.get("default"), entry.get("cut"), entry.get("certificate")
    if not isinstance(default, str) or default not in curves:
        raise bad(f"has a default rule {shown(default)} that is not among its rules")
    if not is_number(cut) or not 0 < cut < 1:
        raise bad(f"has a cut of {shown(cut)}, expected a share of expert uses")
    low, high = curves[default].cuts[0], curves[default].cuts[-1]
    default_cut = entry.get("default_cut", min(max(cut, low), high))
    if default_cut is not None and (not is_number(default_cut) or not low <= default_cut <= high):
        raise bad(f"has a default_cut of {shown(default_cut)}, expected null or {low:g} to {high:g}")
    if not isinstance(certificate, list | None):
        raise bad(f"has a certificate that is {shown(certificate)}, expected a list")
    if set(LEARNED) & curves.keys():
        read, routers = Reader(where), entry.get("mask_routers")
        if not isinstance(routers, dict):
            raise bad("has a learned rule, but no mask_routers")
        read.count(routers, "bytes"), read.checksum(routers)
    default_cut = None if default_cut is None else float(default_cut)
    return Pruning(config, path, curves, default, float(cut), default_cut, certificate or [])


def read_mask_routers(path: Path, pruning: Pruning | None, table: dict) -> dict[str, list[np.ndarray]]:
    """The mask routers by rule and layer, float32 (top_k * (dim + 2 top_k + 1),), empty for a layer without experts.

    Raises ValueError for a damaged file or other shapes.
    """
    rules = pruning.learned if pruning else []
    if not rules:
        return {}
    config, entry, file = pruning.config, table["pruning"]["mask_routers"], path / MASK_FILE
    shapes = {layer: mask_router_shape(config, layer) for layer in config.moe_layers}
    most = MASK_HEADER_BYTES + len(LEARNED) * sum(4 * math.prod(one) + MASK_TENSOR_BYTES for one in shapes.values())
    size = real_path(path, MASK_FILE, LISTED).stat().st_size
    if size != entry["bytes"] or size > most:
        raise ValueError(f"{file}: has {size:,} bytes, expected {min(entry['bytes'], most):,}; {REMEDY}")
    data = read_bounded(file, most, REMEDY)
    if f"{_core.crc32c(data, 0):08x}" != entry["crc32c"]:
        raise ValueError(f"{file}: does not match its checksum; {REMEDY}")
    stored, found = (
        read_header(file, REMEDY, most),
        {name: [np.zeros(0, np.float32)] * config.layer_count for name in rules},
    )
    for rule, layers in found.items():
        for layer, shape in shapes.items():
            name = f"layers.{layer}.{rule}"
            part = stored.get(name)
            if part is None or part.dtype != "F32" or part.shape != shape:
                kind = "missing" if part is None else f"{part.dtype} {part.shape}"
                raise ValueError(f"{file}: {name} is {kind}, expected F32 {shape}; {REMEDY}")
            values = np.frombuffer(data, "<f4", math.prod(shape), part.offset)
            if not np.isfinite(values).all():
                raise ValueError(f"{file}: {name} has values that are not finite; {REMEDY}")
            layers[layer] = values
    return found


def mask_router_shape(config: ModelConfig, layer: int) -> tuple[int, int]:
    """The shape of a mask router: a row for each number of experts; columns for the hidden state, the log shares of the
    weights, the shares, and 1."""
    top_k = config.top_k_of(layer)
    return top_k, config.dim + 2 * top_k + 1


def _numbers(values) -> bool:
    return isinstance(values, list) and bool(values) and all(is_number(value) for value in values)
