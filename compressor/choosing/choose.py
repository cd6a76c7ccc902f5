"""Choosing, within the target size, which experts to drop, and the widths and groups of experts and trunk tensors."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ...runtime.config import ModelConfig
from ..source.checkpoint import Checkpoint
from ..writing.writer import Packing
from . import allocate, targets, trunk
from .drop_experts import drop, drop_in_program
from .sensitivity import Measures
from .targets import Options


@dataclass(slots=True)
class Choosing:
    """The choice for one run, from its options and measures; run() sets `config` and `trunk` to the bundle's."""

    checkpoint: Checkpoint
    o: Options
    trunk: dict[str, Packing]  # before run(): the narrowest allowed, if the widths are chosen from measures
    measures: Measures | None
    adjusted_top_k: Callable[[ModelConfig], tuple[int, ...]]
    mixed: Callable[..., list[Packing]]  # allocate.mixed, or a study's replacement
    config: ModelConfig = None

    def run(self) -> tuple[dict, dict, dict]:
        """Return the packing of each expert by (layer, number), the uniform packing to compare with in the same form,
        and the description of the method for bundle.json."""
        o, method = self.o, {"name": self.o.method}
        self.config = self.checkpoint.config
        if o.drop_experts:
            method |= {"drop_counts": o.drop_counts} | ({} if self.drops_in_program else {"drop_score": o.drop_score})
            self.config = self.dropped()
            self.measures = self.measures.of(self.config)
            if o.adjust_top_k:
                self.config = replace(self.config, layer_top_k=self.adjusted_top_k(self.config))
        budget = self.budget()
        if o.chooses_trunk:
            method["trunk"] = self.trunk_widths(budget)
            self.trunk = trunk.packing_of(self.config, method["trunk"])
            budget = self.budget()
        config, uniform = self.config, self.uniform(budget)
        chosen = [uniform] * config.expert_count
        if o.method == "pmq":
            bits = 8 * budget / (config.expert_weights * config.expert_count)
            near = allocate.unit_of(config, self.measures, bits)  # normalises the cost of each kind of text
            choice = self.measures.choices.index((near.widths[0], near.group))
            method["spread"] = round(self.measures.spread(choice), 2)
            method["flat"] = method["spread"] < allocate.FLAT
            if self.measures.has_codes or not method["flat"]:
                chosen = self.mixed(config, self.measures, budget, near, self.paging(budget))
        elif o.method != "uniform":
            chosen = allocate.published(config, self.measures, budget, o.method, targets.groups(o, config)[0])
        keys = [(layer, index) for layer in config.moe_layers for index in range(config.experts_of(layer))]
        return dict(zip(keys, chosen, strict=True)), dict.fromkeys(keys, uniform), method

    @property
    def drops_in_program(self) -> bool:
        return self.o.method == "pmq" and self.o.drop_counts == "sensitivity"

    def dropped(self) -> ModelConfig:
        """The config without the experts to drop."""
        o, config = self.o, self.config
        if not self.drops_in_program:
            return drop(config, self.measures, o.drop_experts, o.drop_score, o.drop_counts)
        left = config.expert_count - int(o.drop_experts * config.expert_count + 1e-9)
        budget = self.budget()
        if o.bits or o.paged:  # these targets are relative to the experts that stay
            budget *= left / config.expert_count
        bits = 8 * budget / (config.expert_weights * left)
        return drop_in_program(config, self.measures, o.drop_experts, bits, budget)

    def budget(self) -> float | None:
        """Bytes for the experts, given the present trunk; None if the option `width` is set instead."""
        if self.o.width is not None:
            return None
        if self.o.paged:
            return targets.paged_budget(self.o, self.checkpoint, self.frequency, self.trunk)
        return targets.expert_budget(self.o, self.checkpoint, self.config, self.trunk)

    def uniform(self, budget: float | None) -> Packing:
        """One width and group for all experts: as asked for, or the widest within the budget."""
        if budget is None:
            return Packing((self.o.width,) * 3, targets.groups(replace(self.o, method="rtn"), self.config)[0])
        every = targets.groups(replace(self.o, method="uniform"), self.config)
        bits = 8 * budget / (self.config.expert_weights * self.config.expert_count)
        return targets.uniform_packing(self.config, bits, every)

    def trunk_widths(self, budget: float) -> dict[str, int]:
        """The width of each kind of trunk tensor.

        budget: bytes for the experts; where the target covers the whole bundle, what the narrowest trunk leaves."""
        curves, whole = allocate.curves(self.config, self.measures), not self.o.bits
        if self.o.paged:  # the trunk shares the cap with the hot experts
            hot = targets.hot_experts(self.frequency)
            curves, budget = [curves[i] for i in np.flatnonzero(hot)], budget * hot.mean()
        return trunk.choose_widths(self.config, self.measures.trunk, curves, budget, whole)

    @property
    def frequency(self) -> np.ndarray:
        """Uses a token in calibration, (experts of all layers,)."""
        return np.concatenate([m.frequency for m in self.measures.layers if m is not None])

    def paging(self, budget: float) -> allocate.Paging | None:
        """The limits for a bundle that is larger than its cap; None without the option `paged`."""
        if not self.o.paged:
            return None
        hot, each = targets.hot_experts(self.frequency), budget / len(self.frequency)
        room, missed = each * np.count_nonzero(hot), each * float(self.frequency[~hot].sum())
        most_used = max(self.config.top_k_of(layer) for layer in self.config.moe_layers)
        return allocate.Paging(hot, room, self.frequency, missed, max(each, room / most_used))


def as_json(config: ModelConfig, trunk: dict[str, Packing], chosen: tuple[dict, dict, dict]) -> dict:
    """A choice as JSON for the journal, without layer_top_k, which the journal already has.

    A resumed run must not choose again: another version of the solver may find another packing.
    """
    packing, compared, method = chosen
    return {
        "kept": config.kept,
        "trunk": {name: [how.widths, how.group] for name, how in trunk.items()},
        "experts": [[how.widths, how.group, how.codec] for how in packing.values()],
        "uniform": [[how.widths, how.group, how.codec] for how in compared.values()],
        "method": method,
    }


def from_json(config: ModelConfig, saved: dict) -> tuple[ModelConfig, dict[str, Packing], tuple[dict, dict, dict]]:
    """The inverse of as_json(), for the checkpoint's config."""
    config = replace(config, kept=tuple(map(tuple, saved["kept"])))
    trunk = {name: Packing(tuple(widths), group) for name, (widths, group) in saved["trunk"].items()}
    keys = [(layer, index) for layer in config.moe_layers for index in range(config.experts_of(layer))]
    packing, compared = (
        {key: Packing(tuple(widths), *rest) for key, (widths, *rest) in zip(keys, saved[name], strict=True)}
        for name in ("experts", "uniform")
    )
    return config, trunk, (packing, compared, saved["method"])
