"""What the ranks that run a model together have to have in common before they do; see mlx/ranks.py."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .bundle import Bundle
from .device import mlx_version
from .plan import Plan

if TYPE_CHECKING:
    from .mlx.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Agreement:
    """chunk: tokens of a step, as every rank's cap allows. seeds: of answers for which none is given."""

    chunk: int
    snapshots: int
    seeds: Iterator[int]


def agree(ranks: "Ranks", bundle: Bundle, plan: Plan, **options: object) -> Agreement:
    """Tell the other ranks how this one would run, and return what suits all. options: of the Runtime.

    Raises ValueError if they do not have parts of one bundle, or other options.
    """
    assert bundle.part
    alike = {
        "bundle": bundle.part.bundle,
        "first_layers": list(bundle.part.first_layers),
        "context": plan.context,
        "kv": plan.kv,
        "sequences": plan.sequences,
        "mlx": mlx_version(),
        **options,
    }
    seed = int.from_bytes(os.urandom(6), "little")
    told = ranks.gather(b"plan", {"chunk": plan.chunk, "snapshots": plan.snapshots, "seed": seed, "alike": alike})
    for rank, its in enumerate(told):
        for name, value in told[0]["alike"].items():
            if its["alike"][name] != value:
                raise ValueError(
                    f"the ranks differ in {name}: {value!r} on rank 0, {its['alike'][name]!r} on rank {rank}"
                )
    chunk, snapshots = (min(its[name] for its in told) for name in ("chunk", "snapshots"))
    return Agreement(chunk, snapshots, itertools.count(told[0]["seed"]))
