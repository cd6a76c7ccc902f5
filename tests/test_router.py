"""The router: which experts a token gets and what each counts, by hand, by transformers, and in the engine."""

from dataclasses import replace

import numpy as np
import pytest
from bundles import Kept, changed, logits_of, make_engine, run_engine, write_lossless
from golden_checkpoints import write_checkpoint

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config import Layer
from edge_moe.runtime.layers.mlp import RouterConfig
from edge_moe.runtime.layers.sparsemixer import choose, weights_of


def one_layer(config, **experts):
    """A model of one layer, which has these experts."""
    return replace(config, layers=(Layer(config.attention, changed(config.routed, **experts)),))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """The golden checkpoint, its token ids, and its lossless bundle: 16 experts in 4 groups, of which 2 count."""
    directory = tmp_path_factory.mktemp("router")
    source, ids, _ = write_checkpoint("deepseek_v3", directory / "checkpoint")
    checkpoint = Checkpoint(source)
    return checkpoint, ids, write_lossless(directory / "lossless.emoe", source, checkpoint.config, checkpoint)


# ---- by hand: eight experts in four groups of two, of which two count


class Bias:
    """The only weights that choosing among given scores needs."""

    def __init__(self, bias):
        self.bias = np.array(bias, np.float32)

    def trunk(self, name: str) -> np.ndarray:
        assert name == "layers.0.router_bias"
        return self.bias


SCORES = [0.9, 0.1, 0.8, 0.7, 0.6, 0.6, 0.2, 0.3]
EVERY = tuple(range(8))
CHOICES = [
    ("top2sum", EVERY, {}, [2, 3, 4]),  # sums 1.0, 1.5, 1.2, 0.5; of the equal 4 and 5 the lower
    ("max", EVERY, {}, [0, 2, 3]),
    ("top2sum", EVERY, {6: 0.25, 7: 0.75}, [2, 3, 7]),  # group 3 has 1.5; 7 is the best, but by its score the last
    ("top2sum", EVERY, {0: -2.0, 1: -2.0, 2: -2.0, 3: -2.0}, [4, 5, 7]),
    ("top2sum", (0, 2, 3, 5, 6), {}, [0, 1, 2]),  # 0.9, 1.5, 0.6, 0.2: numbers are those left
    ("max", (0, 2, 3, 5, 6), {2: -0.5, 3: -0.5}, [0, 3, -1]),  # 0.9, 0.3, 0.6, 0.2: two groups, an expert each
    ("top2sum", (4, 5, 6, 7), dict.fromkeys(range(8), -9.0), [0, 1, 3]),  # a group with none is below any other
    ("top2sum", (1, 6, 7), {7: -9.0}, [2, 1, 0]),  # 0.1, -8.5: there are only two groups
]


@pytest.mark.parametrize("group_score, kept, bias, wanted", CHOICES)
def test_experts_are_chosen_within_the_best_groups(deepseek, group_score, kept, bias, wanted):
    rule = RouterConfig("sigmoid", selection_bias=True, groups=4, top_groups=2, group_score=group_score)
    config = replace(one_layer(deepseek[0].config, experts=8, top_k=3, router=rule), kept=(kept,))
    weights = Bias([bias.get(expert, 0.0) for expert in kept])
    scores = np.array([[SCORES[expert] for expert in kept]] * 2, np.float32)
    assert reference.choose_experts(config, weights, 0, scores).tolist() == [wanted] * 2


def test_an_expert_keeps_its_group_when_others_are_dropped(deepseek):
    config = deepseek[0].config
    assert config.groups_of(0) == ()
    assert config.groups_of(1) == (0,) * 4 + (1,) * 4 + (2,) * 4 + (3,) * 4
    kept = ((), (0, 3, 4, 11, 12, 15), (5, 6, 7))
    config = replace(config, kept=kept)
    assert [config.groups_of(layer) for layer in range(3)] == [(), (0, 0, 1, 2, 3, 3), (1, 1, 1)]


def test_weights_are_scores_of_those_chosen_renormalised_and_scaled(deepseek):
    class Weights:
        def trunk(self, name):
            return {"router": np.log(np.array([[1], [3], [1 / 3], [9]], np.float32))}[name.split(".")[-1]]

    h = np.ones((1, 1), np.float32)  # sigmoids 1/2, 3/4, 1/4, 9/10
    four = one_layer(deepseek[0].config, experts=4, top_k=3)
    config = changed(four, router=RouterConfig("sigmoid", renormalise=True, scale=2.5))
    chosen, weights = reference.route(config, Weights(), 0, h)
    assert chosen.tolist() == [[3, 1, 0]]
    np.testing.assert_allclose(weights, [[2.5 * 0.9 / 2.15, 2.5 * 0.75 / 2.15, 2.5 * 0.5 / 2.15]], rtol=1e-6)
    config = changed(four, router=RouterConfig("sigmoid", scale=2.0))
    np.testing.assert_allclose(reference.route(config, Weights(), 0, h)[1], [[1.8, 1.5, 1.0]], rtol=1e-6)
    config = changed(four, router=RouterConfig("softmax"))
    np.testing.assert_allclose(
        reference.route(config, Weights(), 0, h)[1], np.array([[9, 3, 1]]) / (1 + 3 + 1 / 3 + 9), rtol=1e-6
    )


def test_factors_of_experts_order_the_weights_that_they_change(deepseek):
    class Weights:
        def trunk(self, name):
            values = {"router": [[0], [6], [4], [2]], "expert_scale": [1, 0.5, 2, 1]}
            return np.array(values[name.split(".")[-1]], np.float32)

    h = np.full((1, 1), np.log(2), np.float32)  # logits are halved: softmax over 1, 8, 4 and 2, of which 8 and 4 stay
    rule = RouterConfig(renormalise=True, logits_scale=0.5, expert_scale=True)
    config = changed(one_layer(deepseek[0].config, experts=4, top_k=2), router=rule)
    chosen, weights = reference.route(config, Weights(), 0, h)
    assert chosen.tolist() == [[2, 1]]
    np.testing.assert_allclose(weights, [[2 * 4 / 12, 0.5 * 8 / 12]], rtol=1e-6)


# ---- SparseMixer


def test_near_is_a_share_of_the_larger_of_both():
    logits = np.array([[2.0, 1.5, 1.0, -3.0], [-1.0, -2.0, -1.2, -9.0], [0.0, 0.0, -1.0, -1.0]], np.float32)
    # 1.5 is a quarter of 2 below it and 1.0 a third of 1.5; -1.2 is a sixth of itself below -1, and -2 two fifths below
    # -1.2; nothing is near to zero but zero.
    chosen, p = choose(logits, 2, 0.3)
    assert chosen.tolist() == [[1, 0], [2, 0], [1, 0]]  # of the second there are fewer left, so it weighs more
    e = np.exp([-0.5, -0.2])
    np.testing.assert_allclose(
        p,
        [
            [[0, 1, 0, 0], np.array([1, e[0], 0, 0]) / (1 + e[0])],
            [[0, 0, 1, 0], np.array([1, 0, e[1], 0]) / (1 + e[1])],
            [[0, 1, 0, 0], [0.5, 0.5, 0, 0]],
        ],
        rtol=1e-6,
    )


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("shift", [-6.0, 0.0, 3.0])
def test_sparsemixer_is_that_of_transformers(jitter, shift):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits = np.random.default_rng(7).standard_normal((200, 16)).astype(np.float32) + np.float32(shift)
    weights, chosen = (its.numpy() for its in sparsemixer(torch.from_numpy(logits), jitter, training=False))
    order = np.argsort(-weights, axis=-1, kind="stable")
    got, p = choose(logits, 2, 2 * jitter)
    assert np.array_equal(got, np.take_along_axis(chosen, order, -1))
    np.testing.assert_allclose(weights_of(got, p), np.take_along_axis(weights, order, -1), rtol=1e-6)


# ---- the engine


def chosen_by_the_reference(config, weights, ids) -> int:
    """How many experts the tokens use in all layers together."""
    x, used = reference.embed(config, weights, ids[None]), 0
    for layer in range(config.layer_count):
        if layer in config.moe_layers:
            h = reference.mlp_input(config, weights, layer, x + reference.attention_block(config, weights, layer, x))
            used += int((reference.route(config, weights, layer, h)[0] >= 0).sum())
        x = reference.layer(config, weights, layer, x)
    return used


@pytest.mark.parametrize(
    "change",
    [
        {"score": "softmax"},
        {"score": "softmax", "groups": 1, "top_groups": 1, "renormalise": False},
        {"group_score": "max"},
        {"groups": 8, "top_groups": 3},
        {"groups": 8, "top_groups": 8},
        {"groups": 1, "top_groups": 1},
        {"renormalise": False},
        {"scale": 0.5},
        {"score": "sparsemixer", "threshold": 0.0},
        {"score": "sparsemixer", "threshold": 0.9},
    ],
)
def test_the_engine_routes_by_every_rule_as_the_reference_does(deepseek, change):
    checkpoint, ids, path = deepseek
    config = changed(checkpoint.config, router=change)
    want, own = (reference.forward(c, checkpoint, ids) for c in (config, checkpoint.config))
    assert np.abs(want - own).max() > 0.1
    got = run_engine(make_engine(path, config=config), ids)
    assert np.abs(got - want).max() <= 1e-4
    assert np.array_equal(got.argmax(-1), want.argmax(-1))


def test_a_token_uses_fewer_experts_where_its_groups_have_fewer(deepseek, tmp_path):
    checkpoint, ids, _ = deepseek
    config = replace(checkpoint.config, kept=((), (0, 3, 8, 9, 12, 13, 14), (5, 6, 7, 8, 15)))
    weights = Kept(checkpoint, config)
    path = write_lossless(tmp_path / "few.emoe", checkpoint.directory, config, weights)
    assert Bundle.open(path).config == config
    want, used = reference.forward(config, weights, ids), chosen_by_the_reference(config, weights, ids)
    assert len(ids) * 4 < used < len(ids) * 2 * config.top_k

    resident = make_engine(path)
    got = run_engine(resident, ids)
    assert np.abs(got - want).max() <= 1e-4
    assert np.array_equal(got.argmax(-1), want.argmax(-1))
    assert resident.counters["experts_used"] == used
    for slots, threads, chunk in ((1, 2, 5), (6, 3, 32), (12, 1, 1)):
        engine = make_engine(path, slots=slots, threads=threads)
        assert np.array_equal(run_engine(engine, ids, chunk).view(np.uint32), got.view(np.uint32))
        assert engine.counters["experts_used"] == used


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_without_some_experts_tokens_are_routed_as_transformers_does_with_masked_logits(tmp_path, seed):
    """Groups of one, and such as together have fewer than top_k: with biases above 0 a masked expert comes last."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import logits_of as transformers_logits
    from make_golden import random_model

    model = random_model("deepseek_v3", seed, n_group=8, topk_group=4, num_experts_per_tok=6)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.abs_().add_(2**-6)
    assert all((layer.mlp.gate.e_score_correction_bias > 0).all() for layer in model.model.layers[1:])
    model.save_pretrained(tmp_path)
    random = np.random.default_rng(seed)
    kept = ((), *(tuple(sorted(random.choice(16, size, replace=False).tolist())) for size in (9, 7)))
    ids = random.integers(0, 128, 40)
    want = transformers_logits(tmp_path, ids, kept, bias=0.0)

    checkpoint = Checkpoint(tmp_path)
    config = replace(checkpoint.config, kept=kept)
    weights = Kept(checkpoint, config)
    assert any(config.groups_of(layer).count(group) == 1 for layer in (1, 2) for group in range(8))
    assert chosen_by_the_reference(config, weights, ids) < len(ids) * 2 * config.top_k
    np.testing.assert_allclose(reference.forward(config, weights, ids), want, rtol=0, atol=1e-4)
    got = logits_of(write_lossless(tmp_path / "dropped.emoe", tmp_path, config, weights), ids)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.array_equal(got.argmax(-1), want.argmax(-1))
