"""Pruning in the engine: each rule leaves out what the reference's does, and nothing else depends on it."""

import numpy as np
import pytest
from bundles import Pruned, mask_routers_of, prunable

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.pruning import LEARNED, PruneRule
from edge_moe.runtime.runtime import Runtime

ARCHITECTURES = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3"]


def rule_of(kind: str, config) -> PruneRule:
    rng = np.random.default_rng(1)
    low, high = {"ratio": (0.5, 1.0), "share": (0.3, 0.9)}.get(kind, (0, 0))
    threshold = () if kind in LEARNED else tuple(rng.uniform(low, high, config.layer_count).tolist())
    return PruneRule(kind, threshold, price=0.2 if kind in LEARNED else 0.0)


def kept_of(rule: PruneRule, mask_routers):
    """(layer, h, routing weights) -> experts kept of each row, by runtime/reference.py."""

    def kept(layer, h, weights):
        if rule.rule in LEARNED:
            router = mask_routers[f"layers.{layer}.{rule.rule}"]
            return reference.kept_by_router(router, h, weights, rule.price, rule.rule == "loss")
        how = reference.kept_by_ratio if rule.rule == "ratio" else reference.kept_by_share
        return how(weights, np.float32(rule.threshold[layer]))

    return kept


@pytest.mark.parametrize("kind", ["ratio", "share", "otp", "loss"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_reference_pruned_alike(golden, tmp_path, architecture, kind):
    directory, ids, whole = golden[architecture]
    checkpoint = Checkpoint(directory)
    config, masks = checkpoint.config, mask_routers_of(checkpoint.config)
    rule, pruned = rule_of(kind, config), Pruned(checkpoint)
    want = pruned.logits(ids, kept_of(rule, masks))
    assert 0.1 < pruned.cut < 0.9 or architecture == "mixtral"
    with Runtime(
        prunable(tmp_path / "new.emoe", directory, masks), context=len(ids), threads=2, kv="float32"
    ) as runtime:
        runtime._prune = rule
        got = runtime.logits(ids)
        counted = runtime.stats
    assert np.abs(got - want).max() <= 1e-4
    assert np.abs(got - whole).max() > 0.01
    assert counted["experts_used"] == pruned.used
    assert counted["dropped_weight"] == pytest.approx(pruned.dropped, rel=1e-4)
