"""Dropping experts: which ones go, by hand, and that the bundle is the model without them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from bundles import Kept, changed, logits_of, weights_of

from edge_moe.compressor.choosing.drop_experts import drop, score
from edge_moe.compressor.choosing.sensitivity import LayerMeasure, Measures
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle, verify
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.layers.mlp import RouterConfig
from edge_moe.runtime.score import log_softmax

# Four experts, two a token: 0 is used most, 1 is used less but counts much where it is, 3 is used least.
FREQUENCY = np.array([1.0, 0.4, 0.5, 0.1])
WEIGHT = np.array([0.4, 0.3, 0.1, 0.06])


def measure_of(frequency, weight, drop_errors=None) -> LayerMeasure:
    experts, none = len(frequency), np.zeros(0)
    errors = np.zeros((experts, 1)) if drop_errors is None else np.array(drop_errors)[:, None]
    return LayerMeasure(np.array(frequency), np.array(weight), none, none, none, errors, none)


def measures_of(layers: list, gain=None) -> Measures:
    gain = np.ones(len(layers)) if gain is None else np.array(gain)
    return Measures(layers, [(2, 32)], gain[:, None])


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("weight", WEIGHT),
        ("frequency", [0.5, 0.2, 0.25, 0.05]),
        ("mean-weight", np.array([0.4, 0.75, 0.2, 0.6]) / 1.95),
        ("mixture", np.array([0.5, 0.2, 0.25, 0.05]) / 2 + np.array([0.4, 0.75, 0.2, 0.6]) / 3.9),
    ],
)
def test_scores_are_those_worked_out_by_hand(kind, want):
    np.testing.assert_allclose(score(measure_of(FREQUENCY, WEIGHT), kind), want)


def test_an_expert_that_was_never_chosen_scores_nothing():
    measure = measure_of([1.0, 1.0, 0.0], [0.5, 0.3, 0.0])
    for kind in ("mixture", "weight", "frequency", "mean-weight"):
        assert score(measure, kind)[2] == 0
        assert (score(measure, kind)[:2] > 0).all()


@pytest.fixture
def toy(golden):
    """A config of two layers of four experts, two a token."""
    return changed(load_config(golden["qwen3_moe"][0]), experts=4, top_k=2)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("weight", (0, 1, 2)), ("frequency", (0, 1, 2)), ("mean-weight", (0, 1, 3)), ("mixture", (0, 1, 3))],
)
def test_the_lowest_score_of_each_layer_goes(toy, kind, kept):
    turned = measure_of(FREQUENCY[::-1], WEIGHT[::-1])
    config = drop(toy, measures_of([measure_of(FREQUENCY, WEIGHT), turned]), 0.25, kind, "equal")
    assert config.kept == (kept, tuple(sorted(3 - expert for expert in kept)))
    assert config == replace(toy, kept=config.kept)


@pytest.mark.parametrize(("share", "left"), [(0.0, 4), (0.2, 4), (0.25, 3), (0.4999, 3), (0.5, 2)])
def test_a_share_is_rounded_down(toy, share, left):
    layer = measure_of(FREQUENCY, WEIGHT)
    config = drop(toy, measures_of([layer, layer]), share, "weight", "equal")
    assert [len(kept) for kept in config.kept] == [left, left]


def test_by_sensitivity_those_go_that_cost_least_over_all_layers(toy):
    """Two of the eight go: layer 0's least used expert costs more than both of layer 1's."""
    first = measure_of([0.9, 0.5, 0.4, 0.2], [0.4, 0.3, 0.2, 0.1], [9.0, 6.0, 5.0, 4.0])
    second = measure_of([0.2, 0.4, 0.5, 0.9], [0.1, 0.2, 0.3, 0.4], [1.0, 3.0, 5.0, 9.0])
    assert drop(toy, measures_of([first, second]), 0.25, "weight", "sensitivity").kept == ((0, 1, 2, 3), (2, 3))
    # a gain of 5 makes layer 1's second expert dearer than layer 0's last
    config = drop(toy, measures_of([first, second], gain=[1.0, 2.0]), 0.25, "weight", "sensitivity")
    assert config.kept == ((0, 1, 2), (1, 2, 3))
    # top_k experts stay in every layer, however little they cost
    config = drop(toy, measures_of([first, second], gain=[1.0, 1e-6]), 0.25, "weight", "sensitivity")
    assert config.kept == ((0, 1, 2, 3), (2, 3))
    config = drop(toy, measures_of([first, second], gain=[1.0, 1e-6]), 0.5, "weight", "sensitivity")
    assert config.kept == ((0, 1), (2, 3))


@pytest.mark.parametrize("counts", ["equal", "sensitivity"])
def test_fewer_than_a_token_chooses_are_refused(toy, counts):
    layer = measure_of(FREQUENCY, WEIGHT)
    with pytest.raises(ValueError) as caught:
        drop(toy, measures_of([layer, layer]), 0.75, "weight", counts)
    assert str(caught.value) == "dropping 75% of the experts leaves 1, the router needs 2"


def grouped(toy, **router):
    """Eight experts in four groups of two, of which a token chooses two, and three experts of these."""
    router = RouterConfig(score="sigmoid", groups=4, top_groups=2, **router)
    one = changed(toy, experts=8, top_k=3, router=router)
    return replace(one, layers=one.layers[:1])


def test_an_expert_keeps_its_group(toy):
    even = measure_of([0.9, 0.1, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [0.9, 0.1, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    config = drop(grouped(toy), measures_of([even]), 0.125, "weight", "equal")
    assert config.kept == ((0, 2, 3, 4, 5, 6, 7),)
    assert config.router == grouped(toy).router


def test_groups_that_would_leave_a_token_too_few_experts_are_refused(toy):
    odd = measure_of([0.9, 0.1, 0.8, 0.2, 0.6, 0.5, 0.4, 0.3], [0.9, 0.1, 0.8, 0.2, 0.6, 0.5, 0.4, 0.3])
    with pytest.raises(ValueError) as caught:
        drop(grouped(toy), measures_of([odd]), 0.25, "weight", "equal")
    assert str(caught.value) == (
        "layer 0: its smallest 2 groups of experts would have 2 left, a token needs 3; drop fewer"
    )


# ---- whole bundles


@pytest.fixture(scope="module")
def ids_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(0, 128, 2048))
    return file


def dropped(model, out, ids_file, share, **options) -> Bundle:
    options = {"bits": 8, "calibration": ids_file, "tokens": 512, "threads": 1, **options}
    return compress(model, out, drop_experts=share, **{"drop_counts": "equal", **options})


@pytest.mark.parametrize("method", ["pmq", "uniform"])
@pytest.mark.parametrize(
    ("architecture", "share"),
    [
        *(("qwen3_moe", 0.4), ("qwen2_moe", 0.4), ("mixtral", 0.6)),
        *(("deepseek_v3", 0.13), ("deepseek_v4", 0.3)),
    ],
)
def test_a_bundle_has_the_experts_that_were_used_most(golden, tmp_path, ids_file, architecture, share, method):
    model, ids, _ = golden[architecture]
    whole = dropped(model, tmp_path / "whole.emoe", ids_file, 0.0, method="pmq")  # with every expert's frequency
    bundle = dropped(model, tmp_path / "new.emoe", ids_file, share, method=method, drop_score="frequency")
    assert bundle.table["method"].items() >= {"drop_score": "frequency", "drop_counts": "equal"}.items()
    c, trunk, whole_trunk = bundle.config, weights_of(bundle.path), {tensor.name for tensor in whole.trunk}
    assert len(list(verify(bundle))) == 2 + c.expert_count
    for layer in c.moe_layers:
        frequency = [whole.experts[layer, expert].frequency for expert in range(c.experts)]
        left = c.experts - int(share * c.experts)
        assert c.kept[layer] == tuple(sorted(np.argsort(-np.array(frequency), kind="stable")[:left]))
        found = [bundle.experts[layer, index].frequency for index in range(left)]
        assert found == [frequency[expert] for expert in c.kept[layer]]
        for name in (f"layers.{layer}.router", f"layers.{layer}.router_bias"):
            if name in whole_trunk:
                want = Checkpoint(model).trunk(name)[list(c.kept[layer])]
                np.testing.assert_array_equal(trunk.trunk(name), want)
        if c.is_hashed(layer):
            table = f"layers.{layer}.router_table"
            np.testing.assert_array_equal(trunk.trunk(table), Kept(Checkpoint(model), c).trunk(table))
    logits = logits_of(bundle.path, ids)
    want = reference.forward(c, trunk, ids)
    assert np.median(np.sqrt(np.square(logits - want).mean(-1))) < 0.1 * want.std()  # int8 activations


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen2_moe"])
def test_experts_that_stay_make_up_for_a_part_of_what_is_gone(golden, tmp_path, ids_file, architecture):
    """On held-out ids, against the model in full precision without the same experts."""
    model, held_out = golden[architecture][0], tmp_path / "held-out.npy"
    ids = np.random.default_rng(1).integers(0, 128, (4, 256))
    np.save(held_out, ids)
    made = dropped(model, tmp_path / "new.emoe", ids_file, 0.5, bits=10, tokens=1024, held_out=held_out)
    checkpoint = Checkpoint(model)
    clean, without = (
        log_softmax(reference.forward(config, weights, ids)[:, :-1].reshape(-1, config.vocab))
        for config, weights in (
            (checkpoint.config, checkpoint),
            (made.config, Kept(checkpoint, made.config)),
        )
    )
    kld = (np.exp(clean) * (clean - without)).sum(-1).mean()
    assert made.table["certificate"]["bundle"]["kld_mean"] < 0.9 * kld


def test_groups_of_a_real_router_are_kept_or_refused(golden, tmp_path, ids_file):
    with pytest.raises(ValueError) as caught:
        dropped(golden["deepseek_v3"][0], tmp_path / "new.emoe", ids_file, 0.5)
    assert re.fullmatch(
        r"layer 1: its smallest 2 groups of experts would have \d left, a token needs 5; drop fewer", str(caught.value)
    )


def test_counts_by_sensitivity_differ_between_layers_and_add_up(golden, tmp_path, ids_file):
    bundle = dropped(golden["mixtral"][0], tmp_path / "new.emoe", ids_file, 0.5, drop_counts="sensitivity")
    c = bundle.config
    assert sum(len(kept) for kept in c.kept) == c.experts * c.layer_count // 2
    assert min(len(kept) for kept in c.kept) >= c.top_k
    assert bundle.table["method"]["drop_counts"] == "sensitivity"


def test_bits_are_those_of_the_experts_that_stay(golden, tmp_path, ids_file):
    bundle = dropped(golden["qwen3_moe"][0], tmp_path / "new.emoe", ids_file, 0.5, bits=6)
    assert 5.5 < bundle.bits_per_weight <= 6
    assert bundle.table["certificate"]["bundle"]["bits_per_weight"] == pytest.approx(bundle.bits_per_weight)


def test_in_the_program_every_layer_and_group_keeps_what_its_router_needs(golden, tmp_path, ids_file):
    directory = golden["deepseek_v3"][0]
    bundle = dropped(directory, tmp_path / "new.emoe", ids_file, 0.25, drop_counts="sensitivity")
    config, router = bundle.config, bundle.config.router
    assert bundle.config.expert_count == whole_count(directory) - int(0.25 * whole_count(directory))
    size = config.experts // router.groups
    for layer in config.moe_layers:
        in_group = np.bincount(np.array(config.kept[layer]) // size, minlength=router.groups)
        assert np.sort(in_group)[: router.top_groups].sum() >= config.top_k
    with pytest.raises(ValueError, match=r"^dropping 90% of the experts leaves \d+, the router needs \d+$"):
        dropped(directory, tmp_path / "few.emoe", ids_file, 0.9, drop_counts="sensitivity")


def whole_count(directory) -> int:
    return load_config(directory).expert_count


def test_with_a_size_what_was_dropped_leaves_more_bits_for_the_rest(golden, tmp_path, ids_file):
    options = {"bits": None, "size": 230_000, "trunk_width": 4}
    whole, bundle = (
        dropped(golden["qwen3_moe"][0], tmp_path / f"{share}.emoe", ids_file, share, **options) for share in (0.0, 0.5)
    )
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) <= 230_000
    assert bundle.bits_per_weight > 1.4 * whole.bits_per_weight


@pytest.mark.parametrize(
    ("share", "options", "message"),
    [
        (0.67, {}, "dropping 67% of the experts leaves 2, the router needs 3"),
        (1.0, {}, "drop_experts is 1.0, expected a share from 0 up to 1, such as 0.25"),
        (-0.1, {}, "drop_experts is -0.1, expected a share from 0 up to 1, such as 0.25"),
        (float("nan"), {}, "drop_experts is nan, expected a share from 0 up to 1, such as 0.25"),
        (0.25, {"drop_score": "size"}, "drop_score is 'size', expected one of mixture, weight, frequency, mean-weight"),
        (0.25, {"drop_counts": "all"}, "drop_counts is 'all', expected one of equal, sensitivity"),
        (
            0.25,
            {"method": "rtn"},
            "dropping experts needs calibration; choose method pmq, mc or uniform and fewer bits than 16",
        ),
        (
            0.25,
            {"bits": 16},
            "dropping experts needs calibration; choose method pmq, mc or uniform and fewer bits than 16",
        ),
    ],
)
def test_what_cannot_be_dropped_is_refused(golden, tmp_path, ids_file, share, options, message):
    with pytest.raises(ValueError) as caught:
        dropped(golden["qwen3_moe"][0], tmp_path / "new.emoe", ids_file, share, **options)
    assert str(caught.value) == message
    assert not (tmp_path / "new.emoe").exists()
